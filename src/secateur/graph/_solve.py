"""`solve` derives the channel graph from the ledger of one recorded pass.

Tied ids form components, and components that occur at the same places form axes. Then every size, and every Python int
that counts channels, is expressed by the widths of the axes; axes that some int cannot follow are frozen.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from secateur._arrays import IntArray, connected_components, run_starts, unique_values
from secateur.graph._ledger import (
    CountedOperation,
    Ledger,
    ModuleOutput,
    RecordedMixingCall,
    SizeBinding,
    SizeComparison,
    StoredTensor,
)
from secateur.graph._size_ints import (
    Arithmetic,
    Attribute,
    Expression,
    Literal,
    ShapeOf,
    attributes_in,
    evaluate_expression,
    expression_text,
    is_outcome_fixed,
    shape_ids,
    solve_for_attribute,
)
from secateur.graph.blocks import blocks_of_modules
from secateur.graph.graph import (
    Activation,
    ChannelAxis,
    ChannelDim,
    ChannelGraph,
    Extent,
    MixingCall,
    Operation,
    Role,
    Site,
    SizeEdit,
)

_Part = tuple[int, int, int | None]


@dataclass(eq=False)
class Solution:
    """The axes of a graph under construction, and the reasons why some are frozen, by index of the axis."""

    axes: list[ChannelAxis]
    axis_of: IntArray
    channel_of: IntArray
    root: IntArray
    reasons: dict[int, str] = field(default_factory=dict)
    _counted: dict[int, tuple[IntArray, list[_Part]]] = field(default_factory=dict[int, tuple[IntArray, list[_Part]]])
    _lanes: dict[int, tuple[IntArray, IntArray, IntArray]] = field(
        default_factory=dict[int, tuple[IntArray, IntArray, IntArray]]
    )

    def locate(self, ids: IntArray) -> tuple[IntArray, IntArray]:
        """Return the index of the axis (-1 for none) and the channel of the axis that each id belongs to."""
        # The entry holds the vector, so that no other one can get the same `id` as long as the entry exists.
        known = self._lanes.get(id(ids))
        if known is None:
            roots = self.root[ids]
            known = self._lanes[id(ids)] = ids, self.axis_of[roots], self.channel_of[roots]
        return known[1:]

    @property
    def sizes(self) -> dict[str, int]:
        """The full width of every axis by name."""
        return {axis.name: axis.size for axis in self.axes}

    def extent_of(self, ids: IntArray) -> Extent | None:
        """Return the extent of a vector of ids; None if it has only a part of an axis that may be pruned."""
        base, terms = 0, list[tuple[str, int]]()
        # Frozen axes and ids of no axis are constants; a partly present prunable axis has no linear extent.
        for number, total, times in self._census(ids):
            if number < 0 or number in self.reasons:
                base += total
            elif times is None:
                return None
            else:
                terms.append((self.axes[number].name, times))
        return Extent(base, tuple(sorted(terms)))

    def set_census(self, ids: IntArray, parts: list[tuple[int, int, int]]) -> None:
        """Set the census of a vector of ids, which saves counting it.

        Args:
            ids: The ids of a dimension of a stored tensor.
            parts: For each axis in it: the index, the number of positions, and the number of those of each channel.
        """
        rest = len(ids) - sum(total for _, total, _ in parts)
        self._counted[id(ids)] = ids, [*([(-1, rest, None)] if rest else []), *sorted(parts)]

    def _census(self, ids: IntArray) -> list[_Part]:
        """Return for each axis in a vector of ids its index, its positions, and those per channel (None: unequal)."""
        known = self._counted.get(id(ids))
        if known is not None:
            return known[1]
        # All ids of a component have the axis and channel of its root.
        roots = self.root[ids]
        owner = self.axis_of[roots]
        # Shortcut: nearly always, all ids belong to the same axis.
        alike = len(owner) > 0 and bool((owner == owner[0]).all())
        found: list[_Part] = []
        for number in [int(owner[0])] if alike else unique_values(owner).tolist():
            here = roots if alike else roots[owner == number]
            times = None
            if number >= 0:
                counts = np.bincount(self.channel_of[here], minlength=self.axes[number].size)
                times = int(counts[0]) if counts.min() == counts.max() else None
            found.append((number, len(here), times))
        self._counted[id(ids)] = ids, found
        return found

    def axes_in(self, ids: IntArray) -> set[int]:
        """Return the indices of the axes in a vector of ids."""
        return {number for number, _, _ in self._census(ids) if number >= 0}

    def freeze(self, vectors: Iterable[IntArray], reason: str) -> bool:
        """Freeze every axis in some vectors of ids, and return whether any was not frozen before."""
        return self._freeze_numbers(set[int]().union(*map(self.axes_in, vectors)), reason)

    def freeze_named(self, names: Iterable[str], reason: str) -> bool:
        """Freeze axes by name, and return whether any was not frozen before."""
        wanted = set(names)
        return self._freeze_numbers({n for n, axis in enumerate(self.axes) if axis.name in wanted}, reason)

    def _freeze_numbers(self, numbers: set[int], reason: str) -> bool:
        changed = numbers - set(self.reasons)
        self.reasons.update(dict.fromkeys(sorted(changed), reason))
        return bool(changed)


def tie_equal_sizes(ledger: Ledger, solution: Solution, attributes: Mapping[Attribute, int]) -> bool:
    """Tie channels whose numbers the model assumes to be equal, and return whether any were tied.

    After attention, many models write ``x.reshape(b, n, c)`` with the width c of their input, or compute the dimension
    of a head as ``c // heads``. Then the residual stream must be as wide as all heads together, so each of its
    positions is tied to one of the heads. Without the tie, both would have to be frozen.
    """
    edited = _find_edits(ledger, solution, attributes)
    before = len(ledger.ties)
    for binding in ledger.bindings:
        if not _is_consistent(binding, solution, edited, attributes):
            # A tie helps only if it connects something; otherwise the loop in `solve` would not end.
            for first, second in _equal_counts(ledger, binding, attributes):
                if (solution.root[first] != solution.root[second]).any():
                    ledger.tie(first, second)
    for comparison in ledger.comparisons:
        match comparison:
            # Two shapes that were found to be equal must stay so.
            case SizeComparison("==" | "!=", ShapeOf(first), ShapeOf(second)) if (
                len(first) == len(second)
                and (solution.root[first] != solution.root[second]).any()
                and not _is_outcome_kept(comparison, solution, edited, attributes)
            ):
                ledger.tie(first, second)
            case _:
                pass
    return len(ledger.ties) > before


def _equal_counts(  # noqa: PLR0911
    ledger: Ledger, binding: SizeBinding, attributes: Mapping[Attribute, int]
) -> list[tuple[IntArray, IntArray]]:
    """Return pairs of id vectors that must be equally long for the binding to hold."""
    match binding.expression:
        case Attribute() if binding.ids is not None:
            same = (b.ids for b in ledger.bindings if b.expression == binding.expression and b.ids is not None)
            first = next(same)
            return [(first, binding.ids)] if len(first) == len(binding.ids) else []
        case ShapeOf(counted) if binding.ids is not None and len(counted) == len(binding.ids):
            return [(counted, binding.ids)]
        case Arithmetic("//", ShapeOf(counted), heads) if binding.ids is not None:
            # With c // heads, the counted channels are heads x dimensions: tie each dimension across the heads.
            rows = counted.reshape(-1, len(binding.ids)) if len(counted) % len(binding.ids) == 0 else None
            return [] if rows is None else [(np.tile(binding.ids, len(rows)), counted)]
        case Arithmetic("//", ShapeOf(counted), Attribute() as heads):
            by_head = next((b.ids for b in ledger.bindings if b.expression == heads and b.ids is not None), None)
            if by_head is None or len(counted) % len(by_head):
                return []
            return [(np.repeat(by_head, len(counted) // len(by_head)), counted)]
        case Arithmetic():
            # As `chunk` is written in ONNX: equal positions of the pieces stay or go together.
            found = _divided_shape(binding.expression, attributes)
            if binding.ids is None or found is None or found[1] * len(binding.ids) != len(found[0]):
                return []
            return [(np.tile(binding.ids, found[1]), found[0])]
        case _:
            return []


def _divided_shape(expression: Expression, values: Mapping[Attribute, int]) -> tuple[IntArray, int] | None:
    """Return the ids and the divisor of ``c // k``, which may be written ``(c + k - 1) // k * 1``; else None."""

    def value(part: Expression) -> int | None:
        return part.value if isinstance(part, Literal) else values.get(part) if isinstance(part, Attribute) else None

    match expression:
        case Arithmetic("*", quotient, factor) if value(factor) == 1:
            return _divided_shape(quotient, values)
        case Arithmetic("//", ShapeOf(ids), divisor) if (by := value(divisor)) is not None:
            return ids, by
        case Arithmetic("//", Arithmetic("+", ShapeOf(ids), added), divisor):
            by, more = value(divisor), value(added)
            return (ids, by) if by is not None and more is not None and 0 <= more < by else None
        case _:
            return None


