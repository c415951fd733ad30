"""``secateur bench`` and the words for targets."""

import json

import pytest
from command_line import secateur

from secateur.cli.options import to_target
from secateur.cost import OnnxRuntime, TorchCompiled, TorchEager
from secateur.errors import ExportError, TrainingError


def test_models_of_different_inputs_are_compared_and_nothing_is_written():
    words = ("bench", "digits_resnet", "cifar_resnet20", "--rounds", 3, "--target", "torch", "--image-size", 8)
    found = secateur(*words)
    assert found.exit_code == 0
    assert "digits_resnet" in found.stdout
    assert "1x8x8" in found.stdout
    assert "3x8x8" in found.stdout
    assert "1.00 x" in found.stdout
    assert "3 rounds in turns, processor time" in " ".join(found.stdout.split())
    assert "Nothing written." in found.stdout


def test_json_holds_every_number():
    words = ("bench", "digits_resnet", "--rounds", 3, "--target", "torch", "--batch", 2, "--json")
    (row,) = json.loads(secateur(*words).stdout)
    assert row["model"] == "digits_resnet"
    assert (row["batch_size"], row["threads"], row["rounds"]) == (2, 1, 3)
    assert 0 < row["seconds"]["lower"] <= row["seconds"]["median"] <= row["seconds"]["upper"]
    assert row["machine"]["cpu"]


def test_a_model_that_is_not_known_is_an_error_in_words():
    found = secateur("bench", "cifar_resnet20000")
    assert found.exit_code == 2
    assert "cifar_resnet20000" in found.stderr


def test_targets_by_name():
    assert to_target("ort", 2, 3) == OnnxRuntime(2, 3)
    assert to_target("torch", 1, 4) == TorchEager(1, 4, "cpu")
    assert to_target("compiled", 1, 1) == TorchCompiled(1, 1, "cpu")
    with pytest.raises(ExportError, match="`--target ort` must run on the CPU; got the device 'cuda'"):
        to_target("ort", 1, 1, "cuda")
    with pytest.raises(
        TrainingError, match=r"`--target-device` must be a device that this machine has.*'moon'.*Say cpu"
    ):
        to_target("torch", 1, 1, "moon")


def test_a_device_that_is_not_there_is_named_with_the_flag_of_the_command():
    found = secateur("bench", "digits_resnet", "--target", "torch", "--device", "moon")
    assert found.exit_code == 2
    assert "`--device` must be a device that this machine has" in found.stderr.replace("\n", " ")
