"""Denormal numbers among weights: so near to 0 that processors compute with them many times more slowly.

Trained networks have them where weight decay has driven whole channels toward 0. A cut that happens to remove them
makes a network faster for a reason that has nothing to do with its size, and so does setting them to 0.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from secateur._runtime import copy_model

_BITS: Mapping[torch.dtype, tuple[torch.dtype, int, int]] = {
    torch.float64: (torch.int64, 0x7FF0 << 48, (1 << 52) - 1),
    torch.float32: (torch.int32, 0x7F80 << 16, (1 << 23) - 1),
    torch.float16: (torch.int16, 0x7C00, (1 << 10) - 1),
    torch.bfloat16: (torch.int16, 0x7F80, (1 << 7) - 1),
}
"""For each type of numbers: whole numbers of its size, and the masks of its exponent and of its fraction."""
_NOTABLE = 1e-3
"""The fraction of the weights from which on denormals are worth a word."""
_MOST_NAMED = 3

ModuleType = TypeVar("ModuleType", bound=nn.Module)


@dataclass(frozen=True)
class Denormals:
    """The denormal numbers of a model.

    Attributes:
        counts: By name of the parameter or buffer, only of those that have some.
        numbers: All numbers in floating parameters and buffers.
    """

    counts: Mapping[str, int]
    numbers: int

    @property
    def fraction(self) -> float:
        """Denormal numbers / all numbers."""
        return sum(self.counts.values()) / max(self.numbers, 1)

    @property
    def notable(self) -> bool:
        """Whether there are enough to be felt."""
        return self.fraction >= _NOTABLE

    def __str__(self) -> str:
        """In words; empty if there are none."""
        if not self.counts:
            return ""
        most = sorted(self.counts, key=lambda name: -self.counts[name])
        named = ", ".join(f"{name} ({self.counts[name]})" for name in most[:_MOST_NAMED])
        more = f" and {len(most) - _MOST_NAMED} more" if len(most) > _MOST_NAMED else ""
        return (
            f"{100 * self.fraction:.3g} % of the weights and running statistics are denormal, which processors may "
            f"compute many times more slowly with: {named}{more}"
        )

    def to_json(self) -> dict[str, object]:
        """Return a JSON object."""
        return {"fraction": self.fraction, "counts": dict(self.counts)}


def count_denormals(model: nn.Module) -> Denormals:
    """Count the denormal numbers in the parameters and buffers of a model; it is not changed."""
    tensors = dict(_floating(model))
    found = {name: int(_denormal(tensor).sum()) for name, tensor in tensors.items()}
    return Denormals(
        {name: count for name, count in found.items() if count}, sum(tensor.numel() for tensor in tensors.values())
    )


def flush_denormals_(model: ModuleType) -> ModuleType:
    """Set the denormal numbers of a model to 0, in place, and return the model."""
    with torch.no_grad():
        for _, tensor in _floating(model):
            small = _denormal(tensor)
            if bool(small.any()):
                tensor[small] = 0
    return model


def without_denormals(model: nn.Module) -> nn.Module:
    """Return a copy of a model with zeros for its denormal numbers; the model itself if it has none."""
    return flush_denormals_(copy_model(model)) if count_denormals(model).counts else model


def _floating(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.dtype in _BITS and tensor.layout is torch.strided and tensor.device.type != "meta":
            yield name, tensor.detach()


def _denormal(tensor: Tensor) -> Tensor:
    """Where a tensor is denormal: no exponent, but a fraction.

    Bits are compared, because a processor that is set to flush denormals takes them for 0 in any comparison.
    """
    kind, exponent, fraction = _BITS[tensor.dtype]
    bits = tensor.contiguous().view(kind)
    return ((bits & exponent) == 0) & ((bits & fraction) != 0)
