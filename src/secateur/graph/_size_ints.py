"""Python ints that remember how they were computed.

Many models cannot simply be sliced because they hold sizes as Python ints, as in ``split(x, self.sizes)``,
``view(b, self.groups, c // self.groups)`` or ``pad(x, (low, high))``. While a model is traced, its int attributes and
the channel counts in ``x.shape`` are `SizeInt`, ints that carry an expression. When such an int becomes the size of a
dimension with channels, the expression tells which attribute must be edited when channels are removed, or that no edit
is needed because the number is computed from a shape.
"""

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import torch

from secateur._arrays import IntArray
from secateur.graph.graph import Extent, SizeItem


@dataclass(frozen=True)
class Literal:
    """A constant of the source code, or a number of unknown origin."""

    value: int


class Attribute(NamedTuple):
    """An int that a module holds: ``module.attribute`` or ``module.attribute[item]``."""

    module: str
    attribute: str
    item: SizeItem = None

    def __str__(self) -> str:
        place = f"{self.module}.{self.attribute}" if self.module else self.attribute
        return place + "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps_of(self.item))


def steps_of(item: SizeItem) -> tuple[int | str, ...]:
    """Return the path to an item."""
    if item is None:
        return ()
    return item if isinstance(item, tuple) else (item,)


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


class SizeWatcher:
    """What the sizes of one recording report to: comparisons, and uses after which a size can no longer be followed.

    This one takes no notes. Sizes that outlive their recording, in a cache of the model's, are no longer `open`.
    """

    open = True

    def compare(self, symbol: str, left: Expression, right: Expression) -> None:
        """Take note that two sizes were compared, and that the outcome may have decided what the model does."""

    def use(self, expression: Expression, what: str, *, scale: bool = False) -> bool:
        """Take note that a size became a plain number: ``what`` says how, ``scale`` whether it may scale values.

        Returns:
            Whether it was noted: what PyTorch does with the arguments of its own calls is not.
        """
        return False

    def hash(self, expression: Expression) -> None:
        """Take note that a size is about to be looked up."""

    def begin(self, number: "SizeFloat") -> None:
        """Take note of a float that was computed from sizes, of which nobody knows yet how it will be used."""

    def end(self, number: "SizeFloat") -> None:
        """Take note that a float was used in a way that was followed or noted otherwise."""


_NOBODY = SizeWatcher()


class SizeInt(int):
    """An int with an `Expression`.

    Arithmetic with ints extends the expression. Comparisons, and whatever makes a plain number of it, are reported to
    the watcher, because the outcome may have to stay what it is.
    """

    expression: Expression
    watcher: SizeWatcher

    def __new__(cls, value: int, expression: Expression, watcher: SizeWatcher = _NOBODY) -> "SizeInt":
        self = super().__new__(cls, value)
        self.expression = expression
        self.watcher = watcher
        return self

    def __neg__(self) -> "SizeInt":
        # A double negation is simplified, because slices from the end negate their bound twice.
        match self.expression:
            case Arithmetic("-", Literal(0), positive):
                return SizeInt(-int.__int__(self), positive, self.watcher)
            case expression:
                return SizeInt(-int.__int__(self), Arithmetic("-", Literal(0), expression), self.watcher)

    def _same(self, *_: object) -> "SizeInt":
        return self

    __pos__ = __round__ = __floor__ = __ceil__ = __trunc__ = __copy__ = __deepcopy__ = _same  # type: ignore[assignment]

    def __abs__(self) -> int:
        return self if int.__ge__(self, 0) else self.as_plain("`abs`").__abs__()

    def __divmod__(self, other: Any) -> Any:
        return self // other, self % other

    def __rdivmod__(self, other: Any) -> Any:
        return other // self, other % self

    def __lshift__(self, other: int) -> int:
        return self * 2 ** int(other)

    def __rshift__(self, other: int) -> int:
        return self // 2 ** int(other)

    def __bool__(self) -> bool:
        self.watcher.compare("!=", self.expression, Literal(0))
        return int.__bool__(self)

    def __int__(self) -> int:
        # A subclass of int that `__int__` returns would be converted as well: its expression cannot survive.
        return self.as_plain("`int`")

    def __float__(self) -> float:
        self.watcher.use(self.expression, "`float`", scale=True)
        return float(int.__int__(self))

    def __hash__(self) -> int:
        self.watcher.hash(self.expression)
        return int.__hash__(self)

    def as_plain(self, what: str) -> int:
        """Return the plain number, and report what makes one of it."""
        self.watcher.use(self.expression, what)
        return int.__int__(self)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        """Apply a function of numpy: as the operator of Python that it stands for, else to the plain number."""
        symbol = _UFUNCS.get(ufunc.__name__)
        arrays = [value for value in inputs if isinstance(value, np.ndarray)]
        if symbol is not None and method == "__call__" and not any(value.ndim for value in arrays):
            return symbol(*(v.item() if isinstance(v, np.generic | np.ndarray) else v for v in inputs))
        self.watcher.use(self.expression, f"`{ufunc.__name__}`", scale=True)
        plain = (int.__int__(value) if isinstance(value, SizeInt) else value for value in inputs)
        return getattr(ufunc, method)(*plain, **kwargs)

    def __reduce__(self) -> tuple[type, tuple[int]]:
        return int, (int.__int__(self),)


