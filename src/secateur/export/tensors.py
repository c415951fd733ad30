"""The tensors of a model in a safetensors file: written, read and checked, and put into a rebuilt model.

A tensor with many zeros is stored as one bit for each element and the elements that are not zero.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import safetensors.torch
import torch
from torch import Tensor, nn

from secateur._json import brief
from secateur.errors import ArtifactError, SparsityError
from secateur.export.manifest import TensorRecord
from secateur.models.weights import MAX_HEADER_BYTES, can_start_safetensors
from secateur.prune.masks import decode_sparse, encode_sparse

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
}
_LAYOUTS = {
    "contiguous": (torch.contiguous_format, None),
    "channels_last": (torch.channels_last, 4),
    "channels_last_3d": (torch.channels_last_3d, 5),
}
_WIDEST = 8
"""Bytes of the widest dtype."""
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ENTRIES_BYTES = 256
"""Upper bound on the header bytes of three entries beyond those of one."""


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter and buffer under every name it has, also buffers outside of the state dict."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def tensor_records(model: nn.Module) -> tuple[TensorRecord, ...]:
    """Records of all tensors of a model; a tensor with several names is held by the first.

    Raises:
        ArtifactError: If the model holds something that is not plain numbers.
    """
    _refuse_extra_state(model)
    first: dict[int, str] = {}
    records: list[TensorRecord] = []
    for name, tensor in named_tensors(model):
        _refuse_unusual(name, tensor)
        holder = first.setdefault(id(tensor), name)
        dtype = str(tensor.dtype).removeprefix("torch.")
        same_as = None if holder == name else holder
        parameter = isinstance(tensor, nn.Parameter)
        sparse = same_as is None and saves_space(tensor)
        records.append(TensorRecord(name, dtype, tuple(tensor.shape), _layout(tensor), parameter, same_as, sparse))
    return tuple(records)


def serialize(model: nn.Module, records: Sequence[TensorRecord]) -> bytes:
    """Return the bytes of model.safetensors."""
    tensors = dict(named_tensors(model))
    held: dict[str, Tensor] = {}
    for record in records:
        if record.same_as is None:
            tensor = tensors[record.name].detach().cpu().contiguous()
            held |= pack_sparse(record.name, tensor) if record.sparse else {record.name: tensor}
    return safetensors.torch.save(held)


def deserialize(data: bytes, records: Sequence[TensorRecord]) -> dict[str, Tensor]:
    """Read the tensors of model.safetensors by name (the first name of tied ones) and check them against their records.

    Raises:
        ArtifactError: If a tensor is missing, unknown, of another shape or dtype, or holds NaN.
    """
    _check_header(data)
    try:
        found = safetensors.torch.load(data)
    except Exception as error:  # its own errors, and those of torch for shapes and dtypes that it does not know
        raise ArtifactError(
            f"model.safetensors is damaged ({brief(error)}). Copy the artifact again, or make it again."
        ) from error
    held = {record.name: record for record in records if record.same_as is None}
    found = unpack_sparse(found, (record for record in held.values() if record.sparse))
    _same_names(found, held, "model.safetensors", "secateur.json")
    for record in records:
        holder = record.same_as or record.name
        if holder not in held:
            raise ArtifactError(
                f"{record.name} must be the same as a tensor of the file; got {holder!r} (secateur.json). "
                "The file is damaged: save the artifact again."
            )
        _check_tensor(found[holder], record)
    return found


def check_capacity(model: nn.Module, records: Sequence[TensorRecord]) -> int:
    """Refuse records of tensors that a rebuilt model does not have, or that are larger than its own.

    Surgery only removes channels, so whatever the records claim, reading them takes no more memory than the model.

    Returns:
        The largest size in bytes of the file of such tensors.

    Raises:
        ArtifactError: If the model has other tensors than the saved one.
    """
    present = dict(named_tensors(model))
    _same_names(present, {record.name: record for record in records}, "the rebuilt model", "secateur.json")
    for record in records:
        if math.prod(record.shape) > present[record.name].numel():
            raise ArtifactError(
                f"{brief(record.name)} must be at most as large as in the model's source, "
                f"{tuple(present[record.name].shape)}; got {record.shape}. "
                "The source builds another model than the one that was saved: use the same version of its code."
            )
    return MAX_HEADER_BYTES + _WIDEST * sum(tensor.numel() for tensor in present.values())


def install(model: nn.Module, records: Sequence[TensorRecord], tensors: Mapping[str, Tensor]) -> None:
    """Put the saved tensors into a rebuilt model, with their shapes, dtypes, memory formats and ties.

    Raises:
        ArtifactError: If the model has tensors of another kind than the saved one.
    """
    present = dict(named_tensors(model))
    made: dict[str, Tensor] = {}
    for record in records:
        old = present[record.name]
        saved = _kind(record.parameter, _DTYPES[record.dtype], len(record.shape))
        built = _kind(isinstance(old, nn.Parameter), old.dtype, old.dim())
        if saved != built:
            raise ArtifactError(
                f"{record.name} must be {built} as in the model's source; got {saved}. "
                "The source builds another model than the one that was saved: use the same version of its code."
            )
        holder = record.same_as or record.name
        if holder not in made:
            memory_format, _ = _LAYOUTS[record.layout]
            value = torch.empty_like(tensors[holder], memory_format=memory_format).copy_(tensors[holder])
            made[holder] = nn.Parameter(value, requires_grad=old.requires_grad) if record.parameter else value
        path, _, leaf = record.name.rpartition(".")
        setattr(model.get_submodule(path), leaf, made[holder])


def _kind(parameter: bool, dtype: torch.dtype, dimensions: int) -> str:
    numbers = "floats" if dtype.is_floating_point else "whole numbers"
    return f"a {'parameter' if parameter else 'buffer'} of {numbers} with {dimensions} dimensions"


def _layout(tensor: Tensor) -> str:
    for name, (memory_format, dimensions) in _LAYOUTS.items():
        if dimensions in (None, tensor.dim()):
            usual = torch.empty(tensor.shape, device="meta", memory_format=memory_format)
            if usual.stride() == tensor.stride():
                return name
    return "contiguous"


def _refuse_extra_state(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise ArtifactError(
                f"`model` must keep its state in parameters and buffers; got {type(module).__name__} with extra state "
                f"({name or 'the model itself'}). An artifact holds numbers only: register them as buffers."
            )


def _refuse_unusual(name: str, tensor: Tensor) -> None:
    if nn.parameter.is_lazy(tensor):
        raise ArtifactError(f"`model` must be initialized; got lazy {name}. Run the model once on an example first.")
    if tensor.layout != torch.strided or str(tensor.dtype).removeprefix("torch.") not in _DTYPES:
        raise ArtifactError(
            f"{name} must be a dense tensor of a plain dtype; got {tensor.layout}, {tensor.dtype}. "
            f"Convert it to one of {', '.join(_DTYPES)}."
        )
    if tensor.is_floating_point() and bool(tensor.isnan().any()):
        raise ArtifactError(
            f"{name} must not hold NaN; got {int(tensor.isnan().sum())} of {tensor.numel()} values. Train it again."
        )


def _check_header(data: bytes) -> None:
    if not can_start_safetensors(data, len(data)):
        raise ArtifactError(
            f"model.safetensors must begin with the size of its header; got {data[:8].hex()} in a file of "
            f"{len(data)} bytes. The file is damaged: copy the artifact again, or make it again."
        )


def _check_tensor(tensor: Tensor, record: TensorRecord) -> None:
    if record.dtype not in _DTYPES or tensor.dtype != _DTYPES[record.dtype] or tuple(tensor.shape) != record.shape:
        raise ArtifactError(
            f"{record.name} must be {record.dtype} of shape {record.shape} as secateur.json says; got {tensor.dtype} "
            f"of shape {tuple(tensor.shape)}. The artifact is damaged: copy it again, or make it again."
        )
    if _LAYOUTS.get(record.layout, ("", -1))[1] not in (None, tensor.dim()):
        raise ArtifactError(
            f"{record.name} must have a layout that fits its dimensions; got {record.layout!r} "
            "(secateur.json). The file is damaged: save the artifact again."
        )
    if tensor.is_floating_point() and bool(tensor.isnan().any()):
        raise ArtifactError(
            f"{record.name} must not hold NaN; got {int(tensor.isnan().sum())} (model.safetensors). Make it again."
        )


def _same_names(found: Mapping[str, object], wanted: Mapping[str, object], who: str, whom: str) -> None:
    missing, unknown = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if missing or unknown:
        raise ArtifactError(
            f"{who} must have the tensors that {whom} names; missing {len(missing)}: {missing[:5]}, unknown "
            f"{len(unknown)}: {unknown[:5]}. It is damaged, or the model's source code is of another version."
        )


def saves_space(tensor: Tensor) -> bool:
    """Whether a tensor takes fewer bytes when it is stored sparsely."""
    present = int(_bits(tensor).count_nonzero())
    size, width = tensor.numel(), tensor.element_size()
    return -(-size // 8) + present * width + 8 * tensor.dim() + _ENTRIES_BYTES < size * width


def pack_sparse(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Return the parts of a sparse tensor: ``name/bits``, ``name/values`` (integers of its width), ``name/shape``."""
    return {key: torch.from_numpy(array) for key, array in encode_sparse({name: _bits(tensor).cpu().numpy()}).items()}


