"""An artifact gives back the same model bit for bit, or refuses; a failed save leaves what was there before."""

import errno
import hashlib
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from secateur._files import atomic_folder
from secateur._provenance import Provenance
from secateur.architecture import Architecture
from secateur.errors import ArtifactError
from secateur.export import (
    MANIFEST_NAME,
    WEIGHTS_NAME,
    Edit,
    Recipe,
    amend,
    edits_between,
    is_artifact,
    load_artifact,
    read_manifest,
    save_artifact,
)
from secateur.export.artifact import refuse_no_folder
from secateur.export.manifest import manifest_sha256


class Net(nn.Module):
    """A small net with what makes reloading hard: groups, pads, tied weights, a hidden buffer, several dtypes."""

    def __init__(self, width: int = 8, inner: int = 12) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm = nn.BatchNorm2d(width)
        self.expand = nn.ConvTranspose2d(width, inner, 1)
        self.group = nn.GroupNorm(2, inner)
        self.layer = nn.LayerNorm(inner)
        self.one = nn.Linear(inner, inner, bias=False)
        self.two = nn.Linear(inner, inner)
        self.two.weight = self.one.weight
        self.head = nn.Linear(inner, 5).to(torch.float64)
        self.sizes = [width, inner]
        self.pad = 2
        self.register_buffer("shift", torch.randn(inner), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.depthwise(self.conv(x)).relu())
        x = self.group(self.expand(x)).mean((2, 3))
        x = self.two(self.one(self.layer(x + self.shift))) * self.sizes[0]
        return self.head(nn.functional.pad(x, (0, self.pad))[:, : -self.pad].double())


SOURCE: Mapping[str, object] = {"kind": "secateur", "name": "net", "arguments": {}}


def build(source: Mapping[str, object]) -> nn.Module:
    assert source["name"] == "net"
    return Net()


def cut_net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = Net(width=5, inner=6)
        model.pad = 3
        nn.init.uniform_(model.norm.running_mean)
        return model.eval()


def recipe_of(model: nn.Module, **changes: object) -> Recipe:
    recipe = Recipe(
        source=SOURCE,
        architecture=Architecture.of({"conv": [0, 1, 2, 4, 7]}),
        edits=edits_between(Net(), model),
        input_shape=(3, 9, 9),
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        classes=("ant", "bee"),
        cost_before={"macs": 100, "params": 10},
        cost_after={"macs": 50, "params": 5},
        metrics={"top1": 0.9, "n": 100},
        provenance=Provenance.here("secateur compress", seed=3),
    )
    return replace(recipe, **changes)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = cut_net()
    save_artifact(tmp_path / "small", model, recipe_of(model))
    return tmp_path / "small"


def change_manifest(folder: Path, change) -> None:
    """Change secateur.json and make its hash agree, as somebody who means harm would."""
    data = json.loads((folder / MANIFEST_NAME).read_text())
    change(data)
    data["sha256"] = manifest_sha256(data)
    (folder / MANIFEST_NAME).write_text(json.dumps(data))


def test_reloaded_outputs_are_bit_equal(saved: Path, images: Tensor) -> None:
    model = cut_net()
    loaded = load_artifact(saved, build=build)
    assert torch.equal(loaded.model(images), model(images))
    assert not loaded.model.training
    assert loaded.model.one.weight is loaded.model.two.weight
    assert {k: v.dtype for k, v in loaded.model.state_dict().items()} == {
        k: v.dtype for k, v in model.state_dict().items()
    }


def test_reloaded_sizes_are_those_of_the_saved_model(saved: Path) -> None:
    model, loaded = cut_net(), load_artifact(saved, build=build).model
    assert edits_between(model, loaded) == ()
    assert str(loaded) == str(model)


def test_declared_sizes_follow_the_weights_without_their_edits(tmp_path: Path) -> None:
    model = cut_net()
    needed = tuple(e for e in edits_between(Net(), model) if e.attribute in ("groups", "pad", "sizes"))
    save_artifact(tmp_path / "a", model, recipe_of(model, edits=needed))
    assert str(load_artifact(tmp_path / "a", build=build).model) == str(model)


