"""What a search noted on its way, for the report."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

from secateur.report import JudgedStage, SearchedDepth, SearchedWidth, SearchEpoch


def search_epochs(notes: Mapping[str, object], sizes: Mapping[str, int]) -> tuple[SearchEpoch, ...]:
    """The epochs of a search that learns, from ``notes["search"]``; empty for all others.

    Each epoch is an object ``{"epoch", "temperature", "entropy", "expected": {"macs": fraction}, "argmax": {"macs":
    fraction}, "widths": {axis: [expected, most probable]}, "depths": {first block: [expected, most probable, all]},
    "weight_loss", "architecture_loss"}``. A strategy may note what it likes: an epoch that cannot be read is left out,
    because a report of a finished run must not fail for it.

    Args:
        notes: Of the search.
        sizes: Full size by axis, in order of execution.
    """
    noted = notes.get("search")
    if not isinstance(noted, Sequence) or isinstance(noted, str):
        return ()
    found = [_epoch(epoch, sizes) for epoch in cast(Sequence[Any], noted)]
    read = [epoch for epoch in found if epoch is not None]
    return tuple(sorted({epoch.epoch: epoch for epoch in read}.values(), key=lambda epoch: epoch.epoch))


def judged_stages(notes: Mapping[str, object], macs: int) -> tuple[JudgedStage, ...]:
    """The stages of a stage-wise search, from ``notes["stages"]``; empty for all others, or if one cannot be read.

    Args:
        notes: Of the search: each stage is an object ``{"name", "cut", "candidates": {"log10", "trained"}, "losses":
            [...], "costs": {"macs": [...]}, "chosen": number}``.
        macs: Of the original.
    """
    noted = notes.get("stages")
    if not isinstance(noted, Sequence) or isinstance(noted, str):
        return ()
    try:
        return tuple(_stage(stage, macs) for stage in cast(Sequence[Any], noted))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, ZeroDivisionError):
        return ()


def fairness(notes: Mapping[str, object]) -> float | None:
    """How fairly the channels were trained, from ``notes["fairness"]``."""
    noted = notes.get("fairness")
    return float(noted) if isinstance(noted, float | int) and math.isfinite(noted) else None


def _stage(noted: Any, macs: int) -> JudgedStage:
    found = JudgedStage(
        name=str(noted["name"]),
        cut=str(noted["cut"]),
        possible=_finite(noted["candidates"]["log10"]),
        trained=int(noted["candidates"]["trained"]),
        losses=tuple(map(_finite, noted["losses"])),
        macs=tuple(_finite(count) / macs for count in noted["costs"]["macs"]),
        chosen=int(noted["chosen"]),
    )
    if len(found.losses) != len(found.macs) or not 0 <= found.chosen < len(found.losses):
        raise ValueError("candidates, their costs and the choice do not go together")
    return found


def _epoch(noted: Any, sizes: Mapping[str, int]) -> SearchEpoch | None:
    try:
        widths = {str(axis): (float(pair[0]), int(pair[1])) for axis, pair in noted["widths"].items()}
        depths = {str(block): tuple(map(float, three)) for block, three in noted.get("depths", {}).items()}
        return SearchEpoch(
            epoch=int(noted["epoch"]),
            entropy=_finite(noted["entropy"]),
            temperature=_number(noted.get("temperature")),
            expected_macs=_number(noted.get("expected", {}).get("macs")),
            current_macs=_number(noted.get("argmax", {}).get("macs")),
            widths=tuple(
                SearchedWidth(axis, _finite(widths[axis][0]) / size, widths[axis][1], size)
                for axis, size in sizes.items()
                if axis in widths
            ),
            depths=tuple(
                SearchedDepth(block, _finite(kept), int(blocks), int(size))
                for block, (kept, blocks, size) in depths.items()
            ),
            train_loss=_number(noted.get("weight_loss")),
            architecture_loss=_number(noted.get("architecture_loss")),
        )
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, ZeroDivisionError):
        return None


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{number} cannot be drawn")
    return number


def _number(value: Any) -> float | None:
    """None for what is missing or not finite."""
    if value is None:
        return None
    number = float(value)
    return number if math.isfinite(number) else None
