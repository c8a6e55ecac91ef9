"""Everything this package raises on purpose, and the exit code the command line gives it:

* EdgeformerError                      1
  x CheckFailed                        1  a gate said no; nothing is wrong with the set-up
    - GateFailed                          parity, accuracy or comparison beyond its limit
    - BundleRefused                       a file differs, is extra or missing, or the signature does not match
    - ExportError                         a model the format cannot express
    - BuildError                          a native source that did not compile
  x WrongUse                           2  the call must change
    - UnknownTarget, UnknownFormat        with the nearest known names
    - FormatNotYet                        declared in the profile, not built by this version
    - ProfileError                        a device's TOML breaks a rule
    - BadInput                            an argument or a file that cannot be used as given
  x Missing                            3  something must be installed, with the line that does it
    - MissingExtra, MissingTool, MissingRuntime
    - BuildError                          a native source did not compile here
  x LinkError                          3  the device cannot be reached or refuses

A message says what was wrong, which value, and what to do.
"""

# ruff: noqa: N818 (a name says what happened: BundleRefused, MissingTool)

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches


class EdgeformerError(Exception):
    """Base of everything this package raises on purpose."""

    exit_code = 1


class CheckFailed(EdgeformerError):
    """A gate said no."""


class GateFailed(CheckFailed):
    """A measured value is beyond its limit. The message names the gate, the value and the limit."""


class BudgetMissed(CheckFailed):
    """No program found meets the limits. The message names them and what came nearest."""


class BundleRefused(CheckFailed):
    """A bundle is not what was signed. The message names the file that differs and how."""


class ExportError(CheckFailed):
    """A format could not express the model. The message names the format and the first operator that failed."""


class BuildError(CheckFailed):
    """A native source did not compile. Carries the file, the target and the compiler's last words."""


class WrongUse(EdgeformerError):
    """The call must change."""

    exit_code = 2


def _nearest(name: str, known: Sequence[str]) -> list[str]:
    """Up to three known names that `name` may have meant: by spelling, else by containing it."""
    lower = name.lower()
    return get_close_matches(lower, known, 3) or [k for k in known if lower and lower in k][:3]


class _Unknown(WrongUse, LookupError):
    kind = "name"

    def __init__(self, name: str, known: Sequence[str]) -> None:
        self.name, self.known, self.nearest = name, tuple(known), tuple(_nearest(name, known))
        hint = f" Did you mean {' or '.join(map(repr, self.nearest))}?" if self.nearest else ""
        super().__init__(f"no {self.kind} {name!r}.{hint} Known: {', '.join(known) or 'none'}.")


class UnknownTarget(_Unknown):
    """No profile has this name."""

    kind = "target"


class UnknownFormat(_Unknown):
    """No module in `edgeformer.formats` has this name."""

    kind = "format"


class FormatNotYet(WrongUse):
    """The profile declares a format that this version does not build."""

    def __init__(self, format: str, target: str, built: Sequence[str]) -> None:
        now = f"use one of: {', '.join(built)}" if built else "none of its formats is built yet"
        super().__init__(f"{target!r} lists the format {format!r}, which this version does not build; {now}.")


class ProfileError(WrongUse):
    """A profile breaks a rule. `found` is the value as written, or "missing"."""

    def __init__(self, file: str, key: str, rule: str, found: str) -> None:
        self.file, self.key, self.rule, self.found = file, key, rule, found
        super().__init__(f"{file}: {key} must be {rule}; found {found}.")


class BadInput(WrongUse):
    """An argument or a file cannot be used as given."""


class Missing(EdgeformerError):
    """Something must be installed here or on the device."""

    exit_code = 3


class MissingExtra(Missing):
    """A Python package of one extra is not installed."""

    def __init__(self, extra: str, module: str | None = None) -> None:
        self.extra = extra
        super().__init__(f"{module or extra} is not installed. Run: pip install 'edgeformer[{extra}]'")


class MissingTool(Missing):
    """A program on this machine is not installed."""

    def __init__(self, tool: str, fix: str) -> None:
        super().__init__(f"the program {tool!r} is not on the path. Run: {fix}")


class MissingRuntime(Missing):
    """The device has no runtime for this format."""

    def __init__(self, runtime: str, device: str, fix: str) -> None:
        super().__init__(f"{device} has no {runtime}. Run there: {fix}")


class LinkError(EdgeformerError):
    """A device cannot be reached or refuses. The message names the address, the step and its output."""

    exit_code = 3
