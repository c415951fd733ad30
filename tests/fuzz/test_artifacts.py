"""Spoiled artifacts: each is refused with one clear message, or loads exactly the numbers of the good one."""

import json
import os
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from guarded import everything_in, refusal
from hostile_artifacts import (
    GONE,
    Good,
    deep,
    good_artifact,
    random_edits,
    replaced,
    same_numbers,
    with_header,
    with_tensors,
)

import secateur
from secateur.export import MANIFEST_NAME, WEIGHTS_NAME
from secateur.models import load_model
from secateur.pipeline import verify

FLIPS, EDITS = 24, 90


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Good:
    folder = tmp_path_factory.mktemp("good") / "small"
    found = good_artifact(folder)
    assert same_numbers(secateur.load(folder).model, found.state)  # also brings every module in before any is watched
    assert verify(folder).passed
    load_model("torchvision:shufflenet_v2_x0_5")
    load_model("timm:resnet10t")
    return found


def refused_or_same(folder: Path, good: Good) -> str | None:
    """The message, or None if it loaded the same numbers; what loads can be verified."""
    before = everything_in(folder)
    said, loaded = refusal(secateur.load, folder)
    if loaded is not None:
        assert same_numbers(loaded.model, good.state)
        refusal(verify, folder)
    assert everything_in(folder) == before
    return said


def test_the_good_one_written_again_is_good(good: Good, tmp_path: Path):
    assert refused_or_same(good.write(tmp_path / "a"), good) is None


@pytest.mark.parametrize("seed", range(FLIPS))
@pytest.mark.parametrize("name", [MANIFEST_NAME, WEIGHTS_NAME])
def test_flipped_bits_are_refused(good: Good, tmp_path: Path, name: str, seed: int):
    folder, draw = good.write(tmp_path / "a"), random.Random(seed)
    content = bytearray((folder / name).read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    (folder / name).write_bytes(content)
    assert refused_or_same(folder, good)


@pytest.mark.parametrize("part", [0.0, 0.001, 0.3, 0.6, 0.9, 0.999])
@pytest.mark.parametrize("name", [MANIFEST_NAME, WEIGHTS_NAME])
def test_truncated_files_are_refused(good: Good, tmp_path: Path, name: str, part: float):
    folder = good.write(tmp_path / "a")
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(part * len(content))])
    assert refused_or_same(folder, good)


def test_recorded_files_that_are_gone_are_named(good: Good, tmp_path: Path):
    record = {"onnx": {"format": "onnx", "files": [{"name": "model.onnx", "bytes": 1, "sha256": "0" * 64}]}}
    manifest = replaced(good.manifest, ("verification", "exports"), record)
    found = verify(good.write(tmp_path / "a", manifest=manifest))
    assert found.passed
    assert found.passed_over == ("model.onnx was not checked: secateur.json records it, but it is not there.",)


@pytest.mark.parametrize("number", range(EDITS))
def test_signed_edits_are_refused_or_change_no_number(good: Good, tmp_path: Path, number: int):
    path, new = random_edits(good, EDITS, seed=7)[number]
    refused_or_same(good.write(tmp_path / "a", manifest=replaced(good.manifest, path, new)), good)


@pytest.mark.slow
def test_thousands_of_signed_edits(good: Good, tmp_path: Path):
    for path, new in random_edits(good, 3_000, seed=8):
        refused_or_same(good.write(tmp_path / "a", manifest=replaced(good.manifest, path, new)), good)


@pytest.mark.slow
def test_thousands_of_signed_weights(good: Good, tmp_path: Path):
    draw = random.Random(9)
    (size,) = struct.unpack("<Q", good.weights[:8])
    for _ in range(2_000):
        content = bytearray(good.weights)
        content[draw.randrange(8 + size)] ^= 1 << draw.randrange(8)
        said, loaded = refusal(secateur.load, good.write(tmp_path / "a", weights=bytes(content)))
        assert said or loaded


