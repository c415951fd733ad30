"""What was cut by hand is saved in two arguments, after any number of cuts, and loads bit for bit."""

import copy
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command_line import Run, outcome
from cuts import random_architecture
from torch import nn
from zoo import ZOO, ZooNet

import secateur
from secateur.architecture import Architecture
from secateur.cli import main
from secateur.errors import ArtifactError, ModelError, SecateurError
from secateur.graph import untie
from secateur.prune import apply_architecture
from secateur.prune.cut_record import CutRecord

pytestmark = pytest.mark.filterwarnings("ignore:`source` was not given", "ignore:The cut model is larger")


def half(graph: secateur.ChannelGraph) -> Architecture:
    return Architecture.of({axis.name: range(max(1, axis.size // 2)) for axis in graph.prunable})


def cut_once(model: nn.Module, example: torch.Tensor, architecture: Callable = half) -> secateur.prune.Cut:
    graph = secateur.trace(model, example)
    return secateur.cut(model, graph, architecture(graph))


def bits_equal(one: nn.Module, other: nn.Module, example: torch.Tensor) -> bool:
    with torch.no_grad():
        return torch.equal(one.eval()(example), other.eval()(example))


def changed_(model: nn.Module) -> nn.Module:
    """Train, as far as a test needs it: every weight gets another value."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    return model


def test_two_arguments_are_enough(tmp_path: Path) -> None:
    model, example = ZOO["residual"]()
    cut = cut_once(model, example)
    changed_(cut.model)
    with pytest.warns(UserWarning, match=r"only secateur.load\(.*factory=\.\.\.\) can load this artifact"):
        manifest = secateur.save(cut, tmp_path / "small")
    loaded = secateur.load(tmp_path / "small", factory=lambda: ZOO["residual"]().model)
    assert bits_equal(loaded.model, cut.model, example)
    assert manifest.recipe.architecture == cut.architecture
    assert manifest.recipe.input_shape == (3, 8, 8)
    assert manifest.recipe.cost_after["macs"] < manifest.recipe.cost_before["macs"]
    assert secateur.verify(tmp_path / "small", factory=lambda: ZOO["residual"]().model).passed


def test_without_a_factory_the_artifact_says_what_it_needs(tmp_path: Path) -> None:
    model, example = ZOO["plain"]()
    secateur.save(cut_once(model, example), tmp_path / "small")
    for trust in (False, True):
        with pytest.raises(ArtifactError, match=r"made in a Python process from a model .*Plain.* Pass factory="):
            secateur.load(tmp_path / "small", trust_source=trust)


def test_a_source_needs_no_factory(tmp_path: Path) -> None:
    model, source = secateur.load_model("cifar_resnet20")
    cut = cut_once(model, torch.randn(1, 3, 32, 32))
    manifest = secateur.save(
        cut, tmp_path / "a", source=source, mean=(0.5,) * 3, std=(0.2,) * 3, classes=list("abcdefghij")
    )
    secateur.save(cut, tmp_path / "b", source="cifar_resnet20")
    convolutions = 3 * 16 * 9 * 1024 + 6 * 16 * 16 * 9 * 1024 + 2 * (16 * 32 * 9 * 256 + 5 * 32 * 32 * 9 * 256)
    assert manifest.recipe.cost_before["macs"] == convolutions + 64 * 10
    for name in "ab":
        assert bits_equal(secateur.load(tmp_path / name).model, cut.model, torch.randn(2, 3, 32, 32))


def squashed() -> nn.Module:
    """The shapes of another net, and another function."""
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sigmoid(), nn.Conv2d(4, 2, 1))


def test_a_wrong_source_is_refused_and_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "test_save_nets", types.SimpleNamespace(squashed=squashed))
    model, _ = secateur.load_model("cifar_resnet20")
    cut = cut_once(model, torch.randn(1, 3, 32, 32))
    with pytest.raises(ArtifactError, match="before its first cut; secateur:cifar_resnet32 builds another one"):
        secateur.save(cut, tmp_path / "small", source="cifar_resnet32")
    with pytest.raises(ModelError, match="Did you mean"):
        secateur.save(cut, tmp_path / "small", source="cifar_resnet21")
    plain = cut_once(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)), torch.randn(1, 3, 4, 4))
    with pytest.raises(ArtifactError, match="computes something else than the model in memory"):
        secateur.save(plain, tmp_path / "small", source="python:test_save_nets:squashed")
    assert list(tmp_path.iterdir()) == []


# Nets with ints that the weights do not show: groups, pads, the sizes of a split, of a view and of a shuffle.
@pytest.mark.parametrize(
    "name", ["split", "few_groups", "many_groups", "option_a_residual", "view_linear", "shuffle_v2"]
)
def test_cut_trained_and_cut_again_is_one_artifact(name: str, tmp_path: Path) -> None:
    net: ZooNet = ZOO[name]()
    first = cut_once(net.model, net.example, lambda graph: random_architecture(graph, 1))
    changed_(first.model)
    second = cut_once(first.model, net.example, lambda graph: random_architecture(graph, 2))
    changed_(second.model)
    manifest = secateur.save(second, tmp_path / "small")
    loaded = secateur.load(tmp_path / "small", factory=lambda: ZOO[name]().model)
    assert bits_equal(loaded.model, second.model, net.example)
    # The channels are those of the first model, of which the cut model's weights are a slice.
    once = apply_architecture(net.model, secateur.trace(net.model, net.example), manifest.recipe.architecture)
    assert [p.shape for p in once.parameters()] == [p.shape for p in second.model.parameters()]
    record = CutRecord.of(second.model)
    assert record is not None
    assert record.cuts == 2


def test_the_channels_of_two_cuts_are_named_by_the_first_model() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    example = torch.randn(1, 3, 4, 4)
    (axis,) = secateur.trace(model, example).prunable
    first = cut_once(model, example, lambda _: Architecture.of({axis.name: [1, 2, 5, 7]}))
    second = cut_once(first.model, example, lambda _: Architecture.of({axis.name: [0, 2]}))
    record = CutRecord.of(second.model)
    assert record is not None
    assert record.architecture.by_name == {axis.name: (1, 5)}
    assert torch.equal(second.model[0].weight, model[0].weight[[1, 5]])
    assert CutRecord.of(model) is None


def test_narrow_branches_and_removed_blocks_are_in_the_record(tmp_path: Path) -> None:
    net = ZOO["residual"]()
    graph = untie(net.model, secateur.trace(net.model, net.example))
    branch = next(axis for axis in graph.prunable if axis.residual_axis is not None)
    kept = {branch.name: range(1, branch.size)}
    first = secateur.cut(net.model, graph, Architecture.of(kept, [graph.removable[0].name][: len(graph.removable) - 1]))
    second = cut_once(first.model, net.example)
    secateur.save(second, tmp_path / "small")
    loaded = secateur.load(tmp_path / "small", factory=lambda: ZOO["residual"]().model)
    assert bits_equal(loaded.model, second.model, net.example)


def test_a_copy_with_other_weights_can_be_saved(tmp_path: Path) -> None:
    model, example = ZOO["few_groups"]()
    cut = cut_once(model, example)
    trained = changed_(copy.deepcopy(cut.model)).train()
    secateur.save(cut, tmp_path / "small", model=trained)
    assert trained.training
    loaded = secateur.load(tmp_path / "small", factory=lambda: ZOO["few_groups"]().model)
    assert bits_equal(loaded.model, trained, example)


def test_what_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    model, example = ZOO["plain"]()
    cut = cut_once(model, example)
    with pytest.raises(
        SecateurError, match=r"`cut` must be of the type Cut or CompressResult; got Plain.*See secateur\.prune"
    ):
        secateur.save(cut.model, tmp_path / "small")  # type: ignore[arg-type]
    for other in (model, nn.Sequential(cut.model)):
        with pytest.raises(ArtifactError, match="that was not cut this way"):
            secateur.save(cut, tmp_path / "small", model=other)
    larger = copy.deepcopy(cut.model)
    larger.register_buffer("extra", torch.zeros(1))
    with pytest.raises(ArtifactError, match=r"got others: \['extra'\]"):
        secateur.save(cut, tmp_path / "small", model=larger)
    broken = copy.deepcopy(cut.model)
    next(broken.parameters()).data[0] = float("nan")
    with pytest.raises(ArtifactError, match="must have finite weights"):
        secateur.save(cut, tmp_path / "small", model=broken)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="must be new, empty, or an older artifact"):
        secateur.save(cut, tmp_path / "mine")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


MODULE = """
import torch
from torch import nn

def net():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))

def other():
    return nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 4))
