"""Files for other runtimes, from any model."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from secateur.export import Parity, export_onnx, export_pt2
from secateur.pipeline._plan import Format

_EXPORTERS = {Format.ONNX: export_onnx, Format.PT2: export_pt2}


def export_file(model: nn.Module, images: Tensor, folder: Path, form: Format) -> Parity:
    """Write one exported file into a folder and compare it with the model.

    Args:
        model: Not changed.
        images: At least two real ones.
        folder: Where.
        form: Which file.

    Raises:
        ExportError: If it cannot be made or disagrees; nothing is left then.
    """
    return _EXPORTERS[form](model, images, folder / form.file)


def export_files(model: nn.Module, images: Tensor, folder: Path, formats: Sequence[Format]) -> dict[Path, Parity]:
    """Write exported files into a folder.

    Args:
        model: Not changed.
        images: At least two real ones.
        folder: Where.
        formats: Which files.

    Returns:
        How closely each file follows the model.

    Raises:
        ExportError: If one cannot be made or disagrees; those before it stay.
    """
    return {folder / form.file: export_file(model, images, folder, form) for form in formats}
