"""Weights from files that cannot run code: safetensors, or torch files read with ``weights_only=True``.

A torch file still says how much is unpacked and built: two kilobytes of compressed zeros are two megabytes, and sixty
nested tuples, each containing the previous one twice, have 2^60 parts, all of which Python visits if one becomes a key
of a mapping. So `check_torch_file` computes what loading would cost, without building anything, before torch loads it.
"""

import os
import pickle
import pickletools
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor, nn

from secateur._batches import unusual
from secateur._kinds import checked
from secateur._text import is_text
from secateur.errors import ModelError

_STATE_DICT_KEYS = (
    "state_dict", "model_state_dict", "model", "net", "params", "weights",
    "ema", "model_ema", "params_ema", "ema_state_dict", "state_dict_ema", "ema_model",
)  # fmt: skip
"""Entries under which training scripts store weights."""
_WRAPPER_PREFIXES = ("module.", "_orig_mod.")
"""Prefixes of names that DataParallel and torch.compile add."""
_DEEPEST = 2
"""Weights may lie in an entry of an entry."""
_NUMPY_SUFFIXES = (".npy", ".npz")
_BATCH_COUNTER = "num_batches_tracked"
_STATISTICS = ("running_mean", "running_var")
_MAX_NAMES_SHOWN, _MAX_NAME_LENGTH = 5, 200
_HEADER_SIZE_BYTES = 8
MAX_HEADER_BYTES = 16 * 2**20
"""The longest header of a safetensors file that is read."""


def read_weights(path: Path | str, key: str | None = None) -> dict[str, Tensor]:
    """Read a file of tensors by name, on the CPU.

    A ``.safetensors`` file is read as such, any other as a torch file, whose tensors may lie under ``state_dict``,
    ``model``, ``net``, ``ema`` and other usual names.

    Args:
        path: The file.
        key: The entry to read, where there are several.

    Raises:
        ModelError: If the file is missing, truncated, contains pickled code, or is not a mapping of names to tensors;
            or if several entries hold tensors and ``key`` names none of them.
    """
    sets = _read_sets(Path(path))
    known = {name: tensors for name, tensors in sets.items() if name in _STATE_DICT_KEYS} or sets
    return _only({name: t for name, t in sets.items() if name == key} if key is not None else known, sets, path)


def _read_sets(path: Path) -> dict[str, dict[str, Tensor]]:
    """Read every set of tensors by name that a file holds, by its entry; "" if the file is one itself."""
    check_weights_file(path)
    sets = {"": _read_safetensors(path)} if path.suffix == ".safetensors" else _read_torch(path)
    if not any(sets.values()):
        raise ModelError(f"{path} must hold tensors by name; it is empty.")
    return sets


def _only(fitting: Mapping[str, dict[str, Tensor]], sets: Mapping[str, object], path: Path | str) -> dict[str, Tensor]:
    """Return the one set of tensors, also if there are several that are equal; ask which one if there are others."""
    if not fitting:
        raise ModelError(
            f"`weights_key` must name one of the entries of {path} that hold weights: {_list_names(list(sets))}. "
            "Correct it, or leave it out."
        )
    first, *others = fitting.values()
    if any(not _equal(first, other) for other in others):
        names = list(fitting)
        raise ModelError(
            f"{path} must hold one set of weights that fits the model; got {len(names)} that differ: "
            f"{' and '.join(names)}. Say which one: weights_key={names[-1]}"
        )
    return first


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def check_weights_file(path: Path) -> None:
    """Refuse what cannot be a file of weights, without reading it.

    Raises:
        ModelError: If there is no such file, it cannot be read or is empty, or it is of another kind.
    """
    if not path.is_file():
        raise ModelError(f"`weights` must be a file; there is none at {path}. Check the path.")
    if not os.access(path, os.R_OK):
        raise ModelError(f"`weights` must be a file that can be read; {path} cannot be. Check its permissions.")
    if path.stat().st_size == 0:
        raise ModelError(f"`weights` must be a complete file of tensors; {path} is empty. Copy it again.")
    if path.suffix in _NUMPY_SUFFIXES:
        raise ModelError(
            f"`weights` must be a .safetensors file or a torch file; got numpy's {path}. Read it with "
            "numpy.load(allow_pickle=False) and write it with safetensors.numpy.save_file."
        )


