"""One taught digits network and one compressed artifact, shared by the tests of the command line."""

from pathlib import Path

import pytest
from command_line import Run, Small, compress_words, secateur
from safetensors.torch import save_file

from secateur.data import load_data
from secateur.distill import Objective
from secateur.models import load_model
from secateur.train import RunSettings, Silent, TrainConfig, fit


@pytest.fixture
def run() -> Run:
    """The command line."""
    return secateur


@pytest.fixture(scope="session")
def digits_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A digits_resnet taught for a few epochs: good enough that damage shows."""
    data = load_data("digits")
    fresh, _ = load_model("digits_resnet")
    taught = fit(
        fresh,
        data.train,
        train=TrainConfig(epochs=6, batch_size=64, learning_rate=0.05),
        objective=Objective.of_labels(),
        augment=data.augment,
        validation=data.validation,
        run=RunSettings(callbacks=Silent()),
    )
    assert taught.best_score is not None
    assert taught.best_score > 0.9
    path = tmp_path_factory.mktemp("teacher") / "digits.safetensors"
    save_file(taught.model.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def small(digits_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Small:
    """The whole way, once."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    one = ("--strategy", "knapsack", "--divisor", 1)
    said = secateur(*compress_words(digits_weights, folder), *one, "--epochs", 2, "--export", "onnx,pt2")
    assert said.exit_code == 0, said.output
    return Small(digits_weights, folder, said)