class NumpySize(SizeInt):
    """A `SizeInt` that stands for an integer of numpy, and has its attributes and methods."""

    def __getattr__(self, name: str) -> Any:
        return getattr(np.int64(int.__int__(self)), name)

    def item(self) -> SizeInt:
        """Return the size as a Python int."""
        return SizeInt(int.__int__(self), self.expression, self.watcher)


class SizeFloat(float):
    """A float that was computed from sizes (``head_dim ** -0.5``), and stays the same if its `expression` does.

    Attributes:
        expression: It contains all sizes that the float was computed from.
        ratio: Two expressions whose quotient is the float; None if it was computed in any other way.
        watcher: What it reports to.
    """

    expression: Expression
    ratio: tuple[Expression, Expression] | None
    watcher: SizeWatcher

    def __new__(
        cls,
        value: float,
        expression: Expression,
        watcher: SizeWatcher = _NOBODY,
        ratio: tuple[Expression, Expression] | None = None,
    ) -> "SizeFloat":
        self = super().__new__(cls, value)
        self.expression = expression
        self.watcher = watcher
        self.ratio = ratio
        watcher.begin(self)
        return self

    def _whole(self, convert: Callable[[float], int], name: str) -> int:
        """Return the float as an int, which keeps its expression if nothing was rounded."""
        self.watcher.end(self)
        value = convert(float.__float__(self))
        if self.ratio is not None and value == float.__float__(self):
            return SizeInt(value, Arithmetic("//", *self.ratio), self.watcher)
        self.watcher.use(self.expression, name)
        return value

    def __round__(self, digits: Any = None) -> Any:
        return self._whole(round, "`round`") if digits is None else self.as_plain("`round`").__round__(digits)

    def __floor__(self) -> int:
        return self._whole(math.floor, "`floor`")

    def __ceil__(self) -> int:
        return self._whole(math.ceil, "`ceil`")

    def __trunc__(self) -> int:
        return self._whole(math.trunc, "`trunc`")

    def __int__(self) -> int:
        return int(self.as_plain("`int`"))

    def __float__(self) -> float:
        return self.as_plain("`float`")

    def __bool__(self) -> bool:
        return bool(self.as_plain("`bool`"))

    def as_plain(self, what: str) -> float:
        """Return the plain number, and report what makes one of it."""
        if self.watcher.use(self.expression, what, scale=what == "`float`"):
            self.watcher.end(self)
        return float.__float__(self)

    def __reduce__(self) -> tuple[type, tuple[float]]:
        return float, (float.__float__(self),)


def plain_number(value: Any) -> Any:
    """Return an int or float without its expression, and report nothing; anything else unchanged."""
    if isinstance(value, SizeInt):
        return int.__int__(value)
    return float.__float__(value) if isinstance(value, SizeFloat) else value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.integer | np.floating)