def unpack_sparse(found: Mapping[str, Tensor], records: Iterable[TensorRecord]) -> dict[str, Tensor]:
    """Return the tensors of a file, with sparse ones in the place of their parts.

    Raises:
        ArtifactError: If parts are missing or do not fit each other or the record.
    """
    whole = dict(found)
    for record in records:
        if record.name in found:
            raise _damaged(record, "it is there as a whole.")
        parts = {key: whole.pop(key, None) for key in (f"{record.name}/{part}" for part in ("bits", "values", "shape"))}
        whole[record.name] = _unpack_sparse(record, parts)
    return whole


def _unpack_sparse(record: TensorRecord, parts: Mapping[str, Tensor | None]) -> Tensor:
    bits, values, shape = parts.values()
    size = math.prod(record.shape)
    # Checked before anything of that size is allocated.
    fits = (
        bits is not None
        and values is not None
        and shape is not None
        and bits.numel() == -(-size // 8)
        and shape.dtype is torch.int64
        and shape.tolist() == list(record.shape)
    )
    dtype = getattr(torch, record.dtype, None)
    try:
        if not fits or not isinstance(dtype, torch.dtype):
            raise SparsityError("its parts are missing, or are those of another tensor.")
        arrays = {key: part.numpy() for key, part in parts.items() if part is not None}
        return torch.from_numpy(decode_sparse(arrays)[record.name]).view(dtype)
    except (SparsityError, ValueError, RuntimeError) as error:
        raise _damaged(record, str(error)) from error


def _damaged(record: TensorRecord, reason: str) -> ArtifactError:
    return ArtifactError(
        f"{record.name} must be stored as secateur.json says, sparsely, {record.dtype} of shape {record.shape}; "
        f"got: {reason} The artifact is damaged: copy it again, or make it again."
    )


def _bits(tensor: Tensor) -> Tensor:
    """View the bits as integers: -0.0 is not zero then, and numpy has no bfloat16."""
    return tensor.detach().contiguous().view(_INTEGERS[tensor.element_size()])
