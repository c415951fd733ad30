"""Compare strategies on a model of one's own: every strategy, budget and seed with equal compute, as one job."""

import json
import logging
import math
import shutil
import time
import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from secateur._batches import take
from secateur._caller_state import in_default_state
from secateur._files import atomic_folder, disk_errors, temporary_folder, write_atomic
from secateur._kinds import settings
from secateur._provenance import Provenance, sha256_of_json
from secateur._runtime import copy_model
from secateur.cost.budget import Budget
from secateur.cost.macs import count_macs, count_params
from secateur.cost.runtimes import OnnxRuntime, Target
from secateur.data.dataset import ImageData, draw_calibration
from secateur.data.loaders import OwnData
from secateur.errors import ArtifactError, BudgetError, SelectionError, TrainingError
from secateur.export.artifact import refuse_no_folder, weights_bytes
from secateur.models.source import ModelSource
from secateur.pipeline.compress import compress, run_data
from secateur.pipeline.config import LOGGER, CompressResult, CutConfig, RecoveryConfig, RunConfig
from secateur.pipeline.finalize import latency_on
from secateur.pipeline.rounds import Cell, Rounds
from secateur.pipeline.workspace import OnExisting, check_model_fits_data, environment_of, open_run_directory
from secateur.report.comparison import ComparedRun, Comparison, find_winner
from secateur.report.comparison_page import write_comparison
from secateur.search.base import Strategy, stable_repr
from secateur.search.candidates import Fastest
from secateur.tasks.base import Task
from secateur.tasks.classification import Classification
from secateur.tasks.imitation import Imitation
from secateur.tasks.outcomes import NotedAnswers
from secateur.train.callbacks import Silent
from secateur.train.checkpoint import model_sha256
from secateur.train.device import default_device
from secateur.train.evaluate import evaluate
from secateur.workers import InProcess, Workers

_DIVISOR = 4
"""Of the widths, where the space leaves it open: measuring several divisors in each run takes too long."""
_RECORDS, _PAGE, _WINNERS = "records.parquet", "compare.html", "winners"
_MOST_RUNS = 10_000


@settings
class Race:
    """How a comparison spends its compute.

    Attributes:
        seeds: Runs of each strategy at each budget, with the seeds from `RunConfig.seed` on.
        seconds: Wall-clock limit. None trains every run for all epochs of the recovery; otherwise the epochs follow
            from the time, in rounds that only the better strategies stay in (see `secateur.pipeline.rounds`).
        workers: Where runs are made: in this process, or several at once on Ray.

    Raises:
        TrainingError: If a number is out of range.
    """

    seeds: int = 2
    seconds: float | None = None
    workers: Workers = InProcess()

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise TrainingError(f"`seeds` must be at least 1; got {self.seeds}. Two or more show the spread.")
        if self.seconds is not None and not 0 < self.seconds < math.inf:
            raise TrainingError(f"`seconds` must be positive; got {self.seconds}. Leave it out for no limit.")


@dataclass(frozen=True, eq=False)
class _Job:
    """What all runs of a comparison share."""

    model: nn.Module
    data: ImageData | OwnData
    strategies: Mapping[str, Strategy | None]
    task: Task
    cut: CutConfig
    recovery: RecoveryConfig
    target: Target
    source: ModelSource | None
    run: RunConfig
    folder: Path

    def settings(self, race: Race, budgets: Sequence[Budget]) -> dict[str, str]:
        """Everything that makes two comparisons the same."""
        data = self.data
        return {
            "model": f"{type(self.model).__name__} {model_sha256(self.model)[:16]}",
            "data": f"{data.name}: {len(data.train)} training images of {data.size}",
            "strategies": "; ".join(f"{name} = {stable_repr(found)}" for name, found in self.strategies.items()),
            "budgets": "; ".join(map(str, budgets)),
            "seeds": f"{race.seeds} from {self.run.seed}",
            "seconds": str(race.seconds),
            "task": repr(self.task),
            "cut": repr(replace(self.cut, rules={})),
            "recovery": repr(self.recovery),
            "target": f"{type(self.target).__name__}, threads {self.target.threads}, batch {self.target.batch}",
        }