def resolve_sizes(ledger: Ledger, solution: Solution, attributes: Mapping[Attribute, int]) -> dict[Attribute, Extent]:
    """Find the new value of every int attribute, and freeze axes whose sizes an int cannot follow, until stable."""
    while True:
        # Freezing an axis changes extents, and thereby the edits and what is consistent: repeat until nothing changes.
        changed = _freeze_partial(ledger, solution)
        edited = _find_edits(ledger, solution, attributes)
        for binding in ledger.bindings:
            changed |= _freeze_unless_consistent(binding, solution, edited, attributes)
        for comparison in ledger.comparisons:
            changed |= _freeze_unless_kept(comparison, solution, edited, attributes)
        for place in ledger.fixed.keys() & edited.keys():
            names = (name for name, _ in edited[place].terms)
            changed |= solution.freeze_named(names, f"{ledger.fixed[place]} needs {place} as it is")
        if not changed:
            return edited


def _freeze_partial(ledger: Ledger, solution: Solution) -> bool:
    changed = False
    # MACs are products of extents, and a part of an axis has no linear extent.
    for operation in ledger.operations:
        for ids in operation.dims:
            if not isinstance(ids, int) and solution.extent_of(ids) is None:
                changed |= solution.freeze([ids], f"`{operation.kind}` in {operation.module} sees only a part of them")
    return changed