@pytest.mark.parametrize("kernel", [1, 3])
def test_memory_layout_is_kept(tmp_path: Path, kernel: int) -> None:
    model = nn.Conv2d(8, 8, kernel).to(memory_format=torch.channels_last)
    save_artifact(tmp_path / "a", model, Recipe(SOURCE, Architecture(), (8, 4, 4)))
    loaded = load_artifact(tmp_path / "a", build=lambda _: nn.Conv2d(8, 8, kernel)).model
    assert loaded.weight.stride() == model.weight.stride() != torch.empty(8, 8, kernel, kernel).stride()


def test_bfloat16_is_kept(tmp_path: Path) -> None:
    model = nn.Linear(3, 2).bfloat16()
    save_artifact(tmp_path / "a", model, Recipe(SOURCE, Architecture(), (3,)))
    loaded = load_artifact(tmp_path / "a", build=lambda _: nn.Linear(3, 2)).model
    assert torch.equal(loaded.weight, model.weight)
    assert loaded.weight.dtype is torch.bfloat16


def test_manifest_round_trip(saved: Path) -> None:
    model = cut_net()
    recipe = recipe_of(model)
    manifest = read_manifest(saved)
    assert replace(manifest.recipe, provenance=recipe.provenance) == recipe
    assert manifest.recipe.provenance.seed == 3
    assert manifest.recipe.provenance.versions["torch"] == torch.__version__.split("+")[0]
    assert type(manifest).from_bytes(manifest.to_bytes()) == manifest
    assert {p.name for p in saved.iterdir()} == {MANIFEST_NAME, WEIGHTS_NAME}


def test_loading_and_saving_leave_the_random_state_and_the_model_alone(tmp_path: Path, images: Tensor) -> None:
    model = cut_net().train()
    recipe = recipe_of(model)
    before, state = torch.get_rng_state(), {k: v.clone() for k, v in model.state_dict().items()}
    save_artifact(tmp_path / "a", model, recipe)
    load_artifact(tmp_path / "a", build=build)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())


def test_amend_adds_results(saved: Path, images: Tensor) -> None:
    amend(saved, verification={"reload": {"max_abs": 0.0}}, metrics={"top5": 1.0})
    manifest = load_artifact(saved, build=build).manifest
    assert manifest.recipe.verification == {"reload": {"max_abs": 0.0}}
    assert manifest.recipe.metrics == {"top1": 0.9, "n": 100, "top5": 1.0}


# ---- refusing


@pytest.mark.parametrize("position", [0, 9, 200, -1])
def test_one_changed_byte_is_refused(saved: Path, position: int) -> None:
    data = bytearray((saved / WEIGHTS_NAME).read_bytes())
    data[position] ^= 1
    (saved / WEIGHTS_NAME).write_bytes(data)
    with pytest.raises(ArtifactError, match=r"must have the SHA-256 .* copy the artifact again"):
        load_artifact(saved, build=build)


@pytest.mark.parametrize(("old", "new"), [("0.25", "0.26"), ('"ant"', '"and"'), ('"top1": 0.9', '"top1": 0.99')])
def test_one_changed_fact_is_refused(saved: Path, old: str, new: str) -> None:
    text = (saved / MANIFEST_NAME).read_text()
    assert old in text
    (saved / MANIFEST_NAME).write_text(text.replace(old, new, 1))
    with pytest.raises(ArtifactError, match=r"must have the SHA-256 that its last line says.* by hand"):
        load_artifact(saved, build=build)


@pytest.mark.parametrize("name", [WEIGHTS_NAME, MANIFEST_NAME])
@pytest.mark.parametrize("left", [0, 5, 100])
def test_truncated_files_are_refused(saved: Path, name: str, left: int) -> None:
    (saved / name).write_bytes((saved / name).read_bytes()[:left])
    with pytest.raises(ArtifactError, match=r"SHA-256|must be JSON"):
        load_artifact(saved, build=build)


def test_longer_weights_are_refused(saved: Path) -> None:
    with (saved / WEIGHTS_NAME).open("ab") as file:
        file.write(b"x")
    with pytest.raises(ArtifactError, match=r"must have at most \d+ bytes; got"):
        load_artifact(saved, build=build)


def test_future_schema_is_refused_politely(saved: Path) -> None:
    change_manifest(saved, lambda data: data.update(schema=5, weights="unknown to us"))
    with pytest.raises(ArtifactError, match=r"newer Secateur. Upgrade with `pip install --upgrade secateur`"):
        load_artifact(saved, build=build)


