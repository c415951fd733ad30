"""What the recovery begins with."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from run_pipeline import run_compress
from slow_search import data, model
from torch import nn

import secateur
from secateur.architecture import Architecture
from secateur.data import MemorySplit, Normalization
from secateur.errors import ArtifactError, ModelError, TrainingError
from secateur.pipeline import KeepWeights, OnExisting, Reinitialize
from secateur.pipeline.config import CutInput
from secateur.prune import Cut
from secateur.search import Uniform
from secateur.train import Silent, TrainConfig, reset_weights_

ONE_EPOCH = TrainConfig(epochs=1, batch_size=32)


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[nn.Module]]:
    """The students that recoveries began with."""
    _compress = sys.modules["secateur.pipeline.compress"]

    seen: list[nn.Module] = []
    whole = _compress.train_with_teacher

    def distill(student: nn.Module, **settings: object) -> object:
        seen.append(student)
        return whole(student, **settings)

    monkeypatch.setattr(import_module("secateur.pipeline.compress"), "train_with_teacher", distill)
    return seen


def _weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_a_student_from_scratch_has_the_weights_that_its_modules_draw(begun: list[nn.Module]):
    torch.manual_seed(99)
    state = torch.get_rng_state()
    words = {"budget": "macs=50%", "strategy": Uniform(), "train": ONE_EPOCH, "callbacks": Silent(), "seed": 5}
    result = run_compress(model(), data(), init=Reinitialize(), **words)
    torch.manual_seed(7)  # another state: the weights come from the seed alone
    run_compress(model(), data(), init=Reinitialize(), **words)
    run_compress(model(), data(), init=Reinitialize(), **{**words, "seed": 6})
    run_compress(model(), data(), **words)
    torch.manual_seed(99)
    assert torch.equal(state, torch.get_rng_state())
    first, again, other, inherited = map(_weights, begun)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["0.weight"], other["0.weight"])
    assert not torch.equal(first["0.weight"], inherited["0.weight"])
    # As drawn by torch: He's uniform distribution for a = sqrt(5), whose bound is 1 / sqrt(fan in).
    for name, fan in (("0.weight", 27), ("3.weight", 9 * result.model[0].out_channels)):
        assert 0.9 * fan**-0.5 < first[name].abs().max() <= fan**-0.5
    assert torch.equal(first["1.weight"], torch.ones(result.model[0].out_channels))
    assert torch.equal(first["1.running_mean"], torch.zeros(result.model[0].out_channels))
    assert result.architecture.widths["0"] == result.model[0].out_channels < 16
    assert [step.name for step in result.report.steps[:2]] == ["original", "cut, weights drawn anew"]
    assert result.failed == ()
    assert not any("Refit" in note for note in result.report.notes)


class Draws(KeepWeights):
    """Keeps what it was given to cut."""

    given: ClassVar[list[CutInput]] = []

    def cut(self, uncut: CutInput, architecture: Architecture) -> Cut:
        self.given.append(uncut)
        return super().cut(uncut, architecture)


def test_repairs_that_learn_get_images_of_their_own():
    words = {"budget": "macs=50%", "strategy": Uniform(), "train": TrainConfig(epochs=0), "callbacks": Silent()}
    pixels = torch.randint(0, 256, (400, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    train = MemorySplit(pixels, torch.arange(400) % 4, Normalization.default(3))
    run_compress(model(), replace(data(), train=train), init=Draws(repairs=()), calibration_images=16, **words)
    (uncut,) = Draws.given
    used = torch.cat(list(uncut.images))
    # Of 400 images 16 score and 256 judge.
    assert (len(used), *(sum(map(len, uncut.draw_more(count))) for count in (8, 999))) == (16, 8, 128)
    more = torch.cat(list(uncut.draw_more(8)))
    assert not any(torch.equal(one, other) for one in more for other in used)


def test_repairs_belong_to_inherited_weights(begun: list[nn.Module]):
    words = {"budget": "macs=50%", "strategy": Uniform(), "train": ONE_EPOCH, "callbacks": Silent()}
    net = model()
    plain = run_compress(net, data(), init=KeepWeights(repairs=()), **words)
    kept = list(plain.architecture.by_name["0"])
    assert torch.equal(begun[0][0].weight, net[0].weight[kept])
    assert torch.equal(begun[0][3].weight, net[3].weight[list(plain.architecture.by_name["3"])][:, kept])
    repaired = run_compress(net, data(), **words)
    assert not torch.equal(begun[1][3].weight, begun[0][3].weight)
    assert any(note.startswith("Refit") for note in repaired.report.notes)
    assert not any("Refit" in note for note in plain.report.notes)


class Scaled(nn.Module):
    """Has a parameter of its own and nobody knows how it is drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gain


