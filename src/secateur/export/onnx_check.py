"""Which ONNX files only compute, once, from the numbers that they hold. All others are refused.

Everything is walked by protobuf's own description of its messages, so that no field that can hold a tensor is
forgotten, in this version of ONNX or a later one. The process that runs files from strangers executes this module by
its path (see `_runtime_child.py`), so it imports nothing of Secateur.
"""

from collections.abc import Iterator
from typing import Any

MAX_ONNX_BYTES = 2**31
"""Largest size of one protobuf message, and so of one ONNX file."""
MAX_PARTS = 5_000_000
"""The most messages within one file: nodes, attributes, tensors, shapes."""
MAX_NODES = 50_000
"""The most operations of a graph or a function. A vision transformer of 48 blocks has about 4,000."""
MAX_CALLED_NODES = 10_000
"""The most operations that calls of functions stand for. Files that Secateur exports have no functions."""
MAX_CALL_DEPTH = 32
"""The most functions that call each other in a row."""

_REPEATING = frozenset({"Loop", "Scan", "If", "SequenceMap"})
"""Operations that repeat others or choose between them. No file that Secateur exports has them."""
_ORT_FORMAT = b"ORTM"
"""At byte 4 of a file: ONNX Runtime then reads its own format instead of ONNX."""

_Key = tuple[str, str, str]
"""Domain, name and overload of an operation or a function."""


class RefusedFileError(ValueError):
    """Says why a file is not run."""


def plain_onnx(content: bytes) -> bytes:
    """Return the content of an ONNX file that only computes, without the fields that this version does not know.

    What is returned, and nothing else, is to be run: it is what was checked.

    Raises:
        RefusedFileError: If the file could run without end or grow without bound, reads other files, or needs
            operations that are not ONNX's.
        google.protobuf.message.DecodeError: If it is no ONNX file.
    """
    import onnx

    if len(content) > MAX_ONNX_BYTES:
        raise RefusedFileError(f"it has {len(content)} bytes; an ONNX file has at most {MAX_ONNX_BYTES}")
    if content[4:8] == _ORT_FORMAT:
        raise RefusedFileError("it is in the format of ONNX Runtime, not in ONNX")
    model: Any = onnx.ModelProto()
    model.ParseFromString(content)
    model.DiscardUnknownFields()
    functions = {_key_of(function.domain, function.name, function): function for function in model.functions}
    if len(functions) < len(model.functions):
        raise RefusedFileError("two of its functions have the same name")
    if any(domain == "" for domain, _, _ in functions):
        raise RefusedFileError("one of its functions has the name of an operation of ONNX")
    _check_operations(model, functions)
    for message in _messages(model):
        _check_message(message, model)
    _check_calls(model, functions)
    checked: bytes = model.SerializeToString()
    if checked[4:8] == _ORT_FORMAT:
        raise RefusedFileError("it pretends to be in the format of ONNX Runtime")
    return checked


def _messages(message: Any) -> Iterator[Any]:
    """Yield a message and all messages within it."""
    waiting, found = [message], 0
    while waiting:
        current = waiting.pop()
        found += 1
        if found > MAX_PARTS:
            raise RefusedFileError(f"it has more than {MAX_PARTS} parts")
        yield current
        for field, value in current.ListFields():
            if field.message_type is None:
                continue
            if hasattr(value, "ListFields"):
                waiting.append(value)
            else:
                waiting.extend(value.values() if hasattr(value, "values") else value)


def _check_message(message: Any, model: Any) -> None:
    """Refuse tensors whose numbers are elsewhere, sparse tensors, graphs within graphs, and trainings."""
    fields = message.DESCRIPTOR.fields_by_name
    if ("external_data" in fields and message.external_data) or ("data_location" in fields and message.data_location):
        raise RefusedFileError("it has its numbers in other files")
    kind = message.DESCRIPTOR.name
    if kind == "SparseTensorProto":
        # A few bytes can stand for any number of zeros, and some runtimes looked for their numbers in other files.
        raise RefusedFileError("it has sparse tensors, which no file that Secateur exports has")
    if kind == "TrainingInfoProto":
        raise RefusedFileError("it describes a training")
    if kind == "GraphProto" and message is not model.graph:
        raise RefusedFileError("it has an operation that holds a graph, and can repeat others without end")


def _key_of(domain: str, name: str, message: Any) -> _Key:
    return "" if domain == "ai.onnx" else domain, name, getattr(message, "overload", "")


def _nodes(model: Any) -> Iterator[Any]:
    yield from model.graph.node
    for function in model.functions:
        yield from function.node


def _check_operations(model: Any, functions: dict[_Key, Any]) -> None:
    strange = dict[str, str]()
    for node in _nodes(model):
        if node.op_type in _REPEATING:
            raise RefusedFileError(f"it has the operation {node.op_type!r}, which can repeat others without end")
        key = _key_of(node.domain, node.op_type, node)
        if key[0] and key not in functions:
            strange.setdefault(node.domain, node.op_type)
    if strange:
        domains = sorted(strange)[:5]
        names = ", ".join(strange[domain] for domain in domains)
        raise RefusedFileError(f"it needs operations that are not ONNX's: {domains} ({names})")


def _check_calls(model: Any, functions: dict[_Key, Any]) -> None:
    """Bound what the file grows to when runtimes replace each call of a function by its body.

    The size of a function is the sum over its nodes, where a call counts as the size of the function that it calls, so
    each function is visited once.
    """
    sizes = dict[_Key, tuple[int, int, int]]()
    """Nodes, bytes, and the longest row of calls of each function."""

    def measured(nodes: Any, depth: int, running: tuple[_Key, ...]) -> tuple[int, int, int]:
        if depth > MAX_CALL_DEPTH:
            raise RefusedFileError(f"more than {MAX_CALL_DEPTH} of its functions call each other in a row")
        count = called = size = deepest = 0
        for node in nodes:
            key = _key_of(node.domain, node.op_type, node)
            if key not in functions:
                count, size = count + 1, size + node.ByteSize()
                continue
            if key in running:
                raise RefusedFileError(f"its function {key[1]!r} calls itself")
            if key not in sizes:
                sizes[key] = measured(functions[key].node, depth + 1, (*running, key))
            inner_count, inner_size, inner_depth = sizes[key]
            count, size, deepest = count + inner_count, size + inner_size, max(deepest, inner_depth)
            called += inner_count
            if called > MAX_CALLED_NODES or size > MAX_ONNX_BYTES:
                raise RefusedFileError(
                    f"its functions stand for more than {MAX_CALLED_NODES} operations, or {MAX_ONNX_BYTES} bytes"
                )
        if count > MAX_NODES:
            raise RefusedFileError(f"it has more than {MAX_NODES} operations")
        if deepest + 1 > MAX_CALL_DEPTH:
            raise RefusedFileError(f"more than {MAX_CALL_DEPTH} of its functions call each other in a row")
        return count, size, deepest + 1

    measured(model.graph.node, 0, ())
    for key, function in functions.items():  # Functions that nothing calls are read all the same.
        if key not in sizes:
            sizes[key] = measured(function.node, 1, (key,))