def _find_edits(ledger: Ledger, solution: Solution, attributes: Mapping[Attribute, int]) -> dict[Attribute, Extent]:
    """Return the new value of every attribute that counts channels."""
    edited = dict[Attribute, Extent]()

    def known(expression: Expression) -> Extent | None:
        inside = attributes_in(expression)
        if not all(place in edited for place in inside) and not isinstance(expression, Attribute):
            return None
        return evaluate_expression(expression, attributes=edited, values=attributes, measure=solution.extent_of)

    def settled(expression: Expression) -> bool:
        return edited.keys() >= set(attributes_in(expression))

    # Attributes that count channels directly come first, because expressions may contain them.
    for binding in sorted(ledger.bindings, key=lambda b: not isinstance(b.expression, Attribute)):
        extent = None if binding.ids is None else solution.extent_of(binding.ids)
        found = None if extent is None else solve_for_attribute(binding.expression, extent, known, settled)
        # The first value stands. A use that needs another one is found to be inconsistent later, and freezes its axes.
        if found and _is_value_of(*found, solution, attributes):
            edited.setdefault(*found)
    for comparison in ledger.comparisons:
        for place, extent in _find_equal_attribute(comparison, solution, edited, attributes, known):
            edited.setdefault(place, extent)
    return edited


def _find_equal_attribute(
    comparison: SizeComparison,
    solution: Solution,
    edited: Mapping[Attribute, Extent],
    attributes: Mapping[Attribute, int],
    known: Callable[[Expression], Extent | None],
) -> Iterator[tuple[Attribute, Extent]]:
    """Yield the attribute that the model found to be equal to a size (``assert x.shape[1] == self.dim``), if any."""
    if comparison.symbol not in {"==", "!="}:
        return
    for side, other in ((comparison.left, comparison.right), (comparison.right, comparison.left)):
        if not attributes_in(side):
            continue
        wanted = evaluate_expression(other, attributes=edited, values=attributes, measure=solution.extent_of)
        found = solve_for_attribute(side, wanted, known) if wanted is not None and wanted.terms else None
        if found and _is_value_of(*found, solution, attributes):
            yield found


