"""Exported files in a folder whose name is no text: names of files are bytes, and many libraries take only UTF-8."""

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hostile_onnx import IMAGES, network

from secateur.export import compare_file, export_onnx, export_openvino, export_pt2, open_session, session_runner

pytestmark = pytest.mark.skipif(os.name == "nt", reason="names of files are text there")
needs_openvino = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="OpenVINO is not installed")


@pytest.mark.parametrize(
    ("export", "name"),
    [
        (export_onnx, "model.onnx"),
        (export_pt2, "model.pt2"),
        pytest.param(export_openvino, "model.xml", marks=needs_openvino),
    ],
)
def test_a_folder_whose_name_is_no_text(tmp_path: Path, export: Callable[..., object], name: str) -> None:
    folder = tmp_path / "out\udcff"
    folder.mkdir()
    export(network(), IMAGES, folder / name)
    assert compare_file(folder / name, network(), IMAGES).max_rel < 1e-4
    if name == "model.onnx":
        assert session_runner(open_session(folder / name, threads=1))((IMAGES,))[0].shape == (2, 3)