@pytest.mark.parametrize(
    ("path", "new", "words"),
    [
        (("schema",), 99, "newer Secateur"),
        (("schema",), 0, "at least 1"),
        (("source", "kind"), "python", "`trust_source` must be True"),
        (("source",), {"kind": "python", "name": "os:system", "arguments": {}}, "`trust_source` must be True"),
        (("source", "kind"), "factory", "`factory` must build the original"),
        (("source",), {"kind": "timm", "name": "hf-hub:evil/net", "arguments": {}}, "a name that timm knows"),
        (("source",), {"kind": "timm", "name": "local-dir:/etc", "arguments": {}}, "a name that timm knows"),
        (("source",), {"kind": "timm", "name": "../../x", "arguments": {}}, "a name that timm knows"),
        (
            ("source",),
            {"kind": "torchvision", "name": "resnet18\x1b[2J", "arguments": {}},
            "for classification, segmentation or detection",
        ),
        (("source", "name"), "cifar_resnet110", "must have the tensors"),
        (("source", "arguments"), {"num_classes": 2**40}, "`num_classes` must be at most 131072"),
        (("source", "arguments"), {"in_channels": 2**31}, "`in_channels` must be at most 4096"),
        (("source", "arguments"), {"checkpoint_path": 1}, "must be positive integers among"),
        (("source", "arguments"), {"num_classes": 131072}, None),
        (("input", "shape"), [2**40, 2**40, 2**40], "a size of at most"),
        (("input", "shape"), [1] * 9, "a list of at most 8"),
        (("weights", "bytes"), 2**60, None),
        (("weights", "bytes"), 10**30, "too large"),
        (("weights", "tensors"), [], "must have the tensors"),
        (("weights", "tensors", 0, "shape"), [2**40, 2**40], "at most as large"),
        (("weights", "tensors", 0, "dtype"), "float8_e4m3fn", "must be float8"),
        (("weights", "tensors", 0, "dtype"), "__class__", "must be __class__"),
        (("weights", "tensors", 0, "layout"), "channels_last_3d", "layout that fits"),
        (("weights", "tensors", 0, "same_as"), "bn1.weight", "must"),
        (("weights", "tensors", 0, "sparse"), True, "must be stored as secateur.json says"),
        (("edits", 0, 3), 2**20, "must be a size of the model, at most"),
        (("edits", 0, 3), -(2**20), "must be a size of the model, at most"),
        (("edits", 0, 1), "__dict__", "must be an int of the rebuilt model"),
        (("edits", 0, 1), "training", "must be an int of the rebuilt model"),
        (("edits", 0, 0), ".".join("a" * 400), "no such module|at most 1000"),
        (("replacements",), [["", "silence", None]], "got the model itself"),
        (("replacements",), [["layer1", "silence", None]] * 2, "names everything once"),
        (("replacements",), [["layer1", "silence", 10**9]], "at most 64"),
        (("widenings",), [["conv1", 1, 2**30, []]], "must be below"),
        (("widenings",), [["conv1", 1, 0, []]] * 500, "names everything once"),
        (("widenings",), [["conv1" + ".inner" * n, 1, 0, []] for n in range(300)], "at most 1000|must have"),
        (("architecture",), {"kept": {"a": [3, 1]}, "removed_blocks": ["x"] * 3}, None),
        (("metrics",), {"test_accuracy": [{"n": 360}]}, None),
        (("metrics",), {"test_accuracy": {"n": "x"}}, None),
        (("verification",), {"probe": {"logits": "many"}}, None),
        (("verification",), {"probe": {"logits": [[1, 2], [3]]}}, None),
        (("verification",), {"probe": {}}, None),
        (("verification",), {"probe": {"values": [1.0], "shape": [2, 10]}}, None),
        (("verification",), {"probe": {"values": "many", "shape": "x"}}, None),
        (("verification",), deep(40), "within more than 32"),
        (("provenance", "seed"), 2**64, "too large"),
        (("classes",), ["<script>alert(1)</script>", "\x1b]0;pwned\x07", "=cmd|' /C calc'!A0"], None),
    ],
)
def test_chosen_edits(good: Good, tmp_path: Path, path: tuple[Any, ...], new: Any, words: str | None):
    said = refused_or_same(good.write(tmp_path / "a", manifest=replaced(good.manifest, path, new)), good)
    if words is not None:
        assert said is not None
        assert any(word in said for word in words.split("|")), said


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"seed": null', '"seed": 1e400', "a number is too large"),
        ('"seed": null', '"seed": NaN', "not a JSON number"),
        ('"seed": null', '"seed": -Infinity', "not a JSON number"),
        ('"seed": null', '"seed": ' + "9" * 5000, "must be JSON"),
        ('"seed": null', '"seed": 1, "seed": 2', "a key occurs twice"),
        ('"seed": null', '"seed": ' + "[" * 100_000, "must be JSON"),
        ('"seed": null', '"seed": ' + "[" * 900 + "]" * 900, "within more than 32"),
        ('"seed": null', '"seed": [' + "[]," * 1_100_000 + "1]", "more than 2000000 values"),
        ('"seed": null', '"seed": "\x00"', "must be JSON"),
        ('"seed": null', '"seed": "\udcff"', "must be JSON"),
        ('"seed": null', '"se\\u0065d": 1', None),
    ],
)
def test_text_that_is_no_json(good: Good, tmp_path: Path, old: str, new: str, words: str | None):
    folder = good.write(tmp_path / "a")
    text = (folder / MANIFEST_NAME).read_text()
    assert old in text
    (folder / MANIFEST_NAME).write_bytes(text.replace(old, new, 1).encode(errors="surrogateescape"))
    said = refused_or_same(folder, good)
    assert said
    assert words is None or words in said


