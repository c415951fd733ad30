"""Numbers that describe widths follow a cut where that can be proven, and are listed where it cannot."""

import dataclasses
import importlib
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from noise_images import noise_data
from run_pipeline import run_compress
from torch import Tensor, nn

import secateur
from secateur.architecture import Architecture
from secateur.graph import trace
from secateur.pipeline import OnExisting
from secateur.prune import DescribedWidth, apply_architecture
from secateur.prune.described_widths import update_described_widths_
from secateur.search import Knapsack
from secateur.train import TrainConfig

IMAGES = torch.randn(1, 3, 40, 40, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self, wide: int, inside: int) -> None:
        super().__init__()
        self.inside = inside
        self.first = nn.Conv2d(wide, inside, 3, padding=1)
        self.second = nn.Conv2d(inside, wide, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x).relu())


@dataclasses.dataclass
class Settings:
    """A configuration that all modules share, as those of transformers do."""

    hidden: int = 24
    inside: int = 12
    rates: tuple[int, ...] = (24, 7)


class Described(nn.Module):
    """A net of which nearly everything is written down in attributes that its forward pass does not read."""

    def __init__(self) -> None:
        super().__init__()
        self.settings = Settings()
        self.num_features = 24
        self.kernel_like = 5  # A kernel has this size.
        self.seeds = 12  # Something of 12 channels is cut in two ways.
        self.stride_like = 8  # The input is 8 times as large as the last map.
        self.shape_of_images = (3, 24, 24)
        self.labels = {"LABEL_0": 0, "LABEL_24": 24}
        self.table = [
            {"channels": 8, "reduction": 2, "at": "stem"},
            {"channels": 24, "reduction": 8, "at": "stages.1"},
        ]
        self.splits = [12, 12]  # Read by the forward pass.
        self.stem = nn.Conv2d(3, 8, 5, stride=2, padding=2)
        self.stages = nn.Sequential(
            nn.Conv2d(8, 24, 3, stride=4, padding=1),
            nn.Sequential(Block(24, 12), Block(24, 12)),
        )
        self.stages[1].settings = self.settings  # type: ignore[assignment]
        self.fc = nn.Linear(24, 10)

    def features(self, x: Tensor) -> Tensor:
        return self.stages(self.stem(x).relu())

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.features(x).split(self.splits, dim=1)
        return self.fc(torch.cat([first, second.sigmoid()], dim=1).mean((2, 3)))

    def reset_classifier(self, classes: int) -> None:
        self.fc = nn.Linear(self.num_features, classes)


