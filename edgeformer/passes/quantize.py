"""Quantization schemes. The weights are converted by each format's own quantizer, for its own kernels."""

from __future__ import annotations

from ..model import Model
from . import Pass


def int8() -> Pass:
    """
    Dynamic-range int8: weights and embeddings int8 per output channel, activations quantized per call by the runtime.
    Static int8 activations lose .06 to .9 of cosine on this model family and are not faster, so they are not offered.
    """

    def step(model: Model) -> Model:
        return model.after(
            "quantize.int8", facts={"weights": "int8 per channel", "activations": "dynamic"}, precision="int8"
        )

    return step