def header_of(weights: bytes) -> dict[str, Any]:
    (size,) = struct.unpack("<Q", weights[:8])
    return json.loads(weights[8 : 8 + size])


FIRST = "bn1.weight"
HEADERS: dict[str, Any] = {
    "offsets beyond the file": lambda h: {**h, FIRST: {**h[FIRST], "data_offsets": [0, 2**60]}},
    "offsets in the wrong order": lambda h: {**h, FIRST: {**h[FIRST], "data_offsets": [8, 0]}},
    "negative offsets": lambda h: {**h, FIRST: {**h[FIRST], "data_offsets": [-8, 0]}},
    "offsets as floats": lambda h: {**h, FIRST: {**h[FIRST], "data_offsets": [0.5, 8]}},
    "offsets over each other": lambda h: {n: {**v, "data_offsets": h[FIRST]["data_offsets"]} for n, v in h.items()},
    "a shape beyond the numbers": lambda h: {**h, FIRST: {**h[FIRST], "shape": [2**40]}},
    "a shape that wraps round": lambda h: {**h, FIRST: {**h[FIRST], "shape": [2**32, 2**32]}},
    "a shape of zero times everything": lambda h: {
        **h,
        "x": {"dtype": "F32", "shape": [0, 2**63], "data_offsets": [0, 0]},
    },
    "a negative shape": lambda h: {**h, FIRST: {**h[FIRST], "shape": [-8]}},
    "an unknown dtype": lambda h: {**h, FIRST: {**h[FIRST], "dtype": "PICKLE"}},
    "a narrow dtype": lambda h: {**h, FIRST: {**h[FIRST], "dtype": "F8_E8M0"}},
    "another dtype of the same width": lambda h: {**h, FIRST: {**h[FIRST], "dtype": "I32"}},
    "a name that is a path": lambda h: {("../../x" if n == FIRST else n): v for n, v in h.items()},
    "no tensors": lambda h: {},
    "a list": lambda h: [h],
    "metadata that is no text": lambda h: {**h, "__metadata__": {"a": 1}},
    "metadata without end": lambda h: {**h, "__metadata__": {"a": "b" * 10**6}},
    "deep": lambda h: {**h, "__metadata__": deep(500)},
    "a hole": lambda h: {
        n: {**v, "data_offsets": [v["data_offsets"][0] + 4, v["data_offsets"][1]]} for n, v in h.items()
    },
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_of_the_weights(good: Good, tmp_path: Path, name: str):
    content = with_header(good.weights, HEADERS[name])
    said = refused_or_same(good.write(tmp_path / "a", weights=content), good)
    assert (said is None) == name.startswith("metadata without")


SPARSE = "/bits"
TENSORS: dict[str, Any] = {
    "NaN": lambda t: t[FIRST].fill_(float("nan")),
    "one more": lambda t: t.update(extra=torch.zeros(3)),
    "one less": lambda t: t.pop(FIRST),
    "double": lambda t: t.update({FIRST: t[FIRST].double()}),
    "transposed": lambda t: t.update({"linear.weight": t["linear.weight"].t().contiguous()}),
    "more bits": lambda t: t.update({n: torch.cat([v, v]) for n, v in t.items() if n.endswith(SPARSE)}),
    "bits all set": lambda t: [v.fill_(255) for n, v in t.items() if n.endswith(SPARSE)],
    "no values": lambda t: t.update({n: v[:0] for n, v in t.items() if n.endswith("/values")}),
    "a vast shape": lambda t: [v.fill_(2**40) for n, v in t.items() if n.endswith("/shape")],
    "a negative shape": lambda t: [v.neg_() for n, v in t.items() if n.endswith("/shape")],
    "shape as floats": lambda t: t.update({n: v.double() for n, v in t.items() if n.endswith("/shape")}),
    "bits as bools": lambda t: t.update({n: v.bool() for n, v in t.items() if n.endswith(SPARSE)}),
    "values of bytes": lambda t: t.update({n: v.to(torch.uint8) for n, v in t.items() if n.endswith("/values")}),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_of_the_weights(good: Good, tmp_path: Path, name: str):
    assert refused_or_same(good.write(tmp_path / "a", weights=with_tensors(good.weights, TENSORS[name])), good)


def swap(folder: Path) -> None:
    (folder / MANIFEST_NAME).rename(folder / "x")
    (folder / WEIGHTS_NAME).rename(folder / MANIFEST_NAME)
    (folder / "x").rename(folder / WEIGHTS_NAME)


def link(folder: Path, name: str, target: str) -> None:
    (folder / name).unlink()
    (folder / name).symlink_to(target)


def pipe(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)


def subfolder(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).mkdir()


def hole(folder: Path, name: str) -> None:
    with (folder / name).open("r+b") as file:
        file.truncate(2**40)


FILES: dict[str, Any] = {
    "swapped": swap,
    "manifest is a link out": lambda f: link(f, MANIFEST_NAME, "/etc/passwd"),
    "weights are a link out": lambda f: link(f, WEIGHTS_NAME, "/dev/zero"),
    "weights are a link to themselves": lambda f: link(f, WEIGHTS_NAME, WEIGHTS_NAME),
    "manifest is a link to nothing": lambda f: link(f, MANIFEST_NAME, "nothing"),
    "manifest is a pipe": lambda f: pipe(f, MANIFEST_NAME),
    "weights are a pipe": lambda f: pipe(f, WEIGHTS_NAME),
    "manifest is a folder": lambda f: subfolder(f, MANIFEST_NAME),
    "weights are a folder": lambda f: subfolder(f, WEIGHTS_NAME),
    "a terabyte of manifest": lambda f: hole(f, MANIFEST_NAME),
    "a terabyte of weights": lambda f: hole(f, WEIGHTS_NAME),
    "no weights": lambda f: (f / WEIGHTS_NAME).unlink(),
    "no manifest": lambda f: (f / MANIFEST_NAME).unlink(),
    "weights that are a manifest": lambda f: (f / WEIGHTS_NAME).write_bytes((f / MANIFEST_NAME).read_bytes()),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_something_else(good: Good, tmp_path: Path, name: str):
    folder = good.write(tmp_path / "a")
    FILES[name](folder)
    said, _ = refusal(secateur.load, folder)
    assert said


def test_a_terabyte_of_signed_weights(good: Good, tmp_path: Path):
    manifest = replaced(good.manifest, ("weights", "bytes"), 2**40)
    folder = good.write(tmp_path / "a", manifest=manifest)
    hole(folder, WEIGHTS_NAME)
    said, _ = refusal(secateur.load, folder)
    assert said is not None
    assert "must have at most" in said


@pytest.mark.parametrize("folder", ["\0", "a" * 1000, "nowhere", "/dev/null", "/proc/self/mem", "~", "\udcff"])
def test_folders_that_are_none(tmp_path: Path, folder: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    said, _ = refusal(secateur.load, folder)
    assert said


def test_gone_keys(good: Good, tmp_path: Path):
    for key in good.manifest:
        if key != "sha256":
            assert refused_or_same(good.write(tmp_path / "a", manifest=replaced(good.manifest, (key,), GONE)), good)
