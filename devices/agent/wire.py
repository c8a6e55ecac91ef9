"""
What travels between host and device: the manifest down, the report up, and their JSON. Both sides import this file.

Every record is a NamedTuple with units in its field names; "not measurable here" is None, never a guess.
`decode` is strict: a missing, unknown or duplicate key, a wrong type or an unknown schema is a `WireError` that
names the place, so a reader never works on half a document. A number is finite or it is refused.
"""

import hashlib
import json
from typing import Any, Dict, List, NamedTuple, Optional, Tuple, Union

MANIFEST_SCHEMA = "edgeformer.manifest/1"
REPORT_SCHEMA = "edgeformer.report/1"
SIGNATURE_SCHEMA = "edgeformer.signature/1"
RESULT_SCHEMA = "edgeformer.result/1"
MAX_DEPTH = 32  # of facts, which have no schema: deeper ones can be read here and not written elsewhere


class WireError(ValueError):
    """A document that does not say what its schema requires."""


class Tensor(NamedTuple):
    """One input or output of a program. In `shape`, -1 is the batch or the natural sequence length."""

    name: str
    dtype: str
    shape: Tuple[int, ...]
    pad: float = 0  # fills a row up to a static length


class Work(NamedTuple):
    """What one inference of one row costs, counted on the exported program."""

    length: int  # tokens; 0 where the input has no sequence
    flops: float  # floating-point operations, a multiply-add is two
    int8_ops: float  # int8 operations, a multiply-add is two
    weight_bytes: float
    activation_bytes: float


class Metrics(NamedTuple):
    """One measurement, or one prediction of it."""

    latency_ms: Optional[float] = None  # median over the evaluation rows, one row at a time
    latency_p90_ms: Optional[float] = None
    memory_mb: Optional[float] = None
    energy_mj: Optional[float] = None  # per inference, above idle
    accuracy: Optional[float] = None  # the task's metric


class Prediction(NamedTuple):
    """Metrics nobody has measured yet. The true latency is expected in [low, high] times the stated one."""

    device: str
    threads: int
    metrics: Metrics
    low: float
    high: float
    method: str
    kind: str = "modelled"


class Fidelity(NamedTuple):
    """How close a program is to the fp32 PyTorch model, and how well it does the task."""

    measure: str  # cosine | agreement | correlation | likelihood
    mean: float
    worst: float  # the least similar row
    max_abs: float  # largest absolute difference of any output value
    rows: int
    metric: Optional[str] = None  # accuracy | f1 | macro_f1 | mcc | pearson | spearman
    value: Optional[float] = None
    reference: Optional[float] = None  # the same metric of the fp32 PyTorch model
    also: Dict[str, float] = {}  # noqa: RUF012 (never changed); further metrics by name: exact_match beside f1


class Runtime(NamedTuple):
    """The package that opens a program: minimum <= version < below."""

    package: str
    minimum: str
    below: str


class Needs(NamedTuple):
    """What the device must have besides the runtime."""

    glibc: Optional[str] = None
    isa: Tuple[str, ...] = ()


class Entry(NamedTuple):
    """One program of a bundle."""

    name: str
    format: str
    precision: str
    path: str  # the file a runner opens
    size_bytes: int
    inputs: Tuple[Tensor, ...]
    outputs: Tuple[Tensor, ...]
    lengths: Tuple[int, ...]  # static sequence lengths, ascending; () where any length runs
    runtime: Runtime
    needs: Needs
    work: Tuple[Work, ...]
    predicted: Prediction
    checked: Fidelity
    golden_similarity: float  # the self-check's floor against this program's own output on the build machine
    # Machine ("linux-aarch64") -> file with our operator, which makes the program faster and never different. For
    # executorch it is a runtime too, so that a device needs none.
    libraries: Dict[str, str] = {}  # noqa: RUF012 (never changed)


class Task(NamedTuple):
    """What the outputs mean and how they are judged."""

    # embedding | classification | regression | token_classification | question_answering | next_token
    kind: str
    metric: Optional[str] = None  # accuracy | f1 | macro_f1 | mcc | pearson | spearman
    paired: bool = False  # rows 2i and 2i+1 are compared with each other
    labels: Tuple[str, ...] = ()


class Gate(NamedTuple):
    """The least a program must reach to be packaged."""

    metric_ratio: float
    cosine: float
    agreement: float
    correlation: float
    loosened: bool


class Step(NamedTuple):
    """One pass, and the figures it left."""

    name: str
    facts: Dict[str, Any]


class Cases(NamedTuple):
    """Inputs that travel with the bundle, already tokenized."""

    golden: str
    evaluation: str
    rows: int
    source: str


