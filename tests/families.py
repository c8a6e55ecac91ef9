"""
Tiny random configurations of the model families, and how each does in every format; transformers' own modeling code,
nothing copied. `tools/families` prints what the tests hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgeformer.agreement import Cell
    from edgeformer.model import Model

TEXT = {
    "vocab_size": 200,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 66,
}
WIDE = {"hidden_size": 64, "max_position_embeddings": 132}  # heads of 16, and four blocks of 32 tokens
NAMES = ("bert", "distilbert", "roberta", "electra", "mpnet", "modernbert", "vit", "llama")


def tiny(family: str, wide: bool = False) -> Any:
    """Seeded, in eval mode. Heads vary, so that each is met. wide: large enough for sparse attention."""
    import torch
    import transformers as hf

    torch.manual_seed(0)
    text = {**TEXT, **(WIDE if wide else {})}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    make = {
        "bert": lambda: hf.BertModel(hf.BertConfig(**text)),
        "distilbert": lambda: hf.DistilBertForQuestionAnswering(
            hf.DistilBertConfig(
                vocab_size=200,
                dim=text["hidden_size"],
                n_layers=2,
                n_heads=4,
                hidden_dim=64,
                max_position_embeddings=text["max_position_embeddings"] - 2,
            )
        ),
        "roberta": lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**text, num_labels=3)),
        "electra": lambda: hf.ElectraForTokenClassification(
            hf.ElectraConfig(**text, embedding_size=16, id2label={0: "O", 1: "B-PER", 2: "I-PER"})
        ),
        "mpnet": lambda: hf.MPNetModel(hf.MPNetConfig(**text)),
        "modernbert": lambda: hf.ModernBertModel(hf.ModernBertConfig(**text, local_attention=16, **special)),
        "llama": lambda: hf.LlamaForCausalLM(
            hf.LlamaConfig(
                **{**TEXT, "hidden_size": 64, "max_position_embeddings": 320}, num_key_value_heads=2, pad_token_id=0
            )
        ),
        "vit": lambda: hf.ViTForImageClassification(
            hf.ViTConfig(
                hidden_size=text["hidden_size"],
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=64,
                image_size=80 if wide else 32,
                patch_size=8,
                num_labels=5,
            )
        ),
    }
    model = make[family]().eval()
    # Random weights of the usual size give nearly the same output for every input: spread them, so that a wrong mask,
    # position or weight shows.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model


def model(family: str, wide: bool = False) -> Model:
    from edgeformer import model as models

    lengths = None if family == "vit" else (128,) if wide else (48,)
    return models.load(tiny(family, wide), name=f"tiny-{family}", lengths=lengths)


def loud(times: float) -> Model:
    """A decoder with numbers as large as trained ones carry: `times` those of the tiny one."""
    import torch

    made = model("llama")
    with torch.no_grad():
        for name, parameter in made.module.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):  # what is added to what is carried
                parameter.mul_(times)
        table = made.module.get_submodule("module.model.embed_tokens")
        table.weight = torch.nn.Parameter(table.weight * times)  # a head that shares it keeps its own
    return made


def dense(family: str, formats: Sequence[str] = ()) -> tuple[Cell, ...]:
    """
    Every format in fp32 and in its own first precision, each against PyTorch. ExecuTorch lowers each precision anew: of
    one family only.
    """
    from edgeformer import formats as registry
    from edgeformer.agreement import parity

    loaded, found = model(family), []
    for name in formats or registry.names():
        precision = "fp32" if name == "executorch" and family != "bert" else ("fp32", "fp16", "int8")
        found += parity(loaded, formats=[name], precision=precision, layers=False).cells
    return tuple(found)


def sparse(family: str, formats: Sequence[str] = ()) -> tuple[Cell, ...]:
    """The same in fp32 with random scorers, against PyTorch with the same. Raises BadInput where none fits."""
    from edgeformer import formats as registry
    from edgeformer.agreement import parity
    from edgeformer.plan import exports

    found: list[Cell] = []
    for export in exports(formats or registry.names(), "fp32"):
        found += parity(scored(family, export.rule), formats=[export.name], precision="fp32", layers=False).cells
    return tuple(found)


def scored(family: str, rule: int) -> Model:
    """Each layer keeps about half of its blocks, by a threshold or by count."""
    import torch

    from edgeformer.attention import dsa, swap
    from edgeformer.attention.reference import THRESHOLD, Config

    made = torch.Generator().manual_seed(1)

    def parameters(layer: swap.Layer) -> Any:
        given = dsa.fresh(layer.heads, layer.dim, rank=8, generator=made)
        return given._replace(theta=torch.full((layer.heads,), 0.25 if rule == THRESHOLD else 2.0))

    whole = model(family, wide=True)
    swap.install(whole.module, parameters, Config(block_q=32, block_k=32, rule=rule))
    return replace(whole, name=f"{whole.name}-sparse")


def tokenizer() -> Any:
    """Words w3..w194 have the ids 5..196: a WordPiece vocabulary that fits the tiny text models. Pairs get segments."""
    import transformers as hf
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: i for i, word in enumerate([*special, *(f"w{i}" for i in range(3, 195))])}
    made = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {f"{t.strip('[]').lower()}_token": t for t in special}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return hf.PreTrainedTokenizerFast(tokenizer_object=made, model_input_names=inputs, **names)
