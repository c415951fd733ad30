"""The process that runs exported files from strangers: `IsolatedRuntimes` starts this file and talks to it.

It reads messages from standard input and answers on standard output; neither side unpickles anything. Its limits are
set before it sees the first byte of a file: no new file or socket for runtimes that need none, no file that grows,
bounded memory and processor time for each request. Only the standard library is imported at the top, and nothing of
Secateur, because torch takes longer to import than most files take to check.
"""

import contextlib
import ctypes
import importlib
import importlib.util
import io
import json
import os
import struct
import sys
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

Arrays = list[Any]
"""Arrays of numpy, one for each input or output, in order."""
ArrayRunner = Callable[[Arrays], Arrays]
Opener = Callable[[Sequence[bytes], int], ArrayRunner]
"""Opens the content of the files of one format, to run it with a number of threads."""

_LARGEST_HEADER = 2**20
_SHOWN = 300
_READ = frozenset({"r", "rb", "rt"})
_FORBIDDEN = (
    "ctypes.dlopen", "os.chmod", "os.chown", "os.exec", "os.fork", "os.forkpty", "os.kill", "os.link", "os.mkdir",
    "os.posix_spawn", "os.remove", "os.rename", "os.rmdir", "os.spawn", "os.symlink", "os.system", "os.truncate",
    "shutil.", "socket.", "subprocess.",
)  # fmt: skip
"""Beginnings of the names of events (`sys.audit`) that no file may cause."""


def write_message(stream: BinaryIO, header: dict[str, Any], blobs: Sequence[Any] = ()) -> None:
    """Write one message: its header as JSON, then raw bytes."""
    views = [memoryview(blob).cast("B") if len(blob) else memoryview(b"") for blob in blobs]
    text = json.dumps({**header, "blobs": [len(view) for view in views]}).encode()
    stream.write(struct.pack("<Q", len(text)) + text)
    for view in views:
        stream.write(view)
    stream.flush()


def read_header(stream: BinaryIO) -> dict[str, Any] | None:
    """Read the header of the next message; None if the other side has closed.

    Raises:
        ValueError: If it is damaged.
    """
    head = stream.read(8)
    if len(head) < 8:
        return None
    (length,) = struct.unpack("<Q", head)
    if length > _LARGEST_HEADER:
        raise ValueError("the header of a message is too long")
    text = stream.read(length)
    if len(text) < length:
        return None
    header = json.loads(text)
    if not isinstance(header, dict):
        raise ValueError("the header of a message is no JSON object")
    return header


@contextmanager
def without_telemetry() -> Generator[None]:
    """Keep runtimes that are imported within the block from sending statistics and writing to the home folder.

    OpenVINO fails there if the user has no home folder, and both print warnings if it cannot be written.
    """
    settings = {"ORT_DISABLE_TELEMETRY": "1"}
    module, absent = "openvino_telemetry", object()
    variables = {name: os.environ.get(name) for name in settings}
    loaded = sys.modules.get(module, absent)
    os.environ.update(settings)
    if loaded is absent:
        sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if loaded is absent:
            sys.modules.pop(module, None)
        for name, before in variables.items():
            if before is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = before


def open_onnx(files: Sequence[bytes], threads: int) -> ArrayRunner:
    """Open an ONNX file that only computes (see `onnx_check`) with ONNX Runtime."""
    with without_telemetry():
        import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.add_session_config_entry("session.load_model_format", "ONNX")  # Not what the first bytes look like.
    content = _onnx_check().plain_onnx(files[0])
    session: Any = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    names = [slot.name for slot in session.get_inputs()]
    return lambda arrays: session.run(None, dict(zip(names, arrays, strict=True)))