@in_default_state
def compare(
    model: nn.Module,
    data: Any,
    budgets: Sequence[Budget | str] | Budget | str,
    strategies: Mapping[str, Strategy | None],
    *,
    out: Path | str | None = None,
    race: Race = Race(),  # noqa: B008 - frozen
    task: Task = Classification(),  # noqa: B008 - frozen
    cut: CutConfig = CutConfig(),  # noqa: B008 - frozen
    recovery: RecoveryConfig = RecoveryConfig(),  # noqa: B008 - frozen
    target: Target = OnnxRuntime(),  # noqa: B008 - frozen
    source: ModelSource | None = None,
    run: RunConfig = RunConfig(),  # noqa: B008 - frozen
) -> Comparison:
    """Compress a model with every strategy, to every budget, with several seeds, and say which strategy is best.

    Every run is one `secateur.compress`. All get equal compute: the same number of training epochs, in which those that
    the search of a strategy trains are included, so that its recovery has fewer. The winner at each budget is chosen on
    the validation images; the test images are for the numbers beside it. A run that fails is a record with the reason,
    and the others go on. An interrupted comparison is resumed with ``run.on_existing``.

    Args:
        model: A trained model; not changed.
        data: As for `secateur.compress`; with validation images.
        budgets: One, or several, such as ``["macs=50%", "macs=30%"]``.
        strategies: By name; None is the default strategy of `compress`, which compares several itself.
        out: Folder for ``compare.html``, ``records.parquet`` and the artifacts of the winners; must be new or empty.
            None writes nothing. The unfinished work lies in ``<out>.work``.
        race: Seeds, time limit and workers.
        task: What outputs and targets mean.
        cut: What may be cut. If its space leaves the divisor open, 4 is taken, except by the default strategy.
        recovery: How cut models regain accuracy; its epochs are those of a run, with a time limit they have no effect.
        target: Where latency is measured.
        source: How the original is built, see `secateur.compress`.
        run: Seed, device and what to do with an unfinished comparison; callbacks have no effect.

    Returns:
        The records of all runs and the winners.

    Raises:
        SecateurError: If something cannot be used, before any work.
    """
    limits = _budgets(budgets)
    where = None if out is None else Path(out).absolute()  # A model may change the working directory.
    if where is not None:
        _check_out(where)
    if run.fabric is not None:
        raise TrainingError(
            "`fabric` must be left out of a comparison, whose runs use one process each. Give a device."
        )
    images = run_data(data, run.seed)
    if not len(images.validation):
        raise TrainingError("`data` must have validation images, which the winner is chosen on; got none.")
    names = _names(strategies)
    device = run.device or default_device()
    first, targets = draw_calibration(images.train, min(8, len(images.train)), device=device, seed=run.seed)[0]
    check_model_fits_data(copy_model(model).to(device).eval(), images, first, task, targets)
    with ExitStack() as stack:
        work = stack.enter_context(temporary_folder("secateur-compare-")) if where is None else None
        job = _Job(model, images, dict(strategies), task, cut, recovery, target, source, run, work or Path())
        rounds = _rounds(job, names, limits, race)
        if where is not None:
            opened = open_run_directory(where, job.settings(race, limits), run.on_existing, environment_of(device))
            job = replace(job, folder=stack.enter_context(opened).folder)
        runs = _Records(job, rounds, race).complete()
        found = _comparison(job, rounds, runs, take(first, slice(1)))
        return found if where is None else _written(job, where, found)


def search_epochs(strategy: Strategy | None) -> int:
    """Return the epochs that the search of a strategy trains, its own or of the strategy inside of it; 0 for none.

    A strategy that trains says so by ``train.epochs``, as `TAS` and `SWP` do.
    """
    inside: object = strategy
    while inside is not None:
        epochs = getattr(getattr(inside, "train", None), "epochs", None)
        if isinstance(epochs, int):
            return epochs
        inside = getattr(inside, "strategy", None) or getattr(inside, "inner", None)
    return 0