@pytest.mark.parametrize("name", [WEIGHTS_NAME, MANIFEST_NAME])
def test_links_are_refused(saved: Path, name: str) -> None:
    (saved / name).rename(saved.parent / "elsewhere")
    (saved / name).symlink_to(saved.parent / "elsewhere")
    with pytest.raises(ArtifactError, match="must be a regular file; got a symbolic link"):
        load_artifact(saved, build=build)


def test_a_folder_or_pipe_instead_of_a_file_is_refused(saved: Path) -> None:
    (saved / WEIGHTS_NAME).unlink()
    os.mkfifo(saved / WEIGHTS_NAME)
    with pytest.raises(ArtifactError, match="must be a regular file; got a folder or device"):
        load_artifact(saved, build=build)


def test_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"`folder` must hold secateur.json; got no such file"):
        load_artifact(tmp_path / "nowhere", build=build)


def test_a_file_instead_of_the_folder_is_refused(saved: Path) -> None:
    with pytest.raises(ArtifactError, match=r"could not be read: Not a directory\. Check the path"):
        load_artifact(saved / MANIFEST_NAME, build=build)


def test_user_code_needs_trust_or_a_factory(tmp_path: Path, images: Tensor) -> None:
    model = cut_net()
    save_artifact(tmp_path / "a", model, recipe_of(model, source={"kind": "python", "name": "net"}))

    def never(source: Mapping[str, object]) -> nn.Module:
        raise AssertionError("ran untrusted code")

    with pytest.raises(ArtifactError, match=r"`trust_source` must be True .* pass your own `factory`"):
        load_artifact(tmp_path / "a", build=never)
    trusted = load_artifact(tmp_path / "a", build=build, trust_source=True).model
    made = load_artifact(tmp_path / "a", build=never, factory=Net).model
    assert torch.equal(trusted(images), model(images))
    assert torch.equal(made(images), model(images))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format="x"), "`format` must be secateur-artifact"),
        (lambda d: d.update(schema="1"), "`schema` must be an integer"),
        (lambda d: d.pop("source"), "`source` must be present"),
        (lambda d: d["source"].pop("kind"), "`source.kind` must be present"),
        (lambda d: d.update(architecture={"conv": [1, 1]}), "`architecture` is damaged"),
        (lambda d: d["edits"].append(["conv", "groups"]), r"`edits\[\d+\]` must be \[module"),
        (lambda d: d["edits"].append(["conv", "groups", None, "1"]), r"`edits\[\d+\].value` must be an integer"),
        (lambda d: d["edits"].append(["conv", "no_such", None, 1]), "no_such must be an int of the rebuilt model"),
        (lambda d: d["edits"].append(["conv", "forward", None, 1]), "forward must be an int of the rebuilt model"),
        (lambda d: d["edits"].append(["conv", "__class__", None, 1]), "__class__ must be an int of the rebuilt model"),
        (lambda d: d["edits"].append(["conv", "training", None, 1]), "training must be an int of the rebuilt model"),
        (lambda d: d["edits"].append(["nope", "groups", None, 1]), "nope.groups must be an int .* no such module"),
        (lambda d: d["edits"].append(["", "sizes", 7, 1]), r"sizes\[7\] must be an int of the rebuilt model"),
        (lambda d: d["input"].update(mean=["a"]), "`input.mean` must be a list of numbers"),
        (lambda d: d["input"].update(shape=[0]), "`input.shape` must be a list of integers of at least 1"),
        (lambda d: d.update(classes=[1]), "`classes` must be a list of strings"),
        (lambda d: d.update(metrics=[]), "`metrics` must be an object"),
        (lambda d: d.update(edits={}), "`edits` must be a list"),
        (lambda d: d["provenance"].update(versions={"a": 1}), "`provenance.versions` must be an object of strings"),
        (lambda d: d["provenance"].update(command=1), "`provenance.command` must be a string"),
        (lambda d: d.update(weights=1), "`weights` must be an object"),
        (lambda d: d["weights"].update(tensors=d["weights"]["tensors"][1:]), "the rebuilt model must have the tensors"),
        (lambda d: d["weights"]["tensors"][0].update(name="gone"), r"missing 1: \['gone'\], unknown 1"),
        (lambda d: d["weights"]["tensors"][0].update(shape=[5, 3, 3]), "must be float32 of shape"),
        (lambda d: d["weights"]["tensors"][0].update(shape=[2**50]), "must be a list of sizes below"),
        (lambda d: d["weights"]["tensors"][0].update(shape=[1] * 20), "must be a list of at most 8 items"),
        (lambda d: d["weights"]["tensors"][0].update(dtype="object"), "must be object of shape"),
        (lambda d: d["weights"]["tensors"][0].update(layout="odd"), "must have a layout that fits"),
        (lambda d: d["weights"]["tensors"].append(d["weights"]["tensors"][0]), "names everything once; got conv.w"),
        (
            lambda d: next(t for t in d["weights"]["tensors"] if "same_as" in t).update(same_as="x"),
            "must be the same as a tensor of the file; got 'x'",
        ),
        (lambda d: d["weights"].update(sha256=None), "`weights.sha256` must be a string"),
        (lambda d: d["provenance"].update(seed="1"), "`provenance.seed` must be an integer"),
        (lambda d: d["weights"]["tensors"][0].update(buffer="no"), "buffer` must be true or false"),
        (
            lambda d: d["weights"]["tensors"][0].update(buffer=True),
            "must be a parameter of floats with 4 dimensions .* got a buffer",
        ),
    ],
)
def test_damaged_manifests_are_refused(saved: Path, change, message: str) -> None:
    change_manifest(saved, change)
    with pytest.raises(ArtifactError, match=message):
        load_artifact(saved, build=build)


