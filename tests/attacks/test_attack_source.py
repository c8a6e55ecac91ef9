"""What the code must never contain: nothing that turns a bundle's bytes into code before or without a check."""

import ast
from pathlib import Path

import pytest

import edgeformer
import edgeformer_agent

AGENT = sorted(Path(edgeformer_agent.__file__).parent.rglob("*.py"))
HOST = [Path(edgeformer.__path__[0]) / name for name in ("bundle.py", "signing.py")]
FORBIDDEN_MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "tarfile"}
FORBIDDEN_CALLS = {"eval", "exec", "compile"}


def offences(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in FORBIDDEN_MODULES]
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in FORBIDDEN_MODULES:
            found.append(str(node.module))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FORBIDDEN_CALLS:
            found.append(node.func.id)
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
            found.append("allow_pickle")
        if isinstance(node, ast.keyword) and node.arg == "shell" and ast.unparse(node.value) != "False":
            found.append("shell")
    return found


@pytest.mark.parametrize("path", AGENT + HOST, ids=lambda path: path.name)
def test_nothing_unpickles_or_evaluates(path):
    assert offences(path.read_text()) == []


@pytest.mark.parametrize(
    "seeded",
    [
        "import pickle",
        "from pickle import loads",
        "import marshal as m",
        "import os, tarfile",
        "def f():\n from joblib.x import load",
        "eval('1')",
        "np.load(f, allow_pickle=True)",
        "np.load(f, allow_pickle=flag)",
        "run(c, shell=True)",
    ],
)
def test_the_check_finds_what_it_looks_for(seeded):
    assert offences(seeded)


@pytest.mark.parametrize("name", ["verify.py", "ed25519.py", "wire.py"])
def test_what_decides_parses_as_3_6_and_imports_the_standard_library_only(name):
    path = next(path for path in AGENT if path.name == name)
    tree = ast.parse(path.read_text(), feature_version=(3, 6))
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level}
    known = {
        "contextlib",
        "datetime",
        "fcntl",
        "hashlib",
        "json",
        "os",
        "re",
        "shutil",
        "stat",
        "typing",
        "unicodedata",
    }
    assert modules <= known
