"""Synthetic manifests and reports: valid on the wire, fixed by their seed, every field open to change."""

from dataclasses import dataclass, field

import numpy as np

from edgeformer_agent import wire

MODELS = {"raspberry-pi-4": "Raspberry Pi 4 Model B Rev 1.4", "jetson-nano": "NVIDIA Jetson Nano Developer Kit"}
SPEED = {"onnx-fp32": 1.0, "onnx-int8": 0.45, "litert-fp32": 1.06, "litert-int8": 0.36, "tensorrt-fp16": 0.2}
SIZE = {"onnx-fp32": 90.9, "onnx-int8": 23.1, "litert-fp32": 91.7, "litert-int8": 26.7, "tensorrt-fp16": 46.0}
PROGRAMS = ("onnx-fp32", "onnx-int8", "litert-int8")
SHA = "0123456789abcdef" * 4


def row_lengths(rows: int = 128, seed: int = 7) -> tuple[int, ...]:
    """Tokens per row, like SST-2 at natural length."""
    drawn = np.random.default_rng(seed).gamma(5.0, 5.2, rows)
    return tuple(int(n) for n in np.clip(drawn, 4, 55))


def prediction(latency_ms: float | None = 30.0, **changes: object) -> wire.Prediction:
    metrics = wire.Metrics(latency_ms=latency_ms, memory_mb=140.0, accuracy=0.88)
    said = wire.Prediction("raspberry-pi-4", 4, metrics, 0.5, 2.0, "roofline")
    return said._replace(**changes)


def fidelity(int8: bool = True, **changes: object) -> wire.Fidelity:
    mean, worst, value = (0.9962, 0.9541, 0.8819) if int8 else (0.999999, 0.99999, 0.8865)
    found = wire.Fidelity("cosine", mean, worst, 0.412 if int8 else 3e-6, 872, "accuracy", value, 0.8865)
    return found._replace(**changes)


def entry(name: str, **changes: object) -> wire.Entry:
    format, precision = name.split("-")
    tensor = wire.Tensor("input_ids", "int64", (-1, -1))
    made = wire.Entry(
        name=name,
        format=format,
        precision=precision,
        path=f"programs/{name}/model.{format}",
        size_bytes=int(SIZE.get(name, 50) * 2**20),
        inputs=(tensor,),
        outputs=(wire.Tensor("logits", "float32", (-1, 2)),),
        lengths=(16, 32, 48, 64, 128) if format == "litert" else (),
        runtime=wire.Runtime(format, "1.0", "2"),
        needs=wire.Needs("2.28", ("neon",)),
        work=(wire.Work(32, 6.9e8, 0.0, 9e7, 1e6),),
        predicted=prediction(36.0 * SPEED.get(name, 0.8)),
        checked=fidelity(precision == "int8"),
        golden_similarity=0.99,
    )
    return made._replace(**changes)


def manifest(programs: tuple[str, ...] = PROGRAMS, **changes: object) -> wire.Manifest:
    made = wire.Manifest(
        schema=wire.MANIFEST_SCHEMA,
        name="minilm-sst2",
        version=3,
        target="raspberry-pi-4",
        expires="2027-05-20",
        builder="edgeformer 0.1.0",
        task=wire.Task("classification", "accuracy", False, ("negative", "positive")),
        programs=tuple(entry(name) for name in programs),
        history=(
            wire.Step("load", {"model": "minilm-sst2", "parameters": 22_713_986}),
            wire.Step("prune.heads", {"kept": 0.83, "parameters": 21_500_000}),
            wire.Step("quantize.int8", {"calibration_rows": 300, "weights": "per channel"}),
        ),
        gate=wire.Gate(0.99, 0.98, 0.97, 0.98, False),
        cases=wire.Cases("cases/golden.npz", "cases/evaluation.npz", 872, "SST-2 dev"),
        files={f"programs/{name}": wire.File(int(SIZE.get(name, 50) * 2**20), SHA) for name in programs},
    )
    return made._replace(**changes)


@dataclass(frozen=True)
class Timing:
    """Latency of one row: base + slope x tokens, times speed, with log-normal noise and rare stalls."""

    samples: int = 1024
    rows: int = 128
    seed: int = 0
    scale: float = 1.0
    base_ms: float = 4.0
    slope_ms: float = 0.9
    noise: float = 0.04
    stalls: float = 0.01
    wander: float = 0.0  # share by which the whole machine gets slower and faster, over some hundred samples
    lengths: tuple[int, ...] = field(default=())


