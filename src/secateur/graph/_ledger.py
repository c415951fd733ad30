"""The record of a traced forward pass, and the `Call` that channel rules get.

Every position of every dimension of every parameter and buffer gets an integer id. An activation carries, for each
dimension with channels, the vector of ids at its positions. While the model runs, the rules of its operations write
into the `Ledger` which ids must be kept or removed together, which must be kept, and which sizes depend on them.
`_solve` turns the ledger into a channel graph.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch

from secateur._arrays import BoolArray, IntArray
from secateur.graph._size_ints import Attribute, Expression, Literal, attributes_in, shape_ids
from secateur.graph.blocks import is_mutable
from secateur.graph.graph import Block, CallShapes, Role, UncountedOperation

ChannelIds = dict[int, IntArray]
"""A mapping from dimension to the ids of its positions. A dimension that is missing carries no channels."""

_MARK = "_secateur_channel_ids"
_OWN = "_secateur_own"


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A parameter or buffer and its ids. It holds the tensor, so that no other tensor can get the same `id`."""

    tensor: torch.Tensor
    name: str
    is_parameter: bool
    shape: tuple[int, ...]
    ids: ChannelIds


@dataclass(frozen=True, eq=False)
class SizeBinding:
    """A Python int that must equal the number of kept ids (or its old value, if ids is None)."""

    expression: Expression
    ids: IntArray | None
    where: str


@dataclass(frozen=True, eq=False)
class SizeComparison:
    """A comparison of two sizes, one of == != < <= > >=, whose outcome must not change."""

    symbol: str
    left: Expression
    right: Expression
    where: str


@dataclass(frozen=True, eq=False)
class CountedOperation:
    """An operation to count: its MACs are the factor times the product of the constants and numbers of kept ids."""

    module: str
    kind: str
    factor: float
    dims: tuple[IntArray | int, ...]


@dataclass(frozen=True, eq=False)
class ModuleOutput:
    """The ids of the first output tensor of a module, and how often the module was called."""

    module: str
    shape: tuple[int, ...]
    ids: ChannelIds
    calls: int


@dataclass(frozen=True, eq=False)
class RecordedMixingCall:
    """A call that combines channels, with (tensor number, dimension, ids) of what it reads and writes."""

    number: int
    kind: str
    read: tuple[tuple[int, int, IntArray], ...]
    written: tuple[tuple[int, int, IntArray], ...]


