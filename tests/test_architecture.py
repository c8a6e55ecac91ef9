"""
The shape of the code, as tests. When one fails, change the design on purpose, here first.

Every rule is a function from a tree of files to its breaches; `test_a_seeded_breach_is_found` plants one for each rule
in a copy, so that no rule can rot into one that never fails.
"""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

import edgeformer

ROOT = Path(__file__).parents[1]
NEWER_THAN_36 = {
    "dataclasses",
    "contextvars",
    "tomllib",
    "zoneinfo",
    "graphlib",
    "importlib.resources",
    "importlib.metadata",
}
NEWER_CALLS = {"perf_counter_ns", "removeprefix", "removesuffix", "capture_output", "file_digest", "cached_property"}
FRAMEWORKS = ("torch", "transformers", "onnx", "onnxruntime", "litert_torch", "ai_edge_litert", "huggingface_hub")
FORBIDDEN_NAMES = {"utils", "util", "common", "base", "core", "helpers", "misc"}


def sources(root: Path, area: str) -> list[Path]:
    return sorted((root / area).rglob("*.py"))


def imports(root: Path, path: Path) -> Iterator[str]:
    """Absolute dotted names a file imports, relative ones resolved."""
    package = path.relative_to(root).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            yield from (".".join((*base, *filter(None, [node.module]), a.name)) for a in node.names)


def area(name: str) -> str | None:
    parts = name.split(".")
    return parts[1] if parts[0] == "edgeformer" and len(parts) > 1 else None


def passes_and_formats_know_nothing_of_each_other(root: Path) -> Iterator[str]:
    forbidden = {"passes": {"formats"}, "formats": {"passes", "build", "cli"}}
    for path in sources(root, "edgeformer"):
        here = path.relative_to(root / "edgeformer").parts[0]
        banned = forbidden.get(here, set()) | ({"formats"} if here == "formats" and path.stem != "__init__" else set())
        yield from (f"{path.name} imports {name}" for name in imports(root, path) if area(name) in banned)


def a_tool_chain_is_imported_in_its_format_only(root: Path) -> Iterator[str]:
    chains = {
        "onnx": ("onnx", "onnxruntime", "onnxscript"),
        "coreml": ("coremltools",),
        "litert": ("litert_torch", "ai_edge_litert", "ai_edge_quantizer"),
    }
    # Two formats are made of ONNX.
    lowered = ("tensorrt/lower.py", "tensorrt/ranges.py", "tensorrt/rules.py")
    shared = ("onnx_graph.py", "onnx_int8.py", "onnx_outliers.py", *lowered)
    for path in sources(root, "edgeformer"):
        for format, tops in chains.items():
            own = (f"formats/{format}.py", f"{format}_package.py", f"attention/{format}_function.py")
            if path.relative_to(root / "edgeformer").as_posix() in (*own, *(shared if format == "onnx" else ())):
                continue
            yield from (f"{path.name} imports {n}" for n in imports(root, path) if n.split(".")[0] in tops)


def the_agent_is_python_36_and_numpy_psutil_only(root: Path) -> Iterator[str]:
    allowed = (set(sys.stdlib_module_names) - NEWER_THAN_36) | {"numpy", "psutil"}
    for path in sources(root, "devices/agent"):
        text = path.read_text()
        try:
            tree = ast.parse(text, feature_version=(3, 6))
        except SyntaxError as error:
            yield f"{path.name} is not Python 3.6: {error}"
            continue
        called = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
        called |= {k.arg for n in ast.walk(tree) if isinstance(n, ast.Call) for k in n.keywords if k.arg}
        yield from (f"{path.name} uses {name}, which 3.6 has not" for name in sorted(called & NEWER_CALLS))
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in names:
                top = name.split(".")[0]
                own = path.parent.name == "runners" and top != "edgeformer"  # a runner is its runtime
                if name in NEWER_THAN_36 or (top not in allowed and not own):
                    yield f"{path.name} imports {name}"


