"""
Build, ship and measure transformers on phones and boards.

    import edgeformer as ef

    bundle = ef.build("path/or/hub-id", target="raspberry-pi-4", data="texts.txt")
    report = ef.run(bundle)                            # here, by the agent that devices use
    report = ef.deploy(bundle, "ssh://pi@device:22")   # there
    ef.compare(report_a, report_b)
    ef.parity("path/or/hub-id")                        # every format against PyTorch
    ef.search("path", "raspberry-pi-4", ef.Limits(max_size_mb=12, max_drop=0.01), data="dev.tsv", task="sst2")

Importing this loads no framework.
"""

from importlib import import_module as _import
from typing import TYPE_CHECKING as _CHECKED, Any as _Any

from edgeformer_agent.wire import Gate, Manifest, Report

from .build import build
from .bundle import Bundle, open_bundle
from .compare import Comparison, against_prediction, compare
from .deploy import Measure, deploy, run
from .errors import EdgeformerError
from .generate import Generated, generate
from .link import SshOptions

if _CHECKED:
    from .agreement import Matrix, parity
    from .budget import Limits, Outcome, search

__all__ = [
    "Bundle",
    "Comparison",
    "EdgeformerError",
    "Gate",
    "Generated",
    "Limits",
    "Manifest",
    "Matrix",
    "Measure",
    "Outcome",
    "Report",
    "SshOptions",
    "__version__",
    "against_prediction",
    "build",
    "compare",
    "deploy",
    "generate",
    "open_bundle",
    "parity",
    "run",
    "search",
]
__version__ = "0.1.0"

_LATER = {"Limits": "budget", "Matrix": "agreement", "Outcome": "budget", "parity": "agreement", "search": "budget"}


def __getattr__(name: str) -> _Any:
    """What needs a framework is imported when it is asked for."""
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_import(f".{_LATER[name]}", __name__), name)
