"""ONNX files as a stranger would spoil them, and whether `compare_file` reads, stalls or crashes because of them.

    python tests/hostile_onnx.py COUNT SEED

runs that many and prints one line of JSON with what happened.
"""

import collections
import contextlib
import ctypes
import itertools
import json
import os
import random
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from guarded import watched
from onnx import AttributeProto, TensorProto, helper, numpy_helper
from torch import nn

from secateur.errors import ExportError
from secateur.export import compare_file
from secateur.export.isolation import isolated_runtimes

SECONDS = 20
"""Within which each file must be refused or run."""
PRIVATE = "private.bin"
IMAGES = torch.randn(2, 1, 6, 6, generator=torch.Generator().manual_seed(1))
OPSET = 18
Spoil = Callable[[Any, random.Random], None]


def network() -> nn.Module:
    """What the files claim to compute."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).eval()


def honest() -> Any:
    """The network, with one function of its own."""
    state = {name: tensor.numpy() for name, tensor in network().state_dict().items()}
    given = helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 1, 6, 6])
    found = helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", 3])
    act = helper.make_function(
        "own", "Act", ["x"], ["y"], [helper.make_node("Relu", ["x"], ["y"])], [helper.make_opsetid("", OPSET)]
    )
    nodes = [
        helper.make_node("Conv", ["input", "0.weight", "0.bias"], ["a"]),
        helper.make_node("Act", ["a"], ["b"], domain="own"),
        helper.make_node("Flatten", ["b"], ["c"]),
        helper.make_node("Constant", [], ["one"], value=numpy_helper.from_array(np.ones(1, np.float32), "one")),
        helper.make_node("Mul", ["c", "one"], ["d"]),
        helper.make_node("Gemm", ["d", "3.weight", "3.bias"], ["output"], transB=1),
    ]
    weights = [numpy_helper.from_array(array, name) for name, array in state.items()]
    graph = helper.make_graph(nodes, "g", [given], [found], weights)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("own", 1)]
    return helper.make_model(graph, opset_imports=opsets, functions=[act], ir_version=10)


def external(location: str, count: int = 640) -> TensorProto:
    """A tensor whose numbers lie in another file."""
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[count], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location)
    return tensor


def locations(draw: random.Random) -> str:
    found = (PRIVATE, f"./{PRIVATE}", f"../{PRIVATE}", str(Path(PRIVATE).absolute()), "/dev/zero", "/proc/self/maps")
    return draw.choice((*found, "*/_ORT_MEM_ADDR_/*", "", "."))


def messages(message: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every message within one, with the names of the fields on the way."""
    yield path, message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for each in [value] if hasattr(value, "ListFields") else value:
                yield from messages(each, (*path, field.name))


def slots(kind: Any, most: int = 6) -> list[tuple[str, ...]]:
    """Every way of at most so many fields from a kind of message to a tensor: found by what protobuf says of itself."""
    found: list[tuple[str, ...]] = []
    waiting = [((), kind)]
    while waiting:
        path, here = waiting.pop()
        if here.name == "TensorProto":
            found.append(path)
        elif len(path) < most:
            waiting += [((*path, f.name), f.message_type) for f in here.fields if f.message_type is not None]
    return sorted(found)


def put(model: Any, path: tuple[str, ...], tensor: TensorProto) -> None:
    """Put a tensor at the end of a way, making what is missing on it."""
    here = model
    for name in path[:-1]:
        inner = getattr(here, name)
        here = (
            inner if hasattr(inner, "ListFields") else inner[0] if len(inner) and name != "attribute" else inner.add()
        )
    last = getattr(here, path[-1])
    (last if hasattr(last, "ListFields") else last.add()).CopyFrom(tensor)


SLOTS = slots(onnx.ModelProto.DESCRIPTOR)


def elsewhere(model: Any, draw: random.Random) -> None:
    """External data in any field of any message that can hold a tensor."""
    put(model, draw.choice(SLOTS), external(locations(draw)))


