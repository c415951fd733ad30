"""Exported files in an artifact, run again where they lie."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from torch import Tensor, nn

from secateur.artifact import Manifest, read_bytes
from secateur.data import ImageData
from secateur.errors import ArtifactError, ExportError
from secateur.export import LEAST_KEPT, check_extra, compare_file, compare_int8_file, eval_copy, onnx_bytes
from secateur.pipeline._export import BATCH, RECORD
from secateur.pipeline._formats import Format
from secateur.pipeline._probe import probe_images
from secateur.report import Check

_MOST_BYTES = 2**31
"""Of an int8 file: it is one protobuf message, and those end there."""


def check_files(
    folder: Path, model: nn.Module, manifest: Manifest, data: ImageData | None, *, trust_source: bool
) -> tuple[list[Check], tuple[str, ...]]:
    """Compare every exported file with the model.

    Args:
        folder: The artifact.
        model: Loaded from it.
        manifest: What it says.
        data: For the accuracy of an int8 file; without it the file must be the one whose accuracy was recorded.
        trust_source: Whether to read files that could do harm.

    Returns:
        A check for each file that was run, and a sentence for each that was not.
    """
    checks, passed_over = list[Check](), list[str]()
    images = probe_images(manifest.recipe.input_shape)
    for form in Format:
        path = folder / form.file
        if not os.path.lexists(path):
            continue
        reason = _not_now(form, trust_source=trust_source)
        if reason:
            passed_over.append(f"{form.file} was not checked: {reason}")
        elif form is Format.INT8:
            checks.append(_int8_check(path, model, manifest, data))
        else:
            checks.append(_file_check(path, model, images))
    return checks, tuple(passed_over)


def _not_now(form: Format, *, trust_source: bool) -> str:
    """Why a format is passed over; empty if it is not."""
    if form.trusting and not trust_source:
        return "a file from a stranger could do harm when it is read. If you trust it, say --trust-source."
    try:
        if form.extra is not None:
            check_extra(form.extra)
    except ExportError as error:
        return str(error)
    return ""


def _file_check(path: Path, model: nn.Module, images: Tensor) -> Check:
    """Whatever is wrong with a file from outside, the check has failed, and the others still run."""
    name = f"{path.name} = model in PyTorch"
    try:
        found = compare_file(path, model, images)
    except ExportError as error:
        return Check(name, False, detail=str(error))
    held = found.max_rel <= found.tolerance
    return Check(name, held, found.max_abs, found.max_rel, found.tolerance, f"batch size {len(images)}")


def _int8_check(path: Path, model: nn.Module, manifest: Manifest, data: ImageData | None) -> Check:
    """Answers on the test images; without any, whether it is the file that was measured."""
    try:
        if data is None:
            same = _recorded_digest(manifest) == hashlib.sha256(read_bytes(path, limit=_MOST_BYTES)).hexdigest()
            said = "its accuracy is in secateur.json" if same else "another file: export it again, or say --data"
            return Check(f"{path.name} = the file that was measured", same, detail=said)
        in_float = onnx_bytes(eval_copy(model), (probe_images(manifest.recipe.input_shape),))
        found = compare_int8_file(path, in_float, data.test.batches(BATCH))
    except (ArtifactError, ExportError) as error:
        return Check(f"{path.name} answers as the float model", False, detail=str(error))
    return Check(f"{path.name} answers as the float model", found.kept >= LEAST_KEPT, detail=str(found))


def _recorded_digest(manifest: Manifest) -> object:
    """SHA-256 of the int8 file, as far as secateur.json says it."""
    found: object = manifest.recipe.verification
    for key in (RECORD, Format.INT8.value, "files"):
        found = _at(found, key)
    first = cast(list[object], found)[0] if isinstance(found, list) and found else None
    return _at(first, "sha256")


def _at(found: object, key: str) -> object:
    return cast(Mapping[str, object], found).get(key) if isinstance(found, Mapping) else None
