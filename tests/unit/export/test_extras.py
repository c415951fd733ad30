"""OpenVINO and ExecuTorch: files that equal the model, and a clear word where the library is missing."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from secateur.errors import ExportError
from secateur.export import (
    compare_file,
    export_executorch,
    export_openvino,
)

IMAGES = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def _or_skip(export, name: str):
    library = "openvino" if name.endswith(".xml") else "executorch"
    missing = importlib.util.find_spec(library) is None
    skip = pytest.mark.skipif(missing, reason=f"{library} is not installed: pip install 'secateur[{library}]'")
    return pytest.param(export, name, id=library, marks=skip)


FORMATS = pytest.mark.parametrize(
    ("export", "name"),
    [
        _or_skip(export_openvino, "model.xml"),
        _or_skip(export_executorch, "model.pte"),
    ],
)


def _model(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        norm = nn.BatchNorm2d(6)
        nn.init.uniform_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2)
        convolved = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), norm, nn.SiLU(), nn.AvgPool2d(4))
        return nn.Sequential(convolved, nn.Flatten(), nn.Linear(24, 5)).eval()


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@FORMATS
def test_file_equals_the_model_for_any_batch(export, name: str, tmp_path: Path) -> None:
    model = _model().train()
    state, random = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    parity = export(model, IMAGES, tmp_path / name)
    assert parity.max_rel <= parity.tolerance == 1e-4
    assert parity.batch_sizes == (1, 5)
    assert model.training
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    for n in (1, 2, 3, 5):
        same = compare_file(tmp_path / name, _model(), IMAGES[:n])
        assert same.max_rel <= 1e-5
        assert same.batch_sizes == (n,)
    assert compare_file(tmp_path / name, _model(seed=1), IMAGES).max_rel > 0.01
    assert _names(tmp_path) == (["model.bin", "model.xml"] if name == "model.xml" else ["model.pte"])


@FORMATS
def test_a_file_that_disagrees_leaves_the_older_one(export, name: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"must compute what the model computes to within -1"):
        export(_model(), IMAGES, tmp_path / name, tolerance=-1.0)
    assert _names(tmp_path) == []
    export(_model(), IMAGES, tmp_path / name)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ExportError, match=r"must compute what the model computes"):
        export(_model(seed=1), IMAGES, tmp_path / name, tolerance=-1.0)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@FORMATS
def test_broken_file_says_so(export, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"not a model")
    with pytest.raises(ExportError, match=r"it does not run \(.*\): export it again"):
        compare_file(tmp_path / name, _model(), IMAGES)


@pytest.mark.parametrize(
    ("export", "library", "name"),
    [
        (export_openvino, "openvino", "model.xml"),
        (export_executorch, "executorch", "model.pte"),
    ],
)
def test_missing_library_is_named_with_its_command(
    export, library: str, name: str, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(
        ExportError, match=rf"{library}, which is not installed\. Run: pip install 'secateur\[{library}\]'"
    ):
        export(_model(), IMAGES, tmp_path / name)
    with pytest.raises(ExportError, match=r"`path` must end in"):
        export(_model(), IMAGES, tmp_path / "model.zip")
    assert _names(tmp_path) == []


def test_library_that_does_not_fit_is_named(tmp_path: Path, monkeypatch) -> None:
    broken = tmp_path / "site" / "openvino"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('undefined symbol: ov_new')")
    for module in [found for found in sys.modules if found.split(".")[0] == "openvino"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    with pytest.raises(ExportError, match=r"openvino must fit the other packages; .*undefined symbol: ov_new"):
        export_openvino(_model(), IMAGES, tmp_path / "model.xml")


@pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="openvino is not installed")
def test_openvino_alone_reads_what_was_written(tmp_path: Path) -> None:
    import openvino

    export_openvino(_model(), IMAGES, tmp_path / "model.xml")
    compiled = openvino.compile_model(tmp_path / "model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = torch.from_numpy(compiled(IMAGES.numpy())[0])
    wanted: Tensor = _model()(IMAGES).detach()
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert str(tmp_path) not in (tmp_path / "model.xml").read_text()


@pytest.mark.skipif(importlib.util.find_spec("executorch") is None, reason="executorch is not installed")
def test_executorch_has_a_largest_batch(tmp_path: Path) -> None:
    assert export_executorch(_model(), IMAGES, tmp_path / "model.pte", largest_batch=3).batch_sizes == (1, 3)
    with pytest.raises(ExportError, match="it does not run"):
        compare_file(tmp_path / "model.pte", _model(), IMAGES[:4])
    with pytest.raises(ExportError, match="`largest_batch` must be at least 2; got 1"):
        export_executorch(_model(), IMAGES, tmp_path / "model.pte", largest_batch=1)