def default_of_a_function(model: Any, draw: random.Random) -> None:
    """External data in the default of an attribute, or a constant's lists and sparse values."""
    attribute = AttributeProto(name="v", type=AttributeProto.TENSOR, t=external(locations(draw)))
    body = helper.make_node("Constant", [], ["w"])
    kind = draw.choice(("value", "sparse_value", "default"))
    if kind == "sparse_value":
        indices = helper.make_tensor("i", TensorProto.INT64, [640], range(640))
        sparse = onnx.SparseTensorProto(values=attribute.t, indices=indices, dims=[640])
        body.attribute.add(name=kind, type=AttributeProto.SPARSE_TENSOR, sparse_tensor=sparse)
    elif kind == "value":
        body.attribute.add(name=kind, type=AttributeProto.TENSOR, t=attribute.t)
    else:
        body.attribute.add(name="value", type=AttributeProto.TENSOR, ref_attr_name="v")
    made = helper.make_function("own", "G", [], ["w"], [body], [helper.make_opsetid("", OPSET)])
    if kind == "default":
        made.attribute_proto.append(attribute)
    model.functions.append(made)
    model.graph.node.insert(0, helper.make_node("G", [], ["w"], domain="own"))
    model.graph.node.insert(1, helper.make_node("ReduceSum", ["w"], ["s"], keepdims=0))
    model.graph.node[-1].input[0] = "e"
    model.graph.node.insert(len(model.graph.node) - 1, helper.make_node("Mul", ["d", "s"], ["e"]))


def bomb(model: Any, draw: random.Random) -> None:
    """Functions that call each other several times, or in a circle."""
    depth, calls, circle = draw.randint(2, 60), draw.randint(1, 4), draw.random() < 0.3
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("own", 1)]
    for level in range(depth):
        below = f"F{level - 1}" if level else "F0" if circle else None
        names = ["x", *(f"t{n}" for n in range(calls - 1)), "y"]
        made = [
            helper.make_node(below or "Abs", [a], [b], domain="own" if below else "")
            for a, b in itertools.pairwise(names)
        ]
        model.functions.append(helper.make_function("own", f"F{level}", ["x"], ["y"], made, opsets))
    model.graph.node[1].op_type = f"F{depth - 1}"


def large(model: Any, draw: random.Random) -> None:
    """An operation that asks for a large tensor, or much time."""
    size = 2 ** draw.randint(10, 40)
    shape = helper.make_tensor("shape", TensorProto.INT64, [1], [size])
    side = helper.make_tensor("side", TensorProto.INT64, [2], [2 ** draw.randint(5, 15)] * 2)
    nodes = draw.choice(
        (
            [helper.make_node("ConstantOfShape", ["shape"], ["big"])],
            [helper.make_node("RandomNormal", [], ["big"], shape=[size])],
            [helper.make_node("Expand", ["one", "shape"], ["big"])],
            [helper.make_node("Tile", ["one", "shape"], ["big"])],
            [helper.make_node("Range", ["zero", "size", "unit"], ["big"])],
            [helper.make_node("Expand", ["one", "side"], ["m"])]
            + [helper.make_node("MatMul", [f"m{n}" if n else "m", "m"], [f"m{n + 1}"]) for n in range(64)]
            + [helper.make_node("ReduceSum", ["m64"], ["big"], keepdims=1)],
        )
    )
    numbers = [helper.make_tensor(n, TensorProto.INT64, [], [v]) for n, v in (("zero", 0), ("size", size), ("unit", 1))]
    model.graph.initializer.extend([shape, side, *numbers])
    # After `one` is made.
    for offset, node in enumerate([*nodes, helper.make_node("ReduceMax", ["big"], ["top"], keepdims=1)]):
        model.graph.node.insert(4 + offset, node)
    model.graph.node.append(helper.make_node("Identity", ["top"], ["unused"]))
    model.graph.output.append(helper.make_tensor_value_info("unused", TensorProto.FLOAT, None))


def other_operation(model: Any, draw: random.Random) -> None:
    """Another operation, or another domain, in the place of one."""
    schema = draw.choice(onnx.defs.get_all_schemas())
    node = draw.choice([*model.graph.node, *model.functions[0].node])
    node.op_type = schema.name
    node.domain = draw.choice((schema.domain, "", "ai.onnx", "own", "com.microsoft", "ai.onnx.ml", "evil"))


def other_field(model: Any, draw: random.Random) -> None:
    """Any field of any message takes another value."""
    for _ in range(draw.randint(1, 3)):
        _, message = draw.choice(list(messages(model)))
        fields = list(message.DESCRIPTOR.fields)
        if not fields:
            continue
        field = draw.choice(fields)
        with contextlib.suppress(ValueError, TypeError, AttributeError):
            other_value(message, field, draw)


def other_value(message: Any, field: Any, draw: random.Random) -> None:
    held = getattr(message, field.name)
    values = (0, 1, -1, 2**31 - 1, 2**62, -(2**62), 1e308, "", PRIVATE, "own", "Act", "input", "\x1b[31m", b"\0" * 9)
    if hasattr(held, "add"):
        held.add() if not len(held) or draw.random() < 0.5 else held.append(draw.choice(held))
    elif hasattr(held, "append"):
        held.append(draw.choice(values))
    elif field.message_type is not None:
        held.SetInParent()
    else:
        setattr(message, field.name, draw.choice(values))