class File(NamedTuple):
    """Size and digest of one file of the bundle."""

    size: int
    sha256: str


class Manifest(NamedTuple):
    """Everything a device may rely on. Signed; every other file hangs on it by its digest."""

    schema: str
    name: str
    version: int  # only rises
    target: str
    expires: str  # last day of validity, YYYY-MM-DD, UTC
    builder: str
    task: Task
    programs: Tuple[Entry, ...]
    history: Tuple[Step, ...]
    gate: Gate
    cases: Cases
    files: Dict[str, File]


class Signature(NamedTuple):
    """Who vouches for the manifest's bytes: Ed25519, lower-case hex."""

    schema: str
    key: str
    signature: str


class Latency(NamedTuple):
    """A steady run, one row at a time."""

    warmup: int
    n: int
    seconds: float
    mean_ms: float
    std_ms: float
    min_ms: float
    p50_ms: float
    p90_ms: float
    p95_ms: float
    p99_ms: float
    samples_us: Tuple[int, ...]  # in the order they were taken; sample i ran row i % len(row_lengths)
    row_lengths: Tuple[int, ...]  # tokens per row; 0 where the input has no sequence


class Memory(NamedTuple):
    """Of the process that ran the program."""

    peak_rss_mb: float
    growth_mb: float  # peak less what the process held before the runtime was imported
    pss_mb: Optional[float] = None


class Energy(NamedTuple):
    """Energy per inference over a burst, integrated from one sensor."""

    source: str
    method: str
    total_mj: float
    above_idle_mj: float
    idle_w: float
    seconds: float
    samples: int
    inferences: int


class Golden(NamedTuple):
    """The self-check before any measurement."""

    rows: int
    worst: float
    floor: float
    passed: bool


class Native(NamedTuple):
    """What our own operator library did in one inference."""

    calls_per_run: int  # one for each layer with sparse attention
    kernel_set: str  # the inner loops in use, e.g. "neon"
    kept: Tuple[float, ...]  # share of the candidate blocks that were kept, a layer


class Spent(NamedTuple):
    """What one operator took of one run, summed over its calls."""

    operator: str
    ms: float


class Result(NamedTuple):
    """What one program did on the device."""

    program: str
    format: str
    precision: str
    runtime_version: str
    threads: int
    import_ms: float
    load_ms: float
    first_ms: float
    golden: Golden
    latency: Optional[Latency]  # None where the self-check failed
    memory: Memory
    energy: Optional[Energy]
    fidelity: Optional[Fidelity]
    before: Dict[str, Any]  # clocks, temperatures, governor, throttling
    after: Dict[str, Any]
    flags: Tuple[str, ...]
    native: Optional[Native] = None  # None where no library of ours ran
    profile: Tuple[Spent, ...] = ()  # longest first, of a run of its own; empty where the runtime does not tell

    def metrics(self):
        # type: () -> Metrics
        """The headline numbers, in the form a prediction has."""
        return Metrics(
            latency_ms=self.latency.p50_ms if self.latency else None,
            latency_p90_ms=self.latency.p90_ms if self.latency else None,
            memory_mb=self.memory.peak_rss_mb,
            energy_mj=self.energy.above_idle_mj if self.energy else None,
            accuracy=self.fidelity.value if self.fidelity else None,
        )


class Measured(NamedTuple):
    """What the process that ran one program hands to the agent."""

    schema: str
    result: Result


class Report(NamedTuple):
    """What a device says about one bundle."""

    schema: str
    id: str  # sha256 of the report without it
    bundle: str  # digest of the manifest's bytes
    name: str
    version: int
    target: str
    kind: str  # measured | emulated
    started: str  # wall clock of the device, ISO 8601, UTC
    agent: str
    profile: str  # default | quick | mlperf | custom
    device: Dict[str, Any]
    results: Tuple[Result, ...]
    skipped: Dict[str, str]  # program -> why it was not run
    selected: Optional[str]  # the fastest program that passed its self-check


Record = Union[Manifest, Report]