def _budgets(budgets: Sequence[Budget | str] | Budget | str) -> tuple[Budget, ...]:
    named = (budgets,) if isinstance(budgets, str | Budget) else budgets
    found = tuple(dict.fromkeys(Budget.parse(each) if isinstance(each, str) else each for each in named))
    if not found:
        raise BudgetError("`budgets` must hold at least one budget; got none. Write, for example, ['macs=50%'].")
    return found


def _names(strategies: Mapping[str, Strategy | None]) -> tuple[str, ...]:
    if not strategies:
        raise SelectionError(
            "`strategies` must hold at least one strategy by name; got none. Write {'pca': PCASlimming()}, for example."
        )
    return tuple(strategies)


def _check_out(folder: Path) -> None:
    """Refuse a folder that holds anything.

    Raises:
        ArtifactError: If it does.
    """
    refuse_no_folder(folder, "out")
    files = sorted(entry.name for entry in folder.iterdir()) if folder.exists() else []
    if files:
        raise ArtifactError(
            f"`out` must be new or empty; got {folder} with {files[:5]}. Choose another folder, or empty it yourself."
        )


def _rounds(job: _Job, names: tuple[str, ...], budgets: Sequence[Budget], race: Race) -> Rounds:
    """The plan of the runs.

    Raises:
        TrainingError: If there are too few epochs for a search, or too many runs.
    """
    searches = {name: search_epochs(found) for name, found in job.strategies.items()}
    longest = max(searches, key=lambda name: searches[name])
    epochs = job.recovery.train.epochs
    if race.seconds is None and searches[longest] and epochs <= searches[longest]:
        raise TrainingError(
            f"`epochs` must be more than the search of {longest} trains, {searches[longest]}, because all runs have as "
            f"many in all; got {epochs}. Give {searches[longest] + 1} or more."
        )
    amount = len(names) * len(budgets) * race.seeds
    if amount > _MOST_RUNS:
        raise TrainingError(f"`seeds` must give at most {_MOST_RUNS} runs; got {amount}. Give fewer seeds or budgets.")
    return Rounds(
        strategies=names,
        budgets=tuple(map(str, budgets)),
        seeds=tuple(range(job.run.seed, job.run.seed + race.seeds)),
        epochs=epochs,
        least_epochs=searches[longest] + 1,
        seconds=race.seconds,
        metric=job.task.metric,
    )


