"""The Neural Engine's layout changes how a model computes and not what."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import families
import pytest

torch = pytest.importorskip("torch")

from edgeformer import check, formats, model as models  # noqa: E402
from edgeformer.passes import channels_first  # noqa: E402
from edgeformer_agent import mil  # noqa: E402


@pytest.mark.parametrize("family", families.NAMES)
def test_a_family_keeps_its_outputs(family: str) -> None:
    model = models.load(families.tiny(family), name=family, lengths=None if family == "vit" else (48,))
    changed = channels_first.layout()(model)
    example = model.example(48)
    if family != "vit":
        example = (torch.arange(48)[None].int() + 3, *example[1:])
    with torch.no_grad():
        torch.testing.assert_close(changed.module(*example), model.module(*example), atol=1e-5, rtol=1e-5)
    kinds = Counter(type(m).__name__ for m in changed.module.modules())
    before = Counter(type(m).__name__ for m in model.module.modules())
    assert kinds["_Pointwise"] == before["Linear"] == changed.history[-1].facts["linear"] > 0
    assert kinds["Linear"] == 0 and kinds["_ChannelNorm"] == changed.history[-1].facts["layer_norm"]


@pytest.mark.slow
def test_the_program_convolves_and_few_transpositions_are_left() -> None:
    pytest.importorskip("coremltools")
    model = channels_first.layout()(models.load(families.tiny("bert"), name="tiny", lengths=(48,)))
    (program,) = formats.load("coreml").export(model, ["fp16"])
    with check.opened(program) as path:
        function = mil.Package(str(Path(path).parent)).function("length_48")
    kinds = Counter(operation.kind for operation in function.operations)
    assert kinds["conv"] == 12 and kinds["linear"] == 0
    assert kinds["layer_norm"] == 5  # found again, over the channels
    assert kinds["transpose"] <= 18, kinds  # 8 are those of the heads; module by module there would be 42
