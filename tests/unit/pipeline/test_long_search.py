"""Searches that train: what they are given, how they are interrupted, and what becomes of their weights."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import slow_search
import torch
from run_pipeline import run_compress
from slow_search import SlowSearch, data, model
from torch import nn

import secateur
from secateur.cost import count_macs
from secateur.errors import ArtifactError, BudgetError, ModelError
from secateur.pipeline import Branches, KeepWeights, OnExisting, Reinitialize
from secateur.prune import Cut, RepairContext, cut
from secateur.search import Proposal, SearchContext, Strategy, Uniform
from secateur.train import Silent, TrainConfig

HEAL_ONLY = TrainConfig(epochs=0)


class Watching(Silent):
    """Remembers what was watched; stops at an epoch of the search if it is told to."""

    def __init__(self, stop_after: int = 0) -> None:
        object.__setattr__(self, "seen", [])
        object.__setattr__(self, "stop_after", stop_after)

    @contextmanager
    def start(self, loop: str, *, epochs: int, steps: int, done: int):
        self.seen.append((loop, epochs, done))
        yield self

    def step(self, epoch: int, step: int, numbers: Mapping[str, float]) -> None:
        pass

    def epoch(self, epoch: int, numbers: Mapping[str, float], line: str) -> None:
        self.seen.append(line)
        if epoch == self.stop_after:
            raise KeyboardInterrupt


def words(out: Path | None, **changed: Any) -> dict[str, Any]:
    usual = {
        "budget": "macs=60%", "strategy": SlowSearch(epochs=4), "train": HEAL_ONLY, "out": out, "export": (),
        "callbacks": Silent(), "seed": 3,
    }  # fmt: skip
    return {**usual, **changed}


def test_a_search_that_trains_gets_data_a_checkpoint_a_meter_and_the_device(tmp_path: Path):
    given: list[SearchContext] = []

    @dataclass(frozen=True)
    class Asks(SlowSearch):
        def find(self, problem: SearchContext) -> Proposal:
            given.append(problem)
            return super().find(problem)

    images, watching = data(), Watching()
    run_compress(model(), images, **words(tmp_path / "out", strategy=Asks(epochs=2), callbacks=watching))
    (problem,) = given
    assert problem.training is images
    assert problem.run.folder == tmp_path / "out.work" / "search-0"
    assert problem.run.fabric is not None
    assert problem.run.fabric.device == torch.device("cpu")
    assert watching.seen == [("search", 2, 0), "search 1/2", "search 2/2"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    run_compress(model(), images, **words(None, strategy=Asks(epochs=2)))
    assert given[1].run.folder is None


def test_the_cut_is_made_from_the_weights_of_the_search_and_the_teacher_stays(monkeypatch: pytest.MonkeyPatch):
    uncut: list[nn.Module] = []
    teachers: list[nn.Module] = []

    def watched(source: nn.Module, *args: Any, **settings: Any) -> Cut:
        uncut.append(source)
        return cut(source, *args, **settings)

    def distill(student: nn.Module, *, teacher: nn.Module, **_: Any) -> None:
        teachers.append(teacher)

    monkeypatch.setattr(import_module("secateur.pipeline.config"), "cut", watched)
    monkeypatch.setattr(import_module("secateur.pipeline.compress"), "train_with_teacher", distill)
    original = model()
    found = run_compress(original, data(), **words(None, train=TrainConfig(1, 32), init=KeepWeights(repairs=())))
    trained = SlowSearch(epochs=4).weights(original, 3)
    assert not torch.equal(trained["0.weight"], original[0].weight)
    assert all(torch.equal(tensor, trained[name]) for name, tensor in uncut[0].state_dict().items())
    kept = list(found.architecture.by_name["0"])
    assert torch.equal(found.model[0].weight, trained["0.weight"][kept])
    assert all(torch.equal(t, original.state_dict()[n]) for n, t in teachers[0].state_dict().items())
    assert found.verification.max_rel <= found.verification.tolerance
    assert found.search.weights is None
    assert found.report.steps[0].score.value == secateur.evaluate(original, data().test).value


def test_repairs_compare_with_the_weights_of_the_search(monkeypatch: pytest.MonkeyPatch):
    contexts: list[RepairContext] = []

    class Looks:
        def apply_(self, small: nn.Module, context: RepairContext) -> None:
            contexts.append(context)

    original = model()
    run_compress(original, data(), **words(None, init=KeepWeights(repairs=(Looks(),))))
    trained = SlowSearch(epochs=4).weights(original, 3)
    assert all(torch.equal(t, trained[name]) for name, t in contexts[0].original.state_dict().items())


def test_from_scratch_has_no_use_for_the_weights_of_the_search(monkeypatch: pytest.MonkeyPatch):
    uncut: list[nn.Module] = []

    def watched(source: nn.Module, *args: Any, **settings: Any) -> Cut:
        uncut.append(source)
        assert "repairs" not in settings
        return cut(source, *args, **settings)

    monkeypatch.setattr(import_module("secateur.pipeline.config"), "cut", watched)
    original = model()
    run_compress(original, data(), **words(None, train=TrainConfig(1, 32), init=Reinitialize()))
    assert all(torch.equal(tensor, original.state_dict()[name]) for name, tensor in uncut[0].state_dict().items())


def test_an_interrupted_search_goes_on_and_ends_the_same(tmp_path: Path):
    out = tmp_path / "out"
    whole = run_compress(model(), data(), **words(None))
    with pytest.raises(KeyboardInterrupt):
        run_compress(model(), data(), **words(out, callbacks=Watching(stop_after=3)))
    assert [path.name for path in tmp_path.iterdir()] == ["out.work"]
    with pytest.raises(ArtifactError, match=r"no unfinished run beside it.*--resume.*--restart"):
        run_compress(model(), data(), **words(out))
    for changed, said in (
        ({"budget": "macs=50%"}, "budget was macs<=60%, now macs<=50%"),
        ({"strategy": SlowSearch(epochs=5)}, r"strategy was SlowSearch\(epochs=4.*now SlowSearch\(epochs=5"),
        ({"branches": Branches.UNTIED}, "branches was tied, now untied"),
    ):
        with pytest.raises(ArtifactError, match=said):
            run_compress(model(), data(), **words(out, on_existing=OnExisting.RESUME, **changed))
    watching = Watching()
    resumed = run_compress(model(), data(), **words(out, on_existing=OnExisting.RESUME, callbacks=watching))
    assert watching.seen == [("search", 4, 2), "search 3/4", "search 4/4"]
    assert resumed.architecture == whole.architecture
    assert all(torch.equal(t, whole.model.state_dict()[n]) for n, t in resumed.model.state_dict().items())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    metrics = json.loads((out / "secateur.json").read_text())["metrics"]
    assert metrics["search"]["search"][3]["entropy"] == resumed.report.search[3].entropy == 0.5**4
    assert "How the search decided" in (out / "report.html").read_text()


def test_restarting_forgets_the_search(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        run_compress(model(), data(), **words(tmp_path / "out", callbacks=Watching(stop_after=3)))
    watching = Watching()
    run_compress(model(), data(), **words(tmp_path / "out", on_existing=OnExisting.OVERWRITE, callbacks=watching))
    assert watching.seen[0] == ("search", 4, 0)


def test_nothing_is_left_of_a_search_that_did_not_get_far(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        run_compress(model(), data(), **words(tmp_path / "out", callbacks=Watching(stop_after=1)))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(BudgetError):
        run_compress(model(), data(), **words(tmp_path / "out", budget="macs=1%"))
    assert list(tmp_path.iterdir()) == []


def test_work_of_a_search_outlives_its_error(tmp_path: Path):
    @dataclass(frozen=True)
    class Diverges(SlowSearch):
        def find(self, problem: SearchContext) -> Proposal:
            super().find(problem)
            raise BudgetError("as if")

    with pytest.raises(BudgetError):
        run_compress(model(), data(), **words(tmp_path / "out", strategy=Diverges(epochs=2)))
    assert (tmp_path / "out.work" / "search-0").is_dir()


def test_a_second_search_has_checkpoints_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folders: list[Path | None] = []

    @dataclass(frozen=True)
    class Asks(SlowSearch):
        def find(self, problem: SearchContext) -> Proposal:
            folders.append(problem.run.folder)
            return super().find(problem)

    def skeptical(source: nn.Module, graph: secateur.ChannelGraph, *args: Any, **settings: Any) -> Cut:
        done = cut(source, graph, *args, **settings)
        if len(graph.prunable) < 2:
            return done
        proof = replace(done.verification, frozen=(("0", "for this test"),))
        return replace(done, graph=graph.with_frozen({"0": "for this test"}), verification=proof)

    monkeypatch.setattr(import_module("secateur.pipeline.config"), "cut", skeptical)

    class SecondTime(Watching):
        def epoch(self, epoch: int, numbers: Mapping[str, float], line: str) -> None:
            self.seen.append(line)
            if self.seen.count("search 3/4") == 2:
                raise KeyboardInterrupt

    asked = {"strategy": Asks(epochs=4), "budget": "macs=80%"}
    whole = run_compress(model(), data(), **words(None, **asked))
    folders.clear()
    with pytest.raises(KeyboardInterrupt):
        run_compress(model(), data(), **words(tmp_path / "out", **asked, callbacks=SecondTime()))
    watching = Watching()
    again = words(tmp_path / "out", **asked, callbacks=watching, on_existing=OnExisting.RESUME)
    resumed = run_compress(model(), data(), **again)
    assert [folder.name for folder in folders if folder] == ["search-0", "search-1"] * 2
    # The first search is only read again, the second goes on.
    assert watching.seen == [("search", 4, 4), ("search", 4, 2), "search 3/4", "search 4/4"]
    assert resumed.architecture == whole.architecture


SCRIPT = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from slow_search import SlowSearch, data, model
from secateur.pipeline import OnExisting, RecoveryConfig, RunConfig, compress
from secateur.train import Silent, TrainConfig

class Tells(Silent):
    def start(self, loop, *, epochs, steps, done):
        print(f"{{loop}} from {{done}}", flush=True)
        return super().start(loop, epochs=epochs, steps=steps, done=done)

compress(
    model(), data(), budget="macs=60%", strategy=SlowSearch(epochs=4), recovery=RecoveryConfig(TrainConfig(epochs=0)),
    out=Path(sys.argv[1]), export=(), run=RunConfig(callbacks=Tells(), seed=3, on_existing=OnExisting.RESUME),
)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="kill -9 is POSIX")
def test_killed_at_any_moment_of_the_search_and_started_again(tmp_path: Path):
    """The process kills itself with SIGKILL: no handler runs, nothing is flushed."""
    script = tmp_path / "run.py"
    script.write_text(SCRIPT.format(tests=str(Path(slow_search.__file__).parent)))
    out = tmp_path / "out"

    def start(die_in: int) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(script), str(out)], env={**os.environ, "DIE_IN": str(die_in)},
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip

    first = start(1)
    assert first.returncode == -signal.SIGKILL, first.stderr
    assert sorted(path.name for path in (tmp_path / "out.work").iterdir()) == [
        "lock",
        "settings.json",
        "surroundings.json",
    ]
    second = start(3)
    assert second.returncode == -signal.SIGKILL, second.stderr
    assert second.stdout.splitlines() == ["search from 0"]
    last = start(0)
    assert last.returncode == 0, last.stderr
    assert last.stdout.splitlines() == ["search from 2"]
    assert not (tmp_path / "out.work").exists()
    whole = run_compress(model(), data(), **words(None))
    loaded = secateur.load(out, factory=model).model
    assert all(torch.equal(t, whole.model.state_dict()[n]) for n, t in loaded.state_dict().items())


class Residual(nn.Module):
    """One branch on a stream that the stem makes."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.stem, self.branch = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
            self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.head((x + self.branch(x.relu())).mean((2, 3)))


