"""
Where programs are made: each is exported, opened with its device's runner and held against the gate once, whatever the
number of targets that take it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from edgeformer_agent import cases, wire

from . import check, device as devices, native, predict
from .attention import choice, cost
from .data import Rows
from .errors import BadInput
from .model import Model
from .passes import sparsify
from .plan import PRECISIONS, Export, Plan
from .program import Program
from .stages import Progress


@dataclass(frozen=True)
class Made:
    """A checked program, what its device is told about it, and its outputs for the evaluation rows."""

    program: Program
    entry: wire.Entry
    outputs: tuple[np.ndarray, ...]
    libraries: dict[str, Path]  # machine -> the operator compiled for it


class Workshop:
    """Remembers what it made, so that the next target finds it."""

    def __init__(self, rows: Rows, wanted: tuple[np.ndarray, ...], limit: wire.Gate, report: Progress) -> None:
        """rows, wanted: the evaluation rows and the fp32 module's outputs for them. limit: the gate."""
        self.rows, self.wanted, self.limit, self.report = rows, wanted, limit, report
        self._scorers: sparsify.Scorers | None = None
        self._sparse: dict[int, Model] = {}
        self._made: dict[tuple[int, str], tuple[Made, ...]] = {}

    def fitted(self, model: Model, plan: Plan, attention: str, budget: float) -> Model:
        """The model with the attention that suits the target: dense or sparse, and why, in the history."""
        if any(step.name == "sparsify.dsa" for step in model.history):  # a pass of the caller's has decided already
            return model
        tokens = [cases.length(row) for row in self.rows.rows]
        load = choice.load(model.module, plan.device, plan.exports[0].precisions[0])
        hoped = load.over(tokens, cost.Kept(sparsify.DENSE_BELOW, ((max(tokens), budget),))) if load else 1.0
        long_enough = load and max(tokens) >= sparsify.FEWEST_BLOCKS * sparsify.block_of(model.module, model.max_length)
        if attention == "dense" or (attention == "auto" and not (hoped >= choice.WORTH and long_enough)):
            what = "if the budget is met" if load else f"({choice.obstacle(model.module)})"
            return _decided(model, "dense", hoped, what, attention, budget)
        sparse = self._sparsified(model, plan.rule, budget)
        assert load is not None  # the pass refuses models without attention layers that it can swap
        kept = cost.calibrated(sparse.history)
        gain, lengths = load.over(tokens, kept), choice.by_length(load, model.lengths, kept)
        worth = attention != "auto" or gain >= choice.WORTH
        made, chosen = (sparse, "dsa") if worth else (model, "dense")
        return _decided(made, chosen, gain, "with what the trained scorers keep", attention, budget, by_length=lengths)

    def _sparsified(self, model: Model, rule: int, budget: float) -> Model:
        """One a rule; the scorers are trained once."""
        if self._scorers is None:
            self._scorers = sparsify.train(model, self.rows.rows, progress=self.report)
        if rule not in self._sparse:
            step = sparsify.dsa(self.rows.rows, budget=budget, rule=rule, scorers=self._scorers)
            self._sparse[rule] = step(model)
        return self._sparse[rule]

    def programs(self, model: Model, plan: Plan) -> list[Made]:
        """The target's programs. Raises GateFailed, ExportError, BadInput."""
        return [
            _placed(made, self.rows, plan.device) for export in plan.exports for made in self._export(model, export)
        ]

    def _export(self, model: Model, export: Export) -> tuple[Made, ...]:
        key = (id(model.module), export.name)
        if key not in self._made:
            made = []
            self.report(f"export {export.name}", 0, len(export.precisions))
            for program in export.programs(model):
                made.append(self._check(model, program))
                self.report(f"export {export.name}", len(made), len(export.precisions))
            self._made[key] = tuple(made)
        return self._made[key]

    def _check(self, model: Model, program: Program) -> Made:
        """Opens the program with the device's runner and holds it against the gate."""
        said = described(program)
        total = len(self.rows.rows)
        outputs = check.run(program, said, self.rows.rows, lambda n: self.report(f"check {program.name}", n, total))
        found = check.fidelity(model, outputs, self.wanted, self.rows.labels)
        check.hold(program.name, found, self.limit)
        return Made(program, said._replace(checked=found), outputs, {})


def _decided(model: Model, chosen: str, gain: float, what: str, wanted: str, budget: float, **more: object) -> Model:
    limits = f"worth it from {choice.WORTH}" if wanted == "auto" else "asked for"
    why = f"modelled gain over the data's rows {gain:.2f} {what}, {limits}"
    facts = {"chosen": chosen, "why": why, "modelled_gain": round(gain, 3), "budget": budget}
    return model.after("attention", facts=facts | more)


def described(program: Program) -> wire.Entry:
    """What every device is told of a program, before it is checked."""
    return wire.Entry(
        name=program.name,
        format=program.format,
        precision=program.precision,
        path=f"programs/{program.name}/{program.entry}",
        size_bytes=program.size_bytes,
        inputs=program.inputs,
        outputs=program.outputs,
        lengths=program.lengths,
        runtime=program.runtime,
        needs=program.needs,
        work=program.work,
        predicted=wire.Prediction("", 1, wire.Metrics(), 1, 1, ""),
        checked=wire.Fidelity("", 0, 0, 0, 0),
        golden_similarity=PRECISIONS[program.precision].golden,
    )


def _placed(made: Made, rows: Rows, device: devices.Device) -> Made:
    """The same program on one device: what it needs there, its operator library, and how fast it should be."""
    program = made.program
    _fits(program, device)
    libraries = _libraries(program, device)
    tokens = [cases.length(row) for row in rows.rows]
    placed = made.entry._replace(
        needs=program.needs if device.glibc else program.needs._replace(glibc=None),
        predicted=predict.predict(
            program.work,
            program.lengths,
            tokens,
            predict.on(device, program.format, program.precision),
            accuracy=made.entry.checked.value,
        ),
        libraries={machine: f"native/{machine}/{path.name}" for machine, path in libraries.items()},
    )
    return replace(made, entry=placed, libraries=libraries)


def _libraries(program: Program, device: devices.Device) -> dict[str, Path]:
    """
    Machine -> the operator compiled for it. Without glibc the app's own tool chain links the operator. ExecuTorch's
    Python runtime needs torch, which boards do not have: they get its runner, with or without sparse attention.
    """
    runtime_too = program.format == "executorch" and device.name != "host"
    if not device.glibc or not (program.sparse or runtime_too):
        return {}
    machine = native.host() if device.name == "host" else f"linux-{device.arch}"
    return {machine: native.operator(program.format, machine)}


def _fits(program: Program, device: devices.Device) -> None:
    """The floor of the device's system must carry the runtime; a loader's own message would come too late."""
    floor, needed = device.glibc, program.needs.glibc
    if floor and needed and [int(n) for n in floor.split(".")] < [int(n) for n in needed.split(".")]:
        raise BadInput(
            f"{program.format} on {device.name}: {program.runtime.package} needs glibc {needed}, and its system has "
            f"{floor} ({device.os}); choose another format with formats=[...]"
        )
