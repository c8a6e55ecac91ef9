"""One good bundle for all attacks. An attack on it counts only because the bundle passes before."""

import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from small_bundle import KEYS, TARGET, small

from edgeformer import bundle, errors
from edgeformer_agent import verify as agent


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small(tmp_path_factory.mktemp("built") / "good").path


@pytest.fixture
def good(built: Path, tmp_path: Path) -> Path:
    """A copy of the good bundle and its archive, which passes."""
    folder = tmp_path / "good"
    shutil.copytree(built, folder)
    shutil.copyfile(f"{built}.tar", f"{folder}.tar")
    assert agent.verify(folder, KEYS, TARGET).target == TARGET
    bundle.open_bundle(folder).verify(KEYS, TARGET)
    return folder


Refuses = Callable[..., str]


@pytest.fixture
def refused() -> Refuses:
    """The device and the host refuse the folder, and both messages name the culprit."""

    def check(folder: Path, *culprits: str, keys: Iterable[str] = KEYS, target: str = TARGET) -> str:
        with pytest.raises(agent.Refused) as device:
            agent.verify(folder, keys, target)
        with pytest.raises(errors.BundleRefused) as host:
            bundle.open_bundle(folder).verify(keys, target)
        for culprit in culprits:
            assert culprit in str(device.value)
            assert culprit in str(host.value)
        return str(device.value)

    return check


@pytest.fixture
def not_unpacked(tmp_path: Path) -> Refuses:
    """Device and host refuse the archive, name the culprit, and leave nothing on the disk."""

    def check(archive: Path, *culprits: str, error: type[Exception] = errors.BundleRefused) -> str:
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(agent.Refused) as device:
            agent.unpack(archive, tmp_path / "unpacked")
        assert sorted(tmp_path.rglob("*")) == before
        with pytest.raises(error) as host:
            bundle.open_bundle(archive)
        assert not [path for path in (tmp_path / "cache").rglob("*") if path.name not in ("edgeformer", "bundles")]
        for culprit in culprits:
            assert re.search(re.escape(culprit), str(device.value))
            assert error is errors.BadInput or culprit in str(host.value)
        return str(device.value)

    return check
