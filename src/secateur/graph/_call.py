"""One recorded ATen call, and what its rules have in common."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from secateur.graph._channels import IntArray
from secateur.graph._flow import is_mutable
from secateur.graph._ledger import ChannelIds, Ledger, MixedCall

# fmt: off
ATTENTION_KINDS = (
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)
# fmt: on
MIXING_KINDS = frozenset(
    {
        "native_layer_norm",
        "_fused_rms_norm",
        "native_group_norm",
        "_softmax",
        "_log_softmax",
        "_safe_softmax",
        "cumsum",
        "cumprod",
        "mean",
        "sum",
        "amax",
        "amin",
        "var",
        "var_mean",
        "std",
        "std_mean",
        "linalg_vector_norm",
        "norm",
        "prod",
        "logsumexp",
        "any",
        "all",
        "max",
        "min",
        "convolution",
        "native_batch_norm",
        "_native_batch_norm_legit",
        "cudnn_batch_norm",
        "_native_batch_norm_legit_functional",
        "batch_norm",
        *ATTENTION_KINDS,
    }
)  # fmt: skip
"""ATen names of the calls that are numbered, whether they meet channels or not."""


@cache
def base_name(operator: Any) -> str:
    """Name of an ATen overload without namespace and without the underscore of an in-place form."""
    name: str = operator._schema.name.split("::")[1]
    return name[:-1] if name.endswith("_") and not name.startswith("__") else name


@cache
def _arguments(operator: Any) -> Mapping[str, tuple[int, Any]]:
    """Position and default of every argument of an ATen overload, by name."""
    return {a.name: (number, a.default_value) for number, a in enumerate(operator._schema.arguments)}


def tensors_in(*values: Any) -> tuple[torch.Tensor, ...]:
    """The tensors among arguments or results of an ATen call, in order; they lie in lists and tuples at most."""
    found: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += tensors_in(*value)
    return tuple(found)


@dataclass(frozen=True, eq=False)
class Call:
    """One recorded ATen call.

    Attributes:
        ledger: Where conclusions go.
        operator: The ATen overload.
        name: Its base name without a trailing in-place underscore.
        module: Qualified name of the module whose forward made the call.
        args: Positional arguments.
        kwargs: Keyword arguments.
        inputs: Tensors among the arguments, in order.
        outputs: Tensors returned.
        number: How many calls that compute over channels came before it (`_mixing.MIXING_KINDS`).
    """

    ledger: Ledger
    operator: Any
    name: str
    module: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: tuple[torch.Tensor, ...]
    outputs: tuple[torch.Tensor, ...]
    number: int = 0

    @property
    def where(self) -> str:
        """For a human."""
        return f"`{self.name}` in {self.module or 'the model itself'}"

    @property
    def full_name(self) -> str:
        """With its namespace: ``aten::relu``, ``my_lib::my_op``."""
        return str(self.operator._schema.name)

    def ids(self, tensor: torch.Tensor) -> ChannelIds:
        """Channel ids of an argument."""
        return self.ledger.ids_of(tensor)

    def argument(self, position: int, default: Any = None) -> Any:
        """A positional argument that may have been left out."""
        return self.args[position] if len(self.args) > position else default

    def named(self, name: str) -> Any:
        """An argument by its name in the operator's schema; the default if left out, None if there is no such."""
        position, default = _arguments(self.operator).get(name, (None, None))
        if position is None:
            return None
        given = self.args[position] if len(self.args) > position else self.kwargs.get(name)
        return default if given is None else given

    def dims(self, name: str = "dim") -> set[int] | None:
        """Dimensions of the first input that an argument names, counted from the front; None if it names none."""
        value = self.named(name)
        if value is None or value == []:
            return None
        rank = max(self.inputs[0].dim(), 1)
        return {int(d) % rank for d in ([value] if isinstance(value, int) else value)}

    def mix(self, results: Sequence[ChannelIds]) -> Sequence[ChannelIds]:
        """Note that the call computes over channels, which a cut model does over the kept ones only."""
        if is_mutable(self.operator) or self.name not in MIXING_KINDS:
            return unknown(self)
        read = tuple((t, dim, ids) for t, tensor in enumerate(self.inputs) for dim, ids in self.ids(tensor).items())
        written = tuple((t, dim, ids) for t, found in enumerate(results) for dim, ids in found.items())
        self.ledger.mixings.append(MixedCall(self.number, self.name, read, written))
        return results


Rule = Callable[[Call], Sequence[ChannelIds]]


def by_whole_groups(groups: int, each: int) -> bool:
    """Whether whole groups go, or else the same positions of every group: whichever leaves more to choose from.

    With G groups of c channels, whole groups leave G units, equal positions leave c.
    """
    return groups >= each


def unknown(call: Call) -> Sequence[ChannelIds]:
    """No rule: everything that comes in stays whole."""
    call.ledger.freeze_all([call.ids(t) for t in call.inputs], f"{call.where} has no channel rule")
    return [{} for _ in call.outputs]


def merge(call: Call, operands: Sequence[tuple[IntArray | None, int]]) -> IntArray | None:
    """Ids of one dimension after an elementwise operation of several operands (ids or None, length)."""
    carried = [ids for ids, _ in operands if ids is not None]
    if not carried:
        return None
    for ids in carried[1:]:
        call.ledger.tie(carried[0], ids)
    if any(ids is None and length > 1 for ids, length in operands):
        call.ledger.freeze(carried[0], f"{call.where} meets a tensor that does not follow the channels")
    return carried[0]
