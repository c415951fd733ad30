"""From the ledger of one run to the channel graph: components, axes, extents, and what must be frozen."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from secateur.graph._blocks import going_with
from secateur.graph._channels import (
    Activation,
    ChannelAxis,
    ChannelGraph,
    Extent,
    IntArray,
    Lane,
    Mixing,
    Operation,
    Role,
    Site,
    SizeEdit,
)
from secateur.graph._components import components
from secateur.graph._ledger import Binding, CountedOperation, Ledger, MixedCall, ModuleOutput, Stored
from secateur.graph._sizes import Attribute, Expression, describe, evaluate, shape_leaves

NOT_CONSUMED = "no layer of this model consumes these channels"
SINGLE = "it has a single channel (or every channel is tied to every other)"
NOT_PRODUCED = "no layer of this model produces these channels"


@dataclass(eq=False)
class _Places:
    """Every (component, site, position) of stored tensors, then of bound sizes (sites without a tensor)."""

    root: IntArray
    site: IntArray
    position: IntArray
    tensors: list[tuple[Stored, int]]


@dataclass(eq=False)
class _Solution:
    """Axes under construction; freezing an axis only fills `reason`."""

    axes: list[ChannelAxis]
    axis_of: IntArray
    channel_of: IntArray
    root: IntArray
    reasons: dict[int, str] = field(default_factory=dict)

    def measure(self, ids: IntArray) -> Extent | None:
        """Extent of a vector of ids; None if it holds only a part of an axis that may be pruned."""
        roots = self.root[ids]
        owner = self.axis_of[roots]
        base, terms = 0, list[tuple[str, int]]()
        for number in np.unique(owner):
            here = owner == number
            total = int(here.sum())
            if number < 0 or int(number) in self.reasons:
                base += total
                continue
            axis = self.axes[number]
            times = np.bincount(self.channel_of[roots[here]], minlength=axis.size)
            if times.min() != times.max():
                return None
            terms.append((axis.name, int(times[0])))
        return Extent(base, tuple(sorted(terms)))

    def freeze(self, vectors: Iterable[IntArray], reason: str) -> bool:
        """Freeze every axis these ids belong to; True if that is news."""
        numbers = {int(n) for ids in vectors for n in np.unique(self.axis_of[self.root[ids]]) if n >= 0}
        return self._freeze_numbers(numbers, reason)

    def freeze_named(self, names: Iterable[str], reason: str) -> bool:
        """Freeze axes by name; True if that is news."""
        wanted = set(names)
        return self._freeze_numbers({n for n, axis in enumerate(self.axes) if axis.name in wanted}, reason)

    def _freeze_numbers(self, numbers: set[int], reason: str) -> bool:
        news = numbers - set(self.reasons)
        self.reasons.update(dict.fromkeys(sorted(news), reason))
        return bool(news)


def solve(ledger: Ledger, attributes: Mapping[Attribute, int], example: tuple[Any, ...]) -> ChannelGraph:
    """Conclude the channel graph from everything the ledger holds."""
    root = components(ledger.count, ledger.ties)
    places = _places(ledger, root)
    frozen = _frozen_roots(ledger, root)
    solution = _axes(ledger, places, root, frozen)
    edited = _settle_sizes(ledger, solution, attributes)
    axes = tuple(
        ChannelAxis(axis.name, axis.size, axis.sites, axis.divisor, solution.reasons.get(number))
        for number, axis in enumerate(solution.axes)
    )
    around = going_with(ledger.blocks)
    return ChannelGraph(
        axes=axes,
        operations=tuple(_operation(solution, op, around(op.module)) for op in ledger.operations),
        tensors={s.name: _extents(solution, s) for s in ledger.stored.values()},
        parameters=tuple(s.name for s in ledger.stored.values() if s.is_parameter),
        edits=tuple(
            SizeEdit(place.module, place.attribute, place.item, extent)
            for place, extent in edited.items()
            if extent.terms
        ),
        activations=_activations(ledger, solution),
        stages=_stages(ledger),
        touching=_touching(ledger, solution),
        example=example,
        mixings=tuple(_mixing(solution, call) for call in ledger.mixings),
        unseen=ledger.unseen(),
        blocks=ledger.blocks,
    )


def _places(ledger: Ledger, root: IntArray) -> _Places:
    tensors = [(stored, dim) for stored in ledger.stored.values() for dim in stored.ids]
    vectors = [stored.ids[dim] for stored, dim in tensors]
    # Sizes count as places too: channels that one python int counts and another does not must not share an axis.
    for binding in ledger.bindings:
        vectors += [binding.ids] if binding.ids is not None else []
        vectors += shape_leaves(binding.expression)
    lengths = np.array([len(v) for v in vectors], dtype=np.int64)
    ids = np.concatenate(vectors) if vectors else np.zeros(0, np.int64)
    starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
    return _Places(root[ids], np.repeat(np.arange(len(vectors)), lengths), np.arange(len(ids)) - starts, tensors)


def _frozen_roots(ledger: Ledger, root: IntArray) -> IntArray:
    """Index of the first freeze that hits each component; a large number if none."""
    first = np.full(ledger.count, len(ledger.freezes), dtype=np.int64)
    for number in range(len(ledger.freezes) - 1, -1, -1):
        first[root[ledger.freezes[number][0]]] = number
    return first


def _axes(ledger: Ledger, places: _Places, root: IntArray, frozen: IntArray) -> _Solution:
    """Group components that appear at the same places, equally often, into axes."""
    order = np.lexsort((places.position, places.site, places.root))
    roots, sites, positions = places.root[order], places.site[order], places.position[order]
    heads, starts = np.unique(roots, return_index=True)
    ends = np.append(starts[1:], len(roots))
    groups: dict[tuple[int, bytes], list[int]] = {}
    by_appearance = np.lexsort((positions[starts], sites[starts]))
    for number in by_appearance:
        key = (int(frozen[heads[number]]), sites[starts[number] : ends[number]].tobytes())
        groups.setdefault(key, []).append(int(number))
    roles = _roles(ledger, places)
    solution = _Solution([], np.full(ledger.count, -1), np.full(ledger.count, -1), root)
    taken: dict[str, int] = {}
    for (reason, signature), members in groups.items():
        pattern = np.frombuffer(signature, dtype=np.int64)
        first = np.array([starts[m] for m in members])
        block = positions[first[:, None] + np.arange(len(pattern))]
        axis_sites = tuple(_sites(places, roles, pattern, block))
        if not any(site.role is not Role.VECTOR for site in axis_sites):
            continue
        number = len(solution.axes)
        solution.axis_of[heads[members]] = number
        solution.channel_of[heads[members]] = np.arange(len(members))
        solution.axes.append(ChannelAxis(_name(axis_sites, taken), len(members), axis_sites))
        if reason < len(ledger.freezes):
            solution.reasons[number] = ledger.freezes[reason][1]
        elif not any(site.role is Role.INPUT for site in axis_sites):
            solution.reasons[number] = NOT_CONSUMED
        elif not any(site.role is Role.OUTPUT for site in axis_sites):
            solution.reasons[number] = NOT_PRODUCED
        elif len(members) == 1:
            solution.reasons[number] = SINGLE
    return solution


def _roles(ledger: Ledger, places: _Places) -> dict[tuple[str, int], Role]:
    owner: dict[int, tuple[str, int]] = {int(stored.ids[dim][0]): (stored.name, dim) for stored, dim in places.tensors}
    roles: dict[tuple[str, int], Role] = {}
    for ids, role in ledger.roles:
        if len(ids) and int(ids[0]) in owner:
            roles.setdefault(owner[int(ids[0])], role)
    return roles


def _sites(
    places: _Places, roles: Mapping[tuple[str, int], Role], pattern: IntArray, block: IntArray
) -> Iterable[Site]:
    edges = np.flatnonzero(np.diff(pattern)) + 1
    for low, high in zip([0, *edges], [*edges, len(pattern)], strict=True):
        if pattern[low] < len(places.tensors):
            stored, dim = places.tensors[pattern[low]]
            role = roles.get((stored.name, dim), Role.VECTOR)
            yield Site(stored.name, dim, np.ascontiguousarray(block[:, low:high]), role)


def _name(sites: tuple[Site, ...], taken: dict[str, int]) -> str:
    """The module that produces the channels first; a number is added where it produces several axes."""
    best = next((s for s in sites if s.role is Role.OUTPUT), sites[0])
    name = best.tensor.rpartition(".")[0] or best.tensor
    if best.role is Role.INPUT:
        name += "/input"
    taken[name] = taken.get(name, 0) + 1
    return name if taken[name] == 1 else f"{name}#{taken[name]}"


def _settle_sizes(ledger: Ledger, solution: _Solution, attributes: Mapping[Attribute, int]) -> dict[Attribute, Extent]:
    """Find the new value of every int attribute; freeze channels whose sizes cannot follow. Repeats until stable."""
    while True:
        news = _freeze_partial(ledger, solution)
        edited = dict[Attribute, Extent]()
        for binding in ledger.bindings:
            if isinstance(binding.expression, Attribute) and binding.ids is not None:
                extent = solution.measure(binding.ids)
                if extent is not None:
                    edited.setdefault(binding.expression, extent)
        for binding in ledger.bindings:
            news |= _freeze_unless_consistent(binding, solution, edited, attributes)
        if not news:
            return edited


def _freeze_partial(ledger: Ledger, solution: _Solution) -> bool:
    news = False
    for operation in ledger.operations:
        for ids in operation.dims:
            if not isinstance(ids, int) and solution.measure(ids) is None:
                news |= solution.freeze([ids], f"`{operation.kind}` in {operation.module} sees only a part of them")
    return news


def _freeze_unless_consistent(
    binding: Binding,
    solution: _Solution,
    edited: Mapping[Attribute, Extent],
    attributes: Mapping[Attribute, int],
) -> bool:
    leaves = shape_leaves(binding.expression)
    if binding.ids is None and not leaves and not _mentions(binding.expression, edited):
        return False
    found = evaluate(binding.expression, attributes=edited, values=attributes, measure=solution.measure)
    if binding.ids is not None:
        needed = solution.measure(binding.ids)
    else:
        needed = evaluate(binding.expression, attributes={}, values=attributes, measure=lambda ids: Extent(len(ids)))
    if needed is not None and found == needed:
        return False
    # An attribute that cannot serve this use may still be edited for another one: that other axis must stay as well.
    names = {name for place in _attributes_in(binding.expression) for name, _ in edited.get(place, Extent(0)).terms}
    vectors = [*leaves, *([binding.ids] if binding.ids is not None else [])]
    if not vectors:
        return solution.freeze_named(names, f"{binding.where} needs {describe(binding.expression)} as it is")
    reason = f"{binding.where} takes the size {describe(binding.expression)}, which cannot follow"
    news = solution.freeze(vectors, reason)
    return solution.freeze_named(names, reason) or news


def _mentions(expression: Expression, edited: Mapping[Attribute, Extent]) -> bool:
    return any(place in edited and edited[place].terms for place in _attributes_in(expression))


def _attributes_in(expression: Expression) -> list[Attribute]:
    if isinstance(expression, Attribute):
        return [expression]
    left, right = getattr(expression, "left", None), getattr(expression, "right", None)
    return [a for side in (left, right) if side is not None for a in _attributes_in(side)]


def _operation(solution: _Solution, operation: CountedOperation, blocks: tuple[str, ...]) -> Operation:
    extents = tuple(Extent(d) if isinstance(d, int) else _whole(solution, d) for d in operation.dims)
    return Operation(operation.module, operation.kind, operation.factor, extents, blocks)


def _whole(solution: _Solution, ids: IntArray) -> Extent:
    extent = solution.measure(ids)
    assert extent is not None, "channels covered in part are frozen before"
    return extent


def _extents(solution: _Solution, stored: Stored) -> tuple[Extent, ...]:
    return tuple(
        _whole(solution, stored.ids[dim]) if dim in stored.ids else Extent(size)
        for dim, size in enumerate(stored.shape)
    )


def _activations(ledger: Ledger, solution: _Solution) -> dict[str, Activation]:
    return {
        name: _activation(solution, output)
        for name, output in ledger.outputs.items()
        if output.ids and output.calls == 1
    }


def _activation(solution: _Solution, output: ModuleOutput) -> Activation:
    dim = min(output.ids)
    roots = solution.root[output.ids[dim]]
    return Activation(output.module, output.shape, dim, solution.axis_of[roots], solution.channel_of[roots])


def _mixing(solution: _Solution, call: MixedCall) -> Mixing:
    def lanes(found: tuple[tuple[int, int, IntArray], ...]) -> tuple[Lane, ...]:
        roots = [(tensor, dim, solution.root[ids]) for tensor, dim, ids in found]
        return tuple(Lane(t, d, solution.axis_of[r], solution.channel_of[r]) for t, d, r in roots)

    return Mixing(call.number, call.kind, lanes(call.read), lanes(call.written))


def _stages(ledger: Ledger) -> tuple[str, ...]:
    """The outermost, last module output at each spatial resolution above 1 x 1."""
    best: dict[tuple[int, ...], ModuleOutput] = {}
    for output in ledger.outputs.values():
        spatial = output.shape[2:]
        if not output.module or len(spatial) != 2 or 1 not in output.ids or max(spatial) == 1 or output.calls > 1:
            continue
        known = best.get(spatial)
        if known is None or output.module.count(".") <= known.module.count("."):
            best[spatial] = output
    order = {name: number for number, name in enumerate(ledger.outputs)}
    return tuple(sorted((o.module for o in best.values()), key=lambda name: order[name]))


def _touching(ledger: Ledger, solution: _Solution) -> dict[str, tuple[str, ...]]:
    """For every module, the axes that operations run by it saw."""
    seen: dict[str, set[int]] = {}
    done: set[tuple[str, int]] = set()
    for module, ids in ledger.touched:
        if (module, id(ids)) in done:
            continue
        done.add((module, id(ids)))
        seen.setdefault(module, set()).update(np.unique(solution.axis_of[solution.root[ids]]).tolist())
    return {module: tuple(solution.axes[n].name for n in sorted(numbers) if n >= 0) for module, numbers in seen.items()}
