"""Checkpoints as training scripts write them: whatever fits is found, and where two fit the user is asked."""

import argparse
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import outcome
from torch import Tensor, nn

from secateur.cli import main
from secateur.errors import ModelError
from secateur.models import digits_resnet, load_model, load_weights_, read_weights


def seeded_state(seed: int) -> dict[str, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return digits_resnet().state_dict()


@pytest.fixture
def state() -> dict[str, Tensor]:
    return seeded_state(7)


def same(model: nn.Module, state: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def saved(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


OTHERS: dict[str, Any] = {
    "epoch": 3,
    "args": argparse.Namespace(lr=0.1, device=torch.device("cpu"), best=np.float64(0.917), out=Path("runs")),
    "best": np.float32(91.7),
    "history": np.arange(3.0),
    "optimizer": {"state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]},
    "rng": {"torch": torch.get_rng_state()},
}


@pytest.mark.parametrize(
    "key", ["net", "ema", "model_ema", "params_ema", "params", "weights", "state_dict", "anything"]
)
@pytest.mark.parametrize("prefix", ["", "module.", "model.", "_orig_mod.model.", "ema_model.module."])
def test_usual_entries_and_prefixes_are_found(key: str, prefix: str, tmp_path: Path, state: dict[str, Tensor]) -> None:
    path = saved(tmp_path / "w.pth", {**OTHERS, key: prefixed(state, prefix)})
    model, _ = load_model("digits_resnet", weights=path)
    assert same(model, state)


def test_an_entry_of_an_entry_is_found(tmp_path: Path, state: dict[str, Tensor]) -> None:
    path = saved(tmp_path / "w.pth", {"ema": {"decay": 0.99, "shadow": state}})
    model, _ = load_model("digits_resnet", weights=path)
    assert same(model, state)


def test_other_parts_of_a_lightning_module_are_left(tmp_path: Path, state: dict[str, Tensor]) -> None:
    beside = {"loss.weight": torch.ones(10), "metric.total": torch.zeros(1)}
    content = {"state_dict": {**prefixed(state, "model."), **beside}, "pytorch-lightning_version": "2.6"}
    model, _ = load_model("digits_resnet", weights=saved(tmp_path / "last.ckpt", content))
    assert same(model, state)


def test_a_file_without_an_entry_but_with_a_prefix(tmp_path: Path, state: dict[str, Tensor]) -> None:
    model, _ = load_model("digits_resnet", weights=saved(tmp_path / "w.pth", prefixed(state, "net.")))
    assert same(model, state)


TWO = {
    "entries": lambda one, two: {"model": one, "model_ema": two},
    "prefixes": lambda one, two: {"state_dict": {**prefixed(one, "student."), **prefixed(two, "teacher.")}},
}


@pytest.mark.parametrize(("kind", "names"), [("entries", ("model", "model_ema")), ("prefixes", ("student", "teacher"))])
def test_if_two_fit_the_user_is_asked(kind: str, names: tuple[str, str], tmp_path: Path) -> None:
    one, two = seeded_state(1), seeded_state(2)
    path = saved(tmp_path / "w.pth", {**OTHERS, **TWO[kind](one, two)})
    both = r"got 2 that differ: (state_dict\.)?{} and (state_dict\.)?{}\. Say which one: weights_key=(state_dict\.)?{}"
    with pytest.raises(ModelError, match=both.format(*names, names[1])):
        load_model("digits_resnet", weights=path)
    for name, wanted in zip(names, (one, two), strict=True):
        model, _ = load_model("digits_resnet", weights=path, weights_key=name)
        assert same(model, wanted)
    with pytest.raises(ModelError, match=r"`weights_key` must name one of the entries of .*w\.pth that hold weights"):
        load_model("digits_resnet", weights=path, weights_key="emma")


def test_two_that_are_equal_are_one(tmp_path: Path, state: dict[str, Tensor]) -> None:
    path = saved(tmp_path / "w.pth", {"model": state, "ema": {n: t.clone() for n, t in state.items()}})
    assert same(load_model("digits_resnet", weights=path)[0], state)
    assert read_weights(path).keys() == state.keys()


def test_of_two_the_one_that_fits_is_taken(tmp_path: Path, state: dict[str, Tensor]) -> None:
    content = {"model": {"w": torch.zeros(3)}, "ema": state}
    assert same(load_model("digits_resnet", weights=saved(tmp_path / "w.pth", content))[0], state)


def test_without_a_model_two_entries_are_asked_about_too(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.pth", {"params": {"w": torch.zeros(2)}, "params_ema": {"w": torch.ones(2)}})
    with pytest.raises(ModelError, match="params and params_ema"):
        read_weights(path)
    assert torch.equal(read_weights(path, "params_ema")["w"], torch.ones(2))
    with pytest.raises(ModelError, match="hold weights: params, params_ema"):
        read_weights(path, "ema")


def test_own_names_and_others_beside_them_are_refused(tmp_path: Path, state: dict[str, Tensor]) -> None:
    """It could be either; nothing is taken in silence."""
    path = saved(tmp_path / "w.pth", {**state, **prefixed(seeded_state(1), "ema.")})
    with pytest.raises(ModelError, match=r"unexpected: ema\.conv1\.weight"):
        load_model("digits_resnet", weights=path)


def test_a_part_that_does_not_fit_is_named_by_its_names(tmp_path: Path, state: dict[str, Tensor]) -> None:
    content = prefixed(state, "model.")
    content["model.linear.bias"] = torch.zeros(3)
    with pytest.raises(ModelError, match=r"must fit the model; .* missing: conv1.weight"):
        load_model("digits_resnet", weights=saved(tmp_path / "w.pth", {"state_dict": content}))


@pytest.mark.parametrize(
    "beside",
    [
        pickle.Unpickler,
        zipfile.ZipFile,
        np.float64,
        argparse.ArgumentParser,
        np.random.default_rng(0),
        nn.Linear(2, 2),
    ],
    ids=["a class", "another class", "a type of numpy", "a parser", "a generator", "a module"],
)
def test_code_beside_the_weights_is_refused(beside: object, tmp_path: Path, state: dict[str, Tensor]) -> None:
    path = saved(tmp_path / "w.pth", {"model": state, "beside": beside})
    with pytest.raises(ModelError, match="contains pickled code"):
        load_model("digits_resnet", weights=path)


class Call:
    """A pickle that calls something with arguments."""

    def __init__(self, what: Any, *arguments: object) -> None:
        self.what, self.arguments = what, arguments

    def __reduce__(self) -> Any:
        return self.what, self.arguments


def test_what_is_allowed_is_not_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The names that are allowed give placeholders: no argument makes numpy or argparse do anything."""
    huge = Call(np.dtype, "S1000000000")
    scalar = np.float64(1).__reduce__()[0]
    path = saved(tmp_path / "w.pth", {"model": {"w": torch.ones(2)}, "bomb": Call(scalar, huge)})
    made: list[object] = []
    allowed = torch.serialization.get_safe_globals()
    monkeypatch.setattr(argparse.Namespace, "__setstate__", lambda self, state: made.append(state), raising=False)
    assert torch.equal(read_weights(path)["w"], torch.ones(2))
    read_weights(saved(tmp_path / "n.pth", {"model": {"w": torch.ones(2)}, "args": argparse.Namespace(lr=1)}))
    assert made == []
    # What was allowed for one file is not allowed for the process.
    assert torch.serialization.get_safe_globals() == allowed


def test_a_model_with_one_weight(tmp_path: Path) -> None:
    model = nn.Linear(2, 2, bias=False)
    load_weights_(model, saved(tmp_path / "w.pth", {"net": {"weight": torch.eye(2)}}))
    assert torch.equal(model.weight, torch.eye(2))


def test_the_flag_chooses(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.pth", {"model": seeded_state(1), "ema": seeded_state(2)})
    words = ("inspect", "--model", "digits_resnet", "--weights", path, "--json")
    asked = outcome(main, *words)
    assert asked.exit_code == 2
    assert "model and ema. Say which one: --weights-key ema" in " ".join(asked.stderr.split())
    assert outcome(main, *words, "--weights-key", "ema").exit_code == 0