def _onnx_check() -> Any:
    """Import ``onnx_check.py`` by its path: as a part of its package, it would import torch."""
    name = "secateur_onnx_check"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name("onnx_check.py"))
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def open_openvino(files: Sequence[bytes], threads: int) -> ArrayRunner:
    """Open a description and its weights with OpenVINO, on the CPU in float32."""
    import numpy as np

    with without_telemetry():
        import openvino

    core = openvino.Core()
    weights = openvino.Tensor(np.frombuffer(files[1] or b"\0", dtype=np.uint8))
    # On processors that compute in bfloat16 OpenVINO does so unless told otherwise: outputs of a ResNet-20 then differ
    # by 7e-3 of the largest instead of 4e-7.
    settings: Any = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    compiled: Any = core.compile_model(core.read_model(files[0], weights), "CPU", settings)

    def run(arrays: Arrays) -> Arrays:
        found = compiled(arrays)
        return [found[slot].copy() for slot in compiled.outputs]

    return run


def open_pt2(files: Sequence[bytes], threads: int) -> ArrayRunner:
    """Open a program of `torch.export`, parts of which torch may unpickle."""
    import torch

    torch.set_num_threads(threads)
    module: Any = torch.export.load(io.BytesIO(files[0])).module()

    def run(arrays: Arrays) -> Arrays:
        from torch.utils import _pytree

        with torch.no_grad():
            found = module(*map(torch.from_numpy, arrays))
        return [tensor.numpy() for tensor in _pytree.tree_leaves(found) if isinstance(tensor, torch.Tensor)]

    return run


def open_executorch(files: Sequence[bytes], threads: int) -> ArrayRunner:
    """Open a program of ExecuTorch, whose runtime trusts it."""
    import torch

    runtime = importlib.import_module("executorch.runtime").Runtime.get()
    # The program reads from the bytes, and the method from the program, without owning them: if either were freed
    # while the method runs, the process would crash. So the function below holds all three.
    content = files[0]
    program = runtime.load_program(content)
    method = program.load_method("forward")

    def run(arrays: Arrays, _held: Any = (content, program)) -> Arrays:
        # What comes back lies in the runtime's memory, which the next run overwrites.
        return [tensor.clone().numpy() for tensor in method.execute([torch.from_numpy(array) for array in arrays])]

    return run


OPENERS: dict[str, Opener] = {
    "onnx": open_onnx,
    "openvino": open_openvino,
    "pt2": open_pt2,
    "executorch": open_executorch,
}
"""By the name of the format (`secateur.export.Format`); files in int8 are opened as ``onnx``."""


def _warm_onnx() -> None:
    importlib.import_module("onnx")
    importlib.import_module("onnxruntime")
    _onnx_check()


_EMPTY_IR = b"""<net name="x" version="11"><layers>
<layer id="0" name="x" type="Parameter" version="opset1"><data shape="1" element_type="f32"/>
<output><port id="0" precision="FP32"><dim>1</dim></port></output></layer>
<layer id="1" name="y" type="Result" version="opset1">
<input><port id="0" precision="FP32"><dim>1</dim></port></input></layer>
</layers><edges><edge from-layer="0" from-port="0" to-layer="1" to-port="0"/></edges></net>"""


def _warm_openvino() -> None:
    # Its parts are loaded from files when they are first used.
    import numpy as np

    open_openvino([_EMPTY_IR, b""], 1)([np.zeros(1, np.float32)])


def _warm_pt2() -> None:
    for name in ("torch", "torch.export", "torch.utils._pytree", "torch._export.serde.serialize"):
        importlib.import_module(name)


def _warm_executorch() -> None:
    for name in ("torch", "executorch.runtime"):
        importlib.import_module(name)


_WARM: dict[str, Callable[[], None]] = {
    "onnx": _warm_onnx,
    "openvino": _warm_openvino,
    "pt2": _warm_pt2,
    "executorch": _warm_executorch,
}
_NEEDS_FILES = frozenset({"openvino", "pt2", "executorch"})
"""Formats whose runtimes look for parts of themselves while they run."""
_FEW = 64
"""Files that those may have open."""


