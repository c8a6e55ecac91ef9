"""
Build, ship and measure transformers on phones and boards.

    import edgeformer as ef

    bundle = ef.build("path/or/hub-id", target="raspberry-pi-4", data="texts.txt")
    report = ef.run(bundle)                            # here, by the agent that devices use
    report = ef.deploy(bundle, "ssh://pi@device:22")   # there
    ef.compare(report_a, report_b)

Importing this loads no framework.
"""

from edgeformer_agent.wire import Gate, Manifest, Report

from .build import build
from .bundle import Bundle, open_bundle
from .compare import Comparison, against_prediction, compare
from .deploy import Measure, deploy, run
from .errors import EdgeformerError
from .generate import Generated, generate
from .link import SshOptions

__all__ = [
    "Bundle",
    "Comparison",
    "EdgeformerError",
    "Gate",
    "Generated",
    "Manifest",
    "Measure",
    "Report",
    "SshOptions",
    "__version__",
    "against_prediction",
    "build",
    "compare",
    "deploy",
    "generate",
    "open_bundle",
    "run",
]
__version__ = "0.1.0"
