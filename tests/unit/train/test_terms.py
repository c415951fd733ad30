"""Objectives with further losses: what they learn, where it is saved, and that nothing of the caller's changes."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import Blobs, fit_small, same, small_config, small_net, state, with_run
from torch import nn

from secateur.distill import (
    ContrastiveRepresentation,
    KnowledgeReview,
    MeanOverTaps,
    Objective,
    Term,
    VariationalInformation,
    attention_loss,
    dist_loss,
    dkd_loss,
    hint_loss,
    make_adaptors,
    pkt_loss,
    rkd_angle_loss,
    rkd_distance_loss,
    select_features,
    select_labeled_feature,
    select_labeled_logits,
    similarity_loss,
    standardized_kd_loss,
)
from secateur.errors import TrainingError
from secateur.train import SGD, AdamW, Silent, Trained, distill_after_hints, evaluate

TEACHER = small_net(seed=9, width=12)
TAPS = {"0": "0"}
POOLED = {"4": "4"}
EXAMPLE = torch.zeros(1, 3, 8, 8)


def adaptors(student: nn.Module, taps: dict[str, str] = TAPS) -> nn.ModuleDict:
    return make_adaptors(student, TEACHER, taps, EXAMPLE)


def hint(weight: float = 1.0) -> Term:
    return Term(
        "hint", MeanOverTaps(hint_loss, adaptors(small_net())), inputs=select_features, weight=weight, taps=TAPS
    )


def only(*terms: Term) -> Objective:
    return Objective(kd_weight=0.0, label_weight=0.0, terms=terms)


def run(objective: Objective, *, source: Blobs | None = None, **settings: Any) -> Trained:
    defaults: dict[str, Any] = {"train": small_config(2), "teacher": TEACHER, "callbacks": Silent()}
    return fit_small(small_net(), source or Blobs(48), objective=objective, **(defaults | settings))


TERMS = {
    "dkd": lambda: Term("dkd", dkd_loss, inputs=select_labeled_logits),
    "dist": lambda: Term("dist", partial(dist_loss, temperature=2.0)),
    "standardized": lambda: Term("standardized", standardized_kd_loss),
    "hint": hint,
    "attention": lambda: Term(
        "attention", MeanOverTaps(attention_loss), inputs=select_features, taps=TAPS, weight=10.0
    ),
    "vid": lambda: Term(
        "vid", MeanOverTaps(VariationalInformation(adaptors(small_net())["0"], 12)), inputs=select_features, taps=TAPS
    ),
    "rkd_distance": lambda: Term("rkd_distance", MeanOverTaps(rkd_distance_loss), inputs=select_features, taps=POOLED),
    "rkd_angle": lambda: Term("rkd_angle", MeanOverTaps(rkd_angle_loss), inputs=select_features, taps=POOLED),
    "sp": lambda: Term("sp", MeanOverTaps(similarity_loss), inputs=select_features, taps=TAPS, weight=100.0),
    "pkt": lambda: Term("pkt", MeanOverTaps(pkt_loss), inputs=select_features, taps=POOLED, weight=100.0),
    "crd": lambda: Term(
        "crd", ContrastiveRepresentation(8, 12, size=48, negatives=8), inputs=select_labeled_feature, taps=POOLED
    ),
    "review": lambda: Term("review", KnowledgeReview((8, 8), (12, 12)), inputs=select_features, taps=TAPS | POOLED),
}


@pytest.mark.parametrize("name", TERMS)
def test_every_loss_trains_alone_and_goes_down(name: str) -> None:
    term = TERMS[name]()
    before = {n: t.clone() for n, t in term.loss.state_dict().items()} if isinstance(term.loss, nn.Module) else {}
    trained = run(only(term), train=small_config(6, learning_rate=0.02, optimizer=SGD(weight_decay=0.0)))
    losses = [record.parts[name] for record in trained.history]
    assert losses[-1] < losses[0]
    after = term.loss.state_dict() if isinstance(term.loss, nn.Module) else {}
    assert same(before, after)
    assert not any(module._forward_hooks for module in TEACHER.modules())


@pytest.mark.parametrize("optimizer", [SGD(), AdamW()])
def test_training_is_bit_for_bit_a_hand_written_loop(optimizer: SGD | AdamW) -> None:
    source, term = Blobs(48), hint(0.5)
    trained = run(
        Objective(label_weight=1.0, kd_weight=0.0, terms=(term,)),
        source=source,
        train=small_config(1, optimizer=optimizer, learning_rate=0.1, warmup_fraction=1.0),
    )
    student = small_net().to(memory_format=torch.channels_last).train()
    teacher = small_net(seed=9, width=12).to(memory_format=torch.channels_last).eval()
    adaptor = adaptors(small_net())["0"]
    learners = nn.ModuleList([student, adaptor])
    built = optimizer.build(learners, 0.1)
    batches = source.batches(16, device=torch.device("cpu"), seed=0, epoch=0, drop_last=True)
    for step, (stored, labels) in enumerate(batches):
        images = stored.contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            target = teacher[0](images)
        loss = nn.functional.cross_entropy(student(images), labels)
        loss = loss + 0.5 * hint_loss(adaptor(student[0](images)), target)
        for group in built.param_groups:
            group["lr"] = 0.1 * (step + 1) / 3
        built.zero_grad()
        loss.backward()
        built.step()
    # One forward pass there, two here: the batch norm is not before the tap, so only sums differ in their order.
    for name, tensor in student.state_dict().items():
        torch.testing.assert_close(trained.model.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)


class Interrupted(Blobs):
    """A user who presses Ctrl-C in the third epoch."""

    def batches(self, *args: Any, epoch: int = 0, **settings: Any) -> Any:
        if epoch == 2:
            raise KeyboardInterrupt
        return super().batches(*args, epoch=epoch, **settings)


@pytest.mark.parametrize("optimizer", [SGD(), AdamW()])
def test_a_resumed_run_learns_bit_for_bit_what_an_uninterrupted_one_does(
    tmp_path: Path, optimizer: SGD | AdamW
) -> None:
    def objective() -> Objective:
        return Objective(terms=tuple(TERMS[name]() for name in ("hint", "vid", "crd", "review", "dkd")))

    settings: dict[str, Any] = {"train": small_config(4, optimizer=optimizer, learning_rate=0.01)}
    whole = run(objective(), **settings)
    with pytest.raises(KeyboardInterrupt):
        run(objective(), source=Interrupted(48), folder=tmp_path, **settings)
    resumed = run(objective(), folder=tmp_path, **settings)
    assert same(state(whole.model), state(resumed.model))
    losses = [[(r.train_loss, dict(r.parts)) for r in trained.history] for trained in (whole, resumed)]
    assert losses[0] == losses[1]
    assert set(whole.history[-1].parts) == {"label", "kd", "hint", "vid", "crd", "review", "dkd"}


def test_another_term_or_another_beginning_of_its_losses_is_another_run(tmp_path: Path) -> None:
    run(only(hint()), folder=tmp_path, train=small_config(1))
    with pytest.raises(TrainingError, match=r"objective\.terms was hint \| 1\.0 .*now hint \| 2\.0"):
        run(only(hint(2.0)), folder=tmp_path, train=small_config(1))
    other = hint()
    with torch.no_grad():
        other.loss.adaptors["0"].bias.add_(1.0)  # type: ignore[attr-defined]
    with pytest.raises(TrainingError, match="losses was"):
        run(only(other), folder=tmp_path, train=small_config(1))


def test_labels_are_checked_for_terms_too() -> None:
    source = Blobs(48)
    source.labels = source.labels + 5
    with pytest.raises(TrainingError, match="labels"):
        run(only(TERMS["dkd"]()), source=source)


def test_hints_first_then_the_whole_student(tmp_path: Path) -> None:
    class Data:
        train, validation, augment = Blobs(48), Blobs(24, seed=1), None

    student = small_net()
    before = state(student)
    settings: dict[str, Any] = {
        "teacher": TEACHER,
        "data": Data(),
        "hints": (hint(),),
        "hint_train": small_config(3, learning_rate=0.05),
        "train": small_config(2, seed=4),
        "callbacks": Silent(),
    }
    trained = distill_after_hints(student, **with_run(folder=tmp_path, **settings))
    assert same(state(student), before)
    stages = [
        fit_small(
            small_net(), Data.train, objective=only(hint()), teacher=TEACHER, train=settings["hint_train"],
            callbacks=Silent(),
        )
    ]  # fmt: skip
    guided = state(stages[0].model)
    # What comes after the hint has not been trained yet.
    assert torch.equal(guided["6.weight"], before["6.weight"])
    assert not torch.equal(guided["0.weight"], before["0.weight"])
    stages.append(
        fit_small(
            stages[0].model, Data.train, objective=Objective(), teacher=TEACHER, train=settings["train"],
            validation=Data.validation, callbacks=Silent(),
        )
    )  # fmt: skip
    assert same(state(trained.model), state(stages[1].model))
    assert trained.best_score == evaluate(trained.model, Data.validation).value
    assert {path.name for path in tmp_path.iterdir()} == {"hints", "student"}
    again = distill_after_hints(student, **with_run(folder=tmp_path, **settings))
    assert same(state(again.model), state(trained.model))