class Limits:
    """The limits of this process.

    Args:
        files: Whether files of installed packages may still be opened.
    """

    def __init__(self, *, files: bool):
        self._resource: Any = None
        with contextlib.suppress(ImportError):  # Windows has no limits of this kind.
            self._resource = importlib.import_module("resource")
        self._files = files

    def close_doors(self) -> None:
        """Allow no new file, no file that grows, and no core file. To be called once everything is loaded."""
        roots = tuple(str(Path(path).resolve()) for path in (*sys.path, sys.prefix, sys.base_prefix) if path)
        roots = (*roots, "/proc/self", "/proc/cpuinfo", "/sys/devices/system") if self._files else roots
        _confine(roots if self._files else ())
        if self._resource is not None:
            for name, most in (("RLIMIT_FSIZE", 0), ("RLIMIT_CORE", 0), ("RLIMIT_NOFILE", _FEW if self._files else 0)):
                self._bound(name, most, most)

        def refuse(event: str, arguments: tuple[Any, ...]) -> None:
            if event.startswith(_FORBIDDEN):
                raise PermissionError(f"a file from a stranger must not cause {event}")
            if event == "open" and not self._readable(arguments, roots):
                raise PermissionError("a file from a stranger must not open other files")

        sys.addaudithook(refuse)  # Where the system has none of these limits, and for Python alone.

    def _readable(self, arguments: tuple[Any, ...], roots: tuple[str, ...]) -> bool:
        path, mode, flags = arguments
        if isinstance(path, int):
            return True
        writes = (mode is not None and mode not in _READ) or (
            isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR)
        )
        return self._files and not writes and os.path.realpath(os.fsdecode(path)).startswith(roots)

    def allow(self, memory: int, seconds: float, *, files: bool) -> None:
        """Bound what the next request may take, beyond what the process has taken until now.

        Args:
            memory: Bytes of new memory.
            seconds: Processor time, of all threads together.
            files: Whether it may open files at all.
        """
        if self._resource is None:
            return
        used, taken = self._resource.getrusage(self._resource.RUSAGE_SELF), _address_space()
        self._bound("RLIMIT_CPU", int(used.ru_utime + used.ru_stime + seconds) + 1)
        self._bound("RLIMIT_NOFILE", _FEW if files else 0)
        if taken:
            self._bound("RLIMIT_AS", taken + memory)

    def _bound(self, name: str, soft: int, hard: int | None = None) -> None:
        """Set a limit; its upper bound stays if none is given."""
        kind = getattr(self._resource, name)
        _, before = self._resource.getrlimit(kind)
        most = before if hard is None else hard
        within = soft if most == self._resource.RLIM_INFINITY else min(soft, most)
        with contextlib.suppress(OSError, ValueError):
            self._resource.setrlimit(kind, (within, most))


def _address_space() -> int:
    """Return the bytes of address space of this process; 0 where the system does not tell."""
    try:
        os.lseek(_STATM[0], 0, os.SEEK_SET)
        return int(os.read(_STATM[0], 100).split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return 0


_STATM: list[int] = []
"""The open file of Linux that tells it: no file can be opened later."""

_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
"""Numbers of system calls, the same on all processors."""
_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}
"""How many rights for files each version of Landlock knows; 16 from the fifth on."""
_READ_RIGHTS = 0b1101
"""Execute (libraries are mapped), read a file, read a folder."""


