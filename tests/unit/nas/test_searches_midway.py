"""Searches that are stopped in the middle of an epoch or a round, and go on there."""

import math
from importlib import import_module
from typing import Any

import pytest
import torch
from swp_runs import assert_same as same_combination
from swp_runs import quick as quick_swp
from swp_runs import staged
from tas_runs import Recorder, net, run
from tas_runs import quick as quick_tas

from secateur.search import SearchResult
from secateur.train import CheckpointPolicy, Stopped, stoppable

EVERY_STEP = CheckpointPolicy(math.inf, 1)


@pytest.fixture(autouse=True)
def _every_step_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("secateur.train.callbacks"), "SECONDS_PER_LOOK", -1.0)


def stopped_at(stop: Any, at: int) -> Recorder:
    """Asks to stop in the n-th step of all that is shown, over epochs, rounds and loops; n from 1."""
    seen = Recorder()

    def ask(_epoch: int, _step: int) -> None:
        if len(seen.steps) == at:
            stop.ask()

    seen.at_step = ask
    return seen


def same_search(one: SearchResult, other: SearchResult) -> None:
    """Bit by bit, but for the time it took."""
    notes = [
        [{k: v for k, v in epoch.items() if k != "seconds"} for epoch in found.notes["search"]]
        for found in (one, other)
    ]
    assert notes[0] == notes[1]
    assert one.architecture == other.architecture
    assert one.weights is not None
    assert other.weights is not None
    assert all(torch.equal(one.weights[name], other.weights[name]) for name in one.weights)


@pytest.mark.parametrize("step", [1, 2, 3])
def test_tas_goes_on_within_an_epoch(tmp_path, step):
    """Epochs have two steps: stopped in the first, at the end of the first, and in the second."""
    whole = run(net(), quick_tas(2), seed=4)
    with stoppable() as stop, pytest.raises(Stopped) as stopped:
        run(net(), quick_tas(2), seed=4, folder=tmp_path, callbacks=stopped_at(stop, step))
    assert stopped.value.folder == tmp_path
    newest = sorted(path.name for path in tmp_path.iterdir())[-1]
    epoch, done = divmod(step - 1, 2)
    assert newest == f"epoch-{epoch:06d}-step-{done + 1:06d}"
    seen = Recorder()
    same_search(run(net(), quick_tas(2), seed=4, folder=tmp_path, callbacks=seen), whole)
    # What was shown of the interrupted epoch is shown again.
    assert [(epoch, step) for epoch, step, _ in seen.steps] == [(e, s) for e in range(epoch + 1, 3) for s in (1, 2)]


@pytest.mark.parametrize("untied", [False, True], ids=["tied", "untied"])
def test_swp_goes_on_within_epochs_and_rounds(tmp_path, untied):
    """Two epochs of three steps, then rounds of some chunks: stopped after every single one of them, again and again.

    Every process comes one step further than the one before it.
    """
    seen = Recorder()
    whole = run(staged(untied=untied), quick_swp(), seed=2, callbacks=seen)
    total, stops = len(seen.steps), 0
    assert [loop["what"] for loop in seen.opened] == ["search", "judge"]
    while stops < 2 * total:
        shown = Recorder()
        with stoppable() as stop:
            # Whatever is shown again does not count: it stops in the first step of its own.
            shown.at_step = lambda epoch, step, stop=stop: stop.ask()
            try:
                found = run(staged(untied=untied), quick_swp(), seed=2, folder=tmp_path, callbacks=shown)
            except Stopped:
                stops += 1
                continue
        same_combination(found, whole)
        break
    # And once between the loops: the training had no step left, but was asked while the last ones were shown again.
    assert stops == total + 1