def _is_value_of(place: Attribute, extent: Extent, solution: Solution, attributes: Mapping[Attribute, int]) -> bool:
    """Return whether an attribute can have this value for all widths.

    At full width it must be the present one; otherwise the equation has another meaning. No size becomes negative.
    """
    sizes = solution.sizes
    least = extent.base + sum(min(k, k * sizes[name]) for name, k in extent.terms)
    return extent.at(sizes) == attributes[place] and (least >= 0 or attributes[place] < 0)


def _is_outcome_kept(
    comparison: SizeComparison,
    solution: Solution,
    edited: Mapping[Attribute, Extent],
    attributes: Mapping[Attribute, int],
) -> bool:
    """Return whether a comparison of sizes has the same outcome for all widths."""
    sides = (comparison.left, comparison.right)
    if not any(shape_ids(side) or _mentions(side, edited) for side in sides):
        return True
    left, right = (
        evaluate_expression(side, attributes=edited, values=attributes, measure=solution.extent_of) for side in sides
    )
    return left is not None and right is not None and is_outcome_fixed(comparison.symbol, left, right, solution.sizes)


def _freeze_unless_kept(
    comparison: SizeComparison,
    solution: Solution,
    edited: Mapping[Attribute, Extent],
    attributes: Mapping[Attribute, int],
) -> bool:
    if _is_outcome_kept(comparison, solution, edited, attributes):
        return False
    sides = (comparison.left, comparison.right)
    names = {name for side in sides for place in attributes_in(side) for name, _ in edited.get(place, Extent(0)).terms}
    text = f" {comparison.symbol} ".join(map(expression_text, sides))
    reason = f"{comparison.where} tests {text}, which fewer channels would change"
    changed = solution.freeze([ids for side in sides for ids in shape_ids(side)], reason)
    return solution.freeze_named(names, reason) or changed


def _is_consistent(
    binding: SizeBinding,
    solution: Solution,
    edited: Mapping[Attribute, Extent],
    attributes: Mapping[Attribute, int],
) -> bool:
    """Return whether an int will have the value that its use requires, for all widths."""
    if binding.ids is None and not shape_ids(binding.expression) and not _mentions(binding.expression, edited):
        return True
    found = evaluate_expression(binding.expression, attributes=edited, values=attributes, measure=solution.extent_of)
    if binding.ids is not None:
        needed = solution.extent_of(binding.ids)
    else:
        # Without ids, the int must keep the value that it has at full width.
        needed = evaluate_expression(
            binding.expression, attributes={}, values=attributes, measure=lambda ids: Extent(len(ids))
        )
    return needed is not None and found == needed


def _freeze_unless_consistent(
    binding: SizeBinding,
    solution: Solution,
    edited: Mapping[Attribute, Extent],
    attributes: Mapping[Attribute, int],
) -> bool:
    leaves = shape_ids(binding.expression)
    if _is_consistent(binding, solution, edited, attributes):
        return False
    # The attribute may be edited for another use, which would break this one: freeze the axis of that use as well.
    names = {name for place in attributes_in(binding.expression) for name, _ in edited.get(place, Extent(0)).terms}
    vectors = [*leaves, *([binding.ids] if binding.ids is not None else [])]
    if not vectors:
        return solution.freeze_named(names, f"{binding.where} needs {expression_text(binding.expression)} as it is")
    reason = f"{binding.where} takes the size {expression_text(binding.expression)}, which cannot follow"
    changed = solution.freeze(vectors, reason)
    return solution.freeze_named(names, reason) or changed


def _mentions(expression: Expression, edited: Mapping[Attribute, Extent]) -> bool:
    return any(place in edited and edited[place].terms for place in attributes_in(expression))


