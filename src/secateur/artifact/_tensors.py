"""A model's tensors to and from safetensors, and the shapes of a rebuilt model."""

import math
from collections.abc import Iterator, Mapping, Sequence

import safetensors.torch
import torch
from torch import Tensor, nn

from secateur.artifact._manifest import TensorRecord
from secateur.artifact._schema import brief
from secateur.artifact._sparse import packed, saves_space, unpacked
from secateur.errors import ArtifactError

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
_MAX_HEADER_BYTES = 16 * 2**20
_HEADER_SIZE_BYTES = 8
_WIDEST = 8
"""Bytes of the widest element."""


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer under every name it has, buffers that are not in the state dict too."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def describe(model: nn.Module) -> tuple[TensorRecord, ...]:
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


def serialise(model: nn.Module, records: Sequence[TensorRecord]) -> bytes:
    """The bytes of model.safetensors."""
    tensors = dict(named_tensors(model))
    held: dict[str, Tensor] = {}
    for record in records:
        if record.same_as is None:
            tensor = tensors[record.name].detach().cpu().contiguous()
            held |= packed(record.name, tensor) if record.sparse else {record.name: tensor}
    return safetensors.torch.save(held)


def deserialise(data: bytes, records: Sequence[TensorRecord]) -> dict[str, Tensor]:
    """The tensors of model.safetensors by name (the first name of tied ones), checked against their records.

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
    found = unpacked(found, (record for record in held.values() if record.sparse))
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


def check_room(model: nn.Module, records: Sequence[TensorRecord]) -> int:
    """Refuse records of tensors that a rebuilt model does not have, or that are larger than its own.

    Surgery only takes away. So whatever the records claim, what is read takes no more room than the model.

    Returns:
        Bytes that the file of such tensors can have at most.

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
    return _MAX_HEADER_BYTES + _WIDEST * sum(tensor.numel() for tensor in present.values())


def install(model: nn.Module, records: Sequence[TensorRecord], tensors: Mapping[str, Tensor]) -> None:
    """Give a rebuilt model the saved tensors, in place: their shapes, dtypes and memory layout, and what is tied.

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
        raise ArtifactError(f"`model` must be initialised; got lazy {name}. Run the model once on an example first.")
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
    size = int.from_bytes(data[:_HEADER_SIZE_BYTES], "little")
    if len(data) < _HEADER_SIZE_BYTES or size > min(_MAX_HEADER_BYTES, len(data) - _HEADER_SIZE_BYTES):
        raise ArtifactError(
            f"model.safetensors must begin with the size of its header; got {size} bytes in a file of {len(data)}. "
            "The file is damaged: copy the artifact again, or make it again."
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