@pytest.mark.parametrize("text", ["[]", "nonsense", '{"schema": NaN}', '{"a": 1, "a": 2}', "[" * 100_000, "\xff"])
def test_manifests_that_are_not_json_objects_are_refused(saved: Path, text: str) -> None:
    (saved / MANIFEST_NAME).write_bytes(text.encode("latin-1"))
    with pytest.raises(ArtifactError, match=r"must be JSON|must hold a JSON object"):
        load_artifact(saved, build=build)


def rewrite_weights(folder: Path, data: bytes) -> None:
    """Replace the weights and make the manifest agree."""
    (folder / WEIGHTS_NAME).write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    change_manifest(folder, lambda d: d["weights"].update(sha256=digest, bytes=len(data)))


@pytest.mark.parametrize("data", [b"", b"\x01", (2**60).to_bytes(8, "little") + b"{}"])
def test_absurd_headers_are_refused(saved: Path, data: bytes) -> None:
    rewrite_weights(saved, data)
    with pytest.raises(ArtifactError, match="must begin with the size of its header"):
        load_artifact(saved, build=build)


def test_a_header_that_is_not_one_is_refused(saved: Path) -> None:
    rewrite_weights(saved, (2).to_bytes(8, "little") + b"[]")
    with pytest.raises(ArtifactError, match=r"model.safetensors is damaged"):
        load_artifact(saved, build=build)


def test_nan_weights_are_refused_on_loading(saved: Path) -> None:
    import safetensors.torch

    tensors = safetensors.torch.load_file(saved / WEIGHTS_NAME)
    tensors["conv.bias"][1] = float("nan")
    rewrite_weights(saved, safetensors.torch.save(tensors))
    with pytest.raises(ArtifactError, match=r"conv.bias must not hold NaN; got 1 \(model.safetensors\)"):
        load_artifact(saved, build=build)


def test_whole_numbers_in_the_place_of_floats_are_refused(saved: Path) -> None:
    import safetensors.torch

    tensors = safetensors.torch.load_file(saved / WEIGHTS_NAME)
    tensors["conv.bias"] = tensors["conv.bias"].long()
    rewrite_weights(saved, safetensors.torch.save(tensors))
    names = [record.name for record in read_manifest(saved).tensors]
    change_manifest(saved, lambda d: d["weights"]["tensors"][names.index("conv.bias")].update(dtype="int64"))
    with pytest.raises(ArtifactError, match=r"conv.bias must be a parameter of floats .* got a parameter of whole"):
        load_artifact(saved, build=build)


def test_another_architecture_of_the_source_is_refused(saved: Path) -> None:
    class Other(Net):
        def __init__(self) -> None:
            super().__init__()
            self.extra = nn.Linear(1, 1)

    with pytest.raises(ArtifactError, match=r"rebuilt model must have the tensors .* unknown 2: \['extra.bias'"):
        load_artifact(saved, build=lambda _: Other())