@checked
def load_weights_(model: nn.Module, path: Path | str, key: str | None = None) -> None:
    """Copy the weights of a file into a model in place; all must fit.

    Files hold weights in many ways: under ``state_dict``, ``net``, ``ema`` and the like, with a prefix ``module.`` or
    ``_orig_mod.`` before all names, or with the parts of a larger module beside each other (``model.``, ``teacher.``),
    of which one has all names of the model. Whatever fits is found. If several fit and differ, ``key`` must choose.

    Two kinds of names may be missing: ``num_batches_tracked``, which older files lack and evaluation does not use, and
    names of tensors that the file has under another name.

    Args:
        model: Unchanged if an error is raised.
        path: See `read_weights`.
        key: The entry, the prefix, or both ("state_dict.model"), where several fit.

    Raises:
        ModelError: As `read_weights`; or names are missing, unexpected or of another shape, or a tensor has NaN or
            infinite values.
    """
    path = Path(path)
    state, sets = model.state_dict(), _read_sets(path)
    fitting = _fitting(state, sets)
    if key is None and not fitting:
        usual = next((sets[name] for name in _STATE_DICT_KEYS if name in sets), next(iter(sets.values())))
        _check_names(state, _strip_prefixes(usual, state), path)
    if key is not None:
        named = {name: tensors for name, tensors in sets.items() if name == key}
        chosen = {name: tensors for name, tensors in fitting.items() if f".{key}." in f".{name}."}
        if named and not chosen:
            _check_names(state, _strip_prefixes(named[key], state), path)
        fitting = chosen
    tensors = _only(fitting, {**sets, **fitting}, path)
    _check_values(model, tensors, path)
    model.load_state_dict(tensors, strict=False)


