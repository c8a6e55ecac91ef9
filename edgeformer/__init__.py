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
from .errors import EdgeformerError

__all__ = ["Bundle", "EdgeformerError", "Gate", "Manifest", "Report", "__version__", "build", "open_bundle"]
__version__ = "0.1.0"
