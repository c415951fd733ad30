"""What a search that trains recorded on its way, as the report draws it.

A strategy returns a `SearchHistory` with its proposal; strategies that train nothing return an empty one.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast


@dataclass(frozen=True)
class SearchedWidth:
    """One axis in one epoch of a search.

    Attributes:
        axis: Its name.
        kept_fraction: Expected width / size, under the probabilities of the epoch.
        width: The most probable width.
        size: Of the whole axis.
    """

    axis: str
    kept_fraction: float
    width: int
    size: int


@dataclass(frozen=True)
class SearchedDepth:
    """One stage of removable blocks in one epoch of a search.

    Attributes:
        stage: Name of its first block.
        kept: Expected number of blocks, under the probabilities of the epoch.
        blocks: The most probable number.
        size: All blocks of the stage.
    """

    stage: str
    kept: float
    blocks: int
    size: int


@dataclass(frozen=True)
class SearchEpoch:
    """One epoch of a search that learns probabilities of widths and depths; what was not noted is None.

    Attributes:
        epoch: From 1.
        entropy: Of the choices, normalized: 1 is undecided, 0 is decided.
        temperature: Of the sampling.
        expected_macs: Expected MACs / MACs of the original.
        current_macs: MACs of the most probable network / MACs of the original.
        widths: By axis, in order of execution.
        depths: By stage, in order of execution.
        train_loss: Mean loss of the weights.
        architecture_loss: Mean loss of the probabilities.
    """

    epoch: int
    entropy: float
    temperature: float | None = None
    expected_macs: float | None = None
    current_macs: float | None = None
    widths: tuple[SearchedWidth, ...] = ()
    depths: tuple[SearchedDepth, ...] = ()
    train_loss: float | None = None
    architecture_loss: float | None = None


@dataclass(frozen=True)
class JudgedStage:
    """One stage of a stage-wise search.

    Attributes:
        name: Of the stage.
        cut: The module that ends it; empty for the last one.
        possible: log10 of the number of its candidates.
        trained: How many different ones were trained.
        losses: Of the candidates that were judged.
        macs: Of each of these, over the MACs of the original.
        chosen: The number of the one that was taken.
    """

    name: str
    cut: str
    possible: float
    trained: int
    losses: tuple[float, ...]
    macs: tuple[float, ...]
    chosen: int


@dataclass(frozen=True)
class SearchHistory:
    """A search that trains, epoch by epoch and stage by stage.

    Attributes:
        epochs: Of a search that learns probabilities of widths and depths; empty for all others.
        stages: Of a stage-wise search; empty for all others.
        fairness: How often the channel trained least was trained, per time of the one trained most; None if unknown.
    """

    epochs: tuple[SearchEpoch, ...] = ()
    stages: tuple[JudgedStage, ...] = ()
    fairness: float | None = None

    @classmethod
    def of_records(cls, records: Mapping[str, object], sizes: Mapping[str, int], macs: int) -> "SearchHistory":
        """Read the records that a strategy keeps in its checkpoints and notes.

        A strategy may record what it likes: an epoch that cannot be read is left out, and so are all stages if one
        cannot be read, because a finished search must not fail for what is only drawn.

        Args:
            records: ``"search"``: a list of epochs, each an object ``{"epoch", "temperature", "entropy", "expected":
                {"macs": fraction}, "argmax": {"macs": fraction}, "widths": {axis: [expected, most probable]}, "depths":
                {first block: [expected, most probable, all]}, "weight_loss", "architecture_loss"}``; ``"stages"``: a
                list of objects ``{"name", "cut", "candidates": {"log10", "trained"}, "losses": [...], "costs":
                {"macs": [...]}, "chosen": number}``; ``"fairness"``: a number. Other keys are ignored.
            sizes: Full size by axis.
            macs: MACs of the original.
        """
        fairness = records.get("fairness")
        return cls(
            epochs=_epochs(records.get("search"), sizes),
            stages=_stages(records.get("stages"), macs),
            fairness=float(fairness) if isinstance(fairness, float | int) and math.isfinite(fairness) else None,
        )

    def to_json(self) -> dict[str, object]:
        """A JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "SearchHistory":
        """Read what `to_json` gives.

        Raises:
            KeyError, TypeError: If it is something else.
        """
        epochs: list[Any] = [
            {
                **epoch,
                "widths": tuple(SearchedWidth(**width) for width in epoch["widths"]),
                "depths": tuple(SearchedDepth(**depth) for depth in epoch["depths"]),
            }
            for epoch in data["epochs"]
        ]
        stages: list[Any] = [
            {**stage, "losses": tuple(stage["losses"]), "macs": tuple(stage["macs"])} for stage in data["stages"]
        ]
        return cls(
            tuple(SearchEpoch(**epoch) for epoch in epochs),
            tuple(JudgedStage(**stage) for stage in stages),
            data["fairness"],
        )


def _epochs(noted: object, sizes: Mapping[str, int]) -> tuple[SearchEpoch, ...]:
    if not isinstance(noted, Sequence) or isinstance(noted, str):
        return ()
    found = [_epoch(epoch, sizes) for epoch in cast(Sequence[Any], noted)]
    read = [epoch for epoch in found if epoch is not None]
    return tuple(sorted({epoch.epoch: epoch for epoch in read}.values(), key=lambda epoch: epoch.epoch))


def _stages(noted: object, macs: int) -> tuple[JudgedStage, ...]:
    if not isinstance(noted, Sequence) or isinstance(noted, str):
        return ()
    try:
        return tuple(_stage(stage, macs) for stage in cast(Sequence[Any], noted))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, ZeroDivisionError):
        return ()


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
