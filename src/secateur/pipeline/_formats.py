"""The files that other runtimes read, by format."""

from collections.abc import Iterable
from enum import Enum

from secateur.export import check_extra


class Format(Enum):
    """Files that other runtimes read."""

    ONNX = "onnx"
    """For ONNX Runtime and most others."""
    PT2 = "pt2"
    """For `torch.export.load` and ahead-of-time compilation."""
    OPENVINO = "openvino"
    """For OpenVINO; needs the extra of that name."""
    EXECUTORCH = "executorch"
    """For phones and small devices; needs the extra of that name."""
    INT8 = "int8"
    """An ONNX file that computes with 8-bit integers."""

    @property
    def files(self) -> tuple[str, ...]:
        """Their names in an artifact; the first is the one to open."""
        return _FILES[self]

    @property
    def file(self) -> str:
        """The name of the one to open."""
        return self.files[0]

    @property
    def extra(self) -> str | None:
        """The optional library that makes and runs it."""
        return _EXTRAS.get(self)

    @property
    def trusting(self) -> bool:
        """Whether reading such a file trusts whoever made it."""
        return self in _TRUSTING


_FILES = {
    Format.ONNX: ("model.onnx",),
    Format.PT2: ("model.pt2",),
    Format.OPENVINO: ("model.xml", "model.bin"),
    Format.EXECUTORCH: ("model.pte",),
    Format.INT8: ("model.int8.onnx",),
}
_EXTRAS = {Format.OPENVINO: "openvino", Format.EXECUTORCH: "executorch"}
_TRUSTING = (Format.PT2, Format.EXECUTORCH)
"""torch may unpickle parts of a .pt2 file; ExecuTorch's runtime does not doubt sizes and offsets of a .pte file."""


def check_formats(formats: Iterable[Format]) -> None:
    """Refuse formats whose library is not installed, before any work.

    Raises:
        ExportError: With the command that installs it.
    """
    for form in formats:
        if form.extra is not None:
            check_extra(form.extra)
