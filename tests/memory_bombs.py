"""Run as a program: reads files that claim terabytes, in a process that cannot take them, and prints how much it grew.

Prints the number of cases and the growth of the peak of resident memory in bytes.
"""

import io
import resource
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import torch
from hostile_artifacts import Good, good_artifact, replaced, with_header, with_tensors
from PIL import Image
from pyarrow import parquet

import secateur
from secateur.data import load_data
from secateur.export import MANIFEST_NAME, WEIGHTS_NAME
from secateur.models import load_model, read_weights
from secateur.pipeline import verify

HEADROOM = 4 * 2**30
"""Bytes of address space beyond what the process has after its imports; what is above them cannot be allocated."""


def limit_memory() -> None:
    """Limit the address space, so that an allocation far above the bound fails instead of burdening the machine."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + HEADROOM
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def torch_file(parts: dict[str, bytes], kind: int) -> bytes:
    """A good torch file of one tensor in which parts are replaced."""
    content, found = io.BytesIO(), io.BytesIO()
    torch.save({"w": torch.arange(4.0)}, content)
    with zipfile.ZipFile(content) as old, zipfile.ZipFile(found, "w", kind) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, parts.get(entry.filename.partition("/")[2], old.read(entry.filename)))
    return found.getvalue()


def png(side: int) -> bytes:
    """An image of a few bytes that claims a size."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(10**6))) + chunk(b"IEND", b"")


def artifacts(good: Good, folder: Path) -> list[Callable[[], object]]:
    """Functions that each write an artifact and read it."""

    def signed(path: tuple[object, ...], new: object) -> Callable[[], object]:
        return lambda: verify(good.write(folder, manifest=replaced(good.manifest, path, new)))

    def weights(content: bytes) -> Callable[[], object]:
        return lambda: secateur.load(good.write(folder, weights=content))

    def text(inside: str) -> Callable[[], object]:
        def read() -> object:
            good.write(folder)
            whole = (folder / MANIFEST_NAME).read_text().replace('"seed": null', f'"seed": {inside}', 1)
            (folder / MANIFEST_NAME).write_text(whole)
            return secateur.load(folder)

        return read

    def hole() -> object:
        good.write(folder, manifest=replaced(good.manifest, ("weights", "bytes"), 2**42))
        with (folder / WEIGHTS_NAME).open("r+b") as file:
            file.truncate(2**42)
        return secateur.load(folder)

    vast = {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}
    return [
        signed(("weights", "bytes"), 2**62),
        signed(("weights", "tensors", 0, "shape"), [2**40, 1]),
        signed(("weights", "tensors", 0, "sparse"), True),
        signed(("input", "shape"), [1, 2**13, 2**13]),
        signed(("input", "shape"), [2**30, 1, 1]),
        signed(("source", "arguments"), {"num_classes": 2**17}),
        signed(("source", "arguments"), {"in_channels": 2**12}),
        signed(("source", "arguments"), {"num_classes": 2**40}),
        text("[" + '{"":0},' * 660_000 + "1]"),
        text("[" + "[]," * 5_000_000 + "1]"),
        text('"' + "\u00e9" * 7_000_000 + '"'),
        text("[" * 7_000_000),
        hole,
        weights(with_header(good.weights, lambda header: {**header, "bn1.weight": vast})),
        weights(struct.pack("<Q", 2**50) + good.weights[8:]),
        weights(with_tensors(good.weights, lambda t: [v.fill_(2**30) for n, v in t.items() if n.endswith("/shape")])),
    ]


def others(folder: Path) -> list[Callable[[], object]]:
    """Functions that each write weights or a data set and read them."""
    bomb = folder / "w.pt"

    def weights(content: bytes) -> Callable[[], object]:
        return lambda: (bomb.write_bytes(content), read_weights(bomb))

    def table(images: pa.Array, labels: list[int], name: str) -> Callable[[], object]:
        def read() -> object:
            place = folder / name
            place.mkdir()
            for split in ("train", "test"):
                path = place / f"{split}-0-of-{10**14}.parquet"
                columns = pa.table({"img": images, "label": pa.array(labels)})
                parquet.write_table(
                    columns, path, compression="zstd", dictionary_pagesize_limit=2**23, store_schema=False
                )
            return load_data(place)

        return read

    zeros = b"\x80\x02cbuiltins\nbytearray\n\x8a\x06\x00\x00\x00\x00\x00\x01\x85R."
    small = io.BytesIO()
    Image.new("RGB", (4, 4)).save(small, "PNG")
    same = pa.DictionaryArray.from_arrays(pa.array([0] * 4000, pa.int32()), pa.array([bytes(2**20)]))
    return [
        weights(torch_file({"data/0": bytes(2**28)}, zipfile.ZIP_DEFLATED)),
        weights(torch_file({"data.pkl": zeros}, zipfile.ZIP_STORED)),
        weights(zeros),
        table(same, [0, 1] * 2000, "same"),
        table(pa.array([png(40_000)] * 20), [0, 1] * 10, "large"),
        table(pa.array([small.getvalue()] * 20), [0, 2**62] * 10, "classes"),
        lambda: load_model("cifar_resnet20", num_classes=2**40),
    ]


def main(folder: Path) -> None:
    """Read all of them, and print the growth."""
    good = good_artifact(folder / "good")
    assert verify(folder / "good").passed
    bombs = [*artifacts(good, folder / "bomb"), *others(folder)]
    limit_memory()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number, bomb in enumerate(bombs):
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        said, _ = refusal_of(bomb)
        now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(number, (now - grown) // 2**10, "MiB", "accepted" if said is None else said[:100], file=sys.stderr)
    print(len(bombs), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 2**10)


def refusal_of(bomb: Callable[[], object]) -> tuple[str | None, object]:
    """Run without watching for writes, because the tests write their own files."""
    from secateur.errors import SecateurError

    try:
        return None, bomb()
    except SecateurError as error:
        return str(error), None


if __name__ == "__main__":
    main(Path(sys.argv[1]))
