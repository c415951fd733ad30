"""Python ints against the widths: which attributes a cut must set, and what must stay because an int cannot follow."""

from collections.abc import Mapping

import numpy as np

from secateur.graph._channels import Extent, IntArray
from secateur.graph._ledger import Binding, Ledger
from secateur.graph._sizes import Arithmetic, Attribute, Expression, ShapeOf, describe, evaluate, invert, shape_leaves
from secateur.graph._solution import Solution


def mend(ledger: Ledger, solution: Solution, attributes: Mapping[Attribute, int]) -> bool:
    """Tie channels whose numbers a model takes to be the same; True if any were tied.

    After attention, many models write ``x.reshape(b, n, c)`` with the width c of their input, or take the dimension of
    a head to be ``c // heads``. Then the residual stream must be as wide as all heads together: position p of the one
    goes with position p of the other. Without the tie both would have to stay whole.
    """
    edited = _edited(ledger, solution, attributes)
    before = len(ledger.ties)
    for binding in ledger.bindings:
        if not _is_consistent(binding, solution, edited, attributes):
            for first, second in _equal_numbers(ledger, binding):
                if (solution.root[first] != solution.root[second]).any():
                    ledger.tie(first, second)
    return len(ledger.ties) > before


def _equal_numbers(ledger: Ledger, binding: Binding) -> list[tuple[IntArray, IntArray]]:
    """Pairs of id vectors that must be equally long if the binding is to hold."""
    match binding.expression:
        case Attribute() if binding.ids is not None:
            same = (b.ids for b in ledger.bindings if b.expression == binding.expression and b.ids is not None)
            first = next(same)
            return [(first, binding.ids)] if len(first) == len(binding.ids) else []
        case ShapeOf(counted) if binding.ids is not None and len(counted) == len(binding.ids):
            return [(counted, binding.ids)]
        case Arithmetic("//", ShapeOf(counted), heads) if binding.ids is not None:
            rows = counted.reshape(-1, len(binding.ids)) if len(counted) % len(binding.ids) == 0 else None
            return [] if rows is None else [(np.tile(binding.ids, len(rows)), counted)]
        case Arithmetic("//", ShapeOf(counted), Attribute() as heads):
            by_head = next((b.ids for b in ledger.bindings if b.expression == heads and b.ids is not None), None)
            if by_head is None or len(counted) % len(by_head):
                return []
            return [(np.repeat(by_head, len(counted) // len(by_head)), counted)]
        case _:
            return []


def settle_sizes(ledger: Ledger, solution: Solution, attributes: Mapping[Attribute, int]) -> dict[Attribute, Extent]:
    """Find the new value of every int attribute; freeze channels whose sizes cannot follow. Repeats until stable."""
    while True:
        news = _freeze_partial(ledger, solution)
        edited = _edited(ledger, solution, attributes)
        for binding in ledger.bindings:
            news |= _freeze_unless_consistent(binding, solution, edited, attributes)
        if not news:
            return edited


def _freeze_partial(ledger: Ledger, solution: Solution) -> bool:
    news = False
    for operation in ledger.operations:
        for ids in operation.dims:
            if not isinstance(ids, int) and solution.measure(ids) is None:
                news |= solution.freeze([ids], f"`{operation.kind}` in {operation.module} sees only a part of them")
    return news


def _edited(ledger: Ledger, solution: Solution, attributes: Mapping[Attribute, int]) -> dict[Attribute, Extent]:
    """The new value of every attribute that counts channels; first of those that do so directly."""
    edited = dict[Attribute, Extent]()

    def known(expression: Expression) -> Extent | None:
        inside = _attributes_in(expression)
        if not all(place in edited for place in inside) and not isinstance(expression, Attribute):
            return None
        return evaluate(expression, attributes=edited, values=attributes, measure=solution.measure)

    for binding in sorted(ledger.bindings, key=lambda b: not isinstance(b.expression, Attribute)):
        extent = None if binding.ids is None else solution.measure(binding.ids)
        found = None if extent is None else invert(binding.expression, extent, known)
        if found and found[1].at(solution.sizes) == attributes[found[0]]:
            edited.setdefault(*found)
    return edited


def _is_consistent(
    binding: Binding,
    solution: Solution,
    edited: Mapping[Attribute, Extent],
    attributes: Mapping[Attribute, int],
) -> bool:
    """Whether an int will have the value that its use needs, for all widths."""
    if binding.ids is None and not shape_leaves(binding.expression) and not _mentions(binding.expression, edited):
        return True
    found = evaluate(binding.expression, attributes=edited, values=attributes, measure=solution.measure)
    if binding.ids is not None:
        needed = solution.measure(binding.ids)
    else:
        needed = evaluate(binding.expression, attributes={}, values=attributes, measure=lambda ids: Extent(len(ids)))
    return needed is not None and found == needed


def _freeze_unless_consistent(
    binding: Binding,
    solution: Solution,
    edited: Mapping[Attribute, Extent],
    attributes: Mapping[Attribute, int],
) -> bool:
    leaves = shape_leaves(binding.expression)
    if _is_consistent(binding, solution, edited, attributes):
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
