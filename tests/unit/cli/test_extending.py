"""Strategies, importances and losses of the user, named by ``python:PACKAGE.MODULE:NAME``."""

import sys
from pathlib import Path

import pytest
import torch
from command_line import secateur

from secateur.cli.distill import Pair, hint_terms, own_loss, parse_losses, to_objective
from secateur.cli.options import SearchFlags
from secateur.cli.parsing import importance, strategy
from secateur.errors import ModelError, SelectionError
from secateur.models import CifarResNet
from secateur.search import L1, RemoveBlocks, Uniform

MODULE = """
from secateur.distill import MeanOverTaps, Term, hint_loss, select_features
from secateur.search import L1, Uniform

def first():
    return Uniform(L1())

class Mine(L1):
    pass

def difference(student, teacher):
    return (student - teacher).abs().mean()

def term():
    return Term("difference", difference, weight=2.0)

def at_taps():
    return Term("levels", MeanOverTaps(hint_loss), inputs=select_features)

def asks(argument):
    return argument

def fails():
    raise RuntimeError("out of ideas")

def nothing():
    return None
"""


@pytest.fixture(autouse=True)
def _module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_methods.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("sys.dont_write_bytecode", True)


def test_a_strategy_of_the_user_is_made_by_its_factory():
    flags = SearchFlags(strategy="python:own_methods:first")
    assert strategy(flags, trust_source=True) == Uniform(L1())
    # It decides by itself whether blocks are removed, unless a flag says so.
    assert strategy(flags, default_blocks=1.0, trust_source=True) == Uniform(L1())
    asked = SearchFlags(strategy="python:own_methods:first", remove_blocks=0.5)
    assert strategy(asked, trust_source=True) == RemoveBlocks(Uniform(L1()), 0.5)


def test_an_importance_of_the_user_replaces_that_of_a_strategy():
    flags = SearchFlags(strategy="uniform", importance="python:own_methods:Mine")
    assert type(importance(flags, trust_source=True)).__name__ == "Mine"
    found = strategy(flags, trust_source=True)
    assert isinstance(found, Uniform)
    assert type(found.importance).__name__ == "Mine"
    both = SearchFlags(strategy="python:own_methods:first", importance="l1")
    with pytest.raises(SelectionError, match="`--importance` must go with a strategy of Secateur"):
        strategy(both, trust_source=True)


def test_a_loss_of_the_user_is_a_term_of_the_objective():
    spec = "python:own_methods:term"
    assert parse_losses([f"{spec}=3"]) == {spec: 3.0}
    assert parse_losses([spec]) == {spec: 1.0}
    nets = [CifarResNet(1, widths=(4, 8, 12), num_classes=3).eval() for _ in range(2)]
    pair = Pair(nets[0], nets[1], torch.zeros(2, 3, 8, 8), 48, {spec: own_loss(spec, trust_source=True)})
    assert not pair.needs_taps(spec)
    objective = to_objective({spec: 3.0}, pair, {}, temperature=4.0, label_weight=0.1, label_smoothing=0.0)
    (term,) = objective.terms
    assert (term.name, term.weight, dict(term.taps)) == ("difference", 6.0, {})


def test_a_loss_of_features_is_given_the_taps():
    spec, taps = "python:own_methods:at_taps", {"layer1": "layer2"}
    nets = [CifarResNet(1, widths=(4, 8, 12), num_classes=3).eval() for _ in range(2)]
    pair = Pair(nets[0], nets[1], torch.zeros(2, 3, 8, 8), 48, {spec: own_loss(spec, trust_source=True)})
    assert pair.needs_taps(spec)
    (term,) = hint_terms({spec: 1.0}, pair, taps)
    assert dict(term.taps) == taps


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("asks", "must name a factory that needs no arguments; python:own_methods:asks failed"),
        ("fails", "out of ideas"),
        ("nothing", "must name a factory that returns a .*Strategy; python:own_methods:nothing returned a NoneType"),
        ("absent", "must name a function of own_methods; there is none"),
    ],
)
def test_factories_that_make_nothing_useful_are_refused(name: str, message: str):
    with pytest.raises(ModelError, match=message):
        strategy(SearchFlags(strategy=f"python:own_methods:{name}"), trust_source=True)


def test_other_words_than_a_module_and_a_name_are_refused():
    with pytest.raises(
        ModelError, match=r"`strategy` must be python:package\.module:factory; got 'python:own_methods'"
    ):
        strategy(SearchFlags(strategy="python:own_methods"), trust_source=True)


RUN = ("compress", "--model", "digits_resnet", "--data", "digits", "--budget", "macs=50%")
LESSON = ("distill", "--teacher", "digits_resnet", "--student", "digits_resnet", "--data", "digits")


@pytest.mark.parametrize(
    "words",
    [
        (*RUN, "--strategy", "python:own_methods:first"),
        (*RUN, "--importance", "python:own_methods:Mine"),
        (*LESSON, "--loss", "python:own_methods:term"),
    ],
)
def test_code_of_the_user_runs_only_with_trust(words: tuple[str, ...], tmp_path: Path):
    (tmp_path / "own_methods.py").write_text("raise SystemExit(99)")
    found = secateur(*words, "--out", tmp_path / "out")
    assert found.exit_code == 2
    assert "imports and runs code; that needs your consent" in " ".join(found.stderr.split())
    assert "--trust-source" in found.stderr
    assert not (tmp_path / "out").exists()


def test_modules_of_the_working_folder_are_found_by_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    here = tmp_path / "here"
    here.mkdir()
    lines = ("from secateur.models import CifarResNet", "def net():", "    return CifarResNet(1)")
    (here / "net_beside_me.py").write_text("\n".join(lines))
    (here / "rich.py").write_text("raise SystemExit(99)")  # Replaces no installed module.
    (here / "net_alone.py").write_text("raise SystemExit(99)")
    monkeypatch.chdir(here)
    before = list(sys.path)
    found = secateur("inspect", "--model", "python:net_beside_me:net", "--trust-source", "--image-size", 32)
    assert (found.exit_code, sys.path) == (0, before), found.stderr
    refused = secateur("inspect", "--model", "python:net_alone:net")
    assert refused.exit_code == 2
    assert "needs your consent" in " ".join(refused.stderr.split())