"""


@pytest.fixture
def in_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An artifact of a model that only ``python:my_net_of_a_test:net`` can build."""
    (tmp_path / "my_net_of_a_test.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("my_net_of_a_test", None)
    from my_net_of_a_test import net  # pyright: ignore[reportMissingImports]

    secateur.save(cut_once(net(), torch.randn(1, 3, 16, 16)), tmp_path / "small")
    return tmp_path / "small"


NET = ("--model", "python:my_net_of_a_test:net", "--trust-source")


def test_python_model_beside_an_artifact(in_process: Path) -> None:
    def run(*words: object) -> Run:
        return outcome(main, *words)

    verified = run("verify", in_process, *NET)
    assert verified.exit_code == 0, verified.output
    assert "Outputs for a seeded input" in verified.output
    inspected = run("inspect", *NET, "--weights", in_process)
    assert inspected.exit_code == 0, inspected.output
    exported = run("export", *NET, "--weights", in_process, "--export", "onnx")
    assert exported.exit_code == 0, exported.output
    assert (in_process / "model.onnx").is_file()
    assert run("verify", in_process, *NET).exit_code == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("verify", "{}"), "--model python:package.module:function"),
        (("inspect", "--model", "{}", "--trust-source"), "--model python:package.module:function"),
        (("verify", "{}", "--model", "python:my_net_of_a_test:net"), "needs your consent"),
        (("verify", "{}", "--model", "python:my_net_of_a_test:other", "--trust-source"), "builds another model"),
        (("verify", "{}", "--model", "{}"), "must be given one artifact folder"),
        (("verify",), "must be given one artifact folder"),
        (("inspect", "--model", "{}", "--weights", "{}"), "must not be given with an artifact"),
        (("inspect", *NET, "--weights", "{}/.."), "secateur.json"),
    ],
)
def test_bad_words_are_refused_in_one_message(in_process: Path, words: tuple[str, ...], message: str) -> None:
    found = outcome(main, *(word.format(in_process) for word in words))
    assert found.exit_code == 2, found.output
    assert message in " ".join(found.stderr.split())
    assert len(found.stderr.strip().splitlines()) == 1