def latency(name: str = "onnx-fp32", timing: Timing = Timing()) -> wire.Latency:
    random = np.random.default_rng(timing.seed)
    lengths = timing.lengths or row_lengths(timing.rows)
    tokens = np.resize(np.asarray(lengths, dtype=float), timing.samples)
    ms = (timing.base_ms + timing.slope_ms * tokens) * SPEED.get(name, 0.8) * timing.scale
    ms *= np.exp(random.normal(0, timing.noise, timing.samples))
    ms *= np.where(random.random(timing.samples) < timing.stalls, 1.8, 1.0)
    if timing.wander:
        steps = random.normal(0, timing.wander * np.sqrt(1 - 0.99**2), timing.samples)
        steps[0] = random.normal(0, timing.wander)
        level = 0.0
        ms *= np.exp([level := 0.99 * level + step for step in steps])
    whole = np.maximum(np.round(ms * 1000), 1)
    p50, p90, p95, p99 = (float(p) / 1000 for p in np.percentile(whole, [50, 90, 95, 99]))
    return wire.Latency(
        warmup=40,
        n=timing.samples,
        seconds=float(whole.sum() / 1e6),
        mean_ms=float(whole.mean() / 1000),
        std_ms=float(whole.std() / 1000),
        min_ms=float(whole.min() / 1000),
        p50_ms=p50,
        p90_ms=p90,
        p95_ms=p95,
        p99_ms=p99,
        samples_us=tuple(int(v) for v in whole),
        row_lengths=lengths,
    )


def state(khz: int = 1_500_000, celsius: float = 47.2) -> dict[str, object]:
    return {
        "governor": "ondemand",
        "khz": [khz] * 4,
        "temp_c": {"cpu-thermal": celsius},
        "throttled": 0,
        "limited_by": [],
        "power_mode": None,
        "charger": None,
        "battery": None,
        "load": 0.31,
        "memory_available_mb": 3211,
    }


def energy(**changes: object) -> wire.Energy:
    return wire.Energy("ina226 5 V input", "trapezoid", 118.4, 61.3, 2.71, 12.0, 480, 512)._replace(**changes)


def result(name: str, timing: Timing = Timing(), **changes: object) -> wire.Result:
    format, precision = name.split("-")
    made = wire.Result(
        program=name,
        format=format,
        precision=precision,
        runtime_version="1.31.1" if format == "onnx" else "2.3.0",
        threads=4,
        import_ms=412.0,
        load_ms=183.0,
        first_ms=51.0,
        golden=wire.Golden(4, 0.99997, 0.99, True),
        latency=latency(name, timing),
        memory=wire.Memory(61.0 + 1.4 * SIZE.get(name, 50), 22.0 + 1.4 * SIZE.get(name, 50), 70.2),
        energy=None,
        fidelity=fidelity(precision == "int8"),
        before=state(),
        after=state(celsius=55.8),
        flags=(),
    )
    return made._replace(**changes)


def report(
    programs: tuple[str, ...] = PROGRAMS,
    timing: Timing = Timing(),
    bundle: wire.Manifest | None = None,
    **changes: object,
) -> wire.Report:
    """`bundle` is the manifest this is a report of. `results` among the changes replaces the made ones."""
    results = tuple(
        result(name, Timing(**{**vars(timing), "seed": timing.seed + 1000 * i})) for i, name in enumerate(programs)
    )
    source = bundle or manifest()
    target = str(changes.get("target", source.target))
    made = wire.Report(
        schema=wire.REPORT_SCHEMA,
        id="",
        bundle=wire.digest(wire.dump(source)),
        name=source.name,
        version=source.version,
        target=target,
        kind="measured",
        started="2026-11-21T09:41:07Z",
        agent="0.1.0",
        profile="default",
        device={"model": MODELS.get(target), "cores": 4, "kernel": "6.6.31", "glibc": "2.36", "isa": ["asimd", "fp"]},
        results=results,
        skipped={},
        selected=min(results, key=lambda r: r.latency.p50_ms).program if results else None,
    )
    return signed(made._replace(**changes))


def signed(made: wire.Report) -> wire.Report:
    """With the id its content gives."""
    return made._replace(id=wire.report_id(made))
