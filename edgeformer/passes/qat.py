"""
Quantization-aware training: the model learns to answer as before with its weights and activations rounded.

    build(model, target, precision="int4", passes=[qat.train(texts, precision="int4", recipe=Recipe(epochs=0.2))])

While it trains, every layer computes with the numbers that its program will hold (see `edgeformer.rounding`; layers
that the model keeps finer are left so), and the gradient passes through the rounding. The teacher is the model itself
before rounding, or another one; the loop, its losses and its checkpoints are those of distillation. What comes out is
an ordinary fp32 model whose weights suit the rounding that the exporters do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from .. import rounding
from ..errors import BadInput
from ..model import Model
from ..stages import Progress, quiet
from ..train import Recipe
from . import Pass
from .distil import Losses, Text, distil


def train(
    texts: Sequence[Text],
    *,
    precision: str = "int4",
    activations: str = "tensor",
    teacher: Model | None = None,
    labels: Sequence[float] | None = None,
    losses: Losses = Losses(),  # noqa: B008 (frozen)
    recipe: Recipe = Recipe(rate=2e-5),  # noqa: B008 (frozen)
    length: int = 128,
    folder: str | Path | None = None,
    progress: Progress = quiet,
) -> Pass:
    """
    For programs of `precision` with `activations` rounded as there: "tensor" (a scale a row; ONNX in int8), "token"
    (LiteRT, ExecuTorch, decoders everywhere), or "none". A decoder learns what follows the end of each text: give many,
    of different ends. The other parameters are those of `distil.distil`; a second call with the same ones and `folder`
    goes on where the first stopped. Raises BadInput.
    """
    if precision not in rounding.PARTS:
        raise BadInput(f"precision {precision!r} must be one of {', '.join(rounding.PARTS)}")

    def run(model: Model) -> Model:
        asked = rounding.asked(model, precision)
        prepared = replace(model, module=rounding.pretending(model, asked, activations))
        learn = distil(
            teacher or model,
            texts,
            labels=labels,
            losses=losses,
            recipe=recipe,
            length=length,
            folder=folder,
            progress=progress,
        )
        trained = learn(prepared)
        rounding.reveal(trained.module, asked)
        facts = {"precision": precision, "activations": activations, **trained.history[-1].facts}
        return model.after("qat.train", trained.module, facts=facts)

    return run
