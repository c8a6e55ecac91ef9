"""The agent that runs on the device: Python 3.6 syntax, numpy and psutil, nothing from edgeformer."""
