"""
A model on its way to a device: a module with one output, what its inputs look like, what its output means.

`load` takes what users have (a Hugging Face folder, a hub id, a `transformers` model, a plain module) and asks the
model itself for the rest: its forward signature, its position table, its head. Modeling code is never copied.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeformer_agent import wire

from .errors import BadInput, MissingExtra

try:
    import torch
except ImportError as error:  # the light core answers without torch; a build needs it
    raise MissingExtra("onnx,litert", "torch") from error

if TYPE_CHECKING:
    from collections.abc import Mapping

LONGEST = 512  # default limit: attention is quadratic, and a longer program is asked for by name
STATIC_LENGTHS = (32, 64, 128, 256, 512)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt", "merges.txt")
MAX_NAME = 64  # the name is part of folder names, which systems limit to 255 bytes
HUB_FILES = ("*.json", "*.txt", "*.safetensors", "LICENSE*", "NOTICE*", "1_Pooling/*")
_HEADS = {  # end of the architecture's name -> what of transformers loads it, and the task's kind
    "ForSequenceClassification": ("AutoModelForSequenceClassification", "classification"),
    "ForImageClassification": ("AutoModelForImageClassification", "classification"),
    "ForTokenClassification": ("AutoModelForTokenClassification", "token_classification"),
    "ForQuestionAnswering": ("AutoModelForQuestionAnswering", "question_answering"),
    "ForCausalLM": ("AutoModelForCausalLM", "next_token"),
    "LMHeadModel": ("AutoModelForCausalLM", "next_token"),
    "Model": ("AutoModel", "embedding"),
    "ForMaskedLM": ("AutoModel", "embedding"),
    "ForPreTraining": ("AutoModel", "embedding"),
    "ForMaskedImageModeling": ("AutoModel", "embedding"),
}
_PER_TOKEN = ("token_classification", "question_answering")  # an output a token: the second axis is the sequence
_POOLINGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_TAKE = {"classification": "logits", "token_classification": "logits", "question_answering": "span"}
_TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


@dataclass(frozen=True)
class Model:
    """
    module: positional tensors in the order of `inputs` -> one tensor whose first axis is the batch.
    inputs, output: -1 in a shape is the batch (first axis) or the sequence.
    lengths: static sequence lengths for formats that need them; () where no input has a sequence.
    past: of a decoder, the keys and values of the tokens before: one more input, with which the module also returns
    those of the new tokens, for formats that generate. None where there are none.
    files: tokenizer and licence files that travel with the model, by name.
    precisions: path of a layer in `module` -> the precision it has at least, in programs of a coarser one
    (`edgeformer.rounding`). Where the arithmetic is fp16 (Core ML, TensorRT), a linear layer in fp32 computes in it.
    ranges: path of a linear layer -> least and greatest value that reaches it, for "int8-static" (`passes.smooth`).
    """

    name: str
    module: torch.nn.Module
    inputs: tuple[wire.Tensor, ...]
    output: wire.Tensor
    task: wire.Task
    lengths: tuple[int, ...] = ()
    past: wire.Tensor | None = None
    tokenizer: Any = None
    files: Mapping[str, bytes] | None = None
    precisions: Mapping[str, str] = field(default_factory=dict)
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    history: tuple[wire.Step, ...] = ()

    def after(
        self, step: str, /, module: torch.nn.Module | None = None, *, facts: dict[str, Any], **fields: Any
    ) -> Model:
        """The same model, one step later."""
        history = (*self.history, wire.Step(step, facts))
        return replace(self, module=module or self.module, history=history, **fields)

    @property
    def program_inputs(self) -> tuple[wire.Tensor, ...]:
        """Those of a program in a format that generates."""
        return self.inputs if self.past is None else (*self.inputs, self.past)

    @property
    def program_outputs(self) -> tuple[wire.Tensor, ...]:
        """A decoder's program also gives the keys and values of the new tokens: what `past` is made of."""
        return (self.output,) if self.past is None else (self.output, self.past._replace(name="new"))

    @property
    def max_length(self) -> int:
        """The longest sequence its programs take; 0 where no input has a sequence."""
        return self.lengths[-1] if self.lengths else 0

    def example(self, length: int = 0, batch: int = 1) -> tuple[torch.Tensor, ...]:
        """Valid inputs of one shape: token 1 everywhere, nothing masked."""
        make = {"int32": torch.ones, "int64": torch.ones}
        return tuple(
            make.get(x.dtype, torch.zeros)(
                [batch if i == 0 else length if n < 0 else n for i, n in enumerate(x.shape)],
                dtype=getattr(torch, x.dtype),
            )
            for x in self.inputs
        )


