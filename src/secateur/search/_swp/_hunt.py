"""A search from its first step to its last candidate: train, judge, and go on where it was interrupted."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace

import numpy as np

from secateur.search._problem import FloatArray
from secateur.search._swp._candidates import Candidates
from secateur.search._swp._score import Judge, losses_of
from secateur.search._swp._table import Choice
from secateur.search._swp._train import Run
from secateur.train import Keeper, Saved, keeping, load_checkpoint
from secateur.workers import Workers

_CHUNK = 8
"""Networks judged at a time: the full net runs once for all of them."""


class Hunt:
    """A search in progress: the training of the supernet, then rounds of candidates.

    There is a checkpoint after every epoch and after every round, and within long ones.

    Args:
        run: The training.
        candidates: Those judged so far.
        settings: Everything that must be equal for a search to be the same search.

    Attributes:
        run: As given.
        candidates: As given.
    """

    def __init__(self, run: Run, candidates: Candidates, settings: Mapping[str, str]):
        self.run, self.candidates = run, candidates
        self._settings = settings
        self._problem = run.course.options.problem
        self._judging: dict[int, FloatArray] = {}

    def restore(self) -> None:
        """Take up what an interrupted search has left, if there is anything."""
        folder = self._problem.checkpoint
        saved = None if folder is None else load_checkpoint(folder, self._settings)
        if saved is not None:
            self.run.restore(saved)
            self.candidates.restore(saved.numbers["candidates"])
            # Of the round that was interrupted: the losses of those chunks of networks that were judged.
            judging: Mapping[str, list[list[float]]] = saved.numbers.get("judging", {})
            self._judging = {int(number): np.array(losses) for number, losses in judging.items()}

    def train(self) -> None:
        """Train the supernet to the end.

        Raises:
            TrainingError: If a loss is no longer finite; the last checkpoints stay.
            Stopped: If that was asked for.
        """
        epochs, steps = self.run.course.schedule.epochs, self.run.course.steps
        if self.run.epoch == epochs:
            return
        with (
            self._keeping() as keeper,
            self._problem.watch.watch("search", epochs=epochs, steps=steps, done=self.run.epoch) as meter,
        ):
            while self.run.epoch < epochs:
                self.run.train_epoch(meter, lambda: keeper.between(self._state))
                keeper.save(self._state)

    def judge(self, judge: Judge, workers: Workers, rounds: int, each: int) -> None:
        """Judge candidates, round by round, in chunks of the same networks wherever they are judged.

        Args:
            judge: Who judges.
            workers: Where.
            rounds: How many rounds in all.
            each: Candidates per stage and round.

        Raises:
            Stopped: If that was asked for.
        """
        if self.candidates.rounds == rounds:
            return
        options, steps = self.run.course.options, -(-each // _CHUNK)
        done = self.candidates.rounds
        with (
            self._keeping() as keeper,
            workers.running(losses_of, judge) as pool,
            self._problem.watch.watch("judge", epochs=rounds, steps=steps, done=done) as meter,
        ):
            while self.candidates.rounds < rounds:
                proposed = self.candidates.proposed(each)
                subnets = [options.subnet(rows) for rows in proposed]
                chunks = [subnets[first : first + _CHUNK] for first in range(0, len(subnets), _CHUNK)]
                left = [number for number in range(len(chunks)) if number not in self._judging]
                for place, losses in pool.map([chunks[number] for number in left]):
                    self._judging[left[place]] = losses
                    least = {"least_loss": float(losses.sum(1).min())}
                    meter.step(self.candidates.rounds + 1, len(self._judging), least)
                    keeper.between(self._state)
                ordered = [self._judging[number] for number in range(len(chunks))]
                empty = np.zeros((0, len(options.stages)))
                self.candidates.judged(proposed, np.concatenate([empty, *ordered]))
                self._judging = {}
                numbers, line = self._round(rounds)
                meter.epoch(self.candidates.rounds, numbers, line)  # Before the checkpoint: a log misses nothing of it.
                keeper.save(self._state)

    def _round(self, rounds: int) -> tuple[Mapping[str, float], str]:
        counts = [len(losses) for losses in self.candidates.losses]
        line = f"round {self.candidates.rounds}/{rounds}  candidates of each stage {', '.join(map(str, counts))}"
        return {"candidates": float(sum(counts))}, line

    def _keeping(self) -> AbstractContextManager[Keeper]:
        return keeping(self._problem.checkpoint, self._problem.saving, self.run.course.fabric)

    def _state(self) -> Saved:
        """Everything that changes, to go on from here."""
        saved, rounds = self.run.saved(self._settings), self.candidates.rounds
        judging = {number: losses.tolist() for number, losses in self._judging.items()}
        numbers = {**saved.numbers, "candidates": self.candidates.to_json(), "judging": judging}
        return replace(saved, epoch=saved.epoch + rounds, numbers=numbers, step=saved.step + len(judging))

    def notes(self, choice: Choice) -> dict[str, object]:
        """Everything that was learnt on the way, as plain data."""
        options, tally = self.run.course.options, self.run.tally
        table = self.candidates.table()
        stages = [
            {
                "name": stage.name,
                "cut": stage.cut,
                "axes": len(of.axes),
                "blocks": sum(map(len, of.chains)),
                "candidates": counted,
                "losses": losses.tolist(),
                "costs": {field: costs[number].tolist() for field, costs in table.costs.items()},
                "chosen": choice.picked[number],
            }
            for number, (stage, of, counted, losses) in enumerate(
                zip(options.stages, options.of_stage, tally.candidates, table.losses, strict=True)
            )
        ]
        return {
            "training": self.run.history,
            "fairness": tally.fairness,
            "stages": stages,
            "base": dict(table.base),
            "loss": choice.loss,
        }