NOT_CONSUMED = "no layer of this model consumes these channels"
SINGLE_CHANNEL = "it has a single channel (or every channel is tied to every other)"
NOT_PRODUCED = "no layer of this model produces these channels"


@dataclass(eq=False)
class _Occurrences:
    """Every (component, site, position) of the stored tensors, then of the bound sizes (sites without a tensor)."""

    root: IntArray
    site: IntArray
    position: IntArray
    tensors: list[tuple[StoredTensor, int]]


def solve(ledger: Ledger, attributes: Mapping[Attribute, int], example: tuple[Any, ...]) -> ChannelGraph:
    """Return the channel graph that follows from a ledger."""
    solution = _solve_axes(ledger)
    # New ties merge axes, after which more sizes may be consistent.
    while tie_equal_sizes(ledger, solution, attributes):
        solution = _solve_axes(ledger)
    edited = resolve_sizes(ledger, solution, attributes)
    axes = tuple(
        ChannelAxis(axis.name, axis.size, axis.sites, axis.divisor, solution.reasons.get(number))
        for number, axis in enumerate(solution.axes)
    )
    blocks_of = blocks_of_modules(ledger.blocks)
    return ChannelGraph(
        axes=axes,
        operations=tuple(_operation(solution, op, blocks_of(op.module)) for op in ledger.operations),
        tensors={s.name: _extents(solution, s) for s in ledger.stored.values()},
        parameters=tuple(s.name for s in ledger.stored.values() if s.is_parameter),
        edits=tuple(
            SizeEdit(place.module, place.attribute, place.item, extent)
            for place, extent in edited.items()
            if extent.terms
        ),
        activations=_activations(ledger, solution),
        stages=_stages(ledger),
        module_axes=_module_axes(ledger, solution),
        example=example,
        mixings=tuple(_mixing(solution, call) for call in ledger.mixings),
        unseen=ledger.unseen(),
        blocks=ledger.blocks,
        calls=ledger.calls,
        uncounted=tuple(ledger.uncounted),
        module_calls={name: tuple(calls) for name, calls in ledger.module_calls.items()},
    )


def _solve_axes(ledger: Ledger) -> Solution:
    root = connected_components(ledger.count, ledger.ties)
    return _group_into_axes(ledger, _find_occurrences(ledger, root), root, _first_freezes(ledger, root))


def _find_occurrences(ledger: Ledger, root: IntArray) -> _Occurrences:
    tensors = [(stored, dim) for stored in ledger.stored.values() for dim in stored.ids]
    vectors = [stored.ids[dim] for stored, dim in tensors]
    # Bound sizes are sites too, because channels that different Python ints count must not share an axis.
    for binding in ledger.bindings:
        vectors += [binding.ids] if binding.ids is not None else []
        vectors += shape_ids(binding.expression)
    for comparison in ledger.comparisons:
        vectors += [*shape_ids(comparison.left), *shape_ids(comparison.right)]
    lengths = np.array([len(v) for v in vectors], dtype=np.int64)
    ids = np.concatenate(vectors) if vectors else np.zeros(0, np.int64)
    starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
    return _Occurrences(root[ids], np.repeat(np.arange(len(vectors)), lengths), np.arange(len(ids)) - starts, tensors)


def _first_freezes(ledger: Ledger, root: IntArray) -> IntArray:
    """Return the index of the first freeze of each component; the number of freezes if there is none."""
    first = np.full(ledger.count, len(ledger.freezes), dtype=np.int64)
    # Backward, so that the first freeze of a component is the one that remains.
    for number in range(len(ledger.freezes) - 1, -1, -1):
        first[root[ledger.freezes[number][0]]] = number
    return first


