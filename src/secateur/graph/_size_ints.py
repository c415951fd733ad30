"""Python ints that remember how they were computed.

Many models cannot simply be sliced because they hold sizes as Python ints, as in ``split(x, self.sizes)``,
``view(b, self.groups, c // self.groups)`` or ``pad(x, (low, high))``. While a model is traced, its int attributes and
the channel counts in ``x.shape`` are `SizeInt`, ints that carry an expression. When such an int becomes the size of a
dimension with channels, the expression tells which attribute must be edited when channels are removed, or that no edit
is needed because the number is computed from a shape.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from secateur._arrays import IntArray
from secateur.graph.graph import Extent


@dataclass(frozen=True)
class Literal:
    """A constant of the source code, or a number of unknown origin."""

    value: int


class Attribute(NamedTuple):
    """An int attribute of a module: ``module.attribute`` or ``module.attribute[item]``."""

    module: str
    attribute: str
    item: int | None = None

    def __str__(self) -> str:
        place = f"{self.module}.{self.attribute}" if self.module else self.attribute
        return place if self.item is None else f"{place}[{self.item}]"


@dataclass(frozen=True, eq=False)
class ShapeOf:
    """The length of a dimension with these channel ids."""

    ids: IntArray


@dataclass(frozen=True)
class Arithmetic:
    """``left <operator> right``, operator one of + - * // %."""

    operator: str
    left: "Expression"
    right: "Expression"


Expression = Literal | Attribute | ShapeOf | Arithmetic


class SizeInt(int):
    """An int with an `Expression`. Arithmetic with ints extends it; everything else returns plain numbers."""

    expression: Expression

    def __new__(cls, value: int, expression: Expression) -> "SizeInt":
        self = super().__new__(cls, value)
        self.expression = expression
        return self

    def __neg__(self) -> "SizeInt":
        # A double negation is simplified, because slices from the end negate their bound twice.
        match self.expression:
            case Arithmetic("-", Literal(0), positive):
                return SizeInt(-int(self), positive)
            case expression:
                return SizeInt(-int(self), Arithmetic("-", Literal(0), expression))

    def __reduce__(self) -> tuple[type, tuple[int]]:
        return int, (int(self),)

    def __copy__(self) -> "SizeInt":
        return self

    def __deepcopy__(self, memo: object) -> "SizeInt":
        return self


class SizeFloat(float):
    """A float that was computed from sizes (``head_dim ** -0.5``), and stays the same if its `expression` does."""

    expression: Expression

    def __new__(cls, value: float, expression: Expression) -> "SizeFloat":
        self = super().__new__(cls, value)
        self.expression = expression
        return self

    def __reduce__(self) -> tuple[type, tuple[float]]:
        return float, (float(self),)


def _float_operator(name: str) -> Callable[[Any, Any], Any]:
    plain = getattr(float, name)

    def apply(self: SizeInt | SizeFloat, other: Any) -> Any:
        if not isinstance(other, (int, float)):
            return NotImplemented
        # Only the origin of the float matters, not the operation: no float becomes the size of a dimension.
        value = plain(float(self), float(other))
        theirs: Expression = getattr(other, "expression", Literal(0))
        constant = isinstance(theirs, Literal)
        return SizeFloat(value, self.expression if constant else Arithmetic("+", self.expression, theirs))

    return apply


for _name in ("__mul__", "__rmul__", "__truediv__", "__rtruediv__", "__pow__"):
    setattr(SizeFloat, _name, _float_operator(_name))
for _name in ("__truediv__", "__rtruediv__"):
    setattr(SizeInt, _name, _float_operator(_name))


def _power(self: SizeInt, other: Any) -> Any:
    return int(self) ** other if isinstance(other, int) else _float_operator("__pow__")(self, other)


SizeInt.__pow__ = _power  # type: ignore[method-assign, assignment]


def expression_of(value: int) -> Expression:
    """Return the expression of an int; that of a plain int is a `Literal`."""
    return value.expression if isinstance(value, SizeInt) else Literal(int(value))


def _left_operator(operator: str, plain: Callable[[int, Any], Any]) -> Callable[[SizeInt, Any], Any]:
    def apply(self: SizeInt, other: Any) -> Any:
        value = plain(int(self), other)
        # `NotImplemented`, or the float that int arithmetic with a float returns.
        if type(value) is not int:
            return value
        return SizeInt(value, Arithmetic(operator, self.expression, expression_of(other)))

    return apply


def _right_operator(operator: str, plain: Callable[[int, Any], Any]) -> Callable[[SizeInt, Any], Any]:
    def apply(self: SizeInt, other: Any) -> Any:
        value = plain(int(self), other)
        if type(value) is not int:
            return value
        return SizeInt(value, Arithmetic(operator, expression_of(other), self.expression))

    return apply


# Assigned in a loop, because the ten methods differ only in their operator.
for _symbol, _name in {"+": "add", "-": "sub", "*": "mul", "//": "floordiv", "%": "mod"}.items():
    setattr(SizeInt, f"__{_name}__", _left_operator(_symbol, getattr(int, f"__{_name}__")))
    setattr(SizeInt, f"__r{_name}__", _right_operator(_symbol, getattr(int, f"__r{_name}__")))


class SizeTuple(tuple[int, ...]):
    """The type of ``x.shape`` while tracing: as `torch.Size`, but its elements keep their expressions."""

    __slots__ = ()

    def numel(self) -> int:
        """Return the product of the sizes."""
        total = 1
        for size in self:
            total = size * total
        return total

    def __getitem__(self, item: Any) -> Any:
        picked = tuple.__getitem__(self, item)
        return SizeTuple(picked) if isinstance(item, slice) else picked

    def __add__(self, other: Any) -> "SizeTuple":  # type: ignore[override]
        return SizeTuple(tuple(self) + tuple(other))


