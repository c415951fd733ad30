"""Exported files from strangers run in a process with limits: whatever they do there ends in one message."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from hostile_onnx import IMAGES, Opened, external, honest, network
from onnx import TensorProto, helper, numpy_helper

from secateur.errors import ArtifactError, ExportError
from secateur.export import _runtime_child, compare_file
from secateur.export import isolation as module
from secateur.export._runtime_child import without_telemetry
from secateur.export.isolation import IsolatedRuntimes, isolated_runtimes

pytestmark = pytest.mark.window


def asked(path: Path, content: bytes, runtimes: IsolatedRuntimes | None = None):
    path.write_bytes(content)
    return compare_file(path, network(), IMAGES, runtimes=runtimes)


def with_output(*nodes: object, output: str, initializers: tuple[TensorProto, ...] = ()) -> bytes:
    """The honest file, whose output depends on more operations."""
    model = honest()
    model.graph.initializer.extend(initializers)
    model.graph.node[-1].output[0] = "logits"
    model.graph.node.extend([*nodes, helper.make_node("Add", ["logits", output], ["output"])])
    return model.SerializeToString()


def large(bytes_: int) -> bytes:
    """One tensor of so many bytes."""
    shape = numpy_helper.from_array(torch.tensor([bytes_ // 4]).numpy(), "shape")
    nodes = (
        helper.make_node("RandomNormalLike", ["seed"], ["big"], dtype=1),
        helper.make_node("ReduceMax", ["big"], ["top"], keepdims=0),
    )
    seed = helper.make_node("ConstantOfShape", ["shape"], ["seed"])
    return with_output(seed, *nodes, output="top", initializers=(shape,))


def slow() -> bytes:
    """A hundred products of matrices of 1500 x 1500 numbers: more than ten seconds, little memory."""
    side = numpy_helper.from_array(torch.tensor([1500, 1500]).numpy(), "side")
    nodes = [helper.make_node("RandomNormal", [], ["m0"], shape=[1500, 1500], seed=1.0)]
    nodes += [helper.make_node("MatMul", [f"m{n}", "m0"], [f"m{n + 1}"]) for n in range(400)]
    nodes += [helper.make_node("ReduceMax", ["m400"], ["top"], keepdims=0)]
    return with_output(*nodes, output="top", initializers=(side,))


def test_one_process_opens_many_files(tmp_path: Path):
    with isolated_runtimes(["onnx"]) as runtimes:
        for _ in range(3):
            assert asked(tmp_path / "model.onnx", honest().SerializeToString(), runtimes).max_rel < 1e-4


def test_too_much_memory_ends_in_one_message_and_the_next_file_is_run(tmp_path: Path):
    with isolated_runtimes(["onnx"]) as runtimes:
        with pytest.raises(ExportError, match=r"it does not run \(|its runtime"):
            asked(tmp_path / "model.onnx", large(2**36), runtimes)
        assert asked(tmp_path / "model.onnx", honest().SerializeToString(), runtimes).max_rel < 1e-4


def test_too_much_time_ends_in_one_message_and_the_next_file_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "SECONDS", 0.5)
    with isolated_runtimes(["onnx"]) as runtimes:
        started = time.monotonic()
        with pytest.raises(ExportError, match="and was stopped"):
            asked(tmp_path / "model.onnx", slow(), runtimes)
        assert time.monotonic() - started < 20
        monkeypatch.undo()
        assert asked(tmp_path / "model.onnx", honest().SerializeToString(), runtimes).max_rel < 1e-4


@pytest.mark.skipif(os.name == "nt", reason="no signals")
def test_a_runtime_that_crashes_ends_in_one_message(tmp_path: Path):
    (path := tmp_path / "model.onnx").write_bytes(honest().SerializeToString())
    with isolated_runtimes(["onnx"]) as runtimes:
        run = runtimes.open("onnx", [path], model_bytes=10_000)
        os.kill(runtimes._process.pid, signal.SIGSEGV)
        with pytest.raises(ExportError, match="its runtime was ended by SIGSEGV"):
            run((IMAGES,))
        assert compare_file(path, network(), IMAGES, runtimes=runtimes).max_rel < 1e-4


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_what_the_process_may_do(tmp_path: Path):
    (path := tmp_path / "model.onnx").write_bytes(honest().SerializeToString())
    with isolated_runtimes(["onnx"]) as runtimes:
        runtimes.open("onnx", [path], model_bytes=10_000)
        process = Path("/proc") / str(runtimes._process.pid)
        limits = {line[:26].strip(): line[26:].split() for line in (process / "limits").read_text().splitlines()}
        assert limits["Max open files"][:2] == ["0", "0"]
        assert limits["Max file size"][:2] == ["0", "0"]
        assert int(limits["Max cpu time"][0]) < 30
        assert int(limits["Max address space"][0]) < 8 * 2**30
        assert not list((process / "cwd").iterdir())
        names = {entry.split(b"=")[0] for entry in (process / "environ").read_bytes().split(b"\0") if entry}
        assert names <= {name.encode() for name in (*module._ENVIRONMENT, "OMP_NUM_THREADS", "MALLOC_ARENA_MAX")}
        assert "NoNewPrivs:\t1" in (process / "status").read_text()
    assert not process.exists()


def test_secrets_of_the_environment_are_not_handed_on(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    monkeypatch.setenv("ORT_LOAD_CONFIG_FROM_MODEL", "1")
    with isolated_runtimes([]) as runtimes:
        environ = Path(f"/proc/{runtimes._process.pid}/environ")
        if environ.exists():
            assert b"AWS_" not in environ.read_bytes()
            assert b"ORT_" not in environ.read_bytes()


def test_a_file_far_larger_than_the_model_is_not_read(tmp_path: Path):
    with (tmp_path / "model.onnx").open("wb") as file:
        file.truncate(2**27)
    with isolated_runtimes(["onnx"]) as runtimes, pytest.raises(ArtifactError, match="must have at most"):
        runtimes.open("onnx", [tmp_path / "model.onnx"], model_bytes=1000)


@pytest.mark.parametrize(
    "answer",
    [
        {"arrays": [["<f4", [2, -3]]], "blobs": [24]},
        {"arrays": [["<f4", [2, 3]]], "blobs": [25]},
        {"arrays": [["O", [1]]], "blobs": [8]},
        {"arrays": [["nonsense", [1]]], "blobs": [4]},
        {"arrays": [["<f4", [2**62, 2**62]]], "blobs": [0]},
        {"arrays": [["<f4", [2**40]]], "blobs": [2**42]},
        {"arrays": 3, "blobs": []},
        {},
    ],
)
def test_a_process_that_was_taken_over_is_not_believed(answer: dict[str, object]):
    with isolated_runtimes([]) as runtimes, pytest.raises(ExportError, match="makes no sense"):
        runtimes._outputs(answer, 2**20)


@pytest.mark.skipif(sys.platform != "linux", reason="inotify")
def test_the_oracle_of_reads_sees_one(tmp_path: Path):
    (tmp_path / "private.bin").write_bytes(b"x")
    opened = Opened(tmp_path / "private.bin")
    assert not opened.any()
    (tmp_path / "private.bin").read_bytes()
    assert opened.any()
    opened.close()


def test_an_output_that_is_no_tensor_of_numbers(tmp_path: Path):
    model = honest()
    model.graph.node[-1].output[0] = "logits"
    model.graph.node.append(helper.make_node("Cast", ["logits"], ["output"], to=TensorProto.STRING))
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.STRING
    with pytest.raises(ExportError, match="no tensor of numbers"):
        asked(tmp_path / "model.onnx", model.SerializeToString())


def test_external_data_is_refused_before_any_runtime_sees_it(tmp_path: Path):
    model = honest()
    model.graph.initializer.append(external("private.bin"))
    with pytest.raises(ExportError, match="numbers in other files"):
        asked(tmp_path / "model.onnx", model.SerializeToString())


def test_a_process_that_cannot_start_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(ExportError, match="in a process of their own, which must start; got No such file"):
        asked(tmp_path / "model.onnx", honest().SerializeToString())


@pytest.mark.parametrize("library", ["onnxruntime", "openvino"])
def test_runtimes_send_nothing_and_leave_the_home_alone(library: str, tmp_path: Path) -> None:
    """In a process of its own, as a library is imported once; without a home, as in containers."""
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    program = (
        "import importlib.util, os, sys\n"
        f"spec = importlib.util.spec_from_file_location('child', {_runtime_child.__file__!r})\n"
        "child = importlib.util.module_from_spec(spec); spec.loader.exec_module(child)\n"
        f"with child.without_telemetry():\n    import {library}\n"
        "assert 'openvino_telemetry' not in sys.modules and 'ORT_DISABLE_TELEMETRY' not in os.environ\n"
    )
    home = tmp_path / "home"
    home.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"PATH": os.environ["PATH"], "HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert list(home.iterdir()) == []


def test_who_asks_for_telemetry_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    own = types.ModuleType("openvino_telemetry")
    monkeypatch.setitem(sys.modules, "openvino_telemetry", own)
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "0")
    with without_telemetry():
        assert os.environ["ORT_DISABLE_TELEMETRY"] == "1"
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "0"
    assert sys.modules["openvino_telemetry"] is own
