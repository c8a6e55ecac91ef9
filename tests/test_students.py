"""The students' table as a command: what it refuses, and that it goes from texts to judged programs."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from test_student import classifier

sys.path.append(str(Path(__file__).parents[1]))
here = list(sys.path)
from tools.bench import students  # noqa: E402

sys.path[:] = here  # the tool puts the repository first, for when it is run as a file

from edgeformer.train import Recipe  # noqa: E402

TINY = Recipe(epochs=1, batch=16, rate=1e-3, bf16=False)
PLAN = students.Plan(students.Goal(0.0, 1.0, 0.0), TINY, layers=1, width=(16, 32), rank=8, copies=1, embeddings=False)


def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *more: str) -> int:
    model, folder = classifier(num_labels=2), tmp_path / "model"
    model.module.module.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    named = ["--data", str(tmp_path), "--model", str(folder), "--work", str(tmp_path / "work")]
    monkeypatch.setattr(sys, "argv", ["students.py", *named, "--out", str(tmp_path / "out.json"), *more])
    return students.main()


def table(path: Path, rows: int) -> None:
    path.parent.mkdir(exist_ok=True)
    lines = [f"w{3 + i % 40} w{5 + i % 7} w{9 + i % 11}\t{i % 2}" for i in range(rows)]
    path.write_text("\n".join(["sentence\tlabel", *lines]) + "\n")


def test_what_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, tmp_path) == 3
    assert "train.tsv" in capsys.readouterr().err
    for name in ("train", "dev"):
        table(tmp_path / "sst2" / f"{name}.tsv", 4)
    with pytest.raises(SystemExit, match="2"):
        command(monkeypatch, tmp_path, "--only", "tiny")


@pytest.mark.slow
def test_from_texts_to_judged_programs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    table(tmp_path / "sst2" / "train.tsv", 64)
    table(tmp_path / "sst2" / "dev.tsv", 30)
    monkeypatch.setattr(students, "PLANS", {"tiny": PLAN})
    monkeypatch.setattr(students, "LENGTHS", (8, 16))
    monkeypatch.setattr(students, "FORMATS", ("onnx",))
    assert command(monkeypatch, tmp_path, "--only", "tiny") == 0
    lines = json.loads((tmp_path / "out.json").read_text())["lines"]
    assert [(x["student"], x["format"]) for x in lines] == [
        (name, format) for name in ("unmodified", "tiny") for format in students.FORMATS
    ]
    tiny = lines[1]
    assert tiny["accuracy"]["n"] == 30 and tiny["difference"]["test"] == "McNemar, exact"
    assert tiny["program_mb"] < lines[0]["program_mb"] and tiny["latency_ms"] > 0 and tiny["speedup"] > 0
    line = students.Line(**{**tiny, "accuracy": students.evaluate.Estimate(**tiny["accuracy"])})
    assert line.reaches(PLAN.goal)
    for missed in ({"accuracy": 1.1}, {"size_mb": 0.001}, {"speedup": 1e6}):
        assert not line.reaches(replace(PLAN.goal, **missed)), missed