def every_format_has_a_runner_of_the_same_name(root: Path) -> Iterator[str]:
    found = {p.stem for p in (root / "edgeformer" / "formats").glob("[!_]*.py")}
    runners = {p.stem for p in (root / "devices" / "agent" / "runners").glob("[!_]*.py")}
    yield from (f"{name} is only in one of the two folders" for name in sorted(found ^ runners))


def a_format_is_one_function(root: Path) -> Iterator[str]:
    wanted = [("export", "model: Model, precisions: Sequence[str]", "Iterator[Program]")]
    for path in (root / "edgeformer" / "formats").glob("[!_]*.py"):
        body = ast.parse(path.read_text()).body
        functions = [n for n in body if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name[0] != "_"]
        seen = [
            (n.name, ast.unparse(n.args), ast.unparse(n.returns or n))
            for n in functions
            if isinstance(n, ast.FunctionDef)
        ]
        if seen != wanted or len(functions) != 1:
            yield f"{path.name} offers {[n.name for n in functions]}, not export(model, precisions)"
        if not any(ast.unparse(n).startswith("PRECISIONS = (") for n in body):
            yield f"{path.name} does not say its PRECISIONS"


def no_pickle_anywhere(root: Path) -> Iterator[str]:
    for path in (*sources(root, "edgeformer"), *sources(root, "devices")):
        yield from (
            f"{path.name} imports {n}"
            for n in imports(root, path)
            if n.split(".")[0] in ("pickle", "marshal", "shelve", "joblib")
        )
        text = path.read_text()
        yield from (
            f"{path.name}: {bad}"
            for bad in ("allow_pickle=True", "torch.load(", "trust_remote_code=True")
            if bad in text
        )


def no_catch_all_modules(root: Path) -> Iterator[str]:
    for path in (*sources(root, "edgeformer"), *sources(root, "devices"), *sources(root, "tools")):
        if path.stem in FORBIDDEN_NAMES or path.parent.name in FORBIDDEN_NAMES:
            yield f"{path.relative_to(root)}: say what it is about"


