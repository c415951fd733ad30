"""The lists of secateur.json, row by row, checked."""

import json
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import cast

from secateur.artifact._edits import Edit
from secateur.artifact._schema import MAX_DIMENSIONS, MAX_TENSORS, Fields, wrong
from secateur.graph import Replacement, StandIn
from secateur.surgery import Widening

_LONGEST_SOURCE = 64 * 2**10
"""Characters of JSON that say how the original is built."""
_LONGEST_TUPLE = 64
_MAX_CHANNELS = 2**20


def source_of(fields: Fields) -> dict[str, object]:
    """How the original is built: an object with a ``kind``; what else it needs is for its reader to check."""
    source = fields.mapping("source")
    fields.fields("source").name("kind")
    if len(json.dumps(source)) > _LONGEST_SOURCE:
        raise wrong("source", f"at most {_LONGEST_SOURCE} characters", source)
    return source


def check_once(where: str, names: Sequence[Hashable]) -> None:
    """Refuse a list that names something twice."""
    if len(set(names)) != len(names):
        twice = next(name for name, times in Counter(names).items() if times > 1)
        raise wrong(where, "a list that names everything once", twice)


def _named(row: object, where: str, *names: str) -> Fields:
    """A row as fields, by the names of its places."""
    if not isinstance(row, list) or len(cast(list[object], row)) != len(names):
        raise wrong(where, f"[{', '.join(names).replace('_', '-')}]", row)
    return Fields(dict(zip(names, cast(list[object], row), strict=True)), where)


def replacements_of(fields: Fields) -> tuple[Replacement, ...]:
    """The stand-ins of removed modules."""
    rows = enumerate(fields.items("replacements", MAX_TENSORS))
    found = tuple(_replacement(row, f"replacements[{n}]") for n, row in rows)
    check_once("replacements", [replacement.module for replacement in found])
    return found


def _replacement(row: object, where: str) -> Replacement:
    fields = _named(row, where, "module", "stand_in", "items")
    kind = fields.text("stand_in")
    if kind not in {stand_in.value for stand_in in StandIn}:
        raise wrong(fields.path("stand_in"), " or ".join(stand_in.value for stand_in in StandIn), kind)
    items = fields.optional_integer("items", least=1)
    if items is not None and items > _LONGEST_TUPLE:
        raise wrong(fields.path("items"), f"at most {_LONGEST_TUPLE}", items)
    return Replacement(fields.name("module"), StandIn(kind), items)


def widenings_of(fields: Fields) -> tuple[Widening, ...]:
    """The modules that are narrower than the stream they are added into."""
    rows = enumerate(fields.items("widenings", MAX_TENSORS))
    found = tuple(_widening(row, f"widenings[{n}]") for n, row in rows)
    check_once("widenings", [widening.module for widening in found])
    return found


def _widening(row: object, where: str) -> Widening:
    fields = _named(row, where, "module", "dim", "missing", "order")
    dim, missing = fields.integer("dim", least=0), fields.integer("missing", least=0)
    order = fields.integers("order", least=0, limit=_MAX_CHANNELS)
    for name, value, limit in (("dim", dim, MAX_DIMENSIONS), ("missing", missing, _MAX_CHANNELS)):
        if value >= limit:
            raise wrong(fields.path(name), f"below {limit}", value)
    if any(place > len(order) for place in order):
        raise wrong(fields.path("order"), "a list of places among the channels", max(order))
    return Widening(fields.name("module"), dim, missing, order)


def edits_of(fields: Fields) -> tuple[Edit, ...]:
    """The ints that surgery set."""
    found = tuple(_edit(row, f"edits[{n}]") for n, row in enumerate(fields.items("edits")))
    check_once("edits", [(edit.module, edit.attribute, edit.item) for edit in found])
    return found


def _edit(row: object, where: str) -> Edit:
    fields = _named(row, where, "module", "attribute", "item", "value")
    return Edit(
        fields.name("module"),
        fields.name("attribute"),
        fields.optional_integer("item", least=0),
        fields.integer("value"),
    )
