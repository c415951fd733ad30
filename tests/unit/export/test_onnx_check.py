"""Which ONNX files are run: those that only compute, once, from the numbers that they hold."""

import sys
import time

import onnx
import pytest
from hostile_onnx import OPSET, SLOTS, external, honest, put
from onnx import AttributeProto, TensorProto, helper

from secateur.export.onnx_check import MAX_CALL_DEPTH, MAX_CALLED_NODES, MAX_NODES, RefusedFileError, plain_onnx

OPSETS = [helper.make_opsetid("", OPSET), helper.make_opsetid("own", 1)]


def function(name: str, calls: list[str], domain: str = "own", overload: str = "") -> onnx.FunctionProto:
    """A function that calls others, one after the other."""
    names = ["x", *(f"t{n}" for n in range(len(calls) - 1)), "y"]
    nodes = [
        helper.make_node(call, [a], [b], domain="own") for call, a, b in zip(calls, names, names[1:], strict=False)
    ]
    return helper.make_function(
        domain, name, ["x"], ["y"], nodes or [helper.make_node("Abs", ["x"], ["y"])], OPSETS, overload=overload
    )


def file(*functions: onnx.FunctionProto, calls: str = "Act") -> bytes:
    model = honest()
    model.functions.extend(functions)
    model.graph.node[1].op_type = calls
    return model.SerializeToString()


def test_an_honest_file_is_what_it_was():
    checked = onnx.ModelProto.FromString(plain_onnx(honest().SerializeToString()))
    assert checked == honest()


@pytest.mark.parametrize("path", SLOTS, ids=".".join)
def test_external_data_is_refused_wherever_a_tensor_can_be(path: tuple[str, ...]):
    """The places are those that protobuf itself lists, up to six messages deep."""
    model = honest()
    put(model, path, external("private.bin"))
    with pytest.raises(RefusedFileError):
        plain_onnx(model.SerializeToString())


def test_the_places_of_tensors_are_many():
    assert {
        ("graph", "initializer"),
        ("graph", "sparse_initializer", "values"),
        ("graph", "node", "attribute", "tensors"),
        ("graph", "node", "attribute", "sparse_tensor", "indices"),
        ("functions", "attribute_proto", "t"),
        ("functions", "node", "attribute", "g", "initializer"),
        ("training_info", "initialization", "initializer"),
    } <= set(SLOTS)


@pytest.mark.parametrize("levels", [10, 16, 20, 30])
def test_functions_that_call_each_other_twice_are_counted_and_not_run(levels: int):
    functions = [function("F0", [])] + [function(f"F{n}", [f"F{n - 1}"] * 2) for n in range(1, levels)]
    started = time.monotonic()
    content = file(*functions, calls=f"F{levels - 1}")
    if 2 ** (levels - 1) <= MAX_CALLED_NODES:
        plain_onnx(content)
    else:
        with pytest.raises(RefusedFileError, match=f"more than {MAX_CALLED_NODES} operations"):
            plain_onnx(content)
    assert time.monotonic() - started < 1


def test_bytes_that_calls_repeat_are_counted():
    heavy = function("Heavy", [])
    heavy.node[0].attribute.append(helper.make_attribute("v", b"x" * 2**20))
    functions = [heavy, function("G", ["Heavy"] * 60), function("H", ["G"] * 60)]
    with pytest.raises(RefusedFileError, match="bytes"):
        plain_onnx(file(*functions, calls="H"))


def test_operations_are_counted():
    model = honest()
    model.graph.node.extend(helper.make_node("Abs", ["input"], [f"n{n}"]) for n in range(MAX_NODES))
    with pytest.raises(RefusedFileError, match=f"more than {MAX_NODES} operations"):
        plain_onnx(model.SerializeToString())


def test_circles_and_long_rows_of_calls():
    with pytest.raises(RefusedFileError, match="calls itself"):
        plain_onnx(file(function("A", ["B"]), function("B", ["A"]), calls="A"))
    with pytest.raises(RefusedFileError, match="calls itself"):
        plain_onnx(file(function("A", ["A"])))  # though nothing calls it
    long = [function("F0", [])] + [function(f"F{n}", [f"F{n - 1}"]) for n in range(1, sys.getrecursionlimit() + 10)]
    for order in (long, long[::-1]):
        with pytest.raises(RefusedFileError, match=f"more than {MAX_CALL_DEPTH} of its functions"):
            plain_onnx(file(*order, calls=long[-1].name))


def test_an_operation_is_known_by_domain_name_and_overload():
    plain_onnx(file(function("A", [])))
    with pytest.raises(RefusedFileError, match=r"not ONNX's: \['own'\] \(B\)"):
        plain_onnx(file(function("A", []), calls="B"))
    with pytest.raises(RefusedFileError, match="not ONNX's"):
        plain_onnx(file(function("A", [], overload="other"), calls="A"))
    # A function in a domain of a runtime does not open that domain.
    model = onnx.ModelProto.FromString(file(function("A", [], domain="com.microsoft")))
    model.graph.node[1].domain, model.graph.node[1].op_type = "com.microsoft", "Gelu"
    with pytest.raises(RefusedFileError, match=r"\['com.microsoft'\] \(Gelu\)"):
        plain_onnx(model.SerializeToString())
    for domain in ("", "ai.onnx"):
        with pytest.raises(RefusedFileError, match="the name of an operation of ONNX"):
            plain_onnx(file(function("Relu", [], domain=domain)))
    with pytest.raises(RefusedFileError, match="the same name"):
        plain_onnx(file(function("A", []), function("A", [])))


@pytest.mark.parametrize("where", ["graph", "function"])
@pytest.mark.parametrize("kind", ["g", "graphs"])
def test_graphs_within_operations_are_refused(where: str, kind: str):
    model = honest()
    node = model.graph.node[0] if where == "graph" else model.functions[0].node[0]
    inner = helper.make_graph([], "inner", [], [])
    single = kind == "g"
    attribute = node.attribute.add(name="body", type=AttributeProto.GRAPH if single else AttributeProto.GRAPHS)
    attribute.g.CopyFrom(inner) if single else attribute.graphs.append(inner)
    with pytest.raises(RefusedFileError, match="holds a graph"):
        plain_onnx(model.SerializeToString())


def test_other_formats_and_unknown_fields():
    content = honest().SerializeToString()
    with pytest.raises(RefusedFileError, match="format of ONNX Runtime"):
        plain_onnx(content[:4] + b"ORTM" + content[8:])
    model = honest()
    model.producer_name = "ORTM"
    model.ClearField("ir_version")
    model.ir_version = 10
    written = model.SerializeToString()
    assert written[4:8] == b"ORTM"  # still a sound ONNX file
    with pytest.raises(RefusedFileError, match="format of ONNX Runtime"):
        plain_onnx(written)
    # Field 999, which this version does not know and another may: what is run lacks it.
    assert plain_onnx(content + b"\xba\x3e\x03abc") == content


def test_sparse_tensors_are_refused():
    model = honest()
    sparse = onnx.SparseTensorProto(dims=[2**40])
    sparse.values.CopyFrom(helper.make_tensor("v", TensorProto.FLOAT, [0], []))
    model.graph.sparse_initializer.append(sparse)
    with pytest.raises(RefusedFileError, match="sparse tensors"):
        plain_onnx(model.SerializeToString())
