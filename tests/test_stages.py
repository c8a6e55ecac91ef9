"""What a build says it cost."""

from __future__ import annotations

import json
import time

import factory

from edgeformer.stages import Stages
from edgeformer.summary import to_json


def test_a_stage_lasts_until_another_speaks_and_all_add_up() -> None:
    heard: list[tuple[str, int, int]] = []
    start, stages = time.perf_counter(), Stages(lambda *word: heard.append(word))
    words = [("export onnx", 0, 1), ("check onnx-int8", 1, 2), ("check onnx-int8", 2, 2), ("export onnx", 1, 1)]
    for word in words:
        stages(*word)
        time.sleep(0.01)
    cost, whole = stages.cost(), time.perf_counter() - start
    assert heard == words
    assert list(cost.stages_s) == ["start", "export onnx", "check onnx-int8"]
    assert cost.stages_s["export onnx"] >= 0.02 and cost.stages_s["check onnx-int8"] >= 0.02
    assert 0.04 <= sum(cost.stages_s.values()) <= whole + 0.01
    assert 1 < cost.peak_mb < 2**20 and 0 <= cost.cpu_s <= whole + 0.1
    assert f"peak memory {cost.peak_mb:.0f} MB" in cost.words()

    document = json.loads(to_json(factory.manifest(), (), cost=cost))
    assert document["build"]["stages_s"] == cost.stages_s