def dump(record):
    # type: (Any) -> bytes
    """Canonical JSON: sorted keys, finite numbers, UTF-8, one trailing newline."""
    text = json.dumps(_plain(record), indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8") + b"\n"


def load_manifest(data):
    # type: (bytes) -> Manifest
    """Raises WireError."""
    manifest = decode(Manifest, MANIFEST_SCHEMA, data)  # type: Manifest
    return manifest


def load_report(data):
    # type: (bytes) -> Report
    """Raises WireError, also where the id is not the digest of the rest."""
    report = decode(Report, REPORT_SCHEMA, data)  # type: Report
    if report.id != report_id(report):
        raise WireError("report: id {} is not the digest of its content; it was changed on the way".format(report.id))
    return report


def report_id(report):
    # type: (Report) -> str
    """Sending the same report twice is harmless: its name is its content."""
    return hashlib.sha256(dump(report._replace(id=""))).hexdigest()


def digest(data):
    # type: (bytes) -> str
    return hashlib.sha256(data).hexdigest()


def decode(kind, schema, data):
    # type: (Any, str, bytes) -> Any
    """A document of this schema as the record `kind`. Raises WireError."""
    try:
        body = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_not_finite,
            parse_float=_finite,
            parse_int=_integer,
        )
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise WireError("not a JSON document: {}".format(error))
    if not isinstance(body, dict):
        raise WireError("expected a JSON object, got {}".format(type(body).__name__))
    if body.get("schema") != schema:
        raise WireError(
            "schema {!r}: this side speaks {!r}; use the agent and the SDK of one release".format(
                body.get("schema"), schema
            )
        )
    return _decode(kind, body, schema.split(".")[1].split("/")[0])


def _unique(pairs):
    # type: (List[Tuple[str, Any]]) -> Dict[str, Any]
    body = dict(pairs)
    if len(body) != len(pairs):
        keys = [key for key, _ in pairs]
        raise WireError("duplicate key {!r}".format(next(key for key in keys if keys.count(key) > 1)))
    return body


def _not_finite(name):
    # type: (str) -> Any
    raise WireError("{} is not a finite number".format(name))


def _finite(text):
    # type: (str) -> float
    value = float(text)  # 1e999 is inf
    return value if abs(value) < float("inf") else _not_finite(text)


def _integer(text):
    # type: (str) -> int
    if len(text) > 20:  # beyond 64 bits; Python before 3.11 takes minutes over a million digits
        raise WireError("{}... is too large a number".format(text[:20]))
    return int(text)


def _plain(value):
    # type: (Any) -> Any
    if hasattr(value, "_asdict"):
        return {key: _plain(item) for key, item in value._asdict().items()}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _decode(kind, value, where):
    # type: (Any, Any, str) -> Any
    """`value` as `kind`, where `kind` is an annotation used in this file."""
    if kind is Any:
        return _facts(value, where, MAX_DEPTH)
    if hasattr(kind, "_fields"):
        return _record(kind, value, where)
    origin, arguments = getattr(kind, "__origin__", None), getattr(kind, "__args__", ())  # type: Any, Any
    if origin is Union:  # only Optional is used
        return None if value is None else _decode(arguments[0], value, where)
    if origin in (tuple, Tuple):
        items = _typed(list, value, where)
        return tuple(_decode(arguments[0], item, "{}[{}]".format(where, i)) for i, item in enumerate(items))
    if origin in (dict, Dict):
        items = _typed(dict, value, where)
        return {_typed(str, k, where): _decode(arguments[1], v, "{}.{}".format(where, k)) for k, v in items.items()}
    return _typed(kind, value, where)


def _facts(value, where, depth):
    # type: (Any, str, int) -> Any
    """Any JSON that can be written again."""
    if depth < 0:
        raise WireError("{}: nested deeper than {}".format(where, MAX_DEPTH))
    if isinstance(value, dict):
        return {_typed(str, k, where): _facts(v, "{}.{}".format(where, k), depth - 1) for k, v in value.items()}
    if isinstance(value, list):
        return [_facts(item, "{}[{}]".format(where, i), depth - 1) for i, item in enumerate(value)]
    return _typed(str, value, where) if isinstance(value, str) else value


def _record(kind, value, where):
    # type: (Any, Any, str) -> Any
    _typed(dict, value, where)
    unknown = sorted(set(value) - set(kind._fields))
    missing = sorted(set(kind._fields) - set(value))
    if unknown or missing:
        raise WireError("{}: unknown keys {}, missing keys {}".format(where, unknown, missing))
    types = kind.__annotations__
    return kind(**{key: _decode(types[key], value[key], "{}.{}".format(where, key)) for key in kind._fields})


def _typed(kind, value, where):
    # type: (Any, Any, str) -> Any
    allowed = (int, float) if kind is float else (kind,)
    if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):
        raise WireError("{}: expected {}, got {!r}".format(where, kind.__name__, value))
    if kind is str and any("\ud800" <= c <= "\udfff" for c in str(value)):
        raise WireError("{}: {!r} is not Unicode text (half of a surrogate pair)".format(where, value))
    return value