def _group_into_axes(ledger: Ledger, places: _Occurrences, root: IntArray, frozen: IntArray) -> Solution:
    """Group the components that occur at the same sites, equally often, into axes."""
    order = np.argsort(places.root, kind="stable")  # Sites and positions are in order already.
    roots, sites, positions = places.root[order], places.site[order], places.position[order]
    starts = run_starts(roots)
    heads = roots[starts]
    groups = _group_components(frozen[heads], sites, positions, starts)
    roles = _roles(ledger, places)
    solution = Solution([], np.full(ledger.count, -1), np.full(ledger.count, -1), root)
    taken: dict[str, int] = {}
    contracted = np.zeros(ledger.count, dtype=bool)
    for ids in ledger.contracted:
        contracted[root[ids]] = True
    lengths: IntArray = np.diff(np.append(starts, len(roots)))
    along: dict[tuple[str, int], list[tuple[int, int, int]]] = {(s.name, dim): [] for s, dim in places.tensors}
    for members in groups:
        reason, first = int(frozen[heads[members[0]]]), starts[members]
        where = first[:, None] + np.arange(int(lengths[members[0]]))
        pattern, block = sites[where[0]], positions[where]
        assert (sites[where] == pattern).all(), "two kinds of channels have the same fingerprint"
        axis_sites = tuple(_sites(places, roles, pattern, block))
        # Tensors that no layer produces or consumes, such as the tokens of a position embedding, are no channels.
        if not any(site.role is not Role.VECTOR for site in axis_sites):
            continue
        number = len(solution.axes)
        solution.axis_of[heads[members]] = number
        solution.channel_of[heads[members]] = np.arange(len(members))
        solution.axes.append(ChannelAxis(_name(axis_sites, taken), len(members), axis_sites))
        for site in axis_sites:
            along[site.tensor, site.dim].append((number, site.index.size, site.index.shape[1]))
        # An explicit freeze takes precedence over the reasons that follow from the sites.
        if reason < len(ledger.freezes):
            solution.reasons[number] = ledger.freezes[reason][1]
        elif not contracted[heads[members[0]]] and not any(site.role is Role.INPUT for site in axis_sites):
            solution.reasons[number] = NOT_CONSUMED
        elif not any(site.role is Role.OUTPUT for site in axis_sites):
            solution.reasons[number] = NOT_PRODUCED
        elif len(members) == 1:
            solution.reasons[number] = SINGLE_CHANNEL
    for stored, dim in places.tensors:
        solution.set_census(stored.ids[dim], along[stored.name, dim])
    return solution


def _group_components(reasons: IntArray, sites: IntArray, positions: IntArray, starts: IntArray) -> list[IntArray]:
    """Return groups of components with the same freeze and the same multiset of sites.

    The fingerprint of a component is the sum, modulo 2^64, of a random number for its freeze and one for each of its
    sites. Different components have equal fingerprints with probability 2^-63, and the caller checks for that.

    Args:
        reasons: (components,) number of the freeze.
        sites: (places,) number of the site, sorted within each component.
        positions: (places,) position at the site.
        starts: (components,) index of the first place of each component.

    Returns:
        The indices of the components of each group; components and groups are in order of first site, then position.
    """
    if not len(starts):
        return []
    draw = np.random.default_rng(0)
    # The seed is fixed, so that the same model always gives the same graph.
    secrets = draw.integers(2**63, size=int(sites.max()) + int(reasons.max()) + 2, dtype=np.uint64)
    prints = np.add.reduceat(secrets[sites], starts) + secrets[len(secrets) - 1 - reasons]
    # Order of first site, then of position: the order of the channels in the tensor that names the axis.
    order = np.lexsort((positions[starts], sites[starts]))
    kinds = prints[order]
    grouped = np.argsort(kinds, kind="stable")
    groups = np.split(grouped, run_starts(kinds[grouped])[1:])
    return [order[group] for group in sorted(groups, key=lambda group: int(group[0]))]


def _roles(ledger: Ledger, places: _Occurrences) -> dict[tuple[str, int], Role]:
    # The first id of a dimension identifies it, because dimensions of stored tensors do not share ids.
    owner: dict[int, tuple[str, int]] = {int(stored.ids[dim][0]): (stored.name, dim) for stored, dim in places.tensors}
    roles: dict[tuple[str, int], Role] = {}
    for ids, role in ledger.roles:
        if len(ids) and int(ids[0]) in owner:
            # A weight that is used twice, as embedding and head, keeps the role of its first use.
            roles.setdefault(owner[int(ids[0])], role)
    return roles


