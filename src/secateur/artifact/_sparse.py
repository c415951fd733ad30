"""Tensors with many zeros in little space: one bit for each element, and the elements that are not zero."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from secateur.artifact._manifest import TensorRecord
from secateur.errors import ArtifactError, SparsityError
from secateur.sparsity import decode_sparse, encode_sparse

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ENTRIES_BYTES = 256
"""What the header of the file needs for three entries more than for one, generously."""


def saves_space(tensor: Tensor) -> bool:
    """Whether a tensor takes less of a file with its zeros as bits."""
    present = int(_bits(tensor).count_nonzero())
    size, width = tensor.numel(), tensor.element_size()
    return -(-size // 8) + present * width + 8 * tensor.dim() + _ENTRIES_BYTES < size * width


def packed(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """What stands for a tensor in a file: ``name/bits``, ``name/values`` (as integers of its width), ``name/shape``."""
    return {key: torch.from_numpy(array) for key, array in encode_sparse({name: _bits(tensor).cpu().numpy()}).items()}


def unpacked(found: Mapping[str, Tensor], records: Iterable[TensorRecord]) -> dict[str, Tensor]:
    """The tensors of a file with those in the place of their parts that the records call sparse.

    Raises:
        ArtifactError: If parts are missing or do not fit each other or the record.
    """
    whole = dict(found)
    for record in records:
        if record.name in found:
            raise _damaged(record, "it is there as a whole.")
        parts = {key: whole.pop(key, None) for key in (f"{record.name}/{part}" for part in ("bits", "values", "shape"))}
        whole[record.name] = _unpacked(record, parts)
    return whole


def _unpacked(record: TensorRecord, parts: Mapping[str, Tensor | None]) -> Tensor:
    bits, values, shape = parts.values()
    size = math.prod(record.shape)
    # Before anything of that size is made.
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
    """The same bits as integers: -0.0 is no zero, and numpy knows no bfloat16."""
    return tensor.detach().contiguous().view(_INTEGERS[tensor.element_size()])
