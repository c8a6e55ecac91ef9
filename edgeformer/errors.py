"""
Our exceptions:

* EdgeformerError
  x BuildError
"""


class EdgeformerError(Exception):
    """Base of everything this package raises on purpose."""


class BuildError(EdgeformerError):
    """A native source did not compile. Carries the file, the target and the compiler's last words."""
