"""What is refused before any work begins."""

import math
import os
from pathlib import Path

import pytest
import torch
from noise_images import noise_data
from torch import nn

from secateur.errors import ArtifactError, ModelError
from secateur.pipeline import check_model_fits_data, check_output


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
