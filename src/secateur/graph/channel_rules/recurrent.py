"""Recurrent layers: LSTM, GRU and plain RNNs of any number of layers and directions, their cells, and packed sequences.

PyTorch runs a recurrent layer in one of many ways: step by step, as one oneDNN or cuDNN operation per layer, or fused
on a GPU. `WholeCallMode` gives each of them to the recorders as the one call that the model wrote, so that a trace does
not depend on the machine, nor its cost on the number of steps.

The rules follow two kinds of channels. The *cells* are the H units of a layer; with projections, the *outputs* are the
P numbers that it computes from them, and otherwise the cells themselves. Unit j owns row j of the block of every gate:
rows j, H + j, 2H + j and 3H + j of the weights of an LSTM. All layers and directions of one call have equally many
units, because their states lie in one tensor, so the units with the same number are kept or removed together.

A unit without weights and biases stays zero if its initial state is zero: it is exact to remove it. An LSTM then
computes c = sigmoid(0) * c + sigmoid(0) * tanh(0) = c / 2 and h = sigmoid(0) * tanh(c), a GRU h = h / 2, and a plain
RNN tanh(0) or relu(0). Initial states that follow the units (zeros as long as there are units, the final state of
another layer, a learned state) are tied to them; any other freezes them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from secateur._arrays import IntArray
from secateur.graph._ledger import Call, ChannelIds, CountedOperation, merge_operands
from secateur.graph.channel_rules.layers import connect_input
from secateur.graph.graph import Role

_ATEN = torch.ops.aten
_GATES: Mapping[str, int] = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
"""The number of blocks of H rows in the weights of a layer, by the name of the function that runs it."""
_PACKINGS = ("_pack_padded_sequence", "_pad_packed_sequence")
_OVERLOADS: Mapping[str, tuple[Any, ...]] = {
    # All steps of all layers, of a tensor or of a packed sequence.
    **{name: (getattr(_ATEN, name).input, getattr(_ATEN, name).data) for name in _GATES},
    # One step of one layer.
    **{f"{name}_cell": (getattr(_ATEN, f"{name}_cell").default,) for name in _GATES},
    **{name: (getattr(_ATEN, name).default,) for name in _PACKINGS},
}
"""The functions whose calls are not taken apart, by name, with their ATen overloads."""


class WholeCallMode(TorchDispatchMode):
    """A dispatch mode that sees the call of a recurrent layer as one call, not as the operations that it consists of.

    Subclasses define `handle` in place of ``__torch_dispatch__``.
    """

    def __init__(self) -> None:
        super().__init__()
        # A function mode sees the call before PyTorch takes it apart; a dispatch mode only sees the parts.
        self._route = _WholeCalls(self)
        self._inside = False

    def __enter__(self) -> Self:
        self._route.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._route.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {})) if self._inside else self.handle(func, args, kwargs or {})

    def handle(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one call, with whatever the mode does to it, and return its result."""
        raise NotImplementedError

    def handle_whole(self, func: Any, args: tuple[Any, ...]) -> Any:
        """Handle a call whose parts the mode must not see."""
        self._inside = True
        try:
            return self.handle(func, args, {})
        finally:
            self._inside = False


class _WholeCalls(TorchFunctionMode):
    """Gives calls of recurrent layers to a dispatch mode before PyTorch takes them apart."""

    def __init__(self, mode: WholeCallMode) -> None:
        super().__init__()
        self._mode = mode

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        overload = None if kwargs else _find_overload(func, args)
        if overload is None:
            return func(*args, **(kwargs or {}))
        # Modules pass the two states of an LSTM as a tuple; ATen operations get lists.
        out = self._mode.handle_whole(overload, tuple(list(a) if isinstance(a, tuple) else a for a in args))
        if func is overload or isinstance(out, Tensor):
            return out
        # A step of its own for each state shows who uses it: residual branches may use the output only.
        return (out[0], *map(_ATEN.alias.default, out[1:]))


def _find_overload(func: Any, args: tuple[Any, ...]) -> Any:
    """Return the ATen overload of a call that is not taken apart; None for any other call."""
    name = getattr(func, "__name__", "").partition(".")[0]
    overloads = _OVERLOADS.get(name)
    # `torch._VF` has the same functions as `torch`. With several modes, the next one is called with the overload.
    if overloads is None or not (func == getattr(torch, name) or func in overloads):
        return None
    # The weights are the third argument, or after the batch sizes of a packed sequence the fourth.
    return overloads[-1] if len(args) > 3 and isinstance(args[3], list | tuple) else overloads[0]