def evaluate_expression(
    expression: Expression,
    *,
    attributes: Mapping[Attribute, Extent],
    values: Mapping[Attribute, int],
    measure: Callable[[IntArray], Extent | None],
) -> Extent | None:
    """Return the expression as a linear function of the widths; None if it is not one.

    Args:
        expression: What to evaluate.
        attributes: The attributes that will be edited, with their new values.
        values: The present value of every attribute.
        measure: Returns the extent of a vector of channel ids.
    """
    match expression:
        case Literal(value):
            return Extent(value)
        case Attribute():
            return attributes.get(expression, Extent(values[expression]))
        case ShapeOf(ids):
            return measure(ids)
        case Arithmetic(operator, left, right):
            first, second = (
                evaluate_expression(side, attributes=attributes, values=values, measure=measure)
                for side in (left, right)
            )
            if first is None or second is None:
                return None
            return _combine(operator, first, second)


def solve_for_attribute(
    expression: Expression, wanted: Extent, known: Callable[[Expression], Extent | None]
) -> tuple[Attribute, Extent] | None:
    """Return an attribute of an expression, and the value for it that makes the whole expression ``wanted``.

    Args:
        expression: Sums, products, quotients of attributes and numbers.
        wanted: The value that the expression must have.
        known: Returns the value of a part that will not be changed for this; None for a part that may be.

    Returns:
        None if there is no such attribute, or if its value would not be an integer.
    """
    match expression:
        case Attribute():
            return expression, wanted
        case Arithmetic("+" | "*" as operator, left, right):
            value, inner = (known(right), left) if known(right) is not None else (known(left), right)
            return None if value is None else _solve_commuting(operator, inner, value, wanted, known)
        case Arithmetic("-", left, right) if (value := known(right)) is not None:
            return solve_for_attribute(left, combine_extents(((1, wanted), (1, value))), known)
        case Arithmetic("//", left, right) if (value := known(right)) is not None and not value.terms:
            return solve_for_attribute(left, combine_extents(((value.base, wanted),)), known)
        case _:
            return None


def _solve_commuting(
    operator: str, inner: Expression, value: Extent, wanted: Extent, known: Callable[[Expression], Extent | None]
) -> tuple[Attribute, Extent] | None:
    if operator == "+":
        return solve_for_attribute(inner, combine_extents(((1, wanted), (-1, value))), known)
    if (
        value.terms
        or value.base <= 0
        or any(number % value.base for number in (wanted.base, *dict(wanted.terms).values()))
    ):
        return None
    return solve_for_attribute(inner, _quotient_of(wanted, value.base), known)


def _quotient_of(extent: Extent, by: int) -> Extent:
    return Extent(extent.base // by, tuple((name, k // by) for name, k in extent.terms))


def _combine(operator: str, left: Extent, right: Extent) -> Extent | None:
    if operator in "+-":
        sign = 1 if operator == "+" else -1
        return combine_extents(((1, left), (sign, right)))
    if operator == "*":
        return _product(left, right)
    if right.terms:
        return _ratio(left, right) if operator == "//" else None
    if right.base == 0:
        return None
    return _quotient(left, right.base) if operator == "//" else _remainder(left, right.base)


def _product(left: Extent, right: Extent) -> Extent | None:
    # A product of two widths is not linear.
    if left.terms and right.terms:
        return None
    constant, other = (right.base, left) if left.terms else (left.base, right)
    return combine_extents(((constant, other),))


def _quotient(extent: Extent, by: int) -> Extent | None:
    if not extent.terms:
        return Extent(extent.base // by)
    # Floor division is linear only if it is exact for all widths.
    if any(number % by for number in (extent.base, *(k for _, k in extent.terms))):
        return None
    return _quotient_of(extent, by)


def _ratio(left: Extent, right: Extent) -> Extent | None:
    """Return the constant k if left = k * right for all widths, as for channels and the number of their groups."""
    # With all widths set to one, both sides are positive, and a constant ratio must show.
    times, rest = divmod(left.at({name: 1 for name, _ in left.terms}), right.at({name: 1 for name, _ in right.terms}))
    return Extent(times) if not rest and combine_extents(((times, right),)) == left else None


def _remainder(extent: Extent, by: int) -> Extent | None:
    return Extent(extent.base % by) if all(k % by == 0 for _, k in extent.terms) else None


def combine_extents(parts: tuple[tuple[int, Extent], ...]) -> Extent:
    """Return the sum of factor * extent."""
    base, terms = 0, dict[str, int]()
    for factor, extent in parts:
        base += factor * extent.base
        for name, k in extent.terms:
            terms[name] = terms.get(name, 0) + factor * k
    return Extent(base, tuple(sorted((name, k) for name, k in terms.items() if k)))


def shape_ids(expression: Expression) -> list[IntArray]:
    """Return every id vector whose length the expression contains."""
    match expression:
        case ShapeOf(ids):
            return [ids]
        case Arithmetic(_, left, right):
            return shape_ids(left) + shape_ids(right)
        case _:
            return []


def expression_text(expression: Expression) -> str:
    """The expression for a human."""
    match expression:
        case Literal(value):
            return str(value)
        case Attribute():
            return str(expression)
        case ShapeOf():
            return "x.shape[...]"
        case Arithmetic(operator, left, right):
            return f"({expression_text(left)} {operator} {expression_text(right)})"
