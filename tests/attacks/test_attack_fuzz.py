"""Any byte of any file, any byte of the archive: one changed bit is a refusal. Seeded, so that a failure repeats."""

import random
from pathlib import Path

import pytest
from small_bundle import KEYS, TARGET

from edgeformer import bundle, errors
from edgeformer_agent import verify as agent

FILES = ["manifest.json", "manifest.sig", "agent.pyz", "cases/golden.npz", "programs/onnx-int8/model.onnx"]


@pytest.mark.parametrize("name", FILES)
def test_any_bit_of_any_file(good, name):
    drawn = random.Random(name)
    data = (good / name).read_bytes()
    for _ in range(150):
        at, mask = drawn.randrange(len(data)), drawn.randrange(1, 256)
        (good / name).write_bytes(data[:at] + bytes([data[at] ^ mask]) + data[at + 1 :])
        with pytest.raises(agent.Refused) as refusal:
            agent.verify(good, KEYS, TARGET)
        assert name in str(refusal.value) or name == "manifest.sig", (at, mask)
    (good / name).write_bytes(data)
    agent.verify(good, KEYS, TARGET)


def test_every_byte_of_the_signature(good):
    data = (good / "manifest.sig").read_bytes()
    for at in range(len(data)):
        for other in b' \n\r\t0aA"':
            if data[at] != other:
                (good / "manifest.sig").write_bytes(data[:at] + bytes([other]) + data[at + 1 :])
                with pytest.raises(agent.Refused):
                    agent.signed(good, KEYS)


def test_any_bit_of_the_archive(good, tmp_path):
    """Header, padding and end are as strict as the content is."""
    drawn = random.Random("archive")
    data = Path(f"{good}.tar").read_bytes()
    archive = tmp_path / "flipped.tar"
    places = [drawn.randrange(len(data)) for _ in range(60)] + [drawn.randrange(512) for _ in range(60)]
    places += [len(data) - 1 - drawn.randrange(2000) for _ in range(60)]
    for i, at in enumerate(places):
        archive.write_bytes(data[:at] + bytes([data[at] ^ drawn.randrange(1, 256)]) + data[at + 1 :])
        with pytest.raises(agent.Refused):
            agent.unpack(archive, tmp_path / str(i))
            agent.verify(tmp_path / str(i), KEYS, TARGET)


def test_any_bit_through_the_host(good):
    drawn = random.Random("host")
    for name in FILES:
        data = (good / name).read_bytes()
        for _ in range(20):
            at = drawn.randrange(len(data))
            (good / name).write_bytes(data[:at] + bytes([data[at] ^ 1 << drawn.randrange(8)]) + data[at + 1 :])
            with pytest.raises(errors.BundleRefused):
                bundle.open_bundle(good).verify(KEYS, TARGET)
        (good / name).write_bytes(data)


def test_cut_and_grown(good):
    drawn = random.Random("cut")
    for name in FILES:
        data = (good / name).read_bytes()
        for other in (data[: drawn.randrange(len(data))], data + b"\n", data + b" ", b"\n" + data):
            (good / name).write_bytes(other)
            with pytest.raises(agent.Refused):
                agent.verify(good, KEYS, TARGET)
        (good / name).write_bytes(data)
