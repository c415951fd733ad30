"""Run exported files from strangers in a process of their own, with limits on memory, time and files.

A file can make its runtime crash, compute without end, or ask for all memory. Then this process ends with one message,
and the other one is gone.
"""

import contextlib
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Collection, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import torch

from secateur._files import read_bytes, temporary_folder
from secateur._json import brief
from secateur.errors import ExportError
from secateur.export import _runtime_child
from secateur.export._common import InputTensors, Runner
from secateur.export.onnx_check import MAX_ONNX_BYTES

SECONDS = 6.0
"""Processor time that every request has, beside what follows from the size of its file and the time of the model."""
_PATIENCE = 1.6
"""Elapsed seconds per second of processor time, for machines with other work."""
_LOADING = 300.0
"""Seconds in which the runtimes themselves must be imported; no file of a stranger is known by then."""
_BYTES_PER_SECOND = 20e6
_TIMES_THE_MODEL = 20
"""How much slower than the model in PyTorch a file may be."""
_MEMORY, _TIMES_THE_FILE, _TIMES_THE_INPUT = 2**30, 8, 256
"""Bytes that every request may take, and how often the size of its file and of its input."""
_TIMES_THE_WEIGHTS, _LARGEST_GRAPH = 4, 2**26
"""Bytes that a file may have: so often those of the model's weights, and those of a graph without weights."""
_BYTES_PER_THREAD = 2**27
"""Address space that a thread reserves."""
_ENVIRONMENT = ("PATH", "LANG", "LC_ALL", "TZ", "HOME", "LD_LIBRARY_PATH", "SYSTEMROOT", "TMPDIR", "TEMP", "TMP")
"""What is handed on. Runtimes take settings from the environment, and secrets are kept there."""
_KINDS = frozenset("fiub")
"""Of numpy: floats, whole numbers and booleans."""
_SHOWN = 300