def _sites(
    places: _Occurrences, roles: Mapping[tuple[str, int], Role], pattern: IntArray, block: IntArray
) -> Iterable[Site]:
    edges = run_starts(pattern).tolist()
    shared = np.ascontiguousarray(block[:, :1])
    alike = (block == shared).all(0).tolist()
    for number, low, high in zip(pattern[edges].tolist(), edges, [*edges[1:], len(pattern)], strict=True):
        if number < len(places.tensors):
            stored, dim = places.tensors[number]
            role = roles.get((stored.name, dim), Role.VECTOR)
            # Many sites have the same positions; sharing one array saves memory, and time in `slice`.
            one = high == low + 1 and alike[low]
            yield Site(stored.name, dim, shared if one else np.ascontiguousarray(block[:, low:high]), role)


def _name(sites: tuple[Site, ...], taken: dict[str, int]) -> str:
    """Return the module that produces the channels first, with a number if it produces several axes."""
    # Sites are in the order of the state dict; the producer is what a user looks for.
    best = next((s for s in sites if s.role is Role.OUTPUT), sites[0])
    name = best.tensor.rpartition(".")[0] or best.tensor
    if best.role is Role.INPUT:
        name += "/input"
    taken[name] = taken.get(name, 0) + 1
    return name if taken[name] == 1 else f"{name}#{taken[name]}"


def _operation(solution: Solution, operation: CountedOperation, blocks: tuple[str, ...]) -> Operation:
    extents = tuple(Extent(d) if isinstance(d, int) else _whole_extent(solution, d) for d in operation.dims)
    return Operation(operation.module, operation.kind, operation.factor, extents, blocks)


def _whole_extent(solution: Solution, ids: IntArray) -> Extent:
    extent = solution.extent_of(ids)
    assert extent is not None, "channels covered in part are frozen before"
    return extent


def _extents(solution: Solution, stored: StoredTensor) -> tuple[Extent, ...]:
    return tuple(
        _whole_extent(solution, stored.ids[dim]) if dim in stored.ids else Extent(size)
        for dim, size in enumerate(stored.shape)
    )


def _activations(ledger: Ledger, solution: Solution) -> dict[str, Activation]:
    return {
        name: _activation(solution, output)
        for name, output in ledger.outputs.items()
        # A module that runs several times has several outputs, which may carry different channels.
        if output.ids and output.calls == 1
    }


def _activation(solution: Solution, output: ModuleOutput) -> Activation:
    dims = [ChannelDim(0, dim, *solution.locate(ids)) for dim, ids in sorted(output.ids.items())]
    # A position embedding gives ids to tokens as well, but these belong to no axis.
    main = dims[0] if len(dims) == 1 else max(dims, key=lambda one: int((one.axis >= 0).sum()))
    others = tuple(one for one in dims if one is not main and (one.axis >= 0).any())
    return Activation(output.module, output.shape, main.dim, main.axis, main.channel, others)


def _mixing(solution: Solution, call: RecordedMixingCall) -> MixingCall:
    def channel_dims(found: tuple[tuple[int, int, IntArray], ...]) -> tuple[ChannelDim, ...]:
        return tuple(ChannelDim(tensor, dim, *solution.locate(ids)) for tensor, dim, ids in found)

    return MixingCall(call.number, call.kind, channel_dims(call.read), channel_dims(call.written))


def _stages(ledger: Ledger) -> tuple[str, ...]:
    """Return the last, outermost module with an output at each spatial resolution above 1 x 1."""
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


def _module_axes(ledger: Ledger, solution: Solution) -> dict[str, tuple[str, ...]]:
    """Return for every module the names of the axes that its operations saw."""
    seen: dict[str, set[int]] = {}
    for module, ids in ledger.touched:
        seen.setdefault(module, set()).update(solution.axes_in(ids))
    return {module: tuple(solution.axes[n].name for n in sorted(numbers)) for module, numbers in seen.items()}