def kept(graph: secateur.ChannelGraph) -> Architecture:
    """Of the two inner axes, the second one keeps more."""
    fractions = {axis.name: 2 for axis in graph.prunable}
    inner = [axis.name for axis in graph.prunable if axis.name.startswith("stages.1") and axis.residual_axis is None]
    less = {name: 3 if name == inner[-1] else 2 for name in fractions}
    return Architecture.of({axis.name: range(axis.size // less[axis.name]) for axis in graph.prunable})


def cut_half(model: nn.Module, images: Tensor) -> secateur.prune.Cut:
    graph = secateur.trace(model.eval(), images)
    architecture = Architecture.of({axis.name: range(max(1, axis.size // 2)) for axis in graph.prunable})
    return secateur.cut(model, graph, architecture)


def test_what_is_proven_follows_and_the_rest_is_listed() -> None:
    torch.manual_seed(0)
    model = Described()
    graph = secateur.trace(model.eval(), IMAGES)
    cut = secateur.cut(model, graph, kept(graph))
    small: Any = cut.model
    width = small.fc.in_features
    assert width < 24
    assert small.num_features == width
    assert small.settings.hidden == width
    # The shared object is counted once, and the caller's is as it was.
    assert small.stages[1].settings is small.settings
    assert (model.settings, model.num_features) == (Settings(), 24)
    assert [entry["channels"] for entry in small.table] == [small.stem.out_channels, width]
    assert [entry["reduction"] for entry in small.table] == [2, 8]
    assert small.stages[1][0].inside == small.stages[1][0].first.out_channels
    assert small.stages[1][1].inside == small.stages[1][1].first.out_channels
    assert small.stages[1][0].inside != small.stages[1][1].inside
    # Not widths, or not to be told from them.
    assert (small.kernel_like, small.stride_like, small.shape_of_images) == (5, 8, (3, 24, 24))
    assert small.labels == {"LABEL_0": 0, "LABEL_24": 24}
    assert small.settings.rates == (24, 7)
    assert {width.place for width in cut.described.stale} == {"seeds", "settings.inside", "stride_like"}
    assert DescribedWidth("num_features", 24, width) in cut.described.followed
    assert "seeds = 12" in cut.described.warning
    small.reset_classifier(4)
    assert small(IMAGES).shape == (1, 4)


def hidden_reader() -> Any:
    """A net that reads its width by a name that no code mentions."""

    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.width = 24
            self.one, self.two = nn.Conv2d(3, 24, 3), nn.Conv2d(24, 5, 3)
            self.name = "wi"

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x)) * (1 + vars(self)[self.name + "".join(map(chr, (100, 116, 104)))])

    return Hidden()


def test_a_number_with_an_effect_that_no_code_names_stays() -> None:
    torch.manual_seed(0)
    cut = cut_half(hidden_reader(), IMAGES)
    assert cut.model.two.in_channels == 12
    assert cut.model.width == 24
    assert [width.place for width in cut.described.stale] == ["width"]


def test_it_stays_in_a_resumed_run_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_args: object, **_kwargs: object) -> None:
        raise KeyboardInterrupt

    torch.manual_seed(0)
    model = nn.Sequential(hidden_reader(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4))
    words = {"budget": "macs=60%", "train": TrainConfig(0, 8), "out": tmp_path / "run", "export": (), "times": False}
    with monkeypatch.context() as patch:
        patch.setattr(importlib.import_module("secateur.pipeline.compress"), "train_with_teacher", stop)
        with pytest.raises(KeyboardInterrupt):
            run_compress(model, noise_data(), **{**words, "train": TrainConfig(1, 8)})
    resumed: Any = run_compress(model, noise_data(), on_existing=OnExisting.RESUME, **words)
    assert resumed.model[0].two.in_channels < 24
    assert resumed.model[0].width == 24
    assert [width.place for width in resumed.described.stale] == ["0.width"]


class Layer(nn.Module):
    def __init__(self, given: int, made: int, stride: int) -> None:
        super().__init__()
        self.made = made
        self.conv = nn.Conv2d(given, made, 3, stride, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).relu()


@pytest.mark.parametrize("others", [1, 2])
def test_a_size_that_feature_maps_have_too_follows_where_its_like_does(others: int) -> None:
    torch.manual_seed(0)
    # The first layer has 20 channels and maps of 20 x 20.
    like = [Layer(20 + 4 * n, 24 + 4 * n, 1) for n in range(others)]
    model = nn.Sequential(Layer(3, 20, 2), *like, nn.Conv2d(20 + 4 * others, 5, 1))
    cut = cut_half(model, IMAGES)
    assert cut.model[0].conv.out_channels == 10
    assert cut.model[0].made == (10 if others >= 2 else 20)
    assert [width.place for width in cut.described.stale] == ([] if others >= 2 else ["0.made"])


def test_nothing_to_say() -> None:
    torch.manual_seed(0)
    model = Described()
    graph = secateur.trace(model.eval(), IMAGES)
    cut = secateur.cut(model, graph, Architecture())
    assert cut.described == secateur.prune.DescribedWidths()
    assert cut.described.warning == ""


def test_an_artifact_has_them_after_any_number_of_cuts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Described()
    cut = cut_half(cut_half(model, IMAGES).model, IMAGES)
    with pytest.warns(UserWarning, match="factory="):
        secateur.save(cut, tmp_path / "small")
    loaded: Any = secateur.load(tmp_path / "small", factory=Described).model
    assert loaded.num_features == loaded.fc.in_features == cut.model.fc.in_features
    assert loaded.table == cut.model.table
    assert loaded.settings == cut.model.settings


TIMM = ("test_resnet", "test_efficientnet", "test_convnext", "test_vit_relpos", "test_mambaout", "test_nfnet")


@pytest.mark.parametrize("name", TIMM)
def test_heads_and_feature_tables_of_real_nets(name: str) -> None:
    torch.manual_seed(0)
    model: Any = timm.create_model(name, num_classes=10).eval()
    images = torch.randn(1, 3, 160, 160)
    cut = cut_half(model, images)
    small: Any = cut.model
    maps = small.forward_features(images)
    assert small.num_features < model.num_features
    assert small.num_features in maps.shape
    small.reset_classifier(7)
    assert small(images).shape == (1, 7)
    # Every row of the table names a module: its output has that many channels.
    shapes: dict[str, torch.Size] = {}
    for module_name, module in small.named_modules():
        module.register_forward_hook(lambda _m, _a, out, at=module_name: shapes.__setitem__(at, out.shape))
    small(images)
    for row in small.feature_info:
        assert row["num_chs"] in shapes[row["module"]]
    assert [row["reduction"] for row in small.feature_info] == [row["reduction"] for row in model.feature_info]


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_convnext"])
def test_wrappers_that_return_feature_maps(name: str) -> None:
    torch.manual_seed(0)
    model: Any = timm.create_model(name, features_only=True).eval()
    images = torch.randn(1, 3, 160, 160)
    small: Any = cut_half(model, images).model
    with torch.no_grad():
        maps = small(images)
    assert small.feature_info.channels() == [each.shape[1] for each in maps]
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
def test_a_configuration_follows_and_loads(tmp_path: Path) -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, image_size=32, patch_size=8
    )
    model = transformers.ViTForImageClassification(config).eval()
    images = torch.randn(1, 3, 32, 32)
    graph = secateur.trace(model, images)
    # The inner layers of both blocks alike: a configuration has one number for all of them.
    inner = {a.name: range(a.size // 2) for a in graph.prunable if a.size == 96}
    assert len(inner) == 2
    small: Any = secateur.cut(model, graph, Architecture.of(inner)).model
    assert (small.config.intermediate_size, small.config.hidden_size) == (48, 48)
    small.save_pretrained(tmp_path)
    loaded = transformers.ViTForImageClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(images).logits, small(images).logits)


def test_a_run_says_what_is_stale(tmp_path: Path) -> None:
    torch.manual_seed(0)
    heard: list[str] = []
    model = Described()
    model.fc = nn.Linear(24, 4)  # As many classes as the data have.
    model.num_images = 24  # type: ignore[assignment]
    model.stages[1].append(nn.Upsample(scale_factor=24))  # The maps have height 1: now something else is 24, too.
    result = run_compress(
        model, noise_data(), budget="macs=50%", train=TrainConfig(0, 8), hear=heard.append, strategy=Knapsack(),
        out=tmp_path / "run", export=(), times=False,
    )  # fmt: skip
    small: Any = result.model
    assert small.fc.in_features < 24
    stale = {width.place for width in result.described.stale}
    assert "num_images" in stale
    (said,) = [line for line in heard if "may describe widths before the cut" in line]
    assert "num_images = 24" in said
    assert any("num_images = 24" in note for note in result.report.notes)


def test_the_original_does_not_run_again_for_the_cuts_of_a_graph() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.width = 8
            self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.relu(self.first(x)))

    model = Wide().eval()
    graph = trace(model, torch.zeros(1, 3, 23, 23))
    runs: list[int] = []
    handle = model.first.register_forward_hook(lambda *_: runs.append(1))
    found = []
    for kept in (range(4), range(6)):
        small = apply_architecture(model, graph, Architecture.of({"first": kept}))
        # What is cut is a copy with the hook on it.
        small.first._forward_hooks.clear()
        found.append(update_described_widths_(model, small, graph))
    handle.remove()
    assert not runs
    assert [[(each.before, each.after) for each in one.followed] for one in found] == [[(8, 4)], [(8, 6)]]
