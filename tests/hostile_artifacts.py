"""One good artifact, and the ways to spoil it: the hashes are made again, so that the deeper checks are reached."""

import copy
import hashlib
import json
import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from secateur.cost import Budget, count_macs, count_params
from secateur.export import MANIFEST_NAME, WEIGHTS_NAME, Recipe, edits_between, save_artifact
from secateur.export.manifest import manifest_sha256
from secateur.graph import trace
from secateur.models import load_model
from secateur.pipeline.finalize import probe_json
from secateur.prune import ERKAllocation, MagnitudeScore, WeightPruning, apply_masks, cut, make_permanent_
from secateur.search import Uniform, search_architecture

Json = Any


@dataclass(frozen=True)
class Good:
    """The parts of an artifact."""

    manifest: Json
    weights: bytes
    state: dict[str, Tensor]

    def write(self, folder: Path, *, manifest: Json = None, weights: bytes | None = None, sign: bool = True) -> Path:
        """Write it with other parts, signed anew."""
        data = copy.deepcopy(self.manifest if manifest is None else manifest)
        content = self.weights if weights is None else weights
        if sign and weights is not None:
            data["weights"].update(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))
        if sign:
            data["sha256"] = manifest_sha256(data)
        folder.mkdir(exist_ok=True)
        (folder / MANIFEST_NAME).write_text(json.dumps(data))
        (folder / WEIGHTS_NAME).write_bytes(content)
        return folder


def good_artifact(folder: Path) -> Good:
    """A digits network, cut to half of its MACs, with sparse tensors, metrics and a probe."""
    model, source = load_model("digits_resnet")
    example = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    graph = trace(model, example)
    found = search_architecture(model, graph, Uniform(), budget=Budget(macs="50%"))
    small = cut(model, graph, found.architecture).model
    half = make_permanent_(
        apply_masks(small, WeightPruning(MagnitudeScore(), ERKAllocation()).masks(small, 0.3))
    ).eval()
    recipe = Recipe(
        source=source.to_json(),
        architecture=found.architecture,
        edits=edits_between(model, half),
        input_shape=(1, 8, 8),
        mean=(0.305,),
        std=(0.376,),
        classes=tuple(map(str, range(10))),
        cost_before={"macs": count_macs(model, example), "params": count_params(model)},
        cost_after={"macs": count_macs(half, example), "params": count_params(half)},
        metrics={"test_accuracy": [{"step": "original", "top1": 0.9, "n": 360}]},
        verification={"probe": probe_json(half, (1, 8, 8))},
    )
    save_artifact(folder, half, recipe)
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    assert manifest["edits"]
    assert any(record.get("sparse") for record in manifest["weights"]["tensors"])
    state = {name: tensor.clone() for name, tensor in half.state_dict().items()}
    return Good(manifest, (folder / WEIGHTS_NAME).read_bytes(), state)


def places(value: Json, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value where another could stand."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inside in items:
        yield from places(inside, (*path, key))


def replaced(value: Json, path: tuple[Any, ...], new: Json) -> Json:
    """A copy with another value at a place; `GONE` removes it."""
    found = copy.deepcopy(value)
    holder = found
    for key in path[:-1]:
        holder = holder[key]
    if new is GONE:
        del holder[path[-1]]
    else:
        holder[path[-1]] = new
    return found


GONE = object()


def deep(levels: int) -> Json:
    """Lists within lists."""
    found: Json = []
    for _ in range(levels):
        found = [found]
    return found


HOSTILE_VALUES: tuple[Json, ...] = (
    None,
    True,
    -1,
    0,
    2**31,
    2**62,
    2**200,
    1.5,
    1e308,
    "",
    "../../../etc/passwd",
    "/dev/zero",
    "os:system",
    "\x1b[31m\x00\u202e\ud800",
    "a" * 100_000,
    [],
    {},
    [[]],
    {"": {}},
    deep(40),
    GONE,
)


def random_edits(good: Good, count: int, seed: int) -> list[tuple[tuple[Any, ...], Json]]:
    """Places and values, drawn evenly over the top-level keys so that long lists do not take all."""
    draw = random.Random(seed)
    by_key: dict[str, list[tuple[Any, ...]]] = {}
    for path in places(good.manifest):
        if path[0] != "sha256":
            by_key.setdefault(path[0], []).append(path)
    keys = sorted(by_key)
    return [(draw.choice(by_key[keys[n % len(keys)]]), draw.choice(HOSTILE_VALUES)) for n in range(count)]


def with_header(weights: bytes, change: Callable[[Json], Json]) -> bytes:
    """A safetensors file with another header."""
    (size,) = struct.unpack("<Q", weights[:8])
    header = json.dumps(change(json.loads(weights[8 : 8 + size]))).encode()
    return struct.pack("<Q", len(header)) + header + weights[8 + size :]


def with_tensors(weights: bytes, change: Callable[[dict[str, Tensor]], object]) -> bytes:
    """A safetensors file with other tensors."""
    tensors = safetensors.torch.load(weights)
    change(tensors)
    return safetensors.torch.save(tensors)


def same_numbers(model: nn.Module, state: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    found = model.state_dict()
    return found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)
