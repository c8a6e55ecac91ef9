"""What every exporter refuses, and how: the thing, the rule and the value in one message, and nothing left behind."""

from __future__ import annotations

import errno
import subprocess
import sys
import tempfile
from pathlib import Path

import families
import numpy as np
import pytest
import torch

import edgeformer as ef
from edgeformer import data, model as models
from edgeformer.errors import BadInput, ExportError
from edgeformer.plan import exports

FORMATS = ("coreml", "executorch", "litert", "onnx", "tensorrt")
TARGETS = {"coreml": "iphone-13", "executorch": "pixel-7", "tensorrt": "jetson-nano"}
TOOLS = {"coreml": "coremltools", "executorch": "executorch.exir", "litert": "litert_torch", "onnx": "onnx"}


class Odd(torch.nn.Module):
    """Sorts by a complex spectrum, which no device runtime has."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.eigvals(x.reshape(-1, 4, 4) + 0j).real


@pytest.mark.parametrize("format", FORMATS)
def test_an_operator_the_format_does_not_have(format: str, tmp_path: Path, config_home: Path) -> None:
    (export,) = exports([format])
    model = models.load(Odd(), example=(torch.ones(1, 16),), name="odd")
    with pytest.raises(ExportError, match=rf"(?s)^{format}.*odd"):
        list(export.module.export(model, export.precisions))
    with pytest.raises(ExportError):
        ef.build(model, TARGETS.get(format, "raspberry-pi-4"), formats=[format], out=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", FORMATS)
def test_weights_that_are_no_numbers(format: str, tmp_path: Path) -> None:
    module = torch.nn.Linear(4, 4)
    with torch.no_grad():
        module.weight[1, 2] = float("inf")
    with pytest.raises(BadInput, match="weight weight holds NaN or infinity"):
        ef.build(
            module, TARGETS.get(format, "raspberry-pi-4"), formats=[format], example=(torch.ones(1, 4),), out=tmp_path
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", FORMATS)
def test_lengths_over_the_position_limit(format: str, tmp_path: Path) -> None:
    target = TARGETS.get(format, "raspberry-pi-4")
    with pytest.raises(BadInput, match="length 512 is over the model's 66 positions; use at most 66"):
        ef.build(families.tiny("bert"), target, formats=[format], lengths=[16, 512], out=tmp_path)
    assert not list(tmp_path.iterdir())


def test_rows_padded_on_the_left(tmp_path: Path) -> None:
    model = models.load(families.tiny("bert"), lengths=(16,))
    ids, mask = np.ones((2, 8), np.int32), np.ones((2, 8), np.int32)
    mask[1, :3] = 0
    np.savez(tmp_path / "rows.npz", input_ids=ids, attention_mask=mask, token_type_ids=ids * 0)
    with pytest.raises(BadInput, match=r"rows.npz: attention_mask has a 0 before a 1 \(left padding\)"):
        data.load(model, tmp_path / "rows.npz", None)
    np.savez(tmp_path / "rows.npz", input_ids=ids, attention_mask=mask[:, ::-1], token_type_ids=ids * 0)
    assert len(data.load(model, tmp_path / "rows.npz", None).rows) == 2


@pytest.mark.parametrize(("format", "tool"), TOOLS.items())
def test_a_missing_tool_chain(format: str, tool: str) -> None:
    """In an interpreter of its own: what one process has imported is not looked for again."""
    code = f"import sys; sys.modules[{tool!r}] = None; from edgeformer import formats; formats.load({format!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and f"MissingExtra: {tool}" in done.stderr
    assert f"pip install 'edgeformer[{format}]'" in done.stderr


@pytest.mark.parametrize("format", FORMATS)
def test_a_disk_that_is_full(format: str, tmp_path: Path, config_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the program is opened for its check, the first thing that every format writes."""
    kept = Path.write_bytes

    def full(self: Path, content: bytes) -> int:
        if self.is_relative_to(tempfile.gettempdir()) and len(content) > 100:
            raise OSError(errno.ENOSPC, "No space left on device", str(self))
        return kept(self, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises((OSError, ExportError), match="No space left on device"):
        ef.build(
            torch.nn.Linear(16, 16), TARGETS.get(format, "raspberry-pi-4"), formats=[format],
            example=(torch.ones(1, 16),), out=tmp_path / "out",
        )  # fmt: skip
    assert not (tmp_path / "out").exists()