@dataclass(eq=False)
class Ledger:
    """The append-only record of one traced forward pass.

    Attributes:
        stored: The parameters and buffers, by `id`.
        ties: Pairs of equally long vectors; ids at the same position are kept or removed together.
        freezes: (ids, reason) pairs: these ids must be kept.
        bindings: Python ints that depend on numbers of channels.
        comparisons: The comparisons of sizes, by Python or by the model's tensors of sizes.
        fixed: The attributes that something reads that cannot follow, with where that is.
        operations: The operations with multiply-accumulates.
        uncounted: The operations that read parameters, and of which no rule knows the multiply-accumulates.
        mixings: The calls that combine channels.
        roles: (ids of a dimension, role) pairs.
        touched: (module, ids) pairs: operations of the module saw these ids.
        outputs: The output of every module.
        module_calls: The shapes that every module took and returned, by its name, in the order of its calls.
        attended: By module, ids that are multiplied with those of another activation, as in attention.
        contracted: Ids over which two activations are multiplied and summed; this reads them although no layer does.
        scaled: Ids whose number determines a scale (``head_dim ** -0.5``): fewer ids would change the scale.
        scale_attributes: The attributes that hold such a number.
        scaling: The modules that use such a scale.
        by_head: (ids,) of an earlier run of the model: whether these ids are kept or removed by whole heads.
        packed_width: The width of an attention whose three projections are one matrix, while that runs; else 0.
        blocks: The residual blocks.
        calls: The ATen names of all calls.
        seen: The ids of all tensors that any operation read.
        count: The number of ids.
        caller: The name and the arguments of the call of the model that is running. Without a name, the operation is
            run by code whose sizes nobody sees, such as a TorchScript function. None where calls are not watched.
    """

    stored: dict[int, StoredTensor] = field(default_factory=dict)
    ties: list[tuple[IntArray, IntArray]] = field(default_factory=list)
    freezes: list[tuple[IntArray, str]] = field(default_factory=list)
    bindings: list[SizeBinding] = field(default_factory=list)
    comparisons: list[SizeComparison] = field(default_factory=list[SizeComparison])
    fixed: dict[Attribute, str] = field(default_factory=dict[Attribute, str])
    operations: list[CountedOperation] = field(default_factory=list)
    uncounted: list[UncountedOperation] = field(default_factory=list[UncountedOperation])
    mixings: list[RecordedMixingCall] = field(default_factory=list)
    roles: list[tuple[IntArray, Role]] = field(default_factory=list)
    touched: list[tuple[str, IntArray]] = field(default_factory=list)
    outputs: dict[str, ModuleOutput] = field(default_factory=dict)
    module_calls: dict[str, list[CallShapes]] = field(default_factory=lambda: defaultdict(list))
    attended: dict[str, list[IntArray]] = field(default_factory=dict[str, list[IntArray]])
    contracted: list[IntArray] = field(default_factory=list)
    scaled: list[IntArray] = field(default_factory=list)
    scale_attributes: set[Attribute] = field(default_factory=set[Attribute])
    scaling: set[str] = field(default_factory=set[str])
    by_head: BoolArray = field(default_factory=lambda: np.zeros(0, dtype=bool))
    packed_width: int = 0
    blocks: tuple[Block, ...] = ()
    calls: tuple[str, ...] = ()
    seen: set[int] = field(default_factory=set[int])
    count: int = 0
    caller: tuple[str, tuple[Any, ...]] | None = None

    def unseen(self) -> tuple[str, ...]:
        """Return the names of the parameters that no operation has read."""
        return tuple(s.name for number, s in self.stored.items() if s.is_parameter and number not in self.seen)

    def new(self, number: int) -> IntArray:
        """Return new ids."""
        # Ids are consecutive, so that vectors of ids are plain ranges until operations permute them.
        first = self.count
        self.count += number
        return np.arange(first, first + number, dtype=np.int64)

    def store(self, name: str, tensor: torch.Tensor) -> None:
        """Give new ids to every dimension of a parameter or buffer."""
        # A dimension of size one has nothing to remove, and broadcasts against any number of channels.
        ids = {dim: self.new(size) for dim, size in enumerate(tensor.shape) if size > 1}
        self.stored[id(tensor)] = StoredTensor(
            tensor, name, isinstance(tensor, torch.nn.Parameter), tuple(tensor.shape), ids
        )

    def ids_of(self, tensor: torch.Tensor) -> ChannelIds:
        """Return the ids that a tensor carries; empty if none."""
        # The ids of an activation are an attribute of the tensor, so that they are dropped together with it.
        marked: ChannelIds | None = getattr(tensor, _MARK, None)
        if marked is not None:
            return marked
        stored = self.stored.get(id(tensor))
        return stored.ids if stored else {}

    def mark(self, tensor: torch.Tensor, ids: ChannelIds, *, own: bool = False) -> None:
        """Attach ids to an activation, and whether it is computed from weights only (``own``)."""
        # An operation in place may return a parameter or buffer, whose own ids must stay.
        if id(tensor) not in self.stored:
            setattr(tensor, _MARK, ids)
            setattr(tensor, _OWN, own)

    def is_own(self, tensor: torch.Tensor) -> bool:
        """Return whether a tensor is a parameter or buffer of the model, or computed from these only."""
        return id(tensor) in self.stored or bool(getattr(tensor, _OWN, False))

    def is_learned(self, tensor: torch.Tensor) -> bool:
        """Return whether a tensor is a floating-point parameter, or computed from parameters and buffers only."""
        stored = self.stored.get(id(tensor))
        learned = stored.is_parameter if stored is not None else self.is_own(tensor)
        return learned and tensor.is_floating_point()

    def tie(self, first: IntArray, second: IntArray) -> IntArray:
        """Record that ids at the same position must be kept or removed together, and return one of the two vectors."""
        if first is not second:
            self.ties.append((first, second))
        return first

    def tie_rows(self, matrix: IntArray) -> IntArray:
        """Tie every row of a matrix to the first one, and return that."""
        if matrix.shape[0] > 1:
            # One pair of vectors for the whole matrix: `connected_components` works on few long vectors.
            self.ties.append((np.broadcast_to(matrix[:1], matrix[1:].shape).reshape(-1), matrix[1:].reshape(-1)))
        return matrix[0]

    def freeze(self, ids: IntArray, reason: str) -> None:
        """Record that these channels must be kept."""
        self.freezes.append((ids, reason))

    def freeze_all(self, tensors: Sequence[ChannelIds], reason: str) -> None:
        """Record that every channel of these tensors must be kept."""
        for channel_ids in tensors:
            for ids in channel_ids.values():
                self.freeze(ids, reason)

    def note_attention(self, module: str, vectors: Iterable[IntArray]) -> None:
        """Record the ids of two activations that are multiplied with each other."""
        self.attended.setdefault(module, []).extend(vectors)

    def is_by_head(self, ids: IntArray) -> bool:
        """Return whether these ids are kept or removed by whole heads, as an earlier run of the same model found."""
        # `by_head` is empty during the first run, and covers no ids that only a later run has.
        known = ids[ids < len(self.by_head)]
        return bool(self.by_head[known].any())

    def scale(self, expression: Expression) -> None:
        """Record that a Python float was computed from a number of ids, as for the scale of an attention."""
        self.scaled.extend(shape_ids(expression))
        self.scale_attributes.update(attributes_in(expression))

    def scaled_ids(self) -> list[IntArray]:
        """The ids whose number determines a scale, also by an attribute that counts them."""
        counted = [
            binding.ids
            for binding in self.bindings
            if binding.ids is not None and not self.scale_attributes.isdisjoint(attributes_in(binding.expression))
        ]
        return self.scaled + counted

    def bind(self, expression: Expression, ids: IntArray | None, where: str) -> None:
        """Record that a Python int must equal the number of kept ids, or without ids what it is now."""
        # Reading an attribute asks for no edit of it, it only rules one out: `resolve_sizes` checks that once the edits
        # are known.
        if ids is None and isinstance(expression, Attribute):
            self.fixed.setdefault(expression, where)
        elif ids is not None or not isinstance(expression, Literal):
            self.bindings.append(SizeBinding(expression, ids, where))