class IsolatedRuntimes:
    """A process that opens and runs exported files, one after the other. See `isolated_runtimes`.

    It is started at once, so that runtimes are imported while the caller does something else, and again after a file
    has ended it.

    Args:
        formats: Names of the formats that will be opened, see `secateur.Format`.
        folder: An empty folder to run in.
    """

    def __init__(self, formats: Collection[str], folder: Path):
        self._formats, self._folder = sorted(formats), folder
        self._ready, self._late = False, 0.0
        self._process = self._started()

    def open(self, form: str, paths: Sequence[Path], *, model_bytes: int, model_seconds: float = 0.0) -> Runner:
        """Open the files of one format to run them on inputs in their order.

        The runner belongs to the last file that was opened.

        Args:
            form: The name of the format.
            paths: Its files.
            model_bytes: The size of the model's weights, which bounds that of the files.
            model_seconds: How long the model in PyTorch takes for what will be run.

        Raises:
            ArtifactError: If a file is a link, a pipe or a device, or far larger than the model.
            ExportError: If the file is refused, does not open, or takes too much time or memory.
        """
        largest = min(MAX_ONNX_BYTES, _TIMES_THE_WEIGHTS * model_bytes + _LARGEST_GRAPH)
        contents = [read_bytes(path, limit=largest) for path in paths]
        threads, size = torch.get_num_threads(), sum(map(len, contents))
        memory = _MEMORY + _TIMES_THE_FILE * size + _BYTES_PER_THREAD * threads
        seconds = SECONDS + size / _BYTES_PER_SECOND
        header = {"open": form, "threads": threads, "memory": memory, "seconds": seconds}
        self._prepare()
        with self._deadline(_PATIENCE * seconds):
            self._asked(header, contents)

        def run(batch: InputTensors) -> list[torch.Tensor]:
            arrays = [np.ascontiguousarray(tensor.detach().cpu().numpy()) for tensor in batch]
            given = sum(array.nbytes for array in arrays)
            more = {"memory": memory + _TIMES_THE_INPUT * given}
            allowed = {**more, "seconds": seconds + _TIMES_THE_MODEL * model_seconds * threads}
            described = [[array.dtype.str, list(array.shape)] for array in arrays]
            with self._deadline(_PATIENCE * allowed["seconds"]):
                answer = self._asked({"run": True, "arrays": described, **allowed}, arrays)
                return self._outputs(answer, more["memory"])

        return run

    def _started(self) -> "subprocess.Popen[bytes]":
        kept = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        try:
            process = subprocess.Popen(
                # -I: neither the environment nor the folder decide what is imported.
                [sys.executable, "-I", str(Path(_runtime_child.__file__).resolve())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd=self._folder,
                env=kept | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "MALLOC_ARENA_MAX": "2"},
                start_new_session=True,
            )
        except OSError as error:
            raise ExportError(
                f"Exported files are run in a process of their own, which must start; got {error.strerror} "
                f"({sys.executable}). Check the permissions of that file, and how many processes may run."
            ) from error
        here = Path.cwd() if _has_folder() else None
        paths = [path for path in sys.path if path and Path(path).is_absolute() and Path(path) != here]
        self._ready = False
        with contextlib.suppress(OSError):  # It is gone; the first request will say so.
            _runtime_child.write_message(_stream(process.stdin), {"formats": self._formats, "paths": paths})
        return process

    def _prepare(self) -> None:
        """Wait until the runtimes are imported, in a new process if the last one has ended."""
        if self._process.poll() is not None:
            self.close()
            self._process = self._started()
        if not self._ready:
            with self._deadline(_LOADING):
                self._received()
            self._ready = True

    def _asked(self, header: dict[str, Any], blobs: Sequence[Any]) -> dict[str, Any]:
        """Send a request; return the header of the answer, and leave what follows it to be read."""
        try:
            _runtime_child.write_message(_stream(self._process.stdin), header, blobs)
        except OSError:
            raise self._ended() from None
        return self._received()

    @contextmanager
    def _deadline(self, seconds: float) -> Generator[None]:
        """End the process if the block takes longer: whatever waits for it goes on then."""
        process, self._late = self._process, 0.0

        def end() -> None:
            self._late = seconds
            _kill(process)

        timer = threading.Timer(seconds, end)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _received(self) -> dict[str, Any]:
        try:
            answer = _runtime_child.read_header(_stream(self._process.stdout))
        except ValueError:
            self.close()
            raise _senseless() from None
        if answer is None:
            raise self._ended()
        if "refused" in answer:
            raise ExportError(brief(str(answer["refused"]), most=_SHOWN))
        if "failed" in answer:
            raise ExportError(f"it does not run ({brief(str(answer['failed']), most=_SHOWN)}): export it again")
        return answer

    def _outputs(self, answer: dict[str, Any], most: int) -> list[torch.Tensor]:
        """Read the arrays that follow an answer, none of whose words are believed."""
        try:
            kinds = [np.dtype(str(kind)) for kind, _ in answer["arrays"]]
            shapes = [tuple(int(side) for side in shape) for _, shape in answer["arrays"]]
            sizes = [kind.itemsize * math.prod(shape) for kind, shape in zip(kinds, shapes, strict=True)]
            numbers = all(kind.kind in _KINDS for kind in kinds) and all(
                side >= 0 for shape in shapes for side in shape
            )
            if not numbers or sum(sizes) > most or sizes != answer["blobs"]:
                raise ValueError("sizes do not fit")
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            self.close()
            raise _senseless() from error
        found = list[torch.Tensor]()
        for kind, shape, size in zip(kinds, shapes, sizes, strict=True):
            content = bytearray(_stream(self._process.stdout).read(size))
            if len(content) < size:
                raise self._ended()
            found.append(torch.from_numpy(np.frombuffer(content, dtype=kind).reshape(shape)))
        return found

    def _ended(self) -> ExportError:
        """Return the error for a process that is gone."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        code = self._process.returncode
        self.close()
        if self._late:
            return ExportError(f"it takes more than {self._late:.0f} s, and was stopped: export it again")
        if code is not None and -code == getattr(signal, "SIGXCPU", None):
            return ExportError("it takes too much processor time, and was stopped: export it again")
        how = f"ended with code {code}" if code is None or code >= 0 else f"was ended by {_signal_name(-code)}"
        return ExportError(f"its runtime {how} (damaged, or too little memory): export it again")

    def close(self) -> None:
        """End the process."""
        _kill(self._process)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):  # What was not sent is of no use.
                _stream(stream).close()


@contextmanager
def isolated_runtimes(formats: Collection[str]) -> Generator[IsolatedRuntimes]:
    """Start a process that opens and runs exported files; it ends with the context.

    It has no network where the system allows to take that away, an empty working folder, and nothing of the
    environment that a runtime takes settings from. Formats whose runtimes need no files can open none, which the system
    enforces. Per request it has bounded memory (1 GiB, 8 times the file, 256 times the input) and processor time (6 s,
    a second for each 20 MB of the file, 20 times the time of the model). On Windows only the time is bounded.

    Args:
        formats: Names of the formats that will be opened, see `secateur.Format`.
    """
    with temporary_folder("secateur-run-") as folder:
        runtimes = IsolatedRuntimes(formats, folder)
        try:
            yield runtimes
        finally:
            runtimes.close()


def _has_folder() -> bool:
    """Whether the current folder still exists."""
    try:
        Path.cwd()
    except OSError:
        return False
    return True


def _stream(stream: Any) -> BinaryIO:
    assert stream is not None
    return cast(BinaryIO, stream)


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """Kill a process and what it has started."""
    if process.returncode is not None:
        return
    with contextlib.suppress(OSError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()


def _senseless() -> ExportError:
    return ExportError("its runtime gave an answer that makes no sense: export it again")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
