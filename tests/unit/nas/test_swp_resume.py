"""Searches by SWP that are interrupted; a process that is killed is in tests/integration/test_swp_killed.py."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from slow_search import data as noise
from swp_runs import assert_same, quick, staged
from tas_runs import Interrupted, Recorder, run

from secateur.errors import TrainingError
from secateur.search import SearchSpace

each_graph = pytest.mark.parametrize("untied", [False, True], ids=["tied", "untied"])


class StoppedIn(Recorder):
    """Raises in one loop, at the end of an epoch or at a step of it."""

    def __init__(self, what: str, epoch: int, step: int | None = None):
        super().__init__()
        self._at = (what, epoch, step)

    @contextmanager
    def start(self, loop: str, *, epochs: int, steps: int, done: int) -> Iterator[Recorder]:
        with super().start(loop, epochs=epochs, steps=steps, done=done):
            yield self

    def _now(self, epoch: int, step: int | None) -> None:
        if self._at == (self.opened[-1]["what"], epoch, step):
            raise Interrupted

    def step(self, epoch: int, step: int, numbers: Mapping[str, float]) -> None:
        super().step(epoch, step, numbers)
        self._now(epoch, step)

    def epoch(self, epoch: int, numbers: Mapping[str, float], line: str) -> None:
        super().epoch(epoch, numbers, line)
        self._now(epoch, None)


STOPS = [
    # What is going on, its epoch, its step, and the newest checkpoint then.
    (("search", 1, 3), 0), (("search", 1, None), 0), (("search", 2, None), 1), (("judge", 1, 1), 2),
    (("judge", 1, None), 2), (("judge", 2, 1), 3), (("judge", 3, 1), 4), (("judge", 3, None), 4),
]  # fmt: skip


@each_graph
def test_a_search_goes_on_wherever_it_is_interrupted(untied, tmp_path):
    """Again and again, in every loop, before and after checkpoints: the end is the same to the last bit."""
    original = run(staged(untied=untied), quick(), seed=2)
    for stop, newest in STOPS:
        with pytest.raises(Interrupted):
            run(staged(untied=untied), quick(), seed=2, folder=tmp_path, callbacks=StoppedIn(*stop))
        names = sorted(path.name for path in tmp_path.glob("epoch-*"))
        assert names[-1:] == [f"epoch-{newest:06d}"] * (newest > 0), stop
    seen = Recorder()
    assert_same(original, run(staged(untied=untied), quick(), seed=2, folder=tmp_path, callbacks=seen))
    # A round is told before its checkpoint is written: who keeps a log of rounds hears of the last one again.
    assert [(loop["what"], loop["done"]) for loop in seen.opened] == [("judge", 2)]
    assert [epoch for epoch, *_ in seen.epochs] == [3]


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"seed": 1}, "seed was 0, now 1"),
        ({"budget": "macs=60%"}, "budget was macs<=50%, now macs<=60%"),
        ({"space": SearchSpace(divisor=2)}, "space was"),
        ({"strategy": quick(1, candidates=16)}, "strategy was"),
        ({"strategy": quick(1, cuts=("4",))}, "stages was 3, 4, , now 4, ; strategy was"),
        ({"given": staged(untied=True)}, "order was"),
        ({"data": replace(noise(), train=noise().train.subset(torch.arange(48)))}, "images was 48 and 16, now 32"),
    ],
    ids=["seed", "budget", "space", "candidates", "cuts", "untied", "images"],
)
def test_a_checkpoint_of_another_search_is_refused(settings, what, tmp_path):
    given = staged()
    with pytest.raises(Interrupted):
        run(given, quick(1), folder=tmp_path, callbacks=StoppedIn("judge", 1))
    changed = {"given": given, "strategy": quick(1), **settings}
    with pytest.raises(TrainingError, match=f"`checkpoint` must be continued with the settings it was begun.*{what}"):
        run(changed.pop("given"), changed.pop("strategy"), folder=tmp_path, **changed)
