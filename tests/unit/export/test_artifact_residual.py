"""Models with branches narrower than their streams come back bit for bit, from the source that builds them whole."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from zoo import ZOO

from secateur.architecture import Architecture
from secateur.errors import ArtifactError
from secateur.export import MANIFEST_NAME, Recipe, edits_between, load_artifact, read_manifest, save_artifact
from secateur.export.manifest import manifest_sha256
from secateur.graph import trace, untie
from secateur.prune import ChannelExpansion, apply_architecture

NETS = ("residual", "preact_residual", "option_a_residual", "inverted_residual_se", "attention")


def written(folder: Path, name: str) -> tuple[nn.Module, Tensor]:
    """Streams are cut too, every other branch keeps their first channels and the others some from the middle."""
    model, example = ZOO[name]()
    graph = untie(model, trace(model, example))
    kept = {axis.name: range(axis.size - 1) for axis in graph.prunable}
    for number, axis in enumerate(axis for axis in graph.prunable if axis.residual_axis):
        kept[axis.name] = range(number % 2, max(2, axis.size // 2))
    architecture = Architecture.of(kept)
    small = apply_architecture(model, graph, architecture).eval()
    source = {"kind": "secateur", "name": name}
    save_artifact(folder, small, Recipe(source, architecture, (3, 8, 8), edits_between(model, small)))
    return small, example


def build(source) -> nn.Module:
    return ZOO[source["name"]]().model


@pytest.mark.parametrize("name", NETS)
def test_outputs_are_bit_equal(tmp_path: Path, name: str) -> None:
    small, example = written(tmp_path / "small", name)
    loaded = load_artifact(tmp_path / "small", build=build)
    with torch.no_grad():
        assert torch.equal(loaded.model(example), small(example))
    assert [key for key, _ in loaded.model.named_modules()] == [key for key, _ in small.named_modules()]
    assert edits_between(build(loaded.manifest.recipe.source), loaded.model) == loaded.manifest.recipe.edits


def test_what_widens_a_branch_is_data(tmp_path: Path) -> None:
    written(tmp_path / "small", "preact_residual")
    assert read_manifest(tmp_path / "small").widenings == (
        ChannelExpansion("1.conv2", 1, 4),
        ChannelExpansion("2.conv2", 1, 1, (4, 0, 1, 2, 3, 4, 4, 4, 4)),
    )
    data = json.loads((tmp_path / "small" / MANIFEST_NAME).read_text())
    assert data["widenings"][0] == ["1.conv2", 1, 4, []]


def changed(folder: Path, change) -> None:
    data = json.loads((folder / MANIFEST_NAME).read_text())
    change(data)
    data["sha256"] = manifest_sha256(data)
    (folder / MANIFEST_NAME).write_text(json.dumps(data))


def test_artifacts_from_before_there_were_narrow_branches_are_read(tmp_path: Path) -> None:
    model, example = ZOO["plain"]()
    save_artifact(tmp_path / "small", model, Recipe({"kind": "secateur", "name": "plain"}, Architecture(), (3, 8, 8)))

    def older(data: dict) -> None:
        assert data.pop("widenings") == []
        data.update(schema=2)

    changed(tmp_path / "small", older)
    loaded = load_artifact(tmp_path / "small", build=build)
    assert loaded.manifest.schema == 2
    assert torch.equal(loaded.model(example), model(example))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (["1.conv2", 1, 4], r"`widenings\[0\]` must be \[module, dim, missing, order\]"),
        (["1.conv2", -1, 4, []], "`widenings.0..dim` must be an integer of at least 0"),
        (["1.conv2", 8, 4, []], "`widenings.0..dim` must be below 8"),
        (["1.conv2", 1, 2**20, []], "`widenings.0..missing` must be below 1048576"),
        (["1.conv2", 1, 4, [3, 0]], "`widenings.0..order` must be a list of places among the channels; got 3"),
        (["1.conv2", 1, 4, ["0"]], "`widenings.0..order` must be a list of integers"),
        (["9", 1, 4, []], "`widenings` must name modules of the model; got '9'"),
        (["", 1, 4, []], "`widenings` must name modules within the model"),
        (["1.conv1", 1, 4, []], "must be an int of the rebuilt model; got no such attribute"),
        (["2.conv2", 1, 1, [4, 1, 0, 2, 3, 4, 4, 4, 4]], "`widenings` must say what the weights hold"),
    ],
)
def test_widenings_that_do_not_fit_are_refused(tmp_path: Path, row: list, message: str) -> None:
    written(tmp_path / "small", "preact_residual")

    def change(data: dict) -> None:
        data["widenings"][row[0] == "2.conv2"] = row

    changed(tmp_path / "small", change)
    with pytest.raises(ArtifactError, match=message):
        load_artifact(tmp_path / "small", build=build)