def expression_of(value: Any) -> Expression:
    """Return the expression of an int; that of a plain int is a `Literal`."""
    if isinstance(value, SizeInt):
        return value.expression if value.watcher.open else Literal(int.__int__(value))
    return Literal(int(value))


def _float_operator(symbol: str, plain: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def apply(left: Any, right: Any) -> Any:
        if not _is_number(left) or not _is_number(right):
            return NotImplemented
        value = plain(*(float(plain_number(side)) for side in (left, right)))
        sizes = [side for side in (left, right) if isinstance(side, SizeInt | SizeFloat)]
        for side in sizes:
            if isinstance(side, SizeFloat):
                side.watcher.end(side)
        # Only the origin of the float matters, not the operation, unless it becomes an int again.
        expression = sizes[0].expression
        for side in sizes[1:]:
            expression = Arithmetic("+", expression, side.expression)
        return SizeFloat(value, expression, sizes[0].watcher, _ratio_of(symbol, left, right))

    return apply


def _ratio_of(symbol: str, left: Any, right: Any) -> tuple[Expression, Expression] | None:
    """Return the result of a product or quotient as a quotient of two expressions; None for anything else."""
    first, second = _as_ratio(left), _as_ratio(right)
    if symbol not in {"*", "/"} or first is None or second is None:
        return None
    if symbol == "/":
        second = second[1], second[0]
    return _times(first[0], second[0]), _times(first[1], second[1])


def _as_ratio(value: Any) -> tuple[Expression, Expression] | None:
    if isinstance(value, SizeFloat):
        return value.ratio
    if isinstance(value, int | np.integer):
        return expression_of(value), Literal(1)
    # A factor such as 0.5 or 1 / 3 stands for a fraction, if this gives exactly the same float.
    fraction = Fraction(float(value)).limit_denominator(1024)
    return (Literal(fraction.numerator), Literal(fraction.denominator)) if float(fraction) == value else None


def _times(left: Expression, right: Expression) -> Expression:
    if isinstance(left, Literal) and isinstance(right, Literal):
        return Literal(left.value * right.value)
    return _arithmetic("*", left, right)


def _power(base: Any, exponent: Any) -> Any:
    if not isinstance(base, int) or not isinstance(exponent, int):
        return _float_operator("**", operator.pow)(base, exponent)
    # A power is no linear function of the widths, so the result is a plain number.
    for side in (base, exponent):
        if isinstance(side, SizeInt):
            side.watcher.use(side.expression, "`**`", scale=True)
    return plain_number(base) ** plain_number(exponent)


def _int_operator(symbol: str, plain: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    in_floats = _float_operator(symbol, plain)

    def apply(left: Any, right: Any) -> Any:
        if not isinstance(left, int | np.integer) or not isinstance(right, int | np.integer):
            return in_floats(left, right)
        watcher = next(side.watcher for side in (left, right) if isinstance(side, SizeInt))
        value = plain(int(plain_number(left)), int(plain_number(right)))
        return SizeInt(value, _arithmetic(symbol, expression_of(left), expression_of(right)), watcher)

    return apply


def _arithmetic(symbol: str, left: Expression, right: Expression) -> Expression:
    """Return an expression, without the neutral element that loops over sizes begin with."""
    neutral = {"+": Literal(0), "*": Literal(1)}.get(symbol)
    if neutral is not None and neutral in (left, right):
        return right if left == neutral else left
    return Arithmetic(symbol, left, right)


def _multiply(left: Any, right: Any) -> Any:
    for size, other in ((left, right), (right, left)):
        # As in `[layer] * self.depth`: nobody sees how often the list is repeated.
        if isinstance(other, list | tuple | str):
            return other * size.as_plain("`*` of a sequence")
    return _int_operator("*", operator.mul)(left, right)


def _bits(plain: Callable[[int, int], int]) -> Callable[[Any, Any], Any]:
    def apply(left: Any, right: Any) -> Any:
        if not isinstance(left, int) or not isinstance(right, int):
            return NotImplemented
        return plain(
            *(side.as_plain(f"`{plain.__name__}`") if isinstance(side, SizeInt) else side for side in (left, right))
        )

    return apply


def _comparison(symbol: str, plain: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def apply(self: Any, other: Any) -> Any:
        if not _is_number(other):
            return NotImplemented
        if isinstance(self, SizeInt) and isinstance(other, int | np.integer):
            self.watcher.compare(symbol, expression_of(self), expression_of(other))
        else:
            for side in (self, other):
                if isinstance(side, SizeInt | SizeFloat):
                    side.as_plain("a comparison")
        return bool(plain(plain_number(self), plain_number(other)))

    return apply


def _reversed(act: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda self, other: act(other, self)


# Assigned in loops, because the methods differ only in their operator.
_Operator = Callable[[Any, Any], Any]
_EXACT: Mapping[str, tuple[_Operator, _Operator]] = {
    name: (_int_operator(symbol, plain), _float_operator(symbol, plain))
    for symbol, name, plain in (
        ("+", "add", operator.add),
        ("-", "sub", operator.sub),
        ("//", "floordiv", operator.floordiv),
        ("%", "mod", operator.mod),
    )
}
_BINARY: Mapping[str, tuple[_Operator, _Operator]] = {
    **_EXACT,
    "mul": (_multiply, _float_operator("*", operator.mul)),
    "truediv": (_float_operator("/", operator.truediv), _float_operator("/", operator.truediv)),
    "pow": (_power, _float_operator("**", operator.pow)),
}
for _name, _acts in _BINARY.items():
    for _kind, _act in zip((SizeInt, SizeFloat), _acts, strict=True):
        setattr(_kind, f"__{_name}__", _act)
        setattr(_kind, f"__r{_name}__", _reversed(_act))
for _name in ("and_", "or_", "xor"):
    _act = _bits(getattr(operator, _name))
    setattr(SizeInt, f"__{_name.strip('_')}__", _act)
    setattr(SizeInt, f"__r{_name.strip('_')}__", _reversed(_act))
for _symbol, _name in {"==": "eq", "!=": "ne", "<": "lt", "<=": "le", ">": "gt", ">=": "ge"}.items():
    for _kind in (SizeInt, SizeFloat):
        setattr(_kind, f"__{_name}__", _comparison(_symbol, getattr(operator, _name)))
SizeFloat.__hash__ = float.__hash__  # type: ignore[method-assign]
_UFUNCS: Mapping[str, Callable[..., Any]] = {
    "add": operator.add, "subtract": operator.sub, "multiply": operator.mul, "floor_divide": operator.floordiv,
    "remainder": operator.mod, "divide": operator.truediv, "power": operator.pow, "negative": operator.neg,
    "equal": operator.eq, "not_equal": operator.ne, "less": operator.lt, "less_equal": operator.le,
    "greater": operator.gt, "greater_equal": operator.ge, "sqrt": lambda value: value**0.5,
}  # fmt: skip
"""What numpy's functions are in Python, where a size is one of the two operands."""


class SizeTuple(tuple[int, ...]):
    """The type of ``x.shape`` while tracing: as `torch.Size`, but its elements keep their expressions."""

    __slots__ = ()

    @property
    def __class__(self) -> type:  # pyright: ignore[reportIncompatibleMethodOverride]
        """`torch.Size`, which no class can inherit from, for ``isinstance(x.shape, torch.Size)``."""
        return torch.Size

    def numel(self) -> int:
        """Return the product of the sizes."""
        return math.prod(self)

    def prod(self, *_: object, **__: object) -> int:
        """Return the product of the sizes; `numpy.prod` calls this."""
        return math.prod(self)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return np.array([int(size) for size in self], dtype=dtype or np.int64)

    def __getitem__(self, item: Any) -> Any:
        picked = tuple.__getitem__(self, item)
        return SizeTuple(picked) if isinstance(item, slice) else picked

    def __add__(self, other: Any) -> "SizeTuple":  # type: ignore[override]
        return SizeTuple(tuple(self) + tuple(other))

    def __radd__(self, other: Any) -> "SizeTuple":
        return SizeTuple(tuple(other) + tuple(self))


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
    expression: Expression,
    wanted: Extent,
    known: Callable[[Expression], Extent | None],
    settled: Callable[[Expression], bool] = lambda expression: not attributes_in(expression),
) -> tuple[Attribute, Extent] | None:
    """Return an attribute of an expression, and the value for it that makes the whole expression ``wanted``.

    Args:
        expression: Sums, products, quotients of attributes and numbers.
        wanted: The value that the expression must have.
        known: Returns the value of a part that will not be changed for this; None for a part that may be.
        settled: Returns whether nothing in a part may be changed any more. Of two known parts, the other is solved for.

    Returns:
        None if there is no such attribute, or if its value would not be an integer.
    """
    match expression:
        case Attribute():
            return expression, wanted
        case Arithmetic("+" | "*" as operator, left, right):
            # The left operand changes, unless it is settled and the right one is not, or the right one is unknown.
            keep_right = settled(right) or not settled(left)
            value, inner = (known(right), left) if known(right) is not None and keep_right else (known(left), right)
            if value is None:
                value, inner = known(right), left
            inside = None if value is None else _wanted_inside(operator, value, wanted)
            return None if inside is None else solve_for_attribute(inner, inside, known, settled)
        case Arithmetic("-", left, right) if (value := known(right)) is not None:
            return solve_for_attribute(left, combine_extents(((1, wanted), (1, value))), known, settled)
        # Of all numbers with this quotient, the multiple is taken, which leaves no rest.
        case Arithmetic("//", left, right) if (value := known(right)) is not None and not value.terms:
            return solve_for_attribute(left, combine_extents(((value.base, wanted),)), known, settled)
        case _:
            return None


def _wanted_inside(operator: str, value: Extent, wanted: Extent) -> Extent | None:
    """Return what one operand must be if the other is ``value``."""
    if operator == "+":
        return combine_extents(((1, wanted), (-1, value)))
    numbers = (wanted.base, *dict(wanted.terms).values())
    exact = not value.terms and value.base > 0 and not any(number % value.base for number in numbers)
    return _quotient_of(wanted, value.base) if exact else None


def _quotient_of(extent: Extent, by: int) -> Extent:
    return Extent(extent.base // by, tuple((name, k // by) for name, k in extent.terms))


def _combine(operator: str, left: Extent, right: Extent) -> Extent | None:
    if operator in "+-":
        sign = 1 if operator == "+" else -1
        return combine_extents(((1, left), (sign, right)))
    if operator == "*":
        return _product(left, right)
    if right.terms:
        times = _ratio(left, right)
        return Extent(0) if times is not None and operator == "%" else times
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
    # Floor division is linear if only the constant part leaves a rest.
    return None if any(k % by for _, k in extent.terms) else _quotient_of(extent, by)


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


def is_outcome_fixed(symbol: str, left: Extent, right: Extent, sizes: Mapping[str, int]) -> bool:
    """Return whether a comparison has the same outcome for all widths from 1 to the full ones.

    Args:
        symbol: One of == != < <= > >=.
        left: The extent on its left.
        right: The extent on its right.
        sizes: The full width by name of the axis.
    """
    difference = combine_extents(((1, left), (-1, right)))
    ends = [sorted((k, k * sizes[name])) for name, k in difference.terms]
    low = difference.base + sum(least for least, _ in ends)
    high = difference.base + sum(most for _, most in ends)
    match symbol:
        case "<" | ">=":
            return high < 0 or low >= 0
        case "<=" | ">":
            return high <= 0 or low > 0
        case _:
            return low > 0 or high < 0 or low == high


def attributes_in(expression: Expression) -> list[Attribute]:
    """Return every attribute that an expression contains."""
    match expression:
        case Attribute():
            return [expression]
        case Arithmetic(_, left, right):
            return attributes_in(left) + attributes_in(right)
        case _:
            return []


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