# ---- saving


def test_a_model_with_nan_is_not_saved(tmp_path: Path) -> None:
    model = cut_net()
    with torch.no_grad():
        model.conv.bias[0] = float("nan")
    with pytest.raises(ArtifactError, match=r"conv.bias must not hold NaN; got 1 of 5 values"):
        save_artifact(tmp_path / "a", model, recipe_of(model))
    assert list(tmp_path.iterdir()) == []


def test_extra_state_is_not_saved(tmp_path: Path) -> None:
    class Stateful(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"steps": 1}

    with pytest.raises(ArtifactError, match="got Stateful with extra state"):
        save_artifact(tmp_path / "a", Stateful(1, 1), Recipe(SOURCE, Architecture(), (1,)))


def test_lazy_and_unusual_tensors_are_not_saved(tmp_path: Path) -> None:
    recipe = Recipe(SOURCE, Architecture(), (1,))
    with pytest.raises(ArtifactError, match="must be initialized; got lazy weight"):
        save_artifact(tmp_path / "a", nn.LazyLinear(3), recipe)
    odd = nn.Module()
    odd.register_buffer("odd", torch.zeros(1, dtype=torch.complex64))
    with pytest.raises(ArtifactError, match="odd must be a dense tensor of a plain dtype"):
        save_artifact(tmp_path / "a", odd, recipe)


def test_edits_that_the_model_contradicts_are_refused(tmp_path: Path) -> None:
    model = cut_net()
    with pytest.raises(ArtifactError, match=r"got pad = 9, the model has 3\. Record them with edits_between"):
        save_artifact(tmp_path / "a", model, recipe_of(model, edits=(Edit("", "pad", None, 9),)))


class Configured(nn.Module):
    """A net whose sizes lie in a configuration, in a dict, in an integer of numpy and in a tensor."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.linear = nn.Linear(3, width)
        self.config = SimpleNamespace(width=width, name="net", parts=[2, width])
        self.table = {"inner": (width, 3), "steps": 0}
        self.number = np.int64(width)
        self.register_buffer("shape", torch.tensor([-1, width]), persistent=False)


def test_sizes_in_configurations_and_tensors_are_recorded_and_set(tmp_path: Path) -> None:
    model = Configured(5).eval()
    model.table["steps"] = 10_000
    edits = edits_between(Configured(), model)
    assert [(e.attribute, e.item, e.value) for e in edits if not e.module] == [
        ("config", "width", 5),
        ("config", ("parts", 1), 5),
        ("table", ("inner", 0), 5),
        ("number", None, 5),
        ("shape", 1, 5),
    ]
    save_artifact(tmp_path / "a", model, Recipe(SOURCE, Architecture(), (3,), edits=edits))
    loaded = load_artifact(tmp_path / "a", build=build, factory=Configured).model
    assert (loaded.config.width, loaded.config.parts, loaded.table["inner"]) == (5, [2, 5], (5, 3))
    assert (type(loaded.number), int(loaded.number), loaded.shape.tolist()) == (np.int64, 5, [-1, 5])


@pytest.mark.parametrize("item", [["parts"], ["parts", -1], ["parts", 1.5], [*"abcdefghi"], -1])
def test_an_impossible_place_of_a_size_is_refused(tmp_path: Path, item: object) -> None:
    model = Configured(5).eval()
    save_artifact(tmp_path / "a", model, Recipe(SOURCE, Architecture(), (3,), edits=edits_between(Configured(), model)))
    change_manifest(tmp_path / "a", lambda data: data["edits"].append(["", "config", item, 3]))
    with pytest.raises(ArtifactError, match=r"edits\[\d\]"):
        load_artifact(tmp_path / "a", build=build, factory=Configured)


@pytest.mark.parametrize("value", [float("nan"), torch.zeros(1)])
def test_metrics_that_are_not_json_are_refused(tmp_path: Path, value: object) -> None:
    model = cut_net()
    with pytest.raises(ArtifactError, match="must hold plain JSON values"):
        save_artifact(tmp_path / "a", model, recipe_of(model, metrics={"x": value}))


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fsync of a file that holds bytes fails, as on a full disk."""
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if os.fstat(descriptor).st_size > 1000 and not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    model = cut_net()
    with pytest.raises(ArtifactError, match=r"No space left on device. Nothing there was changed"):
        save_artifact(tmp_path / "a", model, recipe_of(model))
    assert list(tmp_path.iterdir()) == []


