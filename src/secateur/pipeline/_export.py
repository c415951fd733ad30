"""Files for other runtimes, from any model."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from secateur.artifact import amend, is_artifact, read_manifest
from secateur.data import ImageData, calibration
from secateur.errors import ExportError
from secateur.export import (
    Parity,
    Quantised,
    export_executorch,
    export_int8,
    export_onnx,
    export_openvino,
    export_pt2,
)
from secateur.latency import LatencyRecord
from secateur.pipeline._formats import Format, check_formats

INT8_IMAGES = 512
"""Training images that tell the range of every activation. More widen ranges by ever rarer values."""
BATCH = 128
"""Images per pass."""
RECORD = "exports"
"""Where secateur.json tells of exported files, within its verification."""


@dataclass(frozen=True, eq=False)
class Samples:
    """What exported files are compared on.

    Attributes:
        images: A few real ones, at least two, as the model takes them.
        data: Where int8 takes its ranges (training images) and its accuracy (test images) from; None if there is none.
    """

    images: Tensor
    data: ImageData | None = None


@dataclass(frozen=True)
class Exported:
    """One format in a folder.

    Attributes:
        form: Which.
        agreed: How it was compared with the model.
        sizes: Bytes of each file.
        sha256: Of each file, hexadecimal.
        latency: Of the float file (before) and of this one (after), or None.
    """

    form: Format
    agreed: Parity | Quantised
    sizes: tuple[int, ...]
    sha256: tuple[str, ...]
    latency: LatencyRecord | None = None

    def to_json(self) -> dict[str, object]:
        """A JSON object."""
        rows = zip(self.form.files, self.sizes, self.sha256, strict=True)
        files = [{"name": name, "bytes": size, "sha256": digest} for name, size, digest in rows]
        measured = {} if self.latency is None else {"latency": self.latency.to_json()}
        return {"format": self.form.value, "files": files, "agreement": self.agreed.to_json(), **measured}


def export_file(model: nn.Module, samples: Samples, folder: Path, form: Format) -> Exported:
    """Write one format into a folder and compare it with the model.

    Args:
        model: Not changed.
        samples: What it is compared on.
        folder: Where.
        form: Which.

    Raises:
        ExportError: If it cannot be made or disagrees; nothing is left then.
    """
    agreed = _EXPORTERS[form](model, samples, folder / form.file)
    contents = [(folder / name).read_bytes() for name in form.files]
    return Exported(
        form, agreed, tuple(map(len, contents)), tuple(hashlib.sha256(each).hexdigest() for each in contents)
    )


def export_files(
    model: nn.Module, images: Tensor, folder: Path, formats: Sequence[Format], *, data: ImageData | None = None
) -> dict[Path, Parity | Quantised]:
    """Write exported files into a folder; if that is an artifact, its secateur.json tells of them afterwards.

    Args:
        model: Not changed.
        images: At least two real ones.
        folder: Where.
        formats: Which files.
        data: For int8, which takes ranges from training images and its accuracy from test images.

    Returns:
        How closely each file follows the model.

    Raises:
        ExportError: If one cannot be made or disagrees; those before it stay.
    """
    check_formats(formats)
    samples, made = Samples(images, data), list[Exported]()
    try:
        for form in formats:
            made.append(export_file(model, samples, folder, form))
    finally:
        if made and is_artifact(folder):
            _record(folder, made)
    return {folder / each.form.file: each.agreed for each in made}


def exports_json(exports: Sequence[Exported]) -> dict[str, object]:
    """Exported files by format, for the verification in secateur.json."""
    return {each.form.value: each.to_json() for each in exports}


def _record(folder: Path, made: Sequence[Exported]) -> None:
    before = read_manifest(folder).recipe.verification.get(RECORD)
    amend(folder, verification={RECORD: {**(before if isinstance(before, dict) else {}), **exports_json(made)}})


def _int8(model: nn.Module, samples: Samples, path: Path) -> Quantised:
    data = samples.data
    if data is None:
        raise ExportError("`--export int8` must have images to take ranges and accuracy from; got none. Say --data.")
    ranges = calibration(data.train, min(INT8_IMAGES, len(data.train)), batch_size=BATCH)
    return export_int8(model, [images for images, _ in ranges], data.test.batches(BATCH), path)


_EXPORTERS: dict[Format, Callable[[nn.Module, Samples, Path], Parity | Quantised]] = {
    Format.ONNX: lambda model, samples, path: export_onnx(model, samples.images, path),
    Format.PT2: lambda model, samples, path: export_pt2(model, samples.images, path),
    Format.OPENVINO: lambda model, samples, path: export_openvino(model, samples.images, path),
    Format.EXECUTORCH: lambda model, samples, path: export_executorch(model, samples.images, path),
    Format.INT8: _int8,
}
