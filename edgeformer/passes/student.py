"""
Smaller models cut out of a larger one: fewer layers, a narrower stream, a smaller vocabulary, factorized embeddings.

    build(model, target, passes=[student.layers(3), student.width(256), student.vocabulary(texts), distil.distil(...)])

Each pass keeps what weighs most, so that training starts from the teacher and not from noise; alone, a cut costs
accuracy, which `distil` brings back.
"""

from __future__ import annotations

import copy
import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import BadInput
from ..model import TOKENIZER_FILES, Model
from . import Pass

Tensor = torch.Tensor

# What the axes of a parameter count, by the end of its name, for the layer layout of BERT and its kin.
_AXES = {
    r"(word|position|token_type)_embeddings\.weight": (None, "hidden"),
    r"LayerNorm\.(weight|bias)": ("hidden",),
    r"self\.(query|key|value)\.weight": ("heads", "hidden"),
    r"self\.(query|key|value)\.bias": ("heads",),
    r"attention\.output\.dense\.weight": ("hidden", "heads"),
    r"intermediate\.dense\.weight": ("ffn", "hidden"),
    r"intermediate\.dense\.bias": ("ffn",),
    r"\d+\.output\.dense\.weight": ("hidden", "ffn"),
    r"pooler\.dense\.weight": ("hidden", "hidden"),
    r"output\.dense\.bias|pooler\.dense\.bias": ("hidden",),
    r"classifier\.weight": (None, "hidden"),
    r"classifier\.bias": (None,),
}


def layers(keep: int | Sequence[int]) -> Pass:
    """`keep`: how many layers (the first, the last, and evenly between them), or their numbers from 0."""

    def run(model: Model) -> Model:
        module = copy.deepcopy(model.module)
        stack = layer_stack(module)
        count = len(stack)
        chosen = _spread(count, keep) if isinstance(keep, int) else tuple(keep)
        if not chosen or any(not 0 <= n < count for n in chosen) or list(chosen) != sorted({*chosen}):
            raise BadInput(f"layers {keep}: {model.name} has {count}; keep at least one, ascending, below {count}")
        kept = [stack[n] for n in chosen]
        del stack[:]
        stack.extend(kept)
        for config in _configs(module):
            config.num_hidden_layers = len(kept)
        return model.after("student.layers", module, facts=_facts(module, kept=list(chosen), of=count))

    return run