def fake_layers(  # noqa: PLR0917
    source: Tensor,
    states: Tensor | Sequence[Tensor],
    weights: Sequence[Tensor],
    _biases: bool,
    layers: int,
    _dropout: float,
    _train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, ...] | None:
    """Return uninitialized results of all layers for (steps, batch, I), or (batch, steps, I) with ``batch_first``."""
    own = _list_of(states)
    steps, batch = (source.size(1), source.size(0)) if batch_first else (source.size(0), source.size(1))
    directions = 2 if bidirectional else 1
    rows = (layers * directions, batch)
    fits = (
        _are_alike(source, *own, *weights)
        and all(tuple(state.shape[:2]) == rows for state in own)
        and (weights[0].size(1), weights[1].size(1)) == (source.size(2), own[0].size(2))
    )
    if not fits:
        return None
    out = source.new_empty(steps, batch, directions * own[0].size(2))
    ends = (source.new_empty(*rows, state.size(2)) for state in own)
    return (out.transpose(0, 1) if batch_first else out, *ends)


def fake_cell(
    source: Tensor, states: Tensor | Sequence[Tensor], of_input: Tensor, of_state: Tensor, *biases: Tensor | None
) -> tuple[Tensor, ...] | Tensor | None:
    """Return uninitialized results of one step for (batch, I) and states (batch, H)."""
    own = _list_of(states)
    fits = (
        _are_alike(source, *own, of_input, of_state, *(b for b in biases if b is not None))
        and all(tuple(state.shape) == (source.size(0), of_state.size(1)) for state in own)
        and of_input.size(1) == source.size(1)
    )
    if not fits:
        return None
    ends = tuple(source.new_empty(state.shape) for state in own)
    return ends[0] if isinstance(states, Tensor) else ends


def _are_alike(*tensors: Tensor) -> bool:
    first = tensors[0]
    return all((t.device, t.dtype, t.layout) == (first.device, first.dtype, torch.strided) for t in tensors)


FAKE_RECURRENT: Mapping[Any, Callable[..., Any]] = {
    **{_OVERLOADS[name][0]: fake_layers for name in _GATES},
    **{_OVERLOADS[f"{name}_cell"][0]: fake_cell for name in _GATES},
}
"""Functions from the arguments of a call to its fake result; see `_record.FAKE_RESULTS`."""


def recurrent_layers(call: Call) -> Sequence[ChannelIds]:
    """Tie the units of all layers and directions, and each layer's input to what it reads; count every matrix.

    The source is (steps, batch, I), (batch, steps, I) with ``batch_first``, or (steps of all sequences, I) if packed.
    """
    packed = len(_OVERLOADS[call.name]) > 1 and call.operator is _OVERLOADS[call.name][1]
    source = call.args[0]
    states, weights, _, layers, _, _, bidirectional = call.args[2 if packed else 1 :][:7]
    directions = 2 if bidirectional else 1
    each = len(weights) // (layers * directions)
    groups = [tuple(weights[start : start + each]) for start in range(0, len(weights), each)]
    batch_dim = None if packed else int(not call.args[8])
    return _connect(call, source, _list_of(states), groups, directions, batch_dim)


def recurrent_cell(call: Call) -> Sequence[ChannelIds]:
    """Do for one step of one layer, (batch, I), what `recurrent_layers` does."""
    source, states, *weights = call.args
    return _connect(call, source, _list_of(states), [tuple(w for w in weights if w is not None)], 1, 0)


def _connect(  # noqa: PLR0917
    call: Call,
    source: Tensor,
    states: list[Tensor],
    groups: Sequence[tuple[Tensor, ...]],
    directions: int,
    batch_dim: int | None,
) -> Sequence[ChannelIds]:
    """Connect (..., I) to the weights of each layer and direction in order, and return the ids of output and states.

    Args:
        call: The call.
        source: The input.
        states: The initial state h, and for an LSTM c.
        groups: The weights of every layer and direction: of the input, of the state, biases, of the projection.
        directions: 1 or 2.
        batch_dim: The dimension of the input that counts sequences; None if packed.
    """
    carried = call.ids(source)
    last = source.dim() - 1
    state_last = states[0].dim() - 1
    over_steps = [ids for dim, ids in carried.items() if dim not in {batch_dim, last}]
    call.ledger.freeze_all([{0: ids} for ids in over_steps], f"{call.where} takes them one after the other, as steps")
    call.ledger.freeze_all(
        [{0: ids} for state in states for dim, ids in call.ids(state).items() if dim < state_last - 1],
        f"{call.where} takes them as the states of its layers",
    )
    places = [] if batch_dim is None else [(source, batch_dim)]
    places += [(state, state_last - 1) for state in states]
    batch = merge_operands(call, [(call.ids(tensor).get(dim), tensor.size(dim)) for tensor, dim in places])
    cells, outputs = _tie_units(call, states, groups)
    sequences = batch if batch_dim is not None else None
    incoming = carried.get(last)
    for number, group in enumerate(groups):
        # From the second layer on, the input is what all directions of the layer before return.
        if number == directions:
            incoming = _repeat(outputs, directions)
        connect_input(call, incoming, call.ids(group[0]).get(1))
        _count(call, source, sequences, group)
    within: ChannelIds = {} if sequences is None or batch_dim is None else {batch_dim: sequences}
    features = _repeat(outputs, directions)
    ends = [outputs, *([cells] if len(states) > 1 else [])]
    results = [within | ({} if features is None else {last: features})] if len(call.outputs) > len(states) else []
    between: ChannelIds = {} if batch is None else {state_last - 1: batch}
    return [*results, *(between | ({} if end is None else {state_last: end}) for end in ends)]


