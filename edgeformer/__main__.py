"""`python -m edgeformer`."""

from .cli import main

main()
