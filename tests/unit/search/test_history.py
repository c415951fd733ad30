"""What a search notes on its way, as the report wants it."""

import json
from typing import Any

import pytest

from secateur.search import JudgedStage, SearchedDepth, SearchedWidth, SearchEpoch, SearchHistory

SIZES = {"conv1": 16, "layer1.0.conv1": 16, "layer2.0.conv1": 32}


def search_epochs(notes: dict[str, Any], sizes: dict[str, int]) -> tuple[SearchEpoch, ...]:
    return SearchHistory.of_records(notes, sizes, 1).epochs


def judged_stages(notes: dict[str, Any], macs: int) -> tuple[JudgedStage, ...]:
    return SearchHistory.of_records(notes, {}, macs).stages


def fairness(notes: dict[str, Any]) -> float | None:
    return SearchHistory.of_records(notes, {}, 1).fairness


def noted(**changed: Any) -> dict[str, Any]:
    return {
        "epoch": 1, "temperature": 4.5, "entropy": 0.9, "expected": {"macs": 0.6, "params": 0.7},
        "argmax": {"macs": 0.55}, "widths": {"layer2.0.conv1": [24.0, 20], "conv1": [8.0, 10]},
        "depths": {"layer1.0": [2.5, 3, 4]}, "weight_loss": 1.25, "architecture_loss": 0.5, "validation": None,
        "seconds": 3.0, **changed,
    }  # fmt: skip


def test_notes_become_epochs_in_order_of_execution() -> None:
    notes = json.loads(json.dumps({"search": [noted(), noted(epoch=2, entropy=0.1)]}))
    first, second = search_epochs(notes, SIZES)
    assert first == SearchEpoch(
        epoch=1, entropy=0.9, temperature=4.5, expected_macs=0.6, current_macs=0.55,
        widths=(SearchedWidth("conv1", 0.5, 10, 16), SearchedWidth("layer2.0.conv1", 0.75, 20, 32)),
        depths=(SearchedDepth("layer1.0", 2.5, 3, 4),), train_loss=1.25, architecture_loss=0.5,
    )  # fmt: skip
    assert (second.epoch, second.entropy) == (2, 0.1)


@pytest.mark.parametrize("notes", [{}, {"search": None}, {"search": "a search"}, {"search": 3}, {"search": {"a": 1}}])
def test_other_notes_are_no_search(notes: dict[str, Any]) -> None:
    assert search_epochs(notes, SIZES) == ()


@pytest.mark.parametrize(
    "odd",
    [
        None, 7, "epoch", {}, noted(widths=None), noted(widths={"conv1": 3}), noted(widths={"conv1": []}),
        noted(widths={"conv1": ["many", 3]}), noted(widths={"conv1": [float("nan"), 3]}), noted(depths={"a": [1, 2]}),
        noted(entropy=float("inf")), noted(entropy=None), noted(expected=[0.5]), noted(epoch="first"),
        noted(depths={"a": [1.0, float("inf"), 2]}),
    ],
)  # fmt: skip
def test_an_odd_epoch_is_left_out(odd: Any) -> None:
    found = search_epochs({"search": [odd, noted(epoch=2)]}, SIZES)
    assert [epoch.epoch for epoch in found] == [2]


def test_what_is_missing_or_not_finite_is_none() -> None:
    sparse = {"epoch": 3, "entropy": 0.5, "widths": {"elsewhere": [1.0, 1]}, "weight_loss": float("nan")}
    assert search_epochs({"search": [sparse]}, SIZES) == (SearchEpoch(3, 0.5),)


def test_an_epoch_noted_twice_counts_once_and_order_is_by_epoch() -> None:
    found = search_epochs({"search": [noted(epoch=2), noted(epoch=1), noted(epoch=2, entropy=0.25)]}, SIZES)
    assert [(epoch.epoch, epoch.entropy) for epoch in found] == [(1, 0.9), (2, 0.25)]


def judged(**changed: Any) -> dict[str, Any]:
    return {
        "name": "stage1", "cut": "layer1", "axes": 2, "blocks": 0, "candidates": {"log10": 1.5, "trained": 3},
        "losses": [0.5, 0.0], "costs": {"macs": [10, 40], "params": [1, 2]}, "chosen": 1, **changed,
    }  # fmt: skip


def test_notes_become_stages() -> None:
    notes = json.loads(json.dumps({"stages": [judged(), judged(name="stage2", cut="")], "fairness": 0.25}))
    first, second = judged_stages(notes, 200)
    assert first == JudgedStage("stage1", "layer1", 1.5, 3, (0.5, 0.0), (0.05, 0.2), 1)
    assert (second.name, second.cut) == ("stage2", "")
    assert fairness(notes) == 0.25


@pytest.mark.parametrize(
    "stages",
    [
        None, "stages", [judged(losses=[0.5])], [judged(chosen=2)], [judged(losses=[float("nan"), 0])], [{}],
        [judged(costs={"params": [1, 2]})],
    ],
)  # fmt: skip
def test_stages_that_cannot_be_read_are_left_out(stages: Any) -> None:
    assert judged_stages({"stages": stages}, 200) == ()


@pytest.mark.parametrize("odd", [None, "fair", float("nan")])
def test_fairness_that_was_not_noted_is_none(odd: Any) -> None:
    assert fairness({"fairness": odd}) is None


def test_a_history_is_read_again_from_json() -> None:
    records = {"search": [noted(), noted(epoch=2)], "stages": [judged()], "fairness": 0.25}
    history = SearchHistory.of_records(records, SIZES, 200)
    assert SearchHistory.from_json(json.loads(json.dumps(history.to_json()))) == history
