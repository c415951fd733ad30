"""Run exported files where they lie and compare them with the model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from secateur.export import TOLERANCE
from secateur.pipeline._plan import Format
from secateur.report import Check


def check_exported(path: Path, form: Format, model: nn.Module, images: Tensor) -> Check:
    """Run one exported file on images and compare the outputs with the model's.

    Args:
        path: The file.
        form: What it is. A ``.pt2`` file must be trusted: torch may unpickle parts of it.
        model: In eval mode, on the CPU.
        images: A batch.
    """
    name = f"{path.name} = model in PyTorch"
    with torch.no_grad():
        wanted = model(images).double()
    try:
        found = _RUNNERS[form](path, images).double()
    except Exception as error:
        # Whatever is wrong with a file from outside, the check has failed, and the others should still run.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return Check(name, False, detail=f"it does not run ({reason}): export it again")
    if found.shape != wanted.shape:
        return Check(name, False, detail=f"outputs have shape {tuple(found.shape)}, not {tuple(wanted.shape)}")
    absolute = float((found - wanted).abs().max())
    relative = absolute / max(float(wanted.abs().max()), 1e-30)
    return Check(name, relative <= TOLERANCE, absolute, relative, TOLERANCE, f"batch size {len(images)}")


def _run_onnx(path: Path, images: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    outputs = cast(list[Any], session.run(None, {session.get_inputs()[0].name: images.numpy()}))
    return torch.from_numpy(outputs[0])


def _run_pt2(path: Path, images: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.export.load(path).module()(images)


_RUNNERS: dict[Format, Callable[[Path, Tensor], Tensor]] = {Format.ONNX: _run_onnx, Format.PT2: _run_pt2}