def width(hidden: int, *, ffn: int = 0) -> Pass:
    """
    `hidden`: of the stream between layers, a multiple of the head size: heads are kept whole. `ffn`: inside a layer, in
    the old proportion by default. Channels, heads and neurons with the largest weights stay.

    It is for a student that is trained afterwards. Every layer reads the stream and adds to it, through normalizations
    that no rotation passes: what a lost channel held is nobody's to make up for, and without training more is lost than
    `prune.structured` loses for the same work (`tools/bench/prune.py --width` prints both).
    """

    def run(model: Model) -> Model:
        outer = copy.deepcopy(model.module)
        whole: Any = _transformer(outer)
        weights = {name: x.detach() for name, x in whole.state_dict().items()}
        axes = {name: _axes(model, name) for name in weights}
        config = copy.deepcopy(whole.config)
        size = config.hidden_size // config.num_attention_heads
        if not 0 < hidden <= config.hidden_size or hidden % size:
            raise BadInput(f"width {hidden} must be a multiple of the head size {size}, at most {config.hidden_size}")
        inner = ffn or config.intermediate_size * hidden // config.hidden_size
        if not 0 < inner <= config.intermediate_size:
            raise BadInput(f"ffn {inner} must be above 0 and at most {config.intermediate_size}")
        config.hidden_size, config.num_attention_heads, config.intermediate_size = hidden, hidden // size, inner
        kept = _kept(weights, axes, {"hidden": hidden, "heads": hidden // size, "ffn": inner}, size)
        narrow = type(whole)(config).float().eval()
        if getattr(whole, "pooler", 0) is None:
            narrow.pooler = None  # as `model.load` does where nothing reads it
        narrow.set_attn_implementation("eager")
        narrow.load_state_dict({name: _cut(x, name, axes[name], kept) for name, x in weights.items()})
        outer.module = narrow
        return model.after("student.width", outer, facts=_facts(outer, hidden=hidden, heads=hidden // size, ffn=inner))

    return run


def vocabulary(texts: Iterable[str | tuple[str, str]], *, least: int = 1) -> Pass:
    """
    Keeps the tokens that occur at least `least` times in `texts`, all characters and all special tokens, so that any
    text can still be written. Texts whose tokens are all kept are cut into the same pieces as before.
    """
    given = list(texts)

    def run(model: Model) -> Model:
        if model.tokenizer is None:
            raise BadInput(f"{model.name} has no tokenizer; its vocabulary cannot be cut")
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            model.tokenizer.save_pretrained(folder)
            written = json.loads((folder / "tokenizer.json").read_text("utf-8"))
            if written["model"]["type"] != "WordPiece":
                raise BadInput(f"vocabulary: {model.name} has {written['model']['type']} tokens; this cuts WordPiece")
            count = len(written["model"]["vocab"])
            kept = _tokens(model.tokenizer, written, given, least)
            tokenizer, files = _rewritten(folder, written, kept)
        module = copy.deepcopy(model.module)
        _cut_embeddings(module, kept, tokenizer.pad_token_id)
        inputs = tuple(x._replace(pad=tokenizer.pad_token_id) if x.name == "input_ids" else x for x in model.inputs)
        others = {n: data for n, data in (model.files or {}).items() if not n.startswith("tokenizer/")}
        facts = _facts(module, tokens=len(kept), of=count, texts=len(given), least=least)
        fields = {"tokenizer": tokenizer, "files": {**files, **others}, "inputs": inputs}
        return model.after("student.vocabulary", module, facts=facts, **fields)

    return run


def positions(most: int) -> Pass:
    """Cuts the table of learned positions to the longest sequence that will be met."""

    def run(model: Model) -> Model:
        if not 0 < most <= model.max_length:
            raise BadInput(f"positions {most}: {model.name} takes up to {model.max_length} tokens; use at most that")
        module = copy.deepcopy(model.module)
        part: Any = next((m for m in module.modules() if hasattr(m, "position_embeddings")), None)
        if part is None or part.position_embeddings.padding_idx is not None:
            raise BadInput(f"{model.name} has no table of positions that counts from 0; nothing to cut")
        part.position_embeddings = _table(part.position_embeddings.weight.detach()[:most], None)
        for name, buffer in list(part.named_buffers(recurse=False)):
            part.register_buffer(name, buffer[:, :most].clone(), persistent=False)
        for config in _configs(module):
            config.max_position_embeddings = most
        lengths = tuple(sorted({n for n in model.lengths if n < most} | {most}))
        return model.after("student.positions", module, facts=_facts(module, positions=most), lengths=lengths)

    return run


def embeddings(rank: int) -> Pass:
    """The table of words as two: vocabulary x rank and rank x hidden, by a truncated singular value decomposition."""

    def run(model: Model) -> Model:
        module = copy.deepcopy(model.module)
        part = _words(module)
        table = part.word_embeddings
        if not isinstance(table, torch.nn.Embedding) or not 0 < rank < table.embedding_dim:
            raise BadInput(f"embeddings: rank {rank} must be above 0 and below the width of a table not yet factorized")
        u, s, v = torch.linalg.svd(table.weight.detach().double(), full_matrices=False)
        share = s[:rank].sqrt()
        narrow = _table((u[:, :rank] * share).float(), table.padding_idx)
        wide = torch.nn.Linear(rank, table.embedding_dim, bias=False)
        wide.weight.data = (share[:, None] * v[:rank]).T.contiguous().float()
        part.word_embeddings = torch.nn.Sequential(narrow, wide)
        energy = float((s[:rank] ** 2).sum() / (s**2).sum())
        return model.after("student.embeddings", module, facts=_facts(module, rank=rank, energy=round(energy, 4)))

    return run


# --- what a transformer looks like ------------------------------------------------------------------------------------


def layer_stack(module: torch.nn.Module) -> torch.nn.ModuleList:
    """The list of its layers. Raises BadInput where there is none."""
    counts = {getattr(config, "num_hidden_layers", 0) for config in _configs(module)}
    for part in module.modules():
        if isinstance(part, torch.nn.ModuleList) and len(part) in counts:
            return part
    raise BadInput(f"{type(module).__name__} has no list of layers that its configuration counts")


def _configs(module: torch.nn.Module) -> list[Any]:
    """Each once: the parts of a transformers model share theirs, or hold copies."""
    found = {id(m.config): m.config for m in module.modules() if hasattr(m, "config")}
    return list(found.values())


def _transformer(module: torch.nn.Module) -> torch.nn.Module:
    inner = getattr(module, "module", None)
    if not isinstance(inner, torch.nn.Module) or not hasattr(inner, "config"):
        raise BadInput(f"{type(inner or module).__name__} is no transformers model; its width cannot be cut")
    return inner


def _words(module: torch.nn.Module) -> Any:
    found = next((m for m in module.modules() if hasattr(m, "word_embeddings")), None)
    if found is None:
        raise BadInput("this model has no `word_embeddings`; its table of words cannot be cut")
    return found


def _facts(module: torch.nn.Module, **facts: Any) -> dict[str, Any]:
    return {**facts, "parameters": sum(p.numel() for p in module.parameters())}


def _spread(count: int, keep: int) -> tuple[int, ...]:
    if not 0 < keep <= count:
        return ()
    return tuple(round(i * (count - 1) / max(keep - 1, 1)) for i in range(keep))


# --- width ------------------------------------------------------------------------------------------------------------


def _axes(model: Model, name: str) -> tuple[str | None, ...]:
    for pattern, axes in _AXES.items():
        if re.search(f"(^|\\.)({pattern})$", name):
            return axes
    raise BadInput(f"width: {model.name} has a weight {name}, which is not in the layout of BERT; cut layers instead")


def _kept(
    weights: dict[str, Tensor], axes: dict[str, tuple[str | None, ...]], sizes: dict[str, int], size: int
) -> dict[str, Tensor]:
    """Place -> the channels that stay: one choice for the whole stream, one a layer for heads and neurons."""
    energy: dict[str, Tensor] = {}
    for name, x in weights.items():
        for axis, kind in enumerate(axes[name]):
            if kind is not None and x.ndim > 1:
                square = x.pow(2).mean([n for n in range(x.ndim) if n != axis])
                place = _place(kind, name)
                energy[place] = energy.get(place, torch.zeros_like(square)) + square / square.mean()
    chosen = {}
    for place, found in energy.items():
        kind = place.partition(" ")[0]
        if kind == "heads":
            best = found.view(-1, size).sum(1).topk(sizes[kind]).indices.sort().values
            chosen[place] = (best[:, None] * size + torch.arange(size)).flatten()
        else:
            chosen[place] = found.topk(sizes[kind]).indices.sort().values
    return chosen


def _place(kind: str, name: str) -> str:
    number = re.search(r"\.(\d+)\.", name)
    return kind if kind == "hidden" or number is None else f"{kind} {number[1]}"


def _cut(x: Tensor, name: str, axes: tuple[str | None, ...], kept: dict[str, Tensor]) -> Tensor:
    for axis, kind in enumerate(axes):
        if kind is not None:
            x = x.index_select(axis, kept[_place(kind, name)])
    return x.clone()


# --- vocabulary -------------------------------------------------------------------------------------------------------


def _tokens(tokenizer: Any, written: dict[str, Any], texts: list[Any], least: int) -> list[int]:
    """Old ids in their old order."""
    model = written["model"]
    prefix = model["continuing_subword_prefix"]
    seen: Counter[int] = Counter()
    for ids in tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else ():
        seen.update(ids)
    special = {x["id"] for x in written["added_tokens"]} | {model["vocab"][model["unk_token"]]}
    return sorted(
        n
        for word, n in model["vocab"].items()
        if n in special or seen[n] >= least or len(word.removeprefix(prefix)) == 1
    )


def _rewritten(folder: Path, written: dict[str, Any], kept: list[int]) -> tuple[Any, dict[str, bytes]]:
    """The tokenizer with new ids and its files: the ids stand in four places."""
    from transformers import AutoTokenizer

    new = {old: n for n, old in enumerate(kept)}
    words = {n: word for word, n in written["model"]["vocab"].items()}
    written["model"]["vocab"] = {words[old]: n for old, n in new.items()}
    written["added_tokens"] = [{**x, "id": new[x["id"]]} for x in written["added_tokens"]]
    written["truncation"] = written["padding"] = None  # the runner's business, and a padding would name an old id
    post = written.get("post_processor") or {}
    for x in post.get("special_tokens", {}).values():  # TemplateProcessing
        x["ids"] = [new[n] for n in x["ids"]]
    for key in ("sep", "cls"):  # BertProcessing
        if key in post:
            post[key] = [post[key][0], new[post[key][1]]]
    (folder / "tokenizer.json").write_text(json.dumps(written, ensure_ascii=False), "utf-8")
    settings = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    if decoder := settings.get("added_tokens_decoder"):
        settings["added_tokens_decoder"] = {str(new[int(n)]): x for n, x in decoder.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1, ensure_ascii=False) + "\n", "utf-8")
    if (folder / "vocab.txt").is_file():
        (folder / "vocab.txt").write_text("".join(f"{words[n]}\n" for n in kept), "utf-8")
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return tokenizer, {f"tokenizer/{n}": (folder / n).read_bytes() for n in TOKENIZER_FILES if (folder / n).is_file()}


def _cut_embeddings(module: torch.nn.Module, kept: list[int], pad: int | None) -> None:
    part = _words(module)
    holder = part.word_embeddings
    table: Any = holder[0] if isinstance(holder, torch.nn.Sequential) else holder
    if kept[-1] >= table.num_embeddings:
        raise BadInput(f"the tokenizer has an id {kept[-1]}, the model {table.num_embeddings} words: not a pair")
    smaller = _table(table.weight.detach()[torch.tensor(kept)], pad)
    if isinstance(holder, torch.nn.Sequential):
        holder[0] = smaller
    else:
        part.word_embeddings = smaller
    for config in _configs(module):
        config.vocab_size, config.pad_token_id = len(kept), pad


def _table(rows: Tensor, pad: int | None) -> torch.nn.Embedding:
    """An embedding that can be trained, of the given rows."""
    made = torch.nn.Embedding(rows.shape[0], rows.shape[1], padding_idx=pad)
    made.weight.data = rows.clone()
    return made
