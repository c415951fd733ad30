"""Weights with many zeros take little space in an artifact, and come back bit for bit."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from zoo import ZOO

from secateur.architecture import Architecture
from secateur.errors import ArtifactError
from secateur.export import (
    MANIFEST_NAME,
    WEIGHTS_NAME,
    Recipe,
    edits_between,
    load_artifact,
    read_manifest,
    save_artifact,
)
from secateur.export import weights_bytes as size_of_weights
from secateur.export.manifest import manifest_sha256
from secateur.models import cifar_resnet20, load_model
from secateur.prune import (
    ERKAllocation,
    MagnitudeScore,
    WeightPruning,
    apply_masks,
    get_masks,
    make_permanent_,
    nonzero_params,
    prunable_weights,
)


def pruned(model: nn.Module, density: float) -> nn.Module:
    """With masks."""
    return apply_masks(model, WeightPruning(MagnitudeScore(), ERKAllocation()).masks(model, density)).eval()


def written(folder: Path, model: nn.Module, name: str = "cifar_resnet20", size: tuple[int, ...] = (3, 32, 32)) -> Path:
    save_artifact(folder, model, Recipe({"kind": "secateur", "name": name}, Architecture(), size))
    return folder


def build(source: Any) -> nn.Module:
    return cifar_resnet20()


def counted_by_hand(model: nn.Module) -> int:
    return sum(int((tensor != 0).sum()) for tensor in model.state_dict().values() if tensor.is_floating_point())


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    return load_model("cifar_resnet20")[0]


def test_at_90_percent_zeros_the_file_is_at_most_a_quarter(tmp_path: Path, resnet: nn.Module) -> None:
    small = pruned(resnet, 0.1)
    written(tmp_path / "dense", resnet)
    written(tmp_path / "small", small)
    dense, sparse = ((tmp_path / name / WEIGHTS_NAME).stat().st_size for name in ("dense", "small"))
    weights = sum(weight.numel() for weight in prunable_weights(resnet).values())
    assert sum(int(kept.sum()) for kept in get_masks(small).values()) == round(0.1 * weights)
    assert dense > 4 * weights
    assert sparse <= 0.25 * dense
    assert (size_of_weights(resnet), size_of_weights(small)) == (dense, sparse)


@pytest.mark.shared
def test_a_trained_network_too(tmp_path: Path, weights_folder: Path) -> None:
    model, source = load_model("cifar_resnet56", weights=weights_folder / "cifar10_resnet56.safetensors")
    small = pruned(model, 0.1)
    save_artifact(tmp_path / "dense", model, Recipe(source.to_json(), Architecture(), (3, 32, 32)))
    save_artifact(tmp_path / "small", small, Recipe(source.to_json(), Architecture(), (3, 32, 32)))
    dense, sparse = ((tmp_path / name / WEIGHTS_NAME).stat().st_size for name in ("dense", "small"))
    assert sparse <= 0.25 * dense
    loaded = load_artifact(tmp_path / "small", build=lambda _: load_model("cifar_resnet56")[0]).model
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(loaded(images), small(images))


def test_what_is_loaded_is_what_was_computed_with(tmp_path: Path, resnet: nn.Module) -> None:
    small = pruned(resnet, 0.2)
    loaded = load_artifact(written(tmp_path / "small", small), build=build)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(loaded.model(images), small(images))
    assert get_masks(small)
    ordinary = make_permanent_(small)
    for name, tensor in ordinary.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor), name
    weights = {name for name, weight in prunable_weights(ordinary).items() if (weight == 0).float().mean() > 0.3}
    assert {record.name for record in loaded.manifest.tensors if record.sparse} >= weights
    assert len(weights) > 15


@pytest.mark.parametrize("name", ZOO)
def test_every_net_comes_back(tmp_path: Path, name: str) -> None:
    model, example = ZOO[name]()
    small = pruned(model, 0.3)
    save_artifact(tmp_path / "small", small, Recipe({"kind": "secateur", "name": name}, Architecture(), (3, 8, 8)))
    loaded = load_artifact(tmp_path / "small", build=lambda _: ZOO[name]().model)
    with torch.no_grad():
        assert torch.equal(loaded.model(example), small(example))
    assert loaded.manifest.nonzero == nonzero_params(small) == nonzero_params(loaded.model)


class Kinds(nn.Module):
    """Tensors of many kinds that are mostly zero: signed zeros, bfloat16, integers, channels last, tied ones."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 32, 3).to(memory_format=torch.channels_last)
        self.brief = nn.Linear(64, 64).to(torch.bfloat16)
        self.one, self.two = nn.Linear(40, 40), nn.Linear(40, 40)
        self.two.weight = self.one.weight
        self.register_buffer("counts", torch.zeros(500, dtype=torch.int64))
        self.register_buffer("flags", torch.zeros(5000, dtype=torch.bool))
        with torch.no_grad():
            for tensor in self.state_dict().values():
                tensor[2:] = 0
            self.conv.weight[3, :2] = -0.0
            self.counts[7] = -3
            self.flags[4999] = True

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_tensors_of_all_kinds_come_back_bit_for_bit(tmp_path: Path) -> None:
    model = Kinds()
    loaded = load_artifact(written(tmp_path / "kinds", model), build=lambda _: Kinds())
    sparse = {record.name for record in loaded.manifest.tensors if record.sparse}
    assert sparse == {"conv.weight", "brief.weight", "one.weight", "counts", "flags"}
    for name, tensor in model.state_dict().items():
        found = loaded.model.state_dict()[name]
        assert found.dtype == tensor.dtype
        assert found.stride() == tensor.stride()
        assert torch.equal(found, tensor)
        if tensor.is_floating_point():
            assert torch.equal(found.signbit(), tensor.signbit())
    assert loaded.model.two.weight is loaded.model.one.weight


