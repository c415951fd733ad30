"""Weight files: what fits is loaded, and what does not fit is named in the error."""

import copy
import math
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from secateur.errors import ModelError
from secateur.models import digits_resnet, load_model, load_weights_, read_weights


@pytest.fixture
def state() -> dict[str, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return digits_resnet().state_dict()


def same(model: nn.Module, state: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w.pth", "w.th", "w.bin"])
def test_both_kinds_of_file_load(tmp_path: Path, state: dict[str, Tensor], name: str):
    path = tmp_path / name
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    model, _ = load_model("digits_resnet", weights=path)
    assert same(model, state)
    assert not model.training


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod."])
def test_nested_and_prefixed_torch_files_load(tmp_path: Path, state: dict[str, Tensor], key: str, prefix: str):
    path = tmp_path / "w.pt"
    torch.save({key: {prefix + name: t for name, t in state.items()}, "epoch": 3, "best": 91.7}, path)
    model, _ = load_model("digits_resnet", weights=path)
    assert same(model, state)


def test_a_prefix_that_the_model_has_too_stays(tmp_path: Path):
    model, path = nn.DataParallel(nn.Linear(2, 2)), tmp_path / "w.safetensors"
    save_file({"module.weight": torch.eye(2), "module.bias": torch.ones(2)}, path)
    load_weights_(model, path)
    assert torch.equal(model.module.weight, torch.eye(2))


def test_half_precision_weights_are_converted(tmp_path: Path, state: dict[str, Tensor]):
    path = tmp_path / "w.safetensors"
    half = {name: t.half() if t.is_floating_point() else t for name, t in state.items()}
    save_file(half, path)
    model, _ = load_model("digits_resnet", weights=path)
    assert same(model, {name: t.float() if t.is_floating_point() else t for name, t in half.items()})


def test_old_files_may_lack_the_batch_counter(tmp_path: Path, state: dict[str, Tensor]):
    path = tmp_path / "w.safetensors"
    save_file({name: t for name, t in state.items() if "num_batches" not in name}, path)
    model, _ = load_model("digits_resnet", weights=path)
    assert same(model, state)


def test_shared_tensors_may_be_stored_once(tmp_path: Path):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            self.b.weight = self.a.weight

    path, model = tmp_path / "w.safetensors", Tied()
    save_file({"b.weight": torch.eye(3)}, path)
    load_weights_(model, path)
    assert torch.equal(model.a.weight, torch.eye(3))
    assert model.a.weight is model.b.weight


def test_missing_files_are_named(tmp_path: Path):
    with pytest.raises(ModelError, match=r"`weights` must be a file; there is none at .*none\.safetensors"):
        load_model("digits_resnet", weights=tmp_path / "none.safetensors")


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
@pytest.mark.parametrize("kept", [0, 5, 300, 0.5, 0.99])
def test_truncated_files_are_refused(tmp_path: Path, state: dict[str, Tensor], name: str, kept: float):
    path = tmp_path / name
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with pytest.raises(ModelError, match=r"must be a complete .*Copy it again"):
        load_model("digits_resnet", weights=path)


@pytest.mark.parametrize("content", [b"hello world, this is text", b"\x80\x02garbage", b"<html>404</html>" * 50])
def test_other_files_are_refused(tmp_path: Path, content: bytes):
    path = tmp_path / "w.pt"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"must be a complete torch or \.safetensors file"):
        read_weights(path)


def test_pickled_models_are_refused(tmp_path: Path):
    path = tmp_path / "w.pt"
    torch.save(digits_resnet(), path)
    with pytest.raises(ModelError, match=r"contains pickled code .*refused .*safetensors\.torch\.save_file"):
        read_weights(path)


def test_code_in_a_pickle_does_not_run(tmp_path: Path):
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "exploded",)  # type: ignore[return-value]

    path = tmp_path / "w.pt"
    torch.save({"state_dict": Bomb()}, path)
    with pytest.raises(ModelError, match="contains pickled code"):
        read_weights(path)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(1)], r"must hold tensors by name \(a state_dict\); got list"),
        ({"weight": torch.zeros(1), "epoch": 3}, "'epoch' is int. Save only model.state_dict"),
        ({}, "must hold tensors by name; it is empty"),
    ],
)
def test_torch_files_without_a_state_dict_are_refused(tmp_path: Path, content: object, message: str):
    path = tmp_path / "w.pt"
    torch.save(content, path)
    with pytest.raises(ModelError, match=message):
        read_weights(path)