Source = str | Path | torch.nn.Module | Model  # what `build` takes


def load(
    source: str | Path | torch.nn.Module,
    *,
    name: str | None = None,
    tokenizer: Any = None,
    example: tuple[torch.Tensor, ...] | dict[str, torch.Tensor] | None = None,
    lengths: tuple[int, ...] | None = None,
) -> Model:
    """
    `source`: a folder, a hub id (`org/name`; the offline cache is honoured), a `transformers` model, or any module
    together with `example` inputs (each with a batch axis). `lengths` replaces the default static lengths.
    Raises BadInput with what to do.
    """
    described = hasattr(source, "config") and hasattr(source, "get_input_embeddings")
    plain = isinstance(source, torch.nn.Module) and not described
    if example is not None and not plain:
        raise BadInput(
            "example inputs go with a plain module; a folder, hub id or transformers model describes its own"
        )
    if not isinstance(source, torch.nn.Module):
        if tokenizer is not None:
            raise BadInput("a tokenizer goes with a transformers model; a folder or hub id brings its own")
        model = _from_folder(_folder(str(source)), name or Path(str(source)).name or str(source))
    else:
        model = (
            _from_module(source, name, example) if plain else _from_transformers(source, name, tokenizer, {}, "mean")
        )
    _finite(model.module)
    return _with_lengths(model, lengths)


def _folder(source: str) -> Path:
    """A local folder, or the snapshot of a hub repository."""
    if (path := Path(source).expanduser()).is_dir():
        return path
    if path.exists() or source.count("/") > 1 or source.startswith((".", "~", "/")):
        raise BadInput(f"{source!r} is not a folder with config.json and *.safetensors, nor a hub id like 'org/name'")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, allow_patterns=list(HUB_FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise BadInput(f"no folder {source!r}, and the hub and its cache do not give it: {_reason(error)}") from error


def _from_folder(folder: Path, name: str) -> Model:
    import transformers
    from transformers import AutoConfig, AutoTokenizer

    if not (folder / "config.json").is_file() or not list(folder.glob("*.safetensors")):
        raise BadInput(
            f"{folder} needs config.json and *.safetensors (pickled weights are not read; "
            "convert them with model.save_pretrained(folder))"
        )
    transformers.logging.disable_progress_bar()
    try:
        # Code that came with a model is never run, nor asked about on the terminal.
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        loader = getattr(transformers, _head((getattr(config, "architectures", None) or ["Model"])[0])[0])
        module, found = loader.from_pretrained(
            folder, use_safetensors=True, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
        )
        has_tokenizer = (folder / "tokenizer.json").is_file()
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False) if has_tokenizer else None
        pooling = _pooling(folder)
    except BadInput:
        raise
    except Exception as error:  # whatever the readers of foreign files raise
        raise BadInput(f"{folder} cannot be loaded: {type(error).__name__}: {_reason(error)}") from error
    missing = {str(key) for key in found["missing_keys"]}
    if any(key.startswith("pooler.") for key in missing):
        module.pooler = None  # nothing here reads it, and weights made up at random would change the digest
    if lost := sorted(key for key in missing if not key.startswith("pooler.")):
        raise BadInput(f"{folder} lacks weights of {type(module).__name__}: {', '.join(lost[:3])}; fine-tune it first")
    files = {f"tokenizer/{n}": (folder / n).read_bytes() for n in TOKENIZER_FILES if (folder / n).is_file()}
    files |= {f"licences/model-{p.name}": p.read_bytes() for p in sorted(folder.glob("LICENSE*"))}
    return _from_transformers(module, name, tokenizer, files, pooling)


