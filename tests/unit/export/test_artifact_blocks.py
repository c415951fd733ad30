"""Models without some of their blocks come back bit for bit, from the source that builds them with."""

import hashlib
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
from secateur.graph import Replacement, StandIn, trace
from secateur.prune import apply_architecture

NETS = {
    "residual": ["3"],
    "attention": ["block.attention", "block.mlp"],
    "inverted_residual_se": ["1", "2"],
    "option_a_residual": ["1"],
}


def cut(name: str) -> tuple[nn.Module, nn.Module, Tensor, Architecture]:
    model, example = ZOO[name]()
    graph = trace(model, example)
    kept = {axis.name: range(0, axis.size, 2) for axis in graph.prunable}
    architecture = Architecture.of(kept, NETS[name])
    return model, apply_architecture(model, graph, architecture).eval(), example, architecture


def written(folder: Path, name: str) -> tuple[nn.Module, Tensor, Architecture]:
    model, small, example, architecture = cut(name)
    source = {"kind": "secateur", "name": name}
    save_artifact(folder, small, Recipe(source, architecture, (3, 8, 8), edits_between(model, small)))
    return small, example, architecture


@pytest.mark.parametrize("name", NETS)
def test_outputs_are_bit_equal(tmp_path: Path, name: str) -> None:
    small, example, architecture = written(tmp_path / "small", name)
    loaded = load_artifact(tmp_path / "small", build=lambda source: ZOO[source["name"]]().model)
    with torch.no_grad():
        assert torch.equal(loaded.model(example), small(example))
    assert loaded.manifest.recipe.architecture == architecture
    assert [key for key, _ in loaded.model.named_modules()] == [key for key, _ in small.named_modules()]
    assert len(loaded.model.state_dict()) < len(ZOO[name]().model.state_dict())


def test_what_replaces_a_block_is_data(tmp_path: Path) -> None:
    written(tmp_path / "small", "attention")
    assert read_manifest(tmp_path / "small").replacements == (
        Replacement("block.norm1", StandIn.PASS_THROUGH),
        Replacement("block.attention", StandIn.SILENCE),
        Replacement("block.norm2", StandIn.PASS_THROUGH),
        Replacement("block.mlp", StandIn.SILENCE),
    )
    data = json.loads((tmp_path / "small" / MANIFEST_NAME).read_text())
    assert data["replacements"][1] == ["block.attention", "silence", None]
    assert data["architecture"]["removed_blocks"] == ["block.attention", "block.mlp"]


def changed(folder: Path, change) -> None:
    data = json.loads((folder / MANIFEST_NAME).read_text())
    change(data)
    data["sha256"] = manifest_sha256(data)
    (folder / MANIFEST_NAME).write_text(json.dumps(data))


def test_artifacts_from_before_there_were_blocks_are_read(tmp_path: Path) -> None:
    model, example = ZOO["plain"]()
    source = {"kind": "secateur", "name": "plain"}
    save_artifact(tmp_path / "small", model, Recipe(source, Architecture.of({"0.0": [0, 2]}), (3, 8, 8)))

    def older(data: dict) -> None:
        assert data.pop("replacements") == []
        data.update(schema=1, architecture=data["architecture"]["kept"])

    changed(tmp_path / "small", older)
    loaded = load_artifact(tmp_path / "small", build=lambda source: ZOO["plain"]().model)
    assert loaded.manifest.schema == 1
    assert loaded.manifest.recipe.architecture == Architecture.of({"0.0": [0, 2]})
    assert torch.equal(loaded.model(example), model(example))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([["3", "pass_through"]], r"`replacements\[0\]` must be \[module, stand-in, items\]"),
        ([["3", "explode", None]], "must be pass_through or silence; got explode"),
        ([["3", "silence", 65]], "`replacements.0..items` must be at most 64"),
        ([["3", "silence", 0]], "must be an integer of at least 1"),
        ([["9", "silence", None]], "must name modules of the model; got '9'"),
        ([["", "silence", None]], "must name modules within the model"),
        ([], "must have the tensors that"),
    ],
)
def test_replacements_that_do_not_fit_are_refused(tmp_path: Path, rows: list, message: str) -> None:
    written(tmp_path / "small", "residual")
    changed(tmp_path / "small", lambda data: data.update(replacements=rows))
    with pytest.raises(ArtifactError, match=message):
        load_artifact(tmp_path / "small", build=lambda source: ZOO[source["name"]]().model)


def test_weights_of_removed_modules_are_not_saved(tmp_path: Path) -> None:
    written(tmp_path / "small", "residual")
    manifest = read_manifest(tmp_path / "small")
    assert not any(tensor.name.startswith("3.") for tensor in manifest.tensors)
    weights = (tmp_path / "small" / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == manifest.weights_sha256