def test_names_that_do_not_fit_are_listed_up_to_five(tmp_path: Path, state: dict[str, Tensor]):
    path = tmp_path / "w.safetensors"
    renamed = {name.replace("layer3", "stage3"): t for name, t in state.items()}
    renamed["linear.weight"] = torch.zeros(100, 64)
    save_file(renamed, path)
    with pytest.raises(ModelError) as caught:
        load_model("digits_resnet", weights=path)
    text = str(caught.value)
    assert (
        "10 missing: layer3.0.conv1.weight, layer3.0.bn1.weight, layer3.0.bn1.bias, layer3.0.bn1.running_mean" in text
    )
    assert re.search(r"12 unexpected: (stage3\.\S+, ){5}\.\.\.; ", text)
    assert "1 of another shape: linear.weight (100, 64) (the model has (10, 64))" in text
    assert text.count("layer3") == 5
    assert text.count("stage3") == 5
    assert text.endswith("Check the model's name, num_classes and in_channels against the file.")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_named(tmp_path: Path, state: dict[str, Tensor], value: float):
    path = tmp_path / "w.safetensors"
    state["layer2.0.bn1.running_var"][3] = value
    save_file(state, path)
    with pytest.raises(ModelError, match=r"NaN or infinite values in 1 tensor\(s\): layer2\.0\.bn1\.running_var\. The"):
        load_model("digits_resnet", weights=path)


def test_a_refused_file_leaves_the_model_unchanged(tmp_path: Path, state: dict[str, Tensor]):
    model = digits_resnet()
    before = copy.deepcopy(model.state_dict())
    path = tmp_path / "w.safetensors"
    state["linear.bias"][0] = float("nan")
    save_file(state, path)
    with pytest.raises(ModelError, match=r"linear\.bias"):
        load_weights_(model, path)
    assert same(model, before)


class Masked(nn.Module):
    """A weight, a mask, and a running statistic."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 3))
        self.register_buffer("mask", torch.zeros(2, 2))
        self.register_buffer("running_var", torch.ones(2))


@pytest.mark.parametrize(
    ("name", "value", "held"),
    [
        ("mask", -math.inf, True),
        ("mask", math.inf, True),
        ("mask", math.nan, False),
        ("running_var", math.inf, False),
        ("weight", -math.inf, False),
        ("weight", math.nan, False),
    ],
)
def test_infinity_in_a_mask_is_no_divergence(tmp_path: Path, name: str, value: float, held: bool) -> None:
    state = Masked().state_dict()
    state[name] = torch.full_like(state[name], value)
    torch.save(state, tmp_path / "w.pt")
    model = Masked()
    if held:
        load_weights_(model, tmp_path / "w.pt")
        assert torch.equal(model.state_dict()[name], state[name])
    else:
        with pytest.raises(
            ModelError, match=rf"must hold finite weights; NaN or infinite values in 1 tensor\(s\): {name}"
        ):
            load_weights_(model, tmp_path / "w.pt")


def _nested(layout: torch.layout) -> torch.Tensor:
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=layout)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "made",
    [
        lambda: _nested(torch.strided),
        lambda: _nested(torch.jagged),
        lambda: torch.ones(2, 3).to(torch.float8_e4m3fn),
        lambda: torch.ones(2, 3).to(torch.float8_e5m2),
        lambda: torch.ones(2, 3, dtype=torch.complex64),
        lambda: torch.ones(2, 3).to_sparse(),
        lambda: torch.ones(2, 3).to_sparse_csr(),
        lambda: torch.ones(2, 3, device="meta"),
        lambda: torch.quantize_per_tensor(torch.ones(2, 3), 1.0, 0, torch.qint8),
    ],
)
def test_tensors_that_no_layer_can_take_are_refused(tmp_path: Path, made: Callable[[], torch.Tensor]) -> None:
    torch.save({**Masked().state_dict(), "weight": made()}, tmp_path / "w.pt")
    with pytest.raises(ModelError, match=r"dense tensors of floats or whole numbers; got others: weight"):
        load_weights_(Masked(), tmp_path / "w.pt")


@pytest.mark.skipif(os.name == "nt", reason="names of files are text there")
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_name_that_is_no_text(tmp_path: Path, state: dict[str, Tensor], suffix: str) -> None:
    written = tmp_path / f"w{suffix}"
    save_file(state, written) if suffix == ".safetensors" else torch.save(state, written)
    path = written.rename(tmp_path / f"w\udcff{suffix}")
    found = read_weights(path)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