def test_weights_that_cannot_be_drawn_are_named_before_any_work(tmp_path: Path):
    net = model()
    net.insert(3, Scaled())
    words = {"budget": "macs=50%", "train": ONE_EPOCH, "callbacks": Silent(), "out": tmp_path / "out", "export": ()}
    with pytest.raises(ModelError, match=r"3 \(Scaled\) has parameters of its own \(gain\) and no reset_parameters"):
        run_compress(net, data(), init=Reinitialize(), **words)
    assert list(tmp_path.iterdir()) == []

    class Drawable(Scaled):
        def reset_parameters(self) -> None:
            nn.init.normal_(self.gain)

    net[3] = Drawable()
    assert run_compress(net, data(), init=Reinitialize(), **{**words, "out": None}).failed == ()


def test_attention_of_torch_is_drawn_too():
    attention = nn.MultiheadAttention(8, 2)
    before = attention.in_proj_weight.clone()
    bound = (6 / (8 + 24)) ** 0.5  # Glorot's uniform distribution
    drawn = reset_weights_(attention, 3).in_proj_weight
    assert not torch.equal(before, drawn)
    assert 0.8 * bound < drawn.abs().max() <= bound


def test_a_module_has_the_last_word_about_what_it_holds():
    class Gentle(nn.Sequential):
        def reset_parameters(self) -> None:
            nn.init.zeros_(self[-1].weight)

    drawn = reset_weights_(Gentle(nn.Linear(4, 4), nn.BatchNorm1d(4)), 3)
    assert torch.equal(drawn[1].weight, torch.zeros(4))
    assert drawn[0].weight.abs().min() > 0


def test_a_student_from_scratch_needs_a_recovery():
    with pytest.raises(TrainingError, match=r"must have epochs for a student from scratch.*got 0\. Give it as many"):
        run_compress(model(), data(), budget="macs=50%", init=Reinitialize(), train=TrainConfig(epochs=0))


def test_a_resumed_student_from_scratch_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def stop(*_args: object, **_kwargs: object) -> None:
        raise KeyboardInterrupt

    words = {
        "budget": "macs=50%", "strategy": Uniform(), "train": ONE_EPOCH, "export": (), "callbacks": Silent(),
        "init": Reinitialize(), "out": tmp_path / "out",
    }  # fmt: skip
    whole = run_compress(model(), data(), **{**words, "out": None})
    with monkeypatch.context() as patch:
        patch.setattr(import_module("secateur.pipeline.compress"), "train_with_teacher", stop)
        with pytest.raises(KeyboardInterrupt):
            run_compress(model(), data(), **words)
    with pytest.raises(ArtifactError, match=r"init was Reinitialize\(\), now KeepWeights\("):
        run_compress(model(), data(), **{**words, "init": KeepWeights(), "on_existing": OnExisting.RESUME})
    resumed = run_compress(model(), data(), **words, on_existing=OnExisting.RESUME)
    assert all(torch.equal(t, whole.model.state_dict()[n]) for n, t in resumed.model.state_dict().items())
    assert secateur.verify(tmp_path / "out", factory=model).passed


@pytest.mark.parametrize(("epochs", "times"), [(0, 1), (1, 0)])
def test_features_are_matched_only_where_no_training_follows(epochs: int, times: int):
    train = TrainConfig(epochs=epochs, batch_size=32)
    settings = {"budget": "macs=50%", "strategy": Uniform(), "train": train, "callbacks": Silent()}
    found = run_compress(model(), data(), init=KeepWeights(), **settings)
    assert sum(note.startswith("MatchFeatures") for note in found.report.notes) == times