def _head(architecture: str) -> tuple[str, str]:
    """The class of transformers that loads it, and its task. Raises BadInput where its output has no meaning here."""
    for suffix, head in _HEADS.items():
        if architecture.endswith(suffix):
            return head
    raise BadInput(f"{architecture}: this version builds {', '.join(_HEADS)} heads")


def _pooling(folder: Path) -> str:
    """
    mean or cls, as a sentence-transformers folder says; mean where it does not. What this version would leave out
    silently is refused: another pooling, a layer behind it.
    """
    modules, pooling = folder / "modules.json", folder / "1_Pooling" / "config.json"
    types = [x["type"].rsplit(".", 1)[-1] for x in json.loads(modules.read_text("utf-8"))] if modules.is_file() else []
    if others := sorted({*types} - {"Transformer", "Pooling", "Normalize"}):
        raise BadInput(f"{folder}: modules.json lists {', '.join(others)}, which this version does not build")
    said = json.loads(pooling.read_text("utf-8")) if pooling.is_file() else {}
    mode = said.get("pooling_mode")  # sentence-transformers 5 and before have a flag for each
    modes = [mode] if isinstance(mode, str) else mode or [k for k, v in said.items() if v is True and k in _POOLINGS]
    modes = [_POOLINGS.get(m, m) for m in modes] or ["mean"]
    if modes not in (["mean"], ["cls"]):
        raise BadInput(f"{folder}: pooling {', '.join(modes)}; this version builds mean or cls")
    return str(modes[0])


def _from_transformers(module: Any, name: str | None, tokenizer: Any, files: dict[str, bytes], pooling: str) -> Model:
    """Asks the module: which inputs its forward takes, how many positions it has, whether it has a head."""
    from .attention.swap import NAME as SPARSE

    architecture = type(module).__name__
    known = "For" in architecture or architecture.endswith("LMHeadModel")
    kind = _head(architecture)[1] if known else "embedding"
    module = copy.deepcopy(module.base_model if kind == "embedding" else module).float().cpu().eval()
    # Eager attention exports as plain matrix products and one softmax; the fused forms decompose into more operators.
    if getattr(module.config, "_attn_implementation", None) != SPARSE:  # a model that is sparse already stays so
        module.set_attn_implementation("eager")
    config = module.config
    inputs = _image_inputs(config) if module.main_input_name == "pixel_values" else _text_inputs(module, tokenizer)
    names = tuple(x.name for x in inputs)
    wrapped = _NextToken(module) if kind == "next_token" else _OneOutput(module, names, _TAKE.get(kind, pooling))
    model = Model(
        name=_slug(name or getattr(config, "_name_or_path", "") or architecture),
        module=wrapped.eval(),
        inputs=inputs,
        output=wire.Tensor("sentence_embedding" if kind == "embedding" else "logits", "float32", (-1, -1)),
        task=_task(config, kind),
        tokenizer=tokenizer,
        files=files,
        lengths=(_positions(module),) if inputs[0].name == "input_ids" else (),
        past=_past(wrapped) if isinstance(wrapped, _NextToken) else None,
    )
    with torch.no_grad():
        shape = model.module(*model.example(4)).shape
    sizes = (-1, *shape[2:]) if kind in _PER_TOKEN else shape[1:]
    model = replace(model, output=model.output._replace(shape=(-1, *sizes)))
    return _described(model, type(module).__name__)


