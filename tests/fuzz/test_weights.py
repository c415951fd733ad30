"""Corrupt and hostile weight files are refused with one clear message, or give the numbers in the file."""

import io
import pickle
import random
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from guarded import everything_in, refusal
from hostile_artifacts import with_header
from safetensors.torch import save
from torch import Tensor

from secateur.models import digits_resnet, load_weights_, read_weights

FLIPS = 20


class Touch:
    """A pickle that makes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return digits_resnet().state_dict()


def torch_file(content: object, **settings: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, **settings)
    return stream.getvalue()


def content_of(name: str, state: dict[str, Tensor]) -> bytes:
    if name == "w.safetensors":
        return save(state)
    return torch_file(state, _use_new_zipfile_serialization=name == "w.pt")


@pytest.fixture(scope="module", autouse=True)
def _warm(state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("warm")
    for name in ("w.safetensors", "w.pt", "w.pth"):
        (folder / name).write_bytes(content_of(name, state))
        assert len(read_weights(folder / name)) == len(state)


def refused_or_loaded(path: Path) -> str | None:
    """Return the error message, or None; a refused file leaves the model unchanged."""
    model, before = digits_resnet(), everything_in(path.parent)
    old = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    said, _ = refusal(load_weights_, model, path)
    now = model.state_dict()
    assert all(bool(torch.isfinite(tensor).all()) for tensor in now.values())
    assert said is None or all(torch.equal(tensor, now[name]) for name, tensor in old.items())
    assert everything_in(path.parent) == before
    return said


@pytest.mark.parametrize("seed", range(FLIPS))
@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w.pth"])
def test_flipped_weights(tmp_path: Path, state: dict[str, Tensor], name: str, seed: int):
    draw, content = random.Random(seed), bytearray(content_of(name, state))
    near = len(content) if seed % 2 else 4_000  # the structure lies in front, of the zip behind
    content[draw.randrange(near)] ^= 1 << draw.randrange(8)
    content[-draw.randrange(1, 4_000)] ^= 1 << draw.randrange(8)
    (tmp_path / name).write_bytes(content)
    refused_or_loaded(tmp_path / name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w.pth"])
def test_hundreds_of_flipped_weights(tmp_path: Path, state: dict[str, Tensor], name: str):
    for seed in range(1_000):
        draw, content = random.Random(seed), bytearray(content_of(name, state))
        for _ in range(1 + seed % 4):
            content[draw.randrange(6_000) * draw.choice((1, -1))] ^= 1 << draw.randrange(8)
        (tmp_path / name).write_bytes(content)
        refused_or_loaded(tmp_path / name)


NAMES = ["w.pt", "w.pth", "w.bin", "w.safetensors", "w"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_weights_never_runs(tmp_path: Path, state: dict[str, Tensor], name: str, zipped: bool):
    mark = tmp_path / "ran"
    for spoiled in ({"state_dict": state, "args": Touch(mark)}, Touch(mark), {Touch(mark): 1}):
        (tmp_path / name).write_bytes(torch_file(spoiled, _use_new_zipfile_serialization=zipped))
        assert refused_or_loaded(tmp_path / name)
        (tmp_path / name).write_bytes(pickle.dumps(spoiled))
        assert refused_or_loaded(tmp_path / name)
    assert not mark.exists()


FILES: dict[str, Any] = {
    "nothing": b"",
    "text": b"weights",
    "an archive of nothing": b"PK\x05\x06" + bytes(18),
    "tar": b"storages" + bytes(1016),
    "a model of torchscript": None,
    "a zip of something else": None,
    "names that are numbers": torch_file({0: torch.zeros(2), 1: torch.zeros(2)}),
    "names without end": torch_file({"a" * 10**6: torch.zeros(1), "\x1b[2J": torch.zeros(1)}),
    "a key without end": torch_file({"a" * 10**6: 1}),
    "a list": torch_file([torch.zeros(2)]),
    "a number": torch_file(3),
    "itself": None,
    "expanded": torch_file({"linear.weight": torch.zeros(1).expand(10, 64)}),
    "header of 2^60": struct.pack("<Q", 2**60) + b"{}",
    "header of -1": struct.pack("<q", -1) + b"{}",
    "header of half the file": struct.pack("<Q", 8) + b'{"a":1}',
}


def made(name: str, tmp_path: Path) -> bytes:
    if name == "itself":
        content: dict[str, Any] = {}
        content["state_dict"] = content
        return torch_file(content)
    stream = io.BytesIO()
    if name == "a model of torchscript":
        torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), stream)
    else:
        with zipfile.ZipFile(stream, "w") as archive:
            archive.writestr("../../../../tmp/evil.txt", "x")
            archive.writestr("word/document.xml", "<a/>")
    return stream.getvalue()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_files_of_other_kinds(tmp_path: Path, name: str, suffix: str):
    path = tmp_path / f"w{suffix}"
    content = FILES[name]
    path.write_bytes(made(name, tmp_path) if content is None else content)
    assert refused_or_loaded(path)


def header(**changes: Any) -> Any:
    return lambda h: {**h, "linear.bias": {**h["linear.bias"], **changes}}


HEADERS: dict[str, Any] = {
    "offsets": header(data_offsets=[0, 2**60]),
    "shape": header(shape=[2**40]),
    "wrapping shape": header(shape=[2**32, 2**32]),
    "dtype": header(dtype="OBJECT"),
    "scales": header(dtype="F8_E8M0"),
    "four bits": header(dtype="F4"),
    "complex": header(dtype="C64", shape=[5]),
    "zero times everything": lambda h: {**h, "x": {"dtype": "F32", "shape": [0, 2**63], "data_offsets": [0, 0]}},
    "zero times a little": lambda h: {**h, "x": {"dtype": "F32", "shape": [0, 2**62], "data_offsets": [0, 0]}},
    "another order": lambda h: dict(reversed(h.items())),
}


@pytest.mark.parametrize("name", HEADERS)
def test_corrupt_headers(tmp_path: Path, state: dict[str, Tensor], name: str):
    path = tmp_path / "w.safetensors"
    path.write_bytes(with_header(save(state), HEADERS[name]))
    assert (refused_or_loaded(path) is None) == (name == "another order")