def test_an_older_artifact_survives_a_full_disk(saved: Path, images: Tensor, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue("full_disk")
    model = cut_net()
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    with torch.no_grad():
        model.conv.weight.zero_()
    with pytest.raises(ArtifactError, match="No space left"):
        save_artifact(saved, model, recipe_of(model))
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
    assert [p.name for p in saved.parent.iterdir()] == ["small"]


def test_a_failed_second_rename_puts_the_older_artifact_back(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from secateur import _files as files

    monkeypatch.setattr(files, "_exchange", lambda *_: False)
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if self.suffix == ".part":
            raise OSError(errno.EIO, "Input/output error")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    model = cut_net()
    with pytest.raises(ArtifactError, match="Input/output error"):
        save_artifact(saved, model, recipe_of(model))
    assert [p.name for p in saved.parent.iterdir()] == ["small"]
    assert is_artifact(saved)


@pytest.mark.parametrize("exchange", [True, False])
def test_an_older_artifact_is_replaced_whole(saved: Path, exchange: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from secateur import _files as files

    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda *_: False)
    (saved / "model.onnx").write_bytes(b"of the older model")
    model = cut_net()
    save_artifact(saved, model, recipe_of(model, metrics={"top1": 0.5}))
    assert read_manifest(saved).recipe.metrics == {"top1": 0.5}
    assert {p.name for p in saved.iterdir()} == {MANIFEST_NAME, WEIGHTS_NAME}
    assert [p.name for p in saved.parent.iterdir()] == ["small"]


def test_other_folders_are_not_overwritten(tmp_path: Path, saved: Path) -> None:
    model = cut_net()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(ArtifactError, match=r"must be new, empty, or an older artifact; got .* \['thesis.tex'\]"):
        save_artifact(tmp_path / "mine", model, recipe_of(model))
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"
    (saved / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match=r"nothing but the older artifact .* \['notes.txt'\]"):
        save_artifact(saved, model, recipe_of(model))
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    with pytest.raises(ArtifactError, match="must be a folder or a new path"):
        save_artifact(tmp_path / "link", model, recipe_of(model))


def test_a_draft_folder_holds_everything_before_it_appears(tmp_path: Path, images: Tensor) -> None:
    model = cut_net()
    with atomic_folder(tmp_path / "runs" / "a") as draft:
        save_artifact(draft, model, recipe_of(model))
        (draft / "report.html").write_text("report")
        assert not (tmp_path / "runs" / "a").exists()
    assert torch.equal(load_artifact(tmp_path / "runs" / "a", build=build).model(images), model(images))
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["a"]


def test_edits_need_the_same_modules_and_lengths() -> None:
    with pytest.raises(ArtifactError, match="must have the modules of `original`"):
        edits_between(nn.Sequential(nn.ReLU()), nn.Sequential(nn.ReLU(), nn.ReLU()))
    one, other = Net(), Net()
    other.sizes = [1]
    with pytest.raises(ArtifactError, match="must keep its length"):
        edits_between(one, other)


@pytest.mark.parametrize("place", ["", ".", "..", "/", "../here", "down/.."])
def test_the_current_folder_and_those_above_it_are_not_replaced(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell would stay in a folder that is gone."""
    (tmp_path / "here" / "down").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ArtifactError, match=r"`folder` must not be the current folder or one above it.*Name a new"):
        refuse_no_folder(Path(place))
    refuse_no_folder(Path("down"))
    refuse_no_folder(Path("../beside"))


@pytest.mark.parametrize("place", ["n" * 250, "n" * 300, "ä" * 120, "/".join(["d" * 150] * 40)])
def test_names_without_room_for_those_beside_are_refused(place: str) -> None:
    with pytest.raises(ArtifactError, match=r"`out` must be a path of at most .*Choose a shorter one") as refused:
        refuse_no_folder(Path(place), "out")
    assert len(str(refused.value)) < 200
    refuse_no_folder(Path("n" * 200), "out")
