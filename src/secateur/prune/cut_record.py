"""What a cut model remembers of its cuts: what they kept of the model before the first one, and the ints they changed.

The record is text in an attribute of the model, so that it goes along into every copy, and a model that is cut, trained
and cut again can be saved as one artifact.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from secateur.architecture import Architecture
from secateur.graph.graph import ChannelGraph, SizeItem

_ATTRIBUTE = "_secateur_cuts"
Place = tuple[str, str, SizeItem]
"""Module, attribute and item of an int, see `SizeEdit`."""


@dataclass(frozen=True)
class CutRecord:
    """All cuts of a model.

    Attributes:
        architecture: What is kept of the model before the first cut. Axes that a later cut names differently, such as
            those of branches that have become narrower, are listed by their new name.
        places: The ints that the cuts changed, by their place in the cut model.
        cuts: How many cuts there were.
    """

    architecture: Architecture
    places: tuple[Place, ...]
    cuts: int = 1

    @classmethod
    def of(cls, model: nn.Module) -> "CutRecord | None":
        """Return the record of a cut model or of a copy of one; None for any other model."""
        text: Any = getattr(model, _ATTRIBUTE, None)
        if not isinstance(text, str):
            return None
        data = cast(dict[str, Any], json.loads(text))
        places = ((str(module), str(name), _item(item)) for module, name, item in data["places"])
        return cls(Architecture.from_json(data["architecture"]), tuple(places), int(data["cuts"]))

    def write_(self, model: nn.Module) -> None:
        """Attach the record to a model, in place."""
        data = {"architecture": self.architecture.to_json(), "places": self.places, "cuts": self.cuts}
        setattr(model, _ATTRIBUTE, json.dumps(data))

    def then(self, graph: ChannelGraph, architecture: Architecture) -> "CutRecord":
        """Return the record after one more cut, with the places of this record.

        Args:
            graph: The graph of the model that this record belongs to.
            architecture: What the next cut keeps of it.
        """
        kept = dict(self.architecture.kept)
        for name, channels in architecture.kept:
            before = kept.get(name)
            # The channels of a later cut are numbered among those that the earlier ones have kept.
            same_axis = before is not None and len(before) == graph.by_name[name].size
            kept[name] = tuple(before[channel] for channel in channels) if same_axis and before else channels
        removed = (*self.architecture.removed_blocks, *architecture.removed_blocks)
        return CutRecord(Architecture.of(kept, removed), self.places, self.cuts + 1)


def record_cut_(small: nn.Module, names: dict[int, str], changed: Iterable[Place], record: CutRecord) -> None:
    """Attach the record of a cut to the cut model.

    Args:
        small: The cut model.
        names: The names that its modules had before narrow branches were wrapped, by the `id` of the module.
        changed: The places of the ints that this cut changed, by these names.
        record: The record of the cuts up to this one; its places are by these names too.
    """
    now = {names[id(module)]: name for name, module in small.named_modules() if id(module) in names}
    places = {(now[module], name, item) for module, name, item in (*record.places, *changed) if module in now}
    # By their text, because items are ints, names or paths, which do not compare with each other.
    CutRecord(record.architecture, tuple(sorted(places, key=repr)), record.cuts).write_(small)


def add_places_(small: nn.Module, places: Iterable[Place]) -> None:
    """Add ints that were changed after a cut, by the names of the modules of the cut model, to its record."""
    record = CutRecord.of(small)
    if record is not None:
        together = tuple(sorted({*record.places, *places}, key=repr))
        CutRecord(record.architecture, together, record.cuts).write_(small)


def _item(item: Any) -> SizeItem:
    return tuple(item) if isinstance(item, list) else item
