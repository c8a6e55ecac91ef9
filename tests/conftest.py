"""
Fixtures that several test files share.

One thread for every numeric library: the matrices are small, and on a busy machine spinning threads are slow.
"""

import importlib.util
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")
BOARD = Path(__file__).parents[1] / "tools" / "board.py"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that build most go first: two workers then share many short ones at the end."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(scope="session")
def board_tool() -> ModuleType:
    """tools/board.py, which is in no package; skips where it cannot make a board."""
    spec = importlib.util.spec_from_file_location("board", BOARD)
    assert spec and spec.loader
    module = sys.modules["board"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if reason := module.missing():
        pytest.skip(reason)
    return module


@pytest.fixture(scope="session")
def board(board_tool: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """An emulated Raspberry Pi 4 behind sshd, one for all tests: give your files a folder of their own in its home."""
    with board_tool.running(board_tool.cached("raspberry-pi-4"), tmp_path_factory.mktemp("board")) as running:
        yield running


@pytest.fixture(scope="session")
def executorch_bundle(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A sparse encoder of one layer for the board, int8 and fp32; its model; the folder with the key it trusts."""
    for module in ("torch", "executorch", "ziglang"):
        pytest.importorskip(module)
    import sparse_models

    import edgeformer as ef

    folder = tmp_path_factory.mktemp("executorch")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(folder / "config"))
        model = sparse_models.model(layers=1, lengths=(32, 70))
        made = ef.build(model, "raspberry-pi-4", formats=["executorch"], precision=("int8", "fp32"), out=folder)
        return made, model, folder / "config"


@pytest.fixture
def config_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keys and caches of one test: the developer's own are neither used nor changed."""
    home = tmp_path / "config"
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return home