# fmt: off
ATTENTION_KINDS = (
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)
# fmt: on
# The masked original runs without ids. It finds a recorded call again by counting the calls of these kinds.
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
        "logcumsumexp",
        "nansum",
        "count_nonzero",
        "_cdist_forward",
        "_euclidean_dist",
        "_pdist_forward",
        "avg_pool2d",
        "avg_pool3d",
        "_weight_norm_interface",
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
"""The ATen names of calls that may combine channels. They are numbered, whether they meet channels or not."""


@cache
def base_name(operator: Any) -> str:
    """Return the name of an ATen overload without its namespace and without the underscore of an in-place form."""
    name: str = operator._schema.name.split("::")[1]
    # Operators of Python, such as `__lshift__`, end with underscores that belong to their names.
    return name[:-1] if name.endswith("_") and not name.startswith("__") else name


@cache
def _arguments(operator: Any) -> Mapping[str, tuple[int, Any]]:
    """Return the position and default of every argument of an ATen overload, by name."""
    return {a.name: (number, a.default_value) for number, a in enumerate(operator._schema.arguments)}


def tensors_in(*values: Any) -> tuple[torch.Tensor, ...]:
    """Return the tensors among the arguments or results of an ATen call, which may be in lists and tuples, in order."""
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
        ledger: The record that rules write into.
        operator: The ATen overload.
        name: Its base name without a trailing in-place underscore.
        module: Qualified name of the module whose forward made the call.
        args: Positional arguments.
        kwargs: Keyword arguments.
        inputs: The tensors among the arguments, in order.
        outputs: The tensors that were returned.
        number: The number of calls of `MIXING_KINDS` before it.
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
        """The call in words, for messages."""
        return f"`{self.name}` in {self.module or 'the model itself'}"

    @property
    def full_name(self) -> str:
        """The name of the operation with its namespace, such as ``aten::relu`` or ``my_lib::my_op``."""
        return str(self.operator._schema.name)

    def ids(self, tensor: torch.Tensor) -> ChannelIds:
        """Return the channel ids of a tensor."""
        return self.ledger.ids_of(tensor)

    def argument(self, position: int, default: Any = None) -> Any:
        """Return a positional argument, or the default if it was left out."""
        return self.args[position] if len(self.args) > position else default

    def named(self, name: str) -> Any:
        """Return an argument by its name in the schema: its default if left out, None if there is no such argument."""
        position, default = _arguments(self.operator).get(name, (None, None))
        if position is None:
            return None
        given = self.args[position] if len(self.args) > position else self.kwargs.get(name)
        return default if given is None else given

    def dims(self, name: str = "dim") -> set[int] | None:
        """Return the dimensions of the first input that an argument names, from the front; None if it names none."""
        value = self.named(name)
        # To ATen, an empty list of dimensions means all of them.
        if value is None or value == []:
            return None
        # ATen accepts dimension 0 of a scalar, as if it had one.
        rank = max(self.inputs[0].dim(), 1)
        return {int(d) % rank for d in ([value] if isinstance(value, int) else value)}

    def mix(self, results: Sequence[ChannelIds]) -> Sequence[ChannelIds]:
        """Record that the call combines channels, in a cut model only the kept ones, and return the results."""
        # `KeptChannelsMode` can only repeat numbered calls, and only if they return new tensors.
        if is_mutable(self.operator) or self.name not in MIXING_KINDS:
            return freeze_inputs(self)
        read = tuple((t, dim, ids) for t, tensor in enumerate(self.inputs) for dim, ids in self.ids(tensor).items())
        written = tuple((t, dim, ids) for t, found in enumerate(results) for dim, ids in found.items())
        self.ledger.mixings.append(RecordedMixingCall(self.number, self.name, read, written))
        return results