def inheritance_is_for_exceptions(root: Path) -> Iterator[str]:
    allowed = {"NamedTuple", "Protocol", "Exception", "ValueError", "LookupError"}
    for path in (*sources(root, "edgeformer"), *sources(root, "devices")):
        if path.name == "errors.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            bases = {ast.unparse(b).split(".")[-1].split("[")[0] for b in getattr(node, "bases", [])}
            # torch.nn.Module is how torch says "function with weights", ctypes.Structure how ctypes says "struct".
            extra = bases - allowed - {"Module", "Structure"}
            if isinstance(node, ast.ClassDef) and extra:
                yield f"{path.name}: {node.name}({', '.join(extra)})"


def public_functions_take_no_open_keywords(root: Path) -> Iterator[str]:
    for path in (*sources(root, "edgeformer"), *sources(root, "devices/agent")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name[0] != "_" and node.args.kwarg:
                yield f"{path.name}: {node.name}(**{node.args.kwarg.arg})"


def functions_stay_short(root: Path) -> Iterator[str]:
    """Nobody reads a function that does not fit the screen. Signatures do not count."""
    for path in (*sources(root, "edgeformer"), *sources(root, "devices/agent"), *sources(root, "tools")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0  # type: ignore[operator]
                if lines > 50:
                    yield f"{path.name}: {node.name} has {lines} lines"


def nothing_names_a_machine(root: Path) -> Iterator[str]:
    """No absolute path of a developer, no registry host."""
    pattern = re.compile(r"/(home|Users)/(?!folder\b)[a-z]|/work/|\bpypi\.org|files\.pythonhosted|deb\.debian\.org")
    for path in sorted(p for folder in ("edgeformer", "devices", "tests", "tools") for p in (root / folder).rglob("*")):
        if path.is_file() and path.suffix in (".py", ".md", ".toml", ".css", "") and path.name != Path(__file__).name:
            for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
                if pattern.search(line):
                    yield f"{path.relative_to(root)}:{number}: {line.strip()[:80]}"


def profiles_name_known_formats(root: Path) -> Iterator[str]:
    built = {p.stem for p in (root / "edgeformer" / "formats").glob("[!_]*.py")}
    tree = ast.parse((root / "edgeformer" / "formats" / "__init__.py").read_text())
    planned = next(
        ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "PLANNED"
    )  # type: ignore[attr-defined]
    for path in (root / "devices" / "profiles").glob("*.toml"):
        named = set(tomllib.loads(path.read_text())["formats"])
        yield from (f"{path.name} names {name}" for name in sorted(named - built - set(planned)))
    yield from (f"{name} is built and still called planned" for name in sorted(built & set(planned)))


RULES: dict[Callable[[Path], Iterator[str]], tuple[str, str]] = {  # rule -> (file, what is appended to break it)
    passes_and_formats_know_nothing_of_each_other: ("edgeformer/formats/onnx.py", "from . import litert"),
    a_tool_chain_is_imported_in_its_format_only: ("edgeformer/check.py", "import onnxruntime.quantization"),
    the_agent_is_python_36_and_numpy_psutil_only: ("devices/agent/score.py", "if (n := 1):\n    pass"),
    every_format_has_a_runner_of_the_same_name: ("edgeformer/formats/tfjs.py", "def export(): ..."),
    a_format_is_one_function: ("edgeformer/formats/litert.py", "def supported() -> bool: ..."),
    no_pickle_anywhere: ("edgeformer/data.py", "from pickle import loads"),
    no_catch_all_modules: ("edgeformer/utils.py", ""),
    inheritance_is_for_exceptions: ("edgeformer/program.py", "class OnnxProgram(Program): ..."),
    public_functions_take_no_open_keywords: ("edgeformer/build.py", "def tune(**options): ..."),
    functions_stay_short: ("edgeformer/data.py", "def long():\n" + "    x = 1\n" * 51),
    nothing_names_a_machine: ("tools/demo.py", "HERE = '/home/" + "someone/edgeformer'"),
    profiles_name_known_formats: ("devices/profiles/host.toml", ""),
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule(rule: Callable[[Path], Iterator[str]]) -> None:
    assert list(rule(ROOT)) == []


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_seeded_breach_is_found(rule: Callable[[Path], Iterator[str]], tmp_path: Path) -> None:
    for folder in ("edgeformer", "devices", "tools", "tests"):
        shutil.copytree(
            ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "sysfs", "golden")
        )
    file, text = RULES[rule]
    path = tmp_path / file
    path.write_text((path.read_text() if path.exists() else "") + "\n" + text + "\n")
    if rule is profiles_name_known_formats:
        path.write_text(path.read_text().replace('"litert"]', '"litert", "tfjs"]'))
    assert list(rule(tmp_path))


def test_the_agent_refuses_newer_standard_library(tmp_path: Path) -> None:
    """The seeded breach above is one of syntax; this one is of a module and one of a function."""
    for text in ("import importlib.metadata", "import time\ntime.perf_counter_ns()", "import torch"):
        (tmp_path / "devices" / "agent").mkdir(parents=True, exist_ok=True)
        (tmp_path / "devices" / "agent" / "new.py").write_text(text)
        assert list(the_agent_is_python_36_and_numpy_psutil_only(tmp_path)), text


def test_importing_loads_no_framework() -> None:
    code = f"import sys, edgeformer, edgeformer.cli; bad = set({FRAMEWORKS!r}) & set(sys.modules); assert not bad, bad"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_all_is_what_is_public() -> None:
    public = {n for n, x in vars(edgeformer).items() if n[0] != "_" and not isinstance(x, ModuleType)}
    public |= {"__version__", *edgeformer._LATER}
    assert sorted(edgeformer.__all__) == sorted(public)
    assert all(getattr(edgeformer, name).__doc__ for name in edgeformer.__all__)


def test_the_version_is_said_once() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert edgeformer.__version__ == project["version"]