def _confine(roots: Sequence[str]) -> None:
    """Let this thread, and those that it starts, only read beneath the given folders, with Linux's Landlock.

    Nothing can be written, removed, renamed or started, and nothing connects over TCP. Without Landlock nothing
    happens.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    version = libc.syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    if version < 1:
        return
    rights = (1 << _RIGHTS.get(version, 16)) - 1
    asked = struct.pack("<QQQ", rights, 0b11, 0b11)[: 8 if version < 4 else 16 if version < 6 else 24]
    ruleset = libc.syscall(_LANDLOCK_CREATE, asked, ctypes.c_size_t(len(asked)), ctypes.c_uint32(0))
    if ruleset < 0:
        return
    try:
        for root in roots:
            with contextlib.suppress(OSError):
                beneath = os.open(root, os.O_RDONLY | os.O_CLOEXEC)
                allowed = _READ_RIGHTS if Path(root).is_dir() else _READ_RIGHTS & ~0b1000
                rule = struct.pack("<Qi", allowed, beneath)
                libc.syscall(_LANDLOCK_ADD, ruleset, ctypes.c_int(1), rule, ctypes.c_uint32(0))
                os.close(beneath)
        libc.syscall(_LANDLOCK_RESTRICT, ruleset, ctypes.c_uint32(0))
    finally:
        os.close(ruleset)


_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
_SIGKILL = 9


def _leave_network() -> None:
    """Take away the network and new rights, and end with the parent, where the system lets a process do so."""
    if sys.platform != "linux":
        return
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.prctl(_PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0)
        libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        if libc.unshare(_CLONE_NEWNET):
            libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET)


def _arrays(header: dict[str, Any], blobs: Sequence[bytes]) -> Arrays:
    import numpy as np

    return [
        np.frombuffer(blob, dtype=kind).reshape(shape)
        for blob, (kind, shape) in zip(blobs, header["arrays"], strict=True)
    ]


def _answer(found: Any, out: BinaryIO) -> None:
    import numpy as np

    if not all(isinstance(each, np.ndarray) and each.dtype.kind in "fiub" for each in found):
        write_message(out, {"failed": "an output is no tensor of numbers"})
        return
    held = [np.ascontiguousarray(each) for each in found]
    described = [[each.dtype.str, list(each.shape)] for each in held]
    write_message(out, {"arrays": described}, [each.reshape(-1).view(np.uint8) for each in held])


def answer_requests(stream: BinaryIO, out: BinaryIO, limits: Limits) -> None:
    """Open files and run them, one request after the other, until the other side closes."""
    runner: ArrayRunner | None = None
    form = ""
    while (header := read_header(stream)) is not None:
        form = header.get("open", form)
        limits.allow(header["memory"], header["seconds"], files=form in _NEEDS_FILES)
        blobs = [stream.read(size) for size in header["blobs"]]
        try:
            if "open" in header:
                runner = None
                runner = OPENERS[form](blobs, header["threads"])
                write_message(out, {"opened": True})
            else:
                assert runner is not None
                _answer(runner(_arrays(header, blobs)), out)
        except _onnx_check().RefusedFileError as error:
            write_message(out, {"refused": str(error)[:_SHOWN]})
        except Exception as error:
            write_message(out, {"failed": _reason(error)})


def _reason(error: Exception) -> str:
    """Return what an error says, in one line: OpenVINO's first lines are places in its source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = [line for line in lines if not line.startswith("Exception from ")] or lines
    return (said[0] if said else type(error).__name__)[:_SHOWN]


def run_child() -> None:
    """Load the runtimes, set the limits, then serve."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # Runtimes print to standard output, where the other side reads messages.
    settings = read_header(sys.stdin.buffer)
    if settings is None:
        return
    _leave_network()
    sys.path.extend(path for path in settings["paths"] if path not in sys.path)
    warnings.simplefilter("ignore")
    wanted: list[str] = settings["formats"]
    try:
        importlib.import_module("numpy")
        _onnx_check()
        for name in wanted:
            _WARM[name]()
    except Exception as error:
        write_message(out, {"failed": f"{type(error).__name__}: {error}"[:_SHOWN]})
        return
    with contextlib.suppress(OSError):
        _STATM.append(os.open("/proc/self/statm", os.O_RDONLY))
    limits = Limits(files=bool(_NEEDS_FILES & set(wanted)))
    limits.close_doors()
    write_message(out, {"ready": True})
    answer_requests(sys.stdin.buffer, out, limits)


if __name__ == "__main__":
    run_child()