def _from_module(
    module: torch.nn.Module,
    name: str | None,
    example: tuple[torch.Tensor, ...] | dict[str, torch.Tensor] | None,
) -> Model:
    """Shapes are those of the example; only the batch is free."""
    if isinstance(example, torch.Tensor) or not example:
        raise BadInput("a plain module needs example=(tensor, ...), each with a batch axis of 1")
    named = example if isinstance(example, dict) else {f"x{i}": x for i, x in enumerate(example)}
    if any(x.ndim == 0 or x.shape[0] != 1 for x in named.values()):
        raise BadInput(f"each example needs a batch axis of 1, got {[tuple(x.shape) for x in named.values()]}")
    positional = not isinstance(example, dict)
    inputs = tuple(wire.Tensor(k, str(x.dtype).removeprefix("torch."), (-1, *x.shape[1:])) for k, x in named.items())
    model = Model(
        name=_slug(name or type(module).__name__),
        module=_OneOutput(copy.deepcopy(module).cpu().eval(), None if positional else tuple(named), "first"),
        inputs=inputs,
        output=wire.Tensor("output", "float32", (-1,)),
        task=wire.Task("embedding"),
        files={},
    )
    with torch.no_grad():
        output = model.module(*named.values())  # fails here, in the user's code, and not in an exporter
    if not isinstance(output, torch.Tensor) or output.shape[:1] != (1,) or not output.is_floating_point():
        said = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
        raise BadInput(f"{type(module).__name__} must return floats with the batch axis first, got {said}")
    model = replace(model, output=model.output._replace(shape=(-1, *output.shape[1:])))
    return _described(model, type(module).__name__)


class _OneOutput(torch.nn.Module):
    """Positional tensors in, one tensor out: the head's logits (start and end of a span), or one unit vector a row."""

    def __init__(self, module: torch.nn.Module, names: tuple[str, ...] | None, take: str) -> None:
        super().__init__()
        self.module, self.names, self.take = module, names, take

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        named = dict(zip(self.names, tensors, strict=True)) if self.names else {}
        output = self.module(**named) if self.names else self.module(*tensors)
        if self.take == "logits":
            logits: torch.Tensor = output.logits
            return logits
        if self.take == "span":
            return torch.stack((output.start_logits, output.end_logits), -1)
        if self.take == "first":
            values = output.values() if isinstance(output, dict) else output
            return output if isinstance(output, torch.Tensor) else next(iter(values))
        hidden = output.last_hidden_state
        vector = hidden[:, 0] if self.take == "cls" else _mean(hidden, named.get("attention_mask"))
        return torch.nn.functional.normalize(vector, dim=-1)


class _NextToken(torch.nn.Module):
    """
    A decoder: (ids, mask), padded on the right -> logits [batch, vocabulary] of the token after the last valid one.

    With `past` [batch, 2 * layers, kv heads, tokens before, head size] (keys and values of each layer in turn) it
    returns those of the new tokens as well, in the same layout.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        input_ids, attention_mask, *given = tensors
        past = given[0] if given else None
        options: dict[str, Any] = {"use_cache": False}
        # The same rows for all of a batch, then each its own: a program runs batches of one, and the model's own code
        # knows what stands between the last layer and the logits.
        last = attention_mask.sum(-1) - 1
        if past is not None and past.shape[3] == 0:
            options = {"use_cache": True}
        elif past is not None:
            before = torch.ones(past.shape[0], past.shape[3], dtype=attention_mask.dtype)
            attention_mask = torch.cat((before, attention_mask), 1)
            options = {"use_cache": True, "past_key_values": _cache(past)}
        output = self.module(input_ids=input_ids, attention_mask=attention_mask, logits_to_keep=last, **options)
        row = torch.arange(output.logits.shape[0])
        own = (row[:, None] == row[None]).to(output.logits.dtype)  # TensorRT 8.2 has no torch.diagonal
        logits: torch.Tensor = (output.logits * own[..., None]).sum(1)
        if past is None:
            return logits
        layers = output.past_key_values.layers
        new = [x[:, :, past.shape[3] :] for layer in layers for x in (layer.keys, layer.values)]
        return logits, torch.stack(new, 1)


def _cache(past: torch.Tensor) -> Any:
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer in range(past.shape[1] // 2):
        cache.update(past[:, 2 * layer], past[:, 2 * layer + 1], layer)
    return cache


def _past(decoder: _NextToken) -> wire.Tensor | None:
    """What it keeps of a token; None where that is not a key and a value for each token, equal in all layers."""
    ids = torch.ones(1, 2, dtype=torch.int32)
    with torch.no_grad():
        cache = decoder.module(input_ids=ids, use_cache=True).past_key_values
    layers = getattr(cache, "layers", [])
    shapes = {tuple(getattr(layer, name).shape) for layer in layers for name in ("keys", "values")}
    if len(shapes) != 1 or {type(layer).__name__ for layer in layers} != {"DynamicLayer"}:
        return None
    _, heads, _, dim = shapes.pop()
    return wire.Tensor("past", "float32", (-1, 2 * len(layers), heads, -1, dim))


def _mean(hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Mean over the valid rows of (batch, sequence, hidden)."""
    if mask is None:
        return hidden.mean(1)
    weight = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weight).sum(1) / weight.sum(1)