def _fitting(state: Mapping[str, Tensor], sets: Mapping[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Return every set of tensors with the model's names and shapes, by entry and prefix."""
    found: dict[str, dict[str, Tensor]] = {}
    for entry, tensors in sets.items():
        whole = _strip_prefixes(tensors, state)
        if not _misfits(state, whole):
            found[entry] = whole
            continue
        for prefix in _prefixes(state, tensors):
            inside = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
            if not _misfits(state, inside):
                found[".".join(filter(None, (entry, prefix.rstrip("."))))] = inside
    return found


def _prefixes(state: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> list[str]:
    """Return what stands before a name of the model in the names of a file."""
    wanted = [name for name in state if not name.endswith(_BATCH_COUNTER)]
    # The longest name is the least likely to be found by chance.
    last = max(wanted, key=len, default="")
    if last in tensors:  # The model's own names are there, and others too: nobody asked for those.
        return []
    ends = [name.removesuffix(last) for name in tensors if last and name.endswith(f".{last}")]
    return list(dict.fromkeys(ends))


def _strip_prefixes(tensors: dict[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove the prefixes that wrappers leave, however many."""
    for prefix in _WRAPPER_PREFIXES:
        if all(name.startswith(prefix) for name in tensors) and not any(name.startswith(prefix) for name in state):
            return _strip_prefixes({name.removeprefix(prefix): tensor for name, tensor in tensors.items()}, state)
    return tensors


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load, load_file

    with path.open("rb") as file:
        start = file.read(_HEADER_SIZE_BYTES)
    if not can_start_safetensors(start, path.stat().st_size):
        raise ModelError(_damaged(path))
    try:
        return load_file(path) if is_text(path) else load(path.read_bytes())  # its paths are text
    except Exception as error:  # its own errors, and those of torch for shapes and dtypes that it does not know
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{path} must be a complete safetensors file; got: {reason}. Copy it again.") from error


def can_start_safetensors(start: bytes, file_size: int) -> bool:
    """Say whether a safetensors file of this size can start like this, with the size of a header within the file."""
    size = int.from_bytes(start[:_HEADER_SIZE_BYTES], "little")
    return len(start) >= _HEADER_SIZE_BYTES and size <= min(MAX_HEADER_BYTES, file_size - _HEADER_SIZE_BYTES)


class _Ignored:
    """Stands for an object beside the weights, such as the arguments of the script that trained them.

    It takes the place of the object's own class, so that nothing of it is built or run.
    """

    def __init__(self, *_: object, **__: object) -> None: ...

    def __new__(cls, *_: object, **__: object) -> "_Ignored":
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None: ...


_IGNORED_GLOBALS = (
    "argparse.Namespace",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *("numpy.dtype", "numpy.ndarray", "pathlib.PosixPath", "pathlib.PurePosixPath", "pathlib.WindowsPath"),
)
"""What training scripts store beside the weights, and nobody needs."""


def _read_torch(path: Path) -> dict[str, dict[str, Tensor]]:
    allowed: list[Any] = [(_Ignored, name) for name in _IGNORED_GLOBALS]
    try:
        check_torch_file(path)
        with torch.serialization.safe_globals(allowed):
            content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelError(_explain_unpickling_error(path, str(error))) from error
    except OversizedFileError as error:
        raise ModelError(
            f"{path} must hold tensors by name and nothing else; {error}. Where you trust it, save model.state_dict() "
            "with safetensors.torch.save_file and use that."
        ) from error
    except Exception as error:  # a damaged file can end in any of them
        raise ModelError(_damaged(path)) from error
    sets = dict(_sets_in(content, ()))
    if not sets:
        raise _no_sets(content, path)
    for tensors in sets.values():
        unusual = [name for name, value in tensors.items() if not _is_plain(value)]
        if unusual:
            raise ModelError(
                f"{path} must hold dense tensors of floats or whole numbers; got others: {_list_names(unusual)}. "
                "Convert them."
            )
    return sets


def _sets_in(content: object, entry: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield the mappings of names to tensors among the content of a file, by entry."""
    if not isinstance(content, Mapping):
        return
    items = cast(Mapping[object, object], content)
    if items and all(isinstance(value, Tensor) for value in items.values()):
        yield ".".join(entry), {str(name): cast(Tensor, value) for name, value in items.items()}
    elif len(entry) < _DEEPEST:
        for name, value in items.items():
            if isinstance(name, str):
                yield from _sets_in(value, (*entry, name))


def _no_sets(content: Any, path: Path) -> ModelError:
    """Say what a file holds instead of tensors by name."""
    for key in _STATE_DICT_KEYS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping):
        return ModelError(f"{path} must hold tensors by name (a state_dict); got {type(content).__name__}.")
    odd = next(((name, value) for name, value in content.items() if not isinstance(value, Tensor)), None)
    if odd is None:
        return ModelError(f"{path} must hold tensors by name; it is empty.")
    return ModelError(
        f"{path} must hold tensors by name (a state_dict); {_list_names([repr(odd[0])])} is "
        f"{type(odd[1]).__name__}. Save only model.state_dict()."
    )


_PLAIN_TYPES = (Tensor, nn.Parameter, nn.Buffer)
_PLAIN_DTYPES = frozenset({
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool, torch.uint8, torch.uint16, torch.uint32,
    torch.uint64, torch.int8, torch.int16, torch.int32, torch.int64,
})  # fmt: skip


def _is_plain(tensor: Tensor) -> bool:
    # A nested tensor says that it is strided, and has no shape.
    dense = tensor.layout is torch.strided and tensor.device.type == "cpu" and not tensor.is_nested
    return dense and type(tensor) in _PLAIN_TYPES and tensor.dtype in _PLAIN_DTYPES


def _explain_unpickling_error(path: Path, reason: str) -> str:
    """Distinguish pickled code from a damaged file: torch names the global that it refused."""
    if "GLOBAL" not in reason and "Unsupported class" not in reason:
        return _damaged(path)
    return (
        f"{path} contains pickled code (objects beyond tensors), which is refused because loading it could run "
        "anything. Where you trust it, save model.state_dict() with safetensors.torch.save_file and use that."
    )


def _damaged(path: Path) -> str:
    return f"{path} must be a complete torch or .safetensors file; it is truncated or of another kind. Copy it again."


def _check_names(state: Mapping[str, Tensor], tensors: Mapping[str, Tensor], path: Path | str) -> None:
    text = _misfits(state, tensors)
    if text:
        raise ModelError(
            f"{path} must fit the model; {text}. Check the model's name, num_classes and in_channels against the file."
        )


def _misfits(state: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> str:
    """Describe what keeps tensors from fitting a model; empty if they fit."""
    there = {tensor.data_ptr() for name, tensor in state.items() if name in tensors and tensor.numel()}
    missing = [
        name
        for name, tensor in state.items()
        if name not in tensors and not name.endswith(_BATCH_COUNTER) and tensor.data_ptr() not in there
    ]
    unexpected = [name for name in tensors if name not in state]
    misshaped = [
        f"{name} {tuple(tensors[name].shape)} (the model has {tuple(tensor.shape)})"
        for name, tensor in state.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    problems = (("missing", missing), ("unexpected", unexpected), ("of another shape", misshaped))
    return "; ".join(f"{len(names)} {kind}: {_list_names(names)}" for kind, names in problems if names)


def diverged_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of tensors that a model cannot have learned: NaN anywhere, or infinity in a weight.

    Infinity in a buffer is a mask, such as the -inf that keeps attention from looking ahead, unless the buffer is a
    running statistic.

    Args:
        model: For what each tensor is.
        tensors: Values by the names of the model's state.
    """
    masks = {name for name, _ in model.named_buffers(remove_duplicate=False) if not name.endswith(_STATISTICS)}
    return [
        name
        for name, tensor in tensors.items()
        # A state may hold what is no tensor, and what no operation looks into.
        if isinstance(cast(Any, tensor), Tensor)
        and not unusual(tensor)
        and not bool((~torch.isnan(tensor) if name in masks else torch.isfinite(tensor)).all())
    ]


def _check_values(model: nn.Module, tensors: Mapping[str, Tensor], path: Path | str) -> None:
    wrong = diverged_tensors(model, tensors)
    if wrong:
        raise ModelError(
            f"{path} must hold finite weights; NaN or infinite values in {len(wrong)} tensor(s): {_list_names(wrong)}. "
            "The training that made it diverged, or the file is damaged."
        )


def _list_names(names: Sequence[str]) -> str:
    shown = [
        name if len(name) <= _MAX_NAME_LENGTH else f"{name[:_MAX_NAME_LENGTH]}..." for name in names[:_MAX_NAMES_SHOWN]
    ]
    return ", ".join(shown) + (", ..." if len(names) > _MAX_NAMES_SHOWN else "")


_MAX_STEPS = 5_000_000
_MAX_PARTS = 10_000_000
"""The most parts of one object, where a part that is referred to twice counts twice."""
_MAX_LONG_INTEGERS = 10_000
"""The most integers beyond 32 bits: as keys of a mapping they could be chosen to collide."""
_REFUSED_GLOBALS = frozenset({"builtins bytearray", "__builtin__ bytearray"})
"""Allocates as many zeros as it is asked for."""
_LOCAL_HEADER_BYTES = 30
_LEGACY_PICKLES = 5


class OversizedFileError(ValueError):
    """Signals a file that asks for more memory or time than its weights can need."""


def check_torch_file(path: Path) -> None:
    """Refuse a file whose loading would take more memory than the size of the file, or unbounded time.

    Raises:
        OversizedFileError: If it would.
        Exception: Any exception if the file is damaged, or no torch file.
    """
    with path.open("rb") as file:
        if zipfile.is_zipfile(file):
            _check_zip(file, path.stat().st_size)
            return
        file.seek(0)
        for _ in range(_LEGACY_PICKLES):
            _check_pickle(file)


def _check_zip(file: IO[bytes], size: int) -> None:
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise OversizedFileError("it is compressed, which torch.save never does")
    if sum(entry.file_size for entry in entries) > size:
        raise OversizedFileError("its parts are larger than the file")
    for entry in entries:
        if entry.filename.endswith("data.pkl"):
            # Read without zipfile, which requires checksums that torch.save may leave out.
            file.seek(entry.header_offset)
            header = file.read(_LOCAL_HEADER_BYTES)
            names = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
            file.seek(entry.header_offset + _LOCAL_HEADER_BYTES + names)
            _check_pickle(file)


def _check_pickle(file: IO[bytes]) -> None:
    """Run a pickle without building anything: every object is replaced by the number of its parts."""
    stack: list[int] = []
    marks: list[int] = []
    memo: dict[Any, int] = {}
    long = 0
    for steps, (operation, argument, _) in enumerate(pickletools.genops(file), 1):
        name = operation.name
        long += name.startswith("LONG") and "GET" not in name and "PUT" not in name
        if steps > _MAX_STEPS or long > _MAX_LONG_INTEGERS or (name == "GLOBAL" and argument in _REFUSED_GLOBALS):
            raise OversizedFileError("it builds more than tensors by name")
        if name == "MARK":
            marks.append(len(stack))
        elif "PUT" in name:
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif "GET" in name:
            stack.append(memo[argument])
        else:
            _apply(operation, stack, marks)
        if stack and stack[-1] > _MAX_PARTS:
            raise OversizedFileError("it builds objects of endless parts")


def _apply(operation: pickletools.OpcodeInfo, stack: list[int], marks: list[int]) -> None:
    before = operation.stack_before
    start = len(stack)
    if pickletools.markobject in before:
        start = marks.pop()
        before = before[: before.index(pickletools.markobject)]
    start -= len(before)
    if start < 0:
        raise ValueError("the pickle is damaged")
    parts = 1 + sum(stack[start:])
    del stack[start:]
    stack.extend(parts for _ in operation.stack_after)
