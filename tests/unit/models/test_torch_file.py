"""Torch files that would take more memory or time than their weights need are refused before torch reads them."""

import io
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from secateur.errors import ModelError
from secateur.models import read_weights


def repacked(path: Path, parts: dict[str, bytes], kind: int = zipfile.ZIP_STORED) -> Path:
    """A good torch file of one tensor in which parts are replaced."""
    content = io.BytesIO()
    torch.save({"w": torch.arange(4.0)}, content)
    with zipfile.ZipFile(content) as old, zipfile.ZipFile(path, "w", kind) as new:
        for entry in old.infolist():
            end = entry.filename.partition("/")[2]
            new.writestr(entry.filename, parts.get(end, old.read(entry.filename)))
    return path


def test_repacked_files_are_read(tmp_path: Path):
    tensors = read_weights(repacked(tmp_path / "w.pt", {}))
    assert torch.equal(tensors["w"], torch.arange(4.0))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 4])
def test_what_torch_saves_is_read(tmp_path: Path, zipped: bool, protocol: int):
    state = {"w": torch.arange(4.0), "n": torch.tensor(3), "half": torch.ones(2, dtype=torch.bfloat16)}
    content = {"state_dict": state, "optimizer": {"state": {0: {"step": 1}}, "param_groups": [{"lr": 0.1}]}}
    torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    if protocol == 2:
        assert all(torch.equal(tensor, state[name]) for name, tensor in read_weights(tmp_path / "w.pt").items())
    else:  # torch itself reads none but protocol 2 without running code
        with pytest.raises(ModelError, match="must be a complete torch or"):
            read_weights(tmp_path / "w.pt")


def test_compressed_files_are_refused(tmp_path: Path):
    path = repacked(tmp_path / "w.pt", {"data/0": bytes(10**7)}, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 10**5
    with pytest.raises(ModelError, match=r"it is compressed, which torch\.save never does"):
        read_weights(path)


def test_overlapping_parts_are_refused(tmp_path: Path):
    path = repacked(tmp_path / "w.pt", {"data/0": bytes(10**5)})
    with zipfile.ZipFile(path, "a") as archive:
        (big,) = (entry for entry in archive.infolist() if entry.filename.endswith("data/0"))
        for number in range(1, 9):
            twin = zipfile.ZipInfo(big.filename[:-1] + str(number))
            for name in ("header_offset", "file_size", "compress_size", "CRC"):
                setattr(twin, name, getattr(big, name))
            archive.filelist.append(twin)
            archive.NameToInfo[twin.filename] = twin
        archive._didModify = True
    with pytest.raises(ModelError, match="its parts are larger than the file"):
        read_weights(path)


def doubled(times: int) -> bytes:
    """A mapping with the key ((((1, 1), (1, 1)), ...)), in which every tuple has the previous one twice."""
    steps = b"".join(b"h" + bytes([n]) + b"h" + bytes([n]) + b"\x86q" + bytes([n + 1]) for n in range(1, times))
    return b"\x80\x02}q\x00K\x01K\x01\x86q\x01" + steps + b"K\x05s."


@pytest.mark.parametrize("zipped", [True, False])
def test_a_key_with_exponentially_many_parts_is_refused(tmp_path: Path, zipped: bool):
    if zipped:
        path = repacked(tmp_path / "w.pt", {"data.pkl": doubled(60)})
    else:
        path = tmp_path / "w.pt"
        path.write_bytes(doubled(60))
    with pytest.raises(ModelError, match="it builds objects of endless parts"):
        read_weights(path)


def test_bytearrays_of_a_given_length_are_refused(tmp_path: Path):
    made = b"\x80\x02cbuiltins\nbytearray\n" + pickle.dumps((2**40,), 2)[2:-1] + b"R."
    with pytest.raises(ModelError, match="it builds more than tensors by name"):
        read_weights(repacked(tmp_path / "w.pt", {"data.pkl": made}))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(2, dtype=torch.complex64),
        torch.zeros(2, device="meta"),
        torch.zeros(2).to_sparse(),
        torch.quantize_per_tensor(torch.zeros(2), 1.0, 0, torch.qint8),
    ],
)
def test_tensors_that_are_not_plain_are_refused(tmp_path: Path, tensor: torch.Tensor):
    torch.save({"good": torch.zeros(1), "odd": tensor}, tmp_path / "w.pt")
    with pytest.raises(ModelError, match="must hold dense tensors of floats or whole numbers; got others: odd"):
        read_weights(tmp_path / "w.pt")


@pytest.mark.parametrize("name", ["w.npy", "w.npz"])
def test_files_of_numpy_are_refused_with_the_way_out(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(b"\x93NUMPY")
    with pytest.raises(ModelError, match=r"numpy\.load\(allow_pickle=False\).*safetensors\.numpy"):
        read_weights(tmp_path / name)


def test_a_too_long_header_is_refused(tmp_path: Path):
    (tmp_path / "w.safetensors").write_bytes((2**40).to_bytes(8, "little") + b"{}")
    with pytest.raises(ModelError, match="must be a complete"):
        read_weights(tmp_path / "w.safetensors")