@pytest.mark.long
def test_untied_branches_have_widths_of_their_own(tmp_path: Path):
    seen: list[tuple[str, ...]] = []

    @dataclass(frozen=True)
    class Looks(Strategy):
        def find(self, problem: SearchContext) -> Proposal:
            seen.append(problem.costs.axes)
            return Uniform().find(problem)

    for branches in Branches:
        out = tmp_path / branches.value
        done = run_compress(Residual(), data(), **words(out, strategy=Looks(), branches=branches))
        assert done.failed == ()
        assert secateur.verify(out, factory=Residual).passed
        metrics = json.loads((out / "secateur.json").read_text())["metrics"]
        assert metrics["branches"] == branches.value
    tied, untied = seen
    assert tied == ("stem",)
    assert untied == ("stem", "branch/branch")
    kept = done.architecture.by_name
    assert set(kept["branch/branch"]) < set(kept["stem"])
    assert done.search.cost.macs == count_macs(done.model, torch.zeros(1, 3, 8, 8))
    utilization = done.search.notes["utilization"]
    assert utilization == {"macs": done.search.cost.macs / (0.6 * done.search.original.macs)}


def test_a_resumed_run_knows_its_untied_branches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def stop(*_args: object, **_kwargs: object) -> None:
        raise KeyboardInterrupt

    asked = {"strategy": Uniform(), "branches": Branches.UNTIED}
    whole = run_compress(Residual(), data(), **words(None, **asked))
    with monkeypatch.context() as patch:
        patch.setattr(import_module("secateur.pipeline.compress"), "train_with_teacher", stop)
        with pytest.raises(KeyboardInterrupt):
            run_compress(Residual(), data(), **words(tmp_path / "out", **asked, train=TrainConfig(1, 32)))
    resumed = run_compress(Residual(), data(), **words(tmp_path / "out", **asked, on_existing=OnExisting.RESUME))
    assert resumed.architecture == whole.architecture
    assert all(torch.equal(t, whole.model.state_dict()[n]) for n, t in resumed.model.state_dict().items())


def test_found_weights_of_another_model_are_refused():
    @dataclass(frozen=True)
    class Wrong(Strategy):
        def find(self, problem: SearchContext) -> Proposal:
            whole = Uniform().find(problem)
            return Proposal(whole.architecture, {}, {"0.weight": torch.zeros(3)})

    with pytest.raises(ModelError, match=r"`weights` of the search must be those of the whole model.*Missing key"):
        run_compress(model(), data(), **words(None, strategy=Wrong()))