class _Records:
    """The runs of a comparison that are done, in the folder of the unfinished work."""

    def __init__(self, job: _Job, rounds: Rounds, race: Race) -> None:
        self._job, self._rounds, self._race = job, rounds, race
        self._began = time.monotonic()
        self._folder = job.folder / "records"
        self._folder.mkdir(exist_ok=True)
        self._cells, self._before = self._read_plan()

    @property
    def spent(self) -> float:
        """Seconds since the beginning, those of earlier processes included."""
        return self._before + time.monotonic() - self._began

    def complete(self) -> tuple[ComparedRun, ...]:
        """Make all runs that are missing; return all."""
        if not self._cells:
            self._cells = list(self._rounds.first())
        known = self._read()
        last = max(cell.round for cell in self._cells)
        # What failed is tried again when a comparison is resumed, unless a later round has been built on it.
        done = {key: run for key, run in known.items() if run.round < last or not run.error}
        while True:
            self._write_plan()
            self._run([cell for cell in self._cells if cell.key not in done], done)
            found = [done[cell.key] for cell in self._cells if cell.key in done]
            is_whole = len(found) == len(self._cells)
            following = self._rounds.following(found, self.spent) if is_whole else ()
            if not following:
                return tuple(found)
            epochs, names = following[0].epochs, sorted({cell.strategy for cell in following})
            LOGGER.info(f"Round {following[0].round + 1}: {', '.join(names)} with {epochs} epochs each.")
            self._cells += following

    def _run(self, cells: Sequence[Cell], done: dict[str, ComparedRun]) -> None:
        if not cells:
            return
        began, total = time.monotonic(), len(cells)
        with self._race.workers.running(run_cell, self._job) as pool:
            rounds = replace(self._rounds, at_once=pool.size)
            self._rounds = rounds
            for number, (at, run) in enumerate(pool.map(self._in_time(cells)), 1):
                key = cells[at].key
                done[key] = run
                write_atomic(self._folder / f"{key}.json", json.dumps(run.to_json()))
                self._write_plan()
                self._tidy(done)
                left = (time.monotonic() - began) / number * (total - number)
                if self._rounds.seconds is not None:
                    left = min(left, max(self._rounds.seconds - self.spent, 0.0))
                said = f"failed: {run.error}" if run.error else self._job.task.metric.text(run.score)
                LOGGER.info(f"Run {number} of {total}, {run.name}: {said} in {run.seconds:.0f} s{_eta(left)}.")

    def _in_time(self, cells: Sequence[Cell]) -> Iterator[Cell]:
        for cell in cells:
            # The first run is made in any case, so that there is something to show.
            if self._rounds.seconds is not None and cell is not cells[0] and self.spent > self._rounds.seconds:
                return
            yield cell

    def _tidy(self, done: Mapping[str, ComparedRun]) -> None:
        """Remove the artifacts that cannot be those of a winner: only the best seed of each strategy stays."""
        metric = self._job.task.metric
        for cell in self._cells:
            folder = self._job.folder / "runs" / cell.key
            mine = done.get(cell.key)
            if mine is None or not folder.is_dir():
                continue
            rivals = [
                run for run in done.values() if (run.strategy, run.budget) == (mine.strategy, mine.budget) and run.ok
            ]
            best = max(rivals, key=lambda run: (run.round, metric.key(run.score), -run.seed), default=None)
            if best is not mine:
                shutil.rmtree(folder, ignore_errors=True)

    def _read(self) -> dict[str, ComparedRun]:
        found: dict[str, ComparedRun] = {}
        for cell in self._cells:
            path = self._folder / f"{cell.key}.json"
            try:
                found[cell.key] = ComparedRun.from_json(json.loads(path.read_text(encoding="utf-8")))
            except FileNotFoundError:
                continue
            except (OSError, ValueError, TypeError, KeyError) as error:
                raise _damaged(path, error) from error
        return found

    def _read_plan(self) -> tuple[list[Cell], float]:
        path = self._folder / "plan.json"
        try:
            plan = json.loads(path.read_text(encoding="utf-8"))
            return [Cell.from_json(each) for each in plan["cells"]], float(plan["spent"])
        except FileNotFoundError:
            return [], 0.0
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise _damaged(path, error) from error

    def _write_plan(self) -> None:
        plan = {"cells": [asdict(cell) for cell in self._cells], "spent": self.spent}
        write_atomic(self._folder / "plan.json", json.dumps(plan))


def _damaged(path: Path, error: Exception) -> ArtifactError:
    return ArtifactError(
        f"{path} must be a record of this comparison; it cannot be read ({error}). Begin again with --restart."
    )


def _eta(seconds: float) -> str:
    if seconds < 1:
        return ""
    return f"; about {seconds / 60:.0f} min left" if seconds >= 90 else f"; about {seconds:.0f} s left"