def _tie_units(
    call: Call, states: list[Tensor], groups: Sequence[tuple[Tensor, ...]]
) -> tuple[IntArray | None, IntArray | None]:
    """Tie the units in all weights and states, and return the ids of the cells and of the outputs."""
    gates = _GATES[call.name.removesuffix("_cell")]
    units = groups[0][0].size(0) // gates
    cells: list[tuple[IntArray | None, int]] = []
    outputs: list[tuple[IntArray | None, int]] = []
    for group in groups:
        projection = group[-1:] if _is_projected(group) else ()
        for tensor in group[: len(group) - len(projection)]:
            rows = _with_role(call, tensor, 0, Role.OUTPUT)
            cells.append((None if rows is None else call.ledger.tie_rows(rows.reshape(gates, -1)), units))
        outputs.append((_with_role(call, group[1], 1, Role.INPUT), group[1].size(1)))
        for tensor in projection:
            outputs.append((_with_role(call, tensor, 0, Role.OUTPUT), tensor.size(0)))
            cells.append((_with_role(call, tensor, 1, Role.INPUT), units))
    # The state h holds the outputs; c, which only an LSTM has, holds the cells.
    for state, places in zip(states, (outputs, cells), strict=False):
        ids, length = call.ids(state).get(state.dim() - 1), state.size(-1)
        if ids is not None:
            places.append((ids, length))
        elif length > 1:
            # Zeros cannot be told from other numbers here.
            reason = f"{call.where} begins with a state that does not follow its units, such as zeros of a fixed size"
            call.ledger.freeze_all([{0: ids} for ids, _ in places if ids is not None], reason)
    if _is_projected(groups[0]):
        return merge_operands(call, cells), merge_operands(call, outputs)
    both = merge_operands(call, cells + outputs)
    return both, both


def _is_projected(group: tuple[Tensor, ...]) -> bool:
    """Return whether weights of input and state, and perhaps two biases, are followed by those of a projection."""
    return len(group) % 2 == 1


def _with_role(call: Call, tensor: Tensor, dim: int, role: Role) -> IntArray | None:
    """Return the ids of a dimension of a weight, after recording what it does with them."""
    ids = call.ids(tensor).get(dim)
    if ids is not None:
        call.ledger.roles.append((ids, role))
    return ids


def _count(call: Call, source: Tensor, sequences: IntArray | None, group: tuple[Tensor, ...]) -> None:
    """Count one layer and direction: every weight of every matrix once for each step of each sequence."""
    # If channels were folded into the batch, the number of sequences follows them: a factor of its own.
    positions = source.numel() // max(1, source.size(-1))
    if sequences is not None:
        positions //= len(sequences)
    outer: tuple[IntArray, ...] = () if sequences is None else (sequences,)
    for matrix in group:
        if matrix.dim() == 2:
            own = call.ids(matrix)
            dims = (*outer, *(own.get(dim, matrix.size(dim)) for dim in (0, 1)))
            call.ledger.operations.append(CountedOperation(call.module, call.name, float(positions), dims))


def _repeat(ids: IntArray | None, times: int) -> IntArray | None:
    """Return the ids of the concatenated outputs of all directions."""
    return ids if ids is None or times == 1 else np.concatenate([ids] * times)


def _list_of(states: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [states] if isinstance(states, Tensor) else list(states)


def packed_sequence(call: Call) -> Sequence[ChannelIds]:
    """Join (batch, steps, ...) to (steps of all sequences, ...), or take these apart: features stay what they are."""
    source = call.args[0]
    ids = call.ids(source)
    first, shift = (2, -1) if call.name == "_pack_padded_sequence" else (1, 1)
    call.ledger.freeze_all(
        [{dim: vector for dim, vector in ids.items() if dim < first}], f"{call.where} takes them as steps of sequences"
    )
    return [{dim + shift: vector for dim, vector in ids.items() if dim >= first}, {}]


RECURRENT_RULES: Mapping[str, Callable[[Call], Sequence[ChannelIds]]] = {
    **dict.fromkeys(_GATES, recurrent_layers),
    **{f"{name}_cell": recurrent_cell for name in _GATES},
    **dict.fromkeys(_PACKINGS, packed_sequence),
}
"""The rules of the calls that are not taken apart, by name."""