Rule = Callable[[Call], Sequence[ChannelIds]]


def cuts_whole_groups(groups: int, each: int) -> bool:
    """Return whether to remove whole groups, or else the same positions of every group.

    With G groups of c channels there are G choices for whole groups and c for positions; the larger number wins.
    """
    return groups >= each


def freeze_inputs(call: Call) -> Sequence[ChannelIds]:
    """Freeze all channels of the inputs: the rule of operations without a rule. The reason says how to give one."""
    call.ledger.freeze_all([call.ids(t) for t in call.inputs], f"{call.where} has no channel rule{_remedy(call)}")
    return [{} for _ in call.outputs]


def _remedy(call: Call) -> str:
    """Name the built-in rule that fits the shapes of a call without a rule; an operation in place has none to fit."""
    fitting = _fitting_rule(call)
    if fitting is None:
        return ""
    rule, condition = fitting
    return f" (if it {condition}, pass rules={{'{call.full_name}': {rule}}} to secateur.trace, see docs/rules.md)"


def _fitting_rule(call: Call) -> tuple[str, str] | None:
    if not call.outputs or not call.inputs or is_mutable(call.operator):
        return None
    source, out = call.inputs[0], call.outputs[0]
    # Positions and masks are no channels, whatever their shape.
    if not (out.is_floating_point() or out.is_complex()):
        return None
    if out.shape == source.shape:
        return "pointwise", "computes every element alone"
    if out.dim() == source.dim() and out.shape[:2] == source.shape[:2]:
        return "per_channel", "computes every channel alone"
    if out.numel() == source.numel():
        return "move_channels", "only moves elements"
    return "a function of yours", "passes channels on"


def merge_operands(call: Call, operands: Sequence[tuple[IntArray | None, int]]) -> IntArray | None:
    """Tie the operands (ids or None, length) of an elementwise operation along one dimension, and return its ids."""
    carried = [ids for ids, _ in operands if ids is not None]
    if not carried:
        return None
    # Only a user's rule for an operation that is not elementwise can get here with different lengths.
    if len({len(ids) for ids in carried}) > 1:
        for ids in carried:
            call.ledger.freeze(ids, f"{call.where} combines tensors of different lengths")
        return None
    # Channels at the same position of all operands are one channel from here on.
    for ids in carried[1:]:
        call.ledger.tie(carried[0], ids)
    # A longer operand without ids would keep its length, and no longer fit if channels were removed.
    if any(ids is None and length > 1 for ids, length in operands):
        call.ledger.freeze(carried[0], f"{call.where} meets a tensor that does not follow the channels")
    return carried[0]