def _text_inputs(module: Any, tokenizer: Any) -> tuple[wire.Tensor, ...]:
    accepted = inspect.signature(module.forward).parameters
    # Segment ids are an input only where there is more than one segment to tell apart.
    segments = getattr(module.config, "type_vocab_size", 0) > 1
    names = [n for n in _TEXT_INPUTS if n in accepted and (n != "token_type_ids" or segments)]
    if "input_ids" not in names or "attention_mask" not in names:
        raise BadInput(
            f"{type(module).__name__} takes no input_ids and attention_mask; wrap it in a plain module, with example="
        )
    pad = getattr(tokenizer, "pad_token_id", None)
    pad = getattr(module.config, "pad_token_id", None) if pad is None else pad
    return tuple(wire.Tensor(n, "int32", (-1, -1), (pad or 0) if n == "input_ids" else 0) for n in names)


def _image_inputs(config: Any) -> tuple[wire.Tensor, ...]:
    size = config.image_size if isinstance(config.image_size, (tuple, list)) else (config.image_size,) * 2
    return (wire.Tensor("pixel_values", "float32", (-1, config.num_channels, *size)),)


def _positions(module: torch.nn.Module) -> int:
    """How many tokens the position table holds; families that count from the padding index lose the rows below it."""
    limit = int(getattr(module.config, "max_position_embeddings", 0) or LONGEST)
    for name, table in module.named_modules():
        if isinstance(table, torch.nn.Embedding) and "position_embeddings" in name and table.padding_idx is not None:
            limit = min(limit, table.num_embeddings - table.padding_idx - 1)
    return limit


def _task(config: Any, kind: str) -> wire.Task:
    if kind not in ("classification", "token_classification"):
        return wire.Task(kind)
    if kind == "classification" and (config.num_labels == 1 or getattr(config, "problem_type", None) == "regression"):
        return wire.Task("regression")
    return wire.Task(kind, labels=tuple(str(config.id2label[i]) for i in range(config.num_labels)))


def _with_lengths(model: Model, lengths: tuple[int, ...] | None) -> Model:
    if not model.lengths:
        if lengths:
            raise BadInput(f"{model.name} has no sequence input, so lengths={lengths} mean nothing")
        return model
    most = model.lengths[0]
    if lengths is None:
        top = min(most, LONGEST)
        lengths = tuple(sorted({n for n in STATIC_LENGTHS if n <= top} | {top}))
    if not lengths or list(lengths) != sorted(set(lengths)) or lengths[0] < 1:
        raise BadInput(f"lengths {lengths} must be ascending, different and positive")
    if lengths[-1] > most:
        raise BadInput(f"length {lengths[-1]} is over the model's {most} positions; use at most {most}")
    return replace(model, lengths=tuple(lengths))


def _described(model: Model, architecture: str) -> Model:
    """The first line of the history: what went in, by content and not by path."""
    state = model.module.state_dict()
    digest = hashlib.sha256()
    for key in sorted(state):
        digest.update(
            key.encode() + b"\0" + state[key].detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        )
    facts = {
        "architecture": architecture,
        "parameters": sum(p.numel() for p in model.module.parameters()),
        "weights_sha256": digest.hexdigest(),
        "output": model.output.name,
    }
    return model.after("load", facts=facts)


def _finite(module: torch.nn.Module) -> None:
    for name, tensor in module.named_parameters():
        if not torch.isfinite(tensor).all():
            raise BadInput(
                f"weight {name.removeprefix('module.')} holds NaN or infinity; the file is damaged or training diverged"
            )


def _slug(name: str) -> str:
    """A name that is a safe folder name on every system."""
    text = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in Path(name).name.lower())
    return text.strip("-._")[:MAX_NAME].rstrip("-._") or "model"


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
