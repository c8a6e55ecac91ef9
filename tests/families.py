"""Tiny random configurations of the model families; transformers' own modeling code, nothing copied."""

from __future__ import annotations

from typing import Any

TEXT = {
    "vocab_size": 200,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 66,
}
NAMES = ("bert", "distilbert", "roberta", "electra", "mpnet", "modernbert", "vit", "llama")


def tiny(family: str) -> Any:
    """Seeded, in eval mode. Heads vary, so that each is met."""
    import torch
    import transformers as hf

    torch.manual_seed(0)
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    make = {
        "bert": lambda: hf.BertModel(hf.BertConfig(**TEXT)),
        "distilbert": lambda: hf.DistilBertForQuestionAnswering(
            hf.DistilBertConfig(
                vocab_size=200, dim=32, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=64
            )
        ),
        "roberta": lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**TEXT, num_labels=3)),
        "electra": lambda: hf.ElectraForTokenClassification(
            hf.ElectraConfig(**TEXT, embedding_size=16, id2label={0: "O", 1: "B-PER", 2: "I-PER"})
        ),
        "mpnet": lambda: hf.MPNetModel(hf.MPNetConfig(**TEXT)),
        "modernbert": lambda: hf.ModernBertModel(hf.ModernBertConfig(**TEXT, local_attention=16, **special)),
        "llama": lambda: hf.LlamaForCausalLM(
            hf.LlamaConfig(
                **{**TEXT, "hidden_size": 64, "max_position_embeddings": 320}, num_key_value_heads=2, pad_token_id=0
            )
        ),
        "vit": lambda: hf.ViTForImageClassification(
            hf.ViTConfig(
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=64,
                image_size=32,
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
