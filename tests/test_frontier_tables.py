"""The benchmark commands against peers and against the paper: who is best, which goal is reached, what is shown."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from test_student import classifier  # noqa: E402

sys.path.append(str(Path(__file__).parents[1]))
here = list(sys.path)
from tools.bench import frontier, peers, shelf, techniques, turns  # noqa: E402

sys.path[:] = here  # the tools put the repository first, for when they are run as files

from edgeformer import budget, data, evaluate  # noqa: E402
from edgeformer.errors import BadInput  # noqa: E402
from edgeformer.passes import depth, distil, student  # noqa: E402
from edgeformer.program import Program  # noqa: E402
from edgeformer.stages import quiet  # noqa: E402
from edgeformer.train import Recipe  # noqa: E402
from edgeformer_agent import wire  # noqa: E402

TIMING = turns.Timing(0.5, 0.5, 0.6)
ESTIMATE = evaluate.Estimate("accuracy", 0.88, 0.86, 0.9, "Wilson", 872)
SAME = evaluate.Difference("accuracy", -0.0035, -0.01, 0.01, 0.71, "McNemar, exact", 0.99)
OURS = frontier.Line("small <b>", "ours", "onnxruntime 1", "cut", ESTIMATE, SAME, 3.0, 0.9, TIMING, 5.5)
PEER = replace(OURS, name="LiteRT int8", side="peer", timing=turns.Timing(2.6, 2.7, 3.0), speedup=1.0, program_mb=23.0)
TRIED = frontier.Tried("LiteRT", "dynamic", 0.88, 2.6, 23.0, True)
MACHINE = {"cpu": "a board", "load": 0.5, "rows": 872, "timed_rows": 150, "rounds": 7, "model": "minilm"}
OUTCOME = frontier.Outcome((OURS, PEER), (TRIED, TRIED._replace(accuracy=None, chosen=False)), "LiteRT int8", MACHINE)


def test_a_goal_names_what_is_missing() -> None:
    two, five, ten = frontier.GOALS
    assert not OURS.missed(two) and not OURS.missed(five)
    assert OURS.missed(ten) == ("speed",)
    assert replace(OURS, tokenizer_mb=3.1, speedup=4.9).missed(five) == ("speed", "size")
    assert frontier.goals_said(OURS) == "reaches 2x, 5x"
    assert frontier.goals_said(replace(OURS, speedup=1.9)) == "2x: speed"
    assert OUTCOME.reached(two) == [OURS], "a peer reaches no goal of ours"


def test_the_best_setting_is_the_fastest_that_is_accurate_enough() -> None:
    accuracy = [0.89, 0.80, 0.88]
    assert frontier.chosen([3.0, 1.0, 2.0], accuracy.__getitem__, 0.87) == (2, {1: 0.80, 2: 0.88})
    assert frontier.chosen([3.0, 1.0, 2.0], accuracy.__getitem__, 0.95)[0] == 1, "none is, so the fastest"


def test_the_clock_that_says_less_counts() -> None:
    assert turns.speedup(turns.Timing(4, 4, 4), turns.Timing(1, 2, 1)) == 2
    assert turns.pick(872, 4) == [0, 218, 436, 654] and turns.pick(3, 10) == [0, 1, 2]


def test_the_page_and_the_table_hold_every_program(tmp_path: Path) -> None:
    frontier.write(tmp_path / "f.json", OUTCOME)
    said, page = json.loads((tmp_path / "f.json").read_text()), (tmp_path / "f.html").read_text()
    assert said["goals"][0]["reached"] == ["small <b>"] and said["lines"][0]["missed"]["10x"] == ["speed"]
    assert "small &lt;b&gt;" in page and "<b>" not in page and "lacks speed" in page and "too slow to matter" in page
    screen = Console(width=100, file=io.StringIO())
    screen.print(frontier.table(replace(OUTCOME, lines=(replace(OURS, name="unmodified int8, LiteRT"), PEER))))
    first = next(line for line in screen.file.getvalue().splitlines() if "unmodified" in line)  # type: ignore[attr-defined]
    assert "unmodified int8, LiteRT" in first and "reaches 2x, 5x" in first


def test_names_of_ours_are_pairs() -> None:
    assert frontier.pair("small=a/b.onnx") == ("small", "a/b.onnx")
    with pytest.raises(frontier.argparse.ArgumentTypeError, match="NAME="):
        frontier.pair("small")


def test_a_missing_peer_says_what_brings_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("sst2/train.tsv", "sst2/dev.tsv", "model/model.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    absent = replace(peers.PEERS[-1], modules=("no_such_module",))
    monkeypatch.setattr(peers, "PEERS", (absent,))
    named = ["frontier.py", "--data", str(tmp_path), "--model", str(tmp_path / "model")]
    monkeypatch.setattr(sys, "argv", named)
    assert frontier.main() == 3
    assert "no_such_module" in (said := capsys.readouterr().err) and "edgeformer[peers]" in said


def test_a_line_without_a_program_says_why() -> None:
    claim = techniques.Claim(3.8, 91)
    none = techniques.Line("stsb", "early exit", "", claim, "", absent="not built: no classes")
    some = techniques.Line("stsb", "combined", "onnx int8", claim, "<how>", score=0.8, baseline=0.82, speedup=4.0)
    assert techniques.read(json.loads(json.dumps(techniques.asdict(some)))) == some
    about = {"cpu": "a board", "load": 1.0, "timed_rows": 60, "minutes": 1.0}
    page = techniques.document([none, some], about)
    document = techniques.markdown([none, some], about)
    assert (
        "| combined | onnx int8 | 0.0 | 4.00 | 0.8000 | 97.6 | 3.8x 91% |" in document
        and "- early exit: not" in document
    )
    assert "no classes" in page and "&lt;how&gt;" in page and "97.6" in page
    dynamic = replace(some, layers_run={"least": 2, "mean": 4.25, "most": 6, "of": 6})
    said = techniques.notes([none, some, dynamic]).splitlines()
    assert len(said) == 2 and "no classes" in said[0] and "4.25 of 6 layers (2.00 to 6.00)" in said[1]
    place = techniques.HEADS.index("paper")
    assert techniques.cells(none)[place] == techniques.cells(some)[place] == "3.8x 91%"
    assert len(techniques.cells(none)) == len(techniques.cells(some)) == len(techniques.HEADS)


def test_a_shelf_gives_back_programs_and_tokenizer(tmp_path: Path) -> None:
    model = student.vocabulary(["w3 w4"])(classifier(num_labels=2))
    program = Program(
        "onnx", "int8", {"model.onnx": b"x"}, model.inputs, (model.output,), (),
        wire.Runtime("onnxruntime", "1", "2"), wire.Needs(), (),
    )  # fmt: skip
    shelf.save(tmp_path / "s", model, [program], {"parameters": 7})
    found = shelf.load(tmp_path / "s", model)
    assert found.facts == {"parameters": 7} and found.programs[0].files == {"onnx-int8.onnx": b"x"}
    words = len(found.model.tokenizer.get_vocab())
    assert words == len(model.tokenizer.get_vocab()) < len(classifier().tokenizer.get_vocab())
    assert found.programs[0].format == "onnx" and found.programs[0].precision == "int8"
    with pytest.raises(BadInput, match="no program"):
        shelf.load(tmp_path / "s" / "facts.json", model)


def test_the_layer_that_matters_least_leaves() -> None:
    model = classifier(num_labels=2)
    stack = student.layer_stack(model.module)
    with torch.no_grad():  # a layer that adds nothing: its normalization only
        for name, x in stack[1].named_parameters():
            if "output.dense" in name:
                x.zero_()
    texts = [f"w{3 + i} w{5 + i % 7}" for i in range(12)]
    made = depth.layers(texts, keep=len(stack) - 1)(model)
    assert 1 not in made.history[-1].facts["kept"]
    assert len(student.layer_stack(made.module)) == len(stack) - 1
    with pytest.raises(BadInput, match="keep 9"):
        depth.layers(texts, keep=9)(model)


def test_pairs_are_learned_from_and_not_augmented(tmp_path: Path) -> None:
    (tmp_path / "p.tsv").write_text("w3 w4\tw5\t2.5\nw6\tw7 w8\t1\n")
    pairs = data.pairs(tmp_path / "p.tsv", "stsb")
    assert pairs == (("w3 w4", "w5"), ("w6", "w7 w8"))
    compares = classifier(num_labels=1)
    assert budget.kitchen(compares, None, tmp_path / "p.tsv", "stsb", tmp_path, quiet).texts == pairs
    words = [len(student.vocabulary(x)(compares).tokenizer.get_vocab()) for x in ([], pairs)]
    assert words[1] == words[0] + len("345678"), "the words of both texts are kept"
    model = classifier(num_labels=2)
    rows = distil._encode(model, pairs, 32)
    types = [x.name for x in model.inputs].index("token_type_ids")
    assert [int(np.max(row[types])) for row in rows] == [1, 1]
    recipe = Recipe(epochs=1, batch=2, bf16=True)  # what the teacher said is kept in fp16, which autocast does not join
    losses = distil.Losses(response=1.0, feature=1.0, relation=1.0)
    assert distil.distil(model, pairs, losses=losses, recipe=recipe)(model).history[-1].facts["steps"] == 1
    with pytest.raises(BadInput, match="pairs"):
        distil.augmented(pairs, distil.Augment(1), "[MASK]")