def test_a_dense_model_is_stored_as_ever(tmp_path: Path, resnet: nn.Module) -> None:
    folder = written(tmp_path / "dense", resnet)
    assert not any(record.sparse for record in read_manifest(folder).tensors)
    stored = safetensors.torch.load_file(folder / WEIGHTS_NAME)
    assert {name: tensor.shape for name, tensor in stored.items()} == {
        name: tensor.shape for name, tensor in resnet.state_dict().items()
    }


def test_nonzero_parameters_are_counted(tmp_path: Path, resnet: nn.Module) -> None:
    small = pruned(resnet, 0.2)
    manifest = read_manifest(written(tmp_path / "small", small))
    ordinary = make_permanent_(small)
    by_hand = sum(int((parameter != 0).sum()) for parameter in ordinary.parameters())
    assert manifest.nonzero == by_hand == nonzero_params(ordinary)
    assert json.loads((tmp_path / "small" / MANIFEST_NAME).read_text())["weights"]["nonzero"] == by_hand


def changed(folder: Path, change: Any) -> None:
    data = json.loads((folder / MANIFEST_NAME).read_text())
    change(data)
    data["sha256"] = manifest_sha256(data)
    (folder / MANIFEST_NAME).write_text(json.dumps(data))


def test_artifacts_from_before_are_read(tmp_path: Path, resnet: nn.Module) -> None:
    folder = written(tmp_path / "dense", resnet)

    def older(data: dict) -> None:
        assert data["weights"].pop("nonzero") > 0
        data.update(schema=3)

    changed(folder, older)
    loaded = load_artifact(folder, build=build)
    assert (loaded.manifest.schema, loaded.manifest.nonzero) == (3, None)
    assert torch.equal(loaded.model.conv1.weight, resnet.conv1.weight)


def rewritten(folder: Path, change: Any) -> None:
    """Another weights file, with the right hash: an attack, not an accident."""
    tensors = safetensors.torch.load_file(folder / WEIGHTS_NAME)
    change(tensors)
    content = safetensors.torch.save(tensors)
    (folder / WEIGHTS_NAME).write_bytes(content)
    hashed = hashlib.sha256(content).hexdigest()
    changed(folder, lambda data: data["weights"].update(sha256=hashed, bytes=len(content)))


W = "layer3.2.conv2.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{W}/bits"), rf"{W} must be stored as secateur.json says, sparsely.*parts are missing"),
        (lambda t: t.update({f"{W}/bits": t[f"{W}/bits"][1:].clone()}), "parts are missing, or are those of another"),
        (lambda t: t.update({f"{W}/values": t[f"{W}/values"][1:].clone()}), "do not fit each other"),
        (lambda t: t.update({f"{W}/shape": torch.tensor([2**40, 2**40])}), "parts are missing, or are those of"),
        (lambda t: t.update({f"{W}/values": t[f"{W}/values"].to(torch.int64)}), "must be float32 of shape"),
        (lambda t: t.update({W: torch.zeros(64, 64, 3, 3)}), "it is there as a whole"),
        (lambda t: t.update({"more": torch.zeros(1)}), r"unknown 1: \['more'\]"),
        (lambda t: t[f"{W}/values"].fill_(0x7FC00000), "must not hold NaN"),
        (lambda t: t[f"{W}/values"][:1].fill_(0), "`weights.nonzero` must be the number of parameters that are not"),
    ],
)
def test_damaged_parts_are_refused(tmp_path: Path, resnet: nn.Module, change: Any, message: str) -> None:
    folder = written(tmp_path / "small", pruned(resnet, 0.1))
    rewritten(folder, change)
    with pytest.raises(ArtifactError, match=message):
        load_artifact(folder, build=build)


@pytest.mark.parametrize(("field", "value"), [("sparse", "yes"), ("sparse", 2)])
def test_a_record_that_is_no_yes_or_no_is_refused(tmp_path: Path, resnet: nn.Module, field: str, value: object) -> None:
    folder = written(tmp_path / "small", pruned(resnet, 0.1))
    changed(folder, lambda data: data["weights"]["tensors"][0].update({field: value}))
    with pytest.raises(ArtifactError, match=rf"tensors\[0\]\.{field}` must be true or false"):
        load_artifact(folder, build=build)


def test_edits_of_a_masked_model_are_those_of_the_model(resnet: nn.Module) -> None:
    assert edits_between(resnet, make_permanent_(pruned(resnet, 0.5))) == ()