def run_cell(job: _Job, cell: Cell) -> ComparedRun:
    """Make one run of a comparison; whatever it raises becomes a record."""
    began = time.monotonic()
    trained = search_epochs(job.strategies[cell.strategy])
    record = ComparedRun(cell.strategy, cell.budget, cell.seed, cell.round, cell.epochs, trained, 0.0)
    with _unlogged(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            record = _measured(job, cell, record)
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            record = replace(record, error=f"{type(error).__name__}: {' '.join(lines)[:500]}")
    said = tuple(dict.fromkeys(str(each.message) for each in caught if issubclass(each.category, UserWarning)))
    return replace(record, seconds=time.monotonic() - began, warnings=said[:10])


def _measured(job: _Job, cell: Cell, record: ComparedRun) -> ComparedRun:
    """Compress once; return the record with its numbers."""
    strategy, cut = job.strategies[cell.strategy], job.cut
    if cut.space.divisor is None and strategy is not None and not isinstance(strategy, Fastest):
        cut = replace(cut, space=replace(cut.space, divisor=_DIVISOR))
    train = replace(job.recovery.train, epochs=max(cell.epochs - record.search_epochs, 0), seed=cell.seed)
    result = compress(
        job.model,
        job.data,
        cell.budget,
        task=job.task,
        strategy=strategy,
        cut=cut,
        recovery=replace(job.recovery, train=train),
        target=job.target,
        out=job.folder / "runs" / cell.key,
        export=(),
        source=job.source,
        run=replace(job.run, seed=cell.seed, callbacks=Silent(), on_existing=OnExisting.RESUME, times=False),
    )
    report, trained = result.report, result.trained
    score, right = _validated(job, result.model)
    latency_s, speedup = _latency(job, result)
    return replace(
        record,
        train_seconds=0.0 if trained is None else sum(each.seconds for each in trained.history),
        macs=report.after.macs,
        params=report.after.params,
        size_bytes=report.after.size_bytes,
        latency_s=latency_s,
        speedup=speedup,
        score=score.value,
        n=score.n,
        test_score=report.after.score.value if report.after.score else math.nan,
        test_n=report.after.score.n if report.after.score else 0,
        verified=not result.failed,
        widths={width.name: (width.before, width.after) for width in report.widths},
        removed_blocks=_removed(result),
        right=right,
    )


def _latency(job: _Job, result: CompressResult) -> tuple[float | None, float | None]:
    """Median seconds and speedup on the target, of all networks of the same shape those that were measured first."""
    if result.report.latency:  # The budget bounds it.
        first = result.report.latency[0]
        return first.after[1], first.speedup[1]
    shapes = {name: tuple(tensor.shape) for name, tensor in result.model.state_dict().items()}
    path = job.folder / "times" / f"{sha256_of_json({name: list(shape) for name, shape in shapes.items()})[:32]}.json"
    with suppress(OSError, ValueError):
        latency, speedup = json.loads(path.read_text(encoding="utf-8"))
        return latency, speedup
    images, _ = draw_calibration(job.data.train, job.target.batch, device=torch.device("cpu"), seed=job.run.seed)[0]
    if not isinstance(images, torch.Tensor):
        return None, None
    original = copy_model(job.model).eval().cpu()
    records, _ = latency_on(job.target, original, copy_model(result.model).eval().cpu(), images)
    if not records:
        return None, None
    found = records[0].after.median, records[0].speedup.median
    write_atomic(path, json.dumps(found))
    return found


def _removed(result: CompressResult) -> tuple[str, ...]:
    return tuple(block.name for block in result.report.blocks if block.removed)


def _validated(job: _Job, model: nn.Module) -> tuple[Any, str]:
    """Score on the validation images; and of a classifier which of them are right."""
    noted = NotedAnswers(job.task) if isinstance(job.task, Classification) else None
    original = job.model if isinstance(job.task, Imitation) else None
    score = evaluate(
        model, job.data.validation, task=noted or job.task, original=original, device=job.run.device or default_device()
    )
    answers = None if noted is None else noted.answers
    return score, "" if answers is None else "".join("1" if each else "0" for each in answers.right.tolist())


@contextmanager
def _unlogged() -> Generator[None]:
    """Keep the steps of a single run out of the log of the whole."""

    def refuse(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.WARNING

    LOGGER.addFilter(refuse)
    try:
        yield
    finally:
        LOGGER.removeFilter(refuse)


def _comparison(job: _Job, rounds: Rounds, runs: tuple[ComparedRun, ...], image: Any) -> Comparison:
    """The result, with the numbers of the original."""
    metric, provenance = job.task.metric, Provenance.here(job.run.command, job.run.seed)
    model = copy_model(job.model).eval()
    score, right = _validated(job, model)
    times = [run.latency_s * run.speedup for run in runs if run.latency_s is not None and run.speedup is not None]
    device = job.run.device or default_device()
    test = evaluate(
        model,
        job.data.test,
        task=job.task,
        original=job.model if isinstance(job.task, Imitation) else None,
        device=device,
    )
    original = ComparedRun(
        "original",
        "",
        job.run.seed,
        0,
        0,
        0,
        0.0,
        macs=count_macs(copy_model(job.model).to(device).eval(), image),
        params=count_params(job.model),
        size_bytes=weights_bytes(job.model),
        latency_s=median(times) if times else None,
        speedup=1.0 if times else None,
        score=score.value,
        n=score.n,
        test_score=test.value,
        test_n=test.n,
        verified=True,
        right=right,
    )
    data = job.data
    return Comparison(
        model=job.run.name or type(job.model).__name__,
        data=f"{data.name}: {len(data.train)} training, {len(data.validation)} validation and {len(data.test)} test "
        "images",
        metric=metric,
        original=original,
        runs=runs,
        winners=tuple(find_winner(b, [run for run in runs if run.budget == b], metric) for b in rounds.budgets),
        notes=_notes(job, rounds, runs),
        command=provenance.command,
        versions=provenance.versions,
        machine=provenance.machine,
        date=provenance.date,
    )


def _notes(job: _Job, rounds: Rounds, runs: Sequence[ComparedRun]) -> tuple[str, ...]:
    found: list[str] = []
    if job.cut.space.divisor is None:
        found.append(
            f"Widths are multiples of {_DIVISOR}, except those of the default strategy, which measures several. "
            "--divisor sets another."
        )
    if any(run.search_epochs for run in runs):
        found.append(
            "The epochs that a search trains count, so that its recovery has fewer. An epoch of a search may take "
            "longer than one of a recovery: the seconds of each run are in the table."
        )
    if rounds.seconds is not None:
        planned = len(rounds.first())
        made = sum(run.round == 0 for run in runs)
        if made < planned:
            found.append(
                f"The time ended after {made} of {planned} runs of the first round: strategies without all of their "
                "seeds are not among the winners. Give more time, or fewer seeds, budgets or strategies."
            )
    failed = sum(bool(run.error) for run in runs)
    if failed:
        found.append(f"{failed} of {len(runs)} runs failed; the table of failures has the reasons.")
    unverified = [run.name for run in runs if run.ok and not run.verified]
    if unverified:
        found.append(f"A check failed in: {'; '.join(unverified[:5])}. Look at its numbers with care.")
    said = dict.fromkeys(text for run in runs for text in run.warnings)
    return (*found, *list(said)[:5])


def _written(job: _Job, out: Path, found: Comparison) -> Comparison:
    """Write page, table and the artifacts of the winners."""
    folders: list[Path] = []
    with disk_errors(out), atomic_folder(out, must_be_new=not out.exists()) as draft:
        found.write_parquet(draft / _RECORDS)
        for winner in found.winners:
            mine = [r for r in found.runs if r.ok and (r.strategy, r.budget) == (winner.strategy, winner.budget)]
            kept = [(run, job.folder / "runs" / _cell_of(run).key) for run in mine]
            kept = [(run, folder) for run, folder in kept if folder.is_dir()]
            if kept:
                name = Cell(winner.strategy, winner.budget, kept[-1][0].seed).key.partition("-")[2]
                (draft / _WINNERS).mkdir(exist_ok=True)
                shutil.copytree(kept[-1][1], draft / _WINNERS / name)
                folders.append(out / _WINNERS / name)
        write_comparison(draft / _PAGE, found)
    return replace(found, files=(out / _PAGE, out / _RECORDS, *folders))


def _cell_of(run: ComparedRun) -> Cell:
    return Cell(run.strategy, run.budget, run.seed, run.round, run.epochs)