def gone(model: Any, draw: random.Random) -> None:
    """Any field is gone."""
    _, message = draw.choice(list(messages(model)))
    fields = [field for field, _ in message.ListFields()]
    if fields:
        message.ClearField(draw.choice(fields).name)


def _bytes_changed(content: bytes, draw: random.Random) -> bytes:
    """Bytes are changed, cut, doubled; or the file begins as one of ONNX Runtime's own format."""
    spoiled = bytearray(content)
    for _ in range(draw.randint(1, 8)):
        place = draw.randrange(len(spoiled))
        way = draw.randrange(4)
        if way == 0:
            spoiled[place] = draw.randrange(256)
        elif way == 1:
            del spoiled[place : place + draw.randint(1, 40)]
        elif way == 2:
            spoiled[place:place] = spoiled[place : place + draw.randint(1, 40)]
        else:
            spoiled[4:8] = b"ORTM"
        if not spoiled:
            spoiled = bytearray(struct.pack("<Q", 2**63))
    return bytes(spoiled)


SPOILS: tuple[Spoil, ...] = (
    elsewhere, default_of_a_function, bomb, large, other_operation, other_field, gone,
)  # fmt: skip


def spoiled(number: int, seed: int, kinds: tuple[Spoil, ...] = SPOILS) -> tuple[str, bytes]:
    """One mutant: its kind and its content. The kinds take turns."""
    draw = random.Random(f"{seed} {number}")
    kind = (*kinds, None)[number % (len(kinds) + 1)]
    model = honest()
    if kind is None:
        return "bytes", _bytes_changed(model.SerializeToString(), draw)
    kind(model, draw)
    return kind.__name__, model.SerializeToString()


class Opened:
    """Tells, by Linux's inotify, whether any process has opened one of some files."""

    IN_ACCESS, IN_OPEN, IN_NONBLOCK = 1, 0x20, 0x800

    def __init__(self, *paths: Path) -> None:
        libc = ctypes.CDLL(None)
        self._handle = libc.inotify_init1(self.IN_NONBLOCK)
        for path in paths:
            assert libc.inotify_add_watch(self._handle, os.fsencode(path), self.IN_ACCESS | self.IN_OPEN) >= 0

    def any(self) -> bool:
        with contextlib.suppress(BlockingIOError):
            return bool(os.read(self._handle, 65536))
        return False

    def close(self) -> None:
        os.close(self._handle)


@contextlib.contextmanager
def private_files(folder: Path) -> Generator[Opened]:
    """Work in a folder with a file that is nobody's business, and one above it."""
    here, before = folder / "here", Path.cwd()
    here.mkdir(parents=True)
    for place in (folder, here):
        (place / PRIVATE).write_bytes(np.full(640, 7e7, np.float32).tobytes())
    os.chdir(here)
    opened = Opened(folder / PRIVATE, here / PRIVATE)
    try:
        yield opened
    finally:
        opened.close()
        os.chdir(before)


def attempts(folder: Path, contents: Iterator[tuple[str, bytes]]) -> Iterator[dict[str, Any]]:
    """Run each file as `verify` does; yield what happened."""
    model = network()
    with private_files(folder) as opened, isolated_runtimes(["onnx"]) as runtimes:
        for kind, content in contents:
            path = Path("model.onnx")
            path.write_bytes(content)
            started = time.monotonic()
            try:
                with watched():
                    found = compare_file(path, model, IMAGES, runtimes=runtimes)
                said = "same" if found.max_rel <= found.tolerance else "different"
            except ExportError as error:
                said = str(error)
                assert len(said) < 500
                assert said.isprintable()
            yield {"kind": kind, "said": said, "seconds": time.monotonic() - started, "read": opened.any()}


def _run(count: int, seed: int) -> dict[str, Any]:
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for row in attempts(Path(folder), (spoiled(number, seed) for number in range(count))):
            found.append(row)
            if row["seconds"] > SECONDS or row["read"]:
                print(json.dumps({**row, "number": len(found) - 1}), file=sys.stderr)
    return {
        "mutants": len(found),
        "seed": seed,
        "reads": sum(row["read"] for row in found),
        "stalls": sum(row["seconds"] > SECONDS for row in found),
        "longest_s": round(max(row["seconds"] for row in found), 2),
        "kinds": dict(collections.Counter(row["kind"] for row in found)),
        "ran": sum(row["said"] in ("same", "different") for row in found),
        "ended_runtimes": sum("its runtime" in row["said"] for row in found),
        "stopped": sum("was stopped" in row["said"] for row in found),
    }


if __name__ == "__main__":
    print(json.dumps(_run(int(sys.argv[1]), int(sys.argv[2]))))
