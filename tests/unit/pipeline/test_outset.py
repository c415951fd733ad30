"""What is refused before any work begins."""

import math
import os
import warnings
from pathlib import Path

import pytest
import torch
from noise_images import noise_data
from torch import nn

from secateur.errors import ArtifactError, ModelError
from secateur.pipeline import check_model_fits_data, check_output
from secateur.pipeline.workspace import check_has_weights


def test_new_and_empty_folders_are_fine(tmp_path: Path):
    check_output(tmp_path / "new" / "deep")
    check_output(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_link_file_and_foreign_folder(tmp_path: Path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(ArtifactError, match="got a file or link"):
        check_output(tmp_path / "file")
    with pytest.raises(ArtifactError, match="got a file or link"):
        check_output(tmp_path / "link")
    with pytest.raises(ArtifactError, match="new, empty, or an older artifact"):
        check_output(tmp_path)
    with pytest.raises(ArtifactError, match="cannot be"):
        check_output(tmp_path / "file" / "below")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="permissions do not bind this user")
def test_folder_that_cannot_be_written(tmp_path: Path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(ArtifactError, match="change its permissions"):
            check_output(tmp_path / "out")
    finally:
        tmp_path.chmod(0o700)


def test_what_appeared_during_an_unfinished_run_does_not_stop_it(tmp_path: Path):
    """As the logs of --tensorboard out/logs; without such a run it is somebody else's folder."""
    (tmp_path / "out" / "logs").mkdir(parents=True)
    with pytest.raises(ArtifactError, match="new, empty, or an older artifact"):
        check_output(tmp_path / "out")
    (tmp_path / "out.work").mkdir()
    (tmp_path / "out.work" / "settings.json").write_text("{}")
    check_output(tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_in_another_type_is_refused_with_the_way_out(dtype: torch.dtype):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 4)).to(dtype)
    data = noise_data()
    with pytest.raises(ModelError, match=rf"of the type of the images, torch.float32; got {dtype}.*model.float\(\)"):
        check_model_fits_data(model, data, torch.zeros(2, 3, 8, 8), targets=torch.tensor([0, 3]))
    check_model_fits_data(model.float(), data, torch.zeros(2, 3, 8, 8), targets=torch.tensor([0, 3]))


def test_a_mask_of_infinities_is_no_divergence_and_nan_is():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    model.register_buffer("mask", torch.tensor([0.0, -math.inf]))
    check_model_fits_data(model, noise_data(), torch.zeros(2, 3, 8, 8), targets=torch.tensor([0, 3]))
    model.mask[0] = math.nan
    with pytest.raises(ModelError, match=r"must have finite weights.*mask"):
        check_model_fits_data(model, noise_data(), torch.zeros(2, 3, 8, 8), targets=torch.tensor([0, 3]))


class Returns(nn.Module):
    """A classifier of four classes whose logits are made something else."""

    def __init__(self, change):
        super().__init__()
        self.layer, self.change = nn.Linear(192, 4), change

    def forward(self, images):
        return self.change(self.layer(images.flatten(1)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda logits: logits.to_sparse(), "one of the layout sparse_coo"),
        (lambda logits: logits.to("meta"), "one on the meta device, without values"),
        (lambda logits: torch.nested.nested_tensor(list(logits)), "one nested"),
        (lambda logits: logits.to(torch.float8_e4m3fn), "one of the type torch.float8_e4m3fn"),
    ],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_outputs_that_nothing_can_be_computed_with_are_refused(change, said: str):
    with pytest.raises(ModelError, match=f"must return ordinary tensors; Returns returned {said}"):
        check_model_fits_data(Returns(change), noise_data(), torch.zeros(2, 3, 8, 8), targets=torch.tensor([0, 3]))


class WithState(Returns):
    """A state that holds what is no tensor."""

    def state_dict(self, *args, **kwargs):
        return {**super().state_dict(*args, **kwargs), "version": 3, "inner._extra_state": {"calls": 1}}


def strange_models() -> dict[str, nn.Module]:
    made = {name: Returns(lambda logits: logits) for name in ("sparse", "eight bits")}
    made["sparse"].odd = nn.Parameter(torch.eye(3).to_sparse())
    made["eight bits"].odd = nn.Parameter(torch.zeros(3).to(torch.float8_e4m3fn), requires_grad=False)
    return {**made, "no tensor": WithState(lambda logits: logits)}


@pytest.mark.parametrize("name", ["sparse", "eight bits", "no tensor"])
def test_models_of_strange_tensors_are_measured_but_not_cut(name: str):
    model = strange_models()[name]
    with pytest.raises(ModelError, match=r"must have ordinary tensors to cut and to store; (odd|version) is "):
        check_has_weights(model)
    if name != "sparse":  # PyTorch cannot copy one.
        check_model_fits_data(model, noise_data(), torch.zeros(2, 3, 8, 8), targets=torch.tensor([0, 3]))


def test_a_quantized_model_is_measured_but_not_cut():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch is about to move it to another package.
        model = torch.ao.quantization.quantize_dynamic(Returns(lambda logits: logits), {nn.Linear})
    check_model_fits_data(model, noise_data(), torch.zeros(2, 3, 8, 8), targets=torch.tensor([0, 3]))
    with pytest.raises(
        ModelError, match=r"layer\._packed_params.* is no tensor.*quantize the result \(--export int8\)"
    ):
        check_has_weights(model)
