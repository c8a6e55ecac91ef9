"""What is to be made: for each target the device, its formats and their precisions, checked before anything slow."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

from . import device as devices, formats as registry
from .attention.reference import THRESHOLD
from .errors import BadInput, FormatNotYet, UnknownFormat

if TYPE_CHECKING:
    from .model import Model
    from .program import Program

SELDOM = 100_000  # new objects between two collections of an export; Python's own is 700


class Precision(NamedTuple):
    """
    weight_bytes: of most weights, for sizes before there is a program. golden: least similarity of a device's answers
    to the build machine's, as other instruction sets round differently (and a board's int8 kernels may saturate where
    this machine's do not).
    """

    about: str
    weight_bytes: float
    golden: float


ATTENTION = ("auto", "dense", "dsa")  # what may be asked for
PRECISIONS = {  # what a format's own `PRECISIONS` may name
    "int8": Precision(
        "int8 weights and embeddings per output channel, activations quantized per call or kept in float", 1, 0.98
    ),
    "int8-static": Precision(
        "as int8, with ranges of activations that `passes.smooth` found on calibration rows", 1, 0.98
    ),
    "int4-embeddings": Precision("as int8, with int4 embeddings in groups", 1, 0.98),
    "int4": Precision(
        "int4 weights in groups, embeddings too where the runtime looks them up; activations as in int8", 0.5, 0.98
    ),
    "fp16": Precision("fp16 storage and arithmetic, sums in fp32 where the runtime allows it", 2, 0.999),
    "fp32": Precision("fp32 throughout", 4, 0.9999),
}


@dataclass(frozen=True)
class Export:
    """One format and the precisions it writes."""

    name: str
    module: ModuleType
    precisions: tuple[str, ...]

    @property
    def rule(self) -> int:
        """By which its sparse attention keeps blocks."""
        return int(getattr(self.module, "RULE", THRESHOLD))

    def programs(self, model: Model) -> Iterator[Program]:
        """In the order of the precisions. Raises ExportError."""
        made = iter(self.module.export(model, self.precisions))
        with _older_set_aside():
            while True:
                with _seldom_collected():
                    program = next(made, None)
                if program is None:
                    return
                yield program


@contextmanager
def _older_set_aside() -> Iterator[None]:
    """Collections walk what is made from here on: modules and models that stay are half a second each time."""
    mine = not gc.get_freeze_count()  # else someone has set theirs aside, and would miss it
    if mine:
        gc.freeze()
    try:
        yield
    finally:
        if mine:
            gc.unfreeze()


@contextmanager
def _seldom_collected() -> Iterator[None]:
    """
    Garbage collection walks the graphs' nodes over and over, a fifth of an export's time; without any, a decoder's old
    graphs are gigabytes. Afterwards all at once, so that the next format does not come on top of what this one left.
    """
    before = gc.get_threshold()
    gc.set_threshold(SELDOM, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
        if gc.isenabled():
            gc.collect()


@dataclass(frozen=True)
class Plan:
    """One target's share of a build."""

    device: devices.Device
    exports: tuple[Export, ...]

    @property
    def rule(self) -> int:
        """The same for all of its formats: one model goes into them."""
        rules = {export.rule for export in self.exports}
        return rules.pop() if len(rules) == 1 else THRESHOLD

    def first(self) -> Plan:
        """One program only: the first format in its first precision."""
        export = self.exports[0]
        return replace(self, exports=(replace(export, precisions=export.precisions[:1]),))


def plans(
    targets: str | Iterable[str], formats: Sequence[str] | None, precision: str | Sequence[str] | None
) -> tuple[Plan, ...]:
    """
    A plan a target. `formats` and `precision` narrow each target's own choice.
    Raises BadInput, UnknownTarget, UnknownFormat, FormatNotYet, MissingExtra.
    """
    names = (targets,) if isinstance(targets, str) else tuple(targets)
    if not names or len(set(names)) != len(names):
        raise BadInput(f"targets {list(names)} must name at least one device, each once")
    found = [devices.load(name) for name in names]
    _known(formats, found)
    return tuple(Plan(device, _exports(device, formats, precision, len(found) > 1)) for device in found)


def _known(formats: Sequence[str] | None, found: Sequence[devices.Device]) -> None:
    if formats is None:
        return
    if not formats or len(set(formats)) != len(formats):
        raise BadInput(f"formats {list(formats)} must name at least one format, each once")
    for name in formats:
        if name not in (*registry.names(), *registry.PLANNED):
            raise UnknownFormat(name, [f for device in found for f in (*device.formats, *device.on_request)])


def _exports(
    device: devices.Device, wanted: Sequence[str] | None, precision: str | Sequence[str] | None, several: bool
) -> tuple[Export, ...]:
    """Of several targets each takes what it runs of the formats named; a single one must run them all."""
    here = registry.names()
    names = [name for name in (wanted or device.formats) if device.runs(name) or not several]
    for name in names:
        if not device.runs(name):
            runs = ", ".join((*device.formats, *device.on_request))
            raise BadInput(f"{device.name} does not run {name}; it runs {runs}")
        if name not in here:
            raise FormatNotYet(name, device.name, [f for f in device.formats if f in here])
    if not names:
        raise BadInput(f"{device.name} runs none of {', '.join(wanted or ())}; it runs {', '.join(device.formats)}")
    return exports(names, precision)


def exports(formats: Sequence[str], precision: str | Sequence[str] | None = None) -> tuple[Export, ...]:
    """One for each format, at its own first precision unless told. Raises BadInput, UnknownFormat, MissingExtra."""
    modules = [(name, registry.load(name)) for name in formats]
    return tuple(Export(name, module, _precisions(name, module, precision)) for name, module in modules)


def _precisions(name: str, module: ModuleType, wanted: str | Sequence[str] | None) -> tuple[str, ...]:
    """Those of the wanted precisions that the format has; its own first choice where nothing is wanted."""
    known = tuple(module.PRECISIONS)
    if wanted is None:
        return known[:1]
    names = (wanted,) if isinstance(wanted, str) else tuple(wanted)
    if not names or len(set(names)) != len(names) or not set(names) <= set(PRECISIONS):
        raise BadInput(f"precision {list(names)} must be some of {', '.join(PRECISIONS)}, each once")
    found = tuple(name for name in names if name in known)
    if not found:
        raise BadInput(f"precision {', '.join(names)}: {name} has {', '.join(known)}")
    return found
