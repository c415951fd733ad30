"""Compiled trainings: what is traced is what is trained, hooks and masks included, and every refusal.

Most tests have torch trace the networks and then run the trace eagerly (the backend named eager): seconds instead of
minutes, and equal to the last bit to a training that nobody traced.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import LABELS_ONLY, Blobs, Fragile, Killed, fit_small, same, small_config, small_net, state
from torch import Tensor, nn

from secateur.distill import (
    AlignedFeatures,
    MeanOverTaps,
    Objective,
    Tap,
    Term,
    hint_loss,
    make_adaptors,
    select_features,
)
from secateur.errors import TrainingError
from secateur.prune import Sparsify, WeightPruning
from secateur.train import CheckpointPolicy, Compiled, Eager, Execution, Precision, Silent, Trained, stoppable

TRACED = Compiled(backend="eager")
TEACHER = small_net(5)
TAPS = {"0": "0"}
ALIGNED: dict[str, Any] = {
    "teacher": TEACHER,
    "objective": Objective(feature_weight=1.0),
    "alignment": AlignedFeatures((Tap("1", 1, 8, tuple(range(8))),)),
}
HINTED: dict[str, Any] = {
    "teacher": TEACHER,
    "objective": Objective(
        terms=(
            Term(
                "hint",
                MeanOverTaps(
                    hint_loss, dict(make_adaptors(small_net(), TEACHER, TAPS, torch.zeros(1, 3, 8, 8)).items())
                ),
                inputs=select_features,
                taps=TAPS,
            ),
        )
    ),
}
SPARSE = {"sparsify": Sparsify(0.5, WeightPruning(every=2))}


def compile_by(backend: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Have torch.compile hand whatever it is given to a backend of the test."""
    compile_: Callable[..., Any] = torch.compile

    def compiled(model: Any, **given: Any) -> Any:
        return compile_(model, **{**given, "backend": backend})

    monkeypatch.setattr(torch, "compile", compiled)


def run(
    execution: Execution, source: Blobs | None = None, student: nn.Module | None = None, **settings: Any
) -> Trained:
    defaults: dict[str, Any] = {"train": small_config(3), "objective": LABELS_ONLY, "callbacks": Silent()}
    student = small_net(dropout=0.3) if student is None else student
    return fit_small(student, source or Blobs(48), execution=execution, **(defaults | settings))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"validation": Blobs(32, seed=1), "train": small_config(3, ema_decay=0.9)},
        ALIGNED,
        HINTED,
        SPARSE,
        {"train": small_config(2, accumulate=3, clip_norm=1.0)},  # Parts of 6, 5 and 5 images.
        {"train": small_config(2, precision=Precision.BF16_MIXED)},
    ],
    ids=["labels", "validated average", "aligned features", "hints", "masks", "parts", "bfloat16"],
)
def test_a_traced_training_is_the_eager_one(settings: dict[str, Any]) -> None:
    caller = small_net(dropout=0.3)
    before = state(caller)
    plain, traced = run(Eager(), **settings), run(TRACED, student=caller, **settings)
    assert same(state(traced.model), state(plain.model))
    assert not same(state(traced.model), before)
    assert same(state(caller), before)
    assert type(traced.model) is type(plain.model)
    times = {"seconds": 0.0, "images_per_s": None}
    assert [r.to_json() | times for r in traced.history] == [r.to_json() | times for r in plain.history]


