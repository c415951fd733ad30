"""Does a quantised classifier still give the right answers? Run it beside the float one on labelled images."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.artifact import read_bytes
from secateur.errors import ArtifactError, ExportError
from secateur.export._onnx import feed, open_session
from secateur.export._plain_onnx import MOST_BYTES, check_plain

LEAST_KEPT = 0.95
"""Smallest accuracy of an int8 file, as a fraction of the float model's: below, quantisation has failed."""
USUAL_KEPT = 0.99
"""What a quantised classifier must keep in MLPerf Inference (Reddi et al., ISCA 2020, Table I)."""


@dataclass(frozen=True)
class Quantised:
    """Answers of an int8 classifier beside those of the float one, on the same images.

    Attributes:
        top1: Fraction of images that the int8 file classifies right.
        float_top1: The same of the float model.
        agreement: Fraction of images for which both say the same class, right or wrong. Accuracies alone would not
            show mistakes that cancel.
        n: Number of images.
    """

    top1: float
    float_top1: float
    agreement: float
    n: int

    @property
    def kept(self) -> float:
        """Accuracy of the int8 file / accuracy of the float model."""
        return self.top1 / self.float_top1 if self.float_top1 else 1.0

    @property
    def usual(self) -> bool:
        """Whether it keeps what is usual."""
        return self.kept >= USUAL_KEPT

    def __str__(self) -> str:
        return (
            f"{100 * self.top1:.2f} % of {self.n} images right, in float {100 * self.float_top1:.2f} %; "
            f"the same answer for {100 * self.agreement:.2f} %"
        )

    def to_json(self) -> dict[str, object]:
        """A JSON object."""
        return asdict(self)


def compare_answers(
    in_float: Any, in_int8: Any, labelled: Iterable[tuple[Tensor, Tensor]], least_kept: float
) -> Quantised:
    """Run two ONNX Runtime sessions on labelled images.

    Args:
        in_float: Of the float model.
        in_int8: Of the quantised one.
        labelled: (images, labels) batches.
        least_kept: See `LEAST_KEPT`.

    Raises:
        ExportError: If there are no images, one gives no logits of them, or too much accuracy is lost.
    """
    right = float_right = same = n = 0
    for images, labels in labelled:
        ours, theirs = _answers(in_float, images), _answers(in_int8, images)
        if not n:
            _answers(in_int8, images[:1])
        wanted = labels.cpu()
        right += int((theirs == wanted).sum())
        float_right += int((ours == wanted).sum())
        same += int((ours == theirs).sum())
        n += len(wanted)
    if not n:
        raise ExportError("`labelled` must hold at least one image; got none. Pass test images with their labels.")
    found = Quantised(right / n, float_right / n, same / n, n)
    if found.kept < least_kept:
        raise ExportError(
            f"The int8 file must keep {100 * least_kept:g} % of the float model's accuracy; got {found}. The file was "
            "removed: use the float one, or train with more weight decay, which keeps ranges narrow."
        )
    return found


def compare_int8_file(path: Path | str, in_float: bytes, labelled: Iterable[tuple[Tensor, Tensor]]) -> Quantised:
    """Run an int8 file where it lies, beside the float model as ONNX content; see `compare_answers`.

    Raises:
        ArtifactError: If the file is a link, a pipe or a device.
        ExportError: If one of them does not run, could run without end, or gives no logits.
    """
    threads = torch.get_num_threads()
    try:
        content = read_bytes(Path(path), limit=MOST_BYTES)
        check_plain(content)
        sessions = open_session(in_float, threads=threads), open_session(content, threads=threads)
        return compare_answers(*sessions, labelled, 0.0)
    except (ArtifactError, ExportError):
        raise
    except Exception as error:
        # Whatever is wrong with a file from outside is said in words.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ExportError(f"it does not run ({reason}): export it again") from error


def _answers(session: Any, images: Tensor) -> Tensor:
    """The class of every image."""
    outputs = session.run(None, feed(session, (images.detach().cpu().contiguous(),)))
    logits = torch.from_numpy(outputs[0])
    if len(outputs) != 1 or logits.dim() != 2 or len(logits) != len(images):
        raise ExportError(
            f"`model` must give logits (batch, classes), for answers to be compared; got {len(outputs)} output(s), "
            f"the first of shape {tuple(logits.shape)}. int8 is for classifiers."
        )
    if not torch.isfinite(logits).all():
        raise ExportError("The model's and the int8 file's outputs must be finite; got NaN or infinity.")
    return logits.argmax(1)