def test_networks_are_traced_once_for_every_size_of_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []

    def counting(_graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        shapes.extend(tuple(i.shape) for i in inputs if i.ndim == 4 and i.shape[1:] == (3, 8, 8))
        return _graph.forward

    compile_by(counting, monkeypatch)
    run(TRACED, teacher=TEACHER, objective=Objective(), train=small_config(2, accumulate=3))
    # Student and teacher, and not once more in the second epoch.
    assert sorted(shapes) == [(5, 3, 8, 8)] * 2 + [(6, 3, 8, 8)] * 2


def test_a_killed_run_continues_bit_identically(tmp_path: Path) -> None:
    whole = run(TRACED, **ALIGNED)
    with pytest.raises(Killed):
        run(TRACED, Fragile(48, epoch=1), folder=tmp_path, checkpoints=CheckpointPolicy(steps=1), **ALIGNED)
    assert same(state(run(TRACED, folder=tmp_path, **ALIGNED).model), state(whole.model))


@pytest.mark.parametrize(
    ("then", "now", "said"),
    [(Eager(), TRACED, r"absent, now Compiled\(backend='eager'\)"), (TRACED, Eager(), r"was Compiled.*, now absent")],
)
def test_a_run_is_not_continued_in_another_way(tmp_path: Path, then: Execution, now: Execution, said: str) -> None:
    run(then, folder=tmp_path)
    with pytest.raises(TrainingError, match=rf"`checkpoint` must be continued.*execution.*{said}"):
        run(now, folder=tmp_path)


def test_an_eager_run_says_nothing_new_about_itself(tmp_path: Path) -> None:
    run(Eager(), folder=tmp_path)
    assert "execution" not in (tmp_path / "epoch-000003" / "state.json").read_text()


def test_remembered_logits_are_those_of_one_way(tmp_path: Path) -> None:
    taught: dict[str, Any] = {"teacher": TEACHER, "objective": Objective(), "teacher_cache": tmp_path}
    first = run(TRACED, **taught)
    assert same(state(run(TRACED, **taught).model), state(first.model))
    with pytest.raises(TrainingError, match="execution"):
        run(Eager(), **taught)


def test_the_environment_is_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_TEST", "mine")

    def noting(_graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Any:
        os.environ["_TORCHINDUCTOR_NOTE"] = os.environ["TORCHINDUCTOR_TEST"] = "theirs"
        return _graph.forward

    compile_by(noting, monkeypatch)
    run(TRACED)
    assert os.environ["TORCHINDUCTOR_TEST"] == "mine"
    assert "_TORCHINDUCTOR_NOTE" not in os.environ


class Counted(nn.Module):
    """Asks for new code in every step."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.calls = small_net(), 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        return self.inside(images) * (1.0 + 0.01 * self.calls)


def test_a_model_that_changes_in_every_step_is_refused() -> None:
    with pytest.raises(TrainingError, match=r"`execution` must be one that these models can do; .*Train without it"):
        run(TRACED, student=Counted(), train=small_config(4))


def broken(_graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Any:
    """A compiler that cannot."""
    raise RuntimeError("No working C++ compiler found\nand much more")


def test_a_machine_that_cannot_compile_is_refused_at_the_door(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_by(broken, monkeypatch)
    source = Blobs(48)
    message = (
        r"`execution` must be one that this machine can do; Compiled\(backend='eager'\) failed "
        r"\(RuntimeError: No working C\+\+ compiler found\)\. Install .*g\+\+.* no --compile\."
    )
    with pytest.raises(TrainingError, match=message):
        run(TRACED, source)
    assert not source.calls


def test_a_compiler_that_ctrl_c_has_ended_is_no_error_of_the_model() -> None:
    compiled = torch.compile(small_net(), backend=broken)
    with stoppable() as stop:
        stop.ask()
        with pytest.raises(KeyboardInterrupt), TRACED.running():
            compiled(torch.zeros(2, 3, 8, 8))


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(TrainingError, match=r"Compiled\(backend='gcc'\) failed \(InvalidBackend: .*gcc"):
        run(Compiled(backend="gcc"))


def test_nothing_is_compiled_for_no_epochs() -> None:
    assert run(Compiled(backend="gcc"), train=small_config(0)).best_epoch == 0


@pytest.mark.slow  # About a minute: C++ is compiled.
@pytest.mark.parametrize("settings", [ALIGNED, SPARSE], ids=["aligned features", "masks"])
def test_real_code_learns_the_same_and_continues_bit_identically(tmp_path: Path, settings: dict[str, Any]) -> None:
    # Without dropout, which compiled code draws in its own way.
    plain, whole = (run(how, student=small_net(), **settings) for how in (Eager(), Compiled()))
    for name, tensor in state(whole.model).items():
        # Sums are taken in another order: float32 rounds at 6e-8, and nine steps carry it on.
        torch.testing.assert_close(tensor, state(plain.model)[name], rtol=1e-3, atol=1e-4)
    with_dropout = run(Compiled(), **settings)
    with pytest.raises(Killed):
        run(Compiled(), Fragile(48, epoch=1), folder=tmp_path, checkpoints=CheckpointPolicy(steps=1), **settings)
    resumed = run(Compiled(), folder=tmp_path, **settings)
    assert same(state(resumed.model), state(with_dropout.model))
    assert not any("_orig_mod" in name for name in state(resumed.model))


@pytest.mark.slow
def test_the_command_ends_with_a_message_without_a_compiler(tmp_path: Path) -> None:
    words = ("compress", "--model", "digits_resnet", "--data", "digits", "--budget", "macs=50%", "--out", "out")
    environment = os.environ | {"CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    said = subprocess.run(
        [sys.executable, "-m", "secateur", *words, "--compile"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=environment,
    )
    assert said.returncode == 2
    assert "`execution` must be one that this machine can do" in said.stderr
    assert "g++" in said.stderr
    assert "Traceback" not in said.stderr
    assert not list(tmp_path.glob("out*"))
