"""Exported files of a finished run: each a check, a row of the report, and an entry of the artifact."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from secateur.errors import ExportError
from secateur.export import USUAL_KEPT, Parity, Quantised, onnx_bytes
from secateur.latency import LatencyRecord, OnnxRuntime, measure_files
from secateur.pipeline._checks import copied, shown_latency
from secateur.pipeline._export import RECORD, Exported, Samples, export_file, exports_json
from secateur.pipeline._formats import Format
from secateur.report import Check, ExportedFile, MeasuredAccuracy

_PARITY_IMAGES = 8


@dataclass(frozen=True)
class Exports:
    """What became of the formats that were asked for.

    Attributes:
        checks: One for each.
        made: Those that held.
        notes: What the reader must know.
    """

    checks: tuple[Check, ...]
    made: tuple[Exported, ...]
    notes: tuple[str, ...]

    @property
    def shown(self) -> tuple[ExportedFile, ...]:
        """As the report has them."""
        return tuple(map(_shown, self.made))

    def to_json(self) -> dict[str, object]:
        """For the verification in secateur.json."""
        return {RECORD: exports_json(self.made)}


def deliver_exports(student: nn.Module, samples: Samples, draft: Path, formats: Sequence[Format]) -> Exports:
    """Write every format into a draft. A failure is a failed check: the artifact itself is good and must not be lost.

    Args:
        student: The finished model.
        samples: What files are compared on.
        draft: The artifact.
        formats: Which.
    """
    few = replace(samples, images=samples.images[:_PARITY_IMAGES])
    checks, made, notes = list[Check](), list[Exported](), list[str]()
    for form in formats:
        try:
            found = export_file(student, few, draft, form)
        except ExportError as error:
            cause = error.__cause__
            if isinstance(cause, OSError):  # A full disk says nothing of the file: the run goes on when there is room.
                raise cause from None
            checks.append(Check(_claim(form), False, detail=f"not written: {error}"))
            continue
        made.append(found)
        checks.append(agreement_check(form, found.agreed))
        notes += _doubts(found)
    # After all of them: the float file may be one that is asked for later.
    for at, each in enumerate(made):
        if each.form is Format.INT8:
            latency, said = _int8_latency(student, few.images, draft)
            made[at] = replace(each, latency=latency)
            notes += said
    return Exports(tuple(checks), tuple(made), tuple(notes))


def agreement_check(form: Format, agreed: Parity | Quantised) -> Check:
    """What was found as a line of the report; for files that were accepted."""
    if isinstance(agreed, Quantised):
        return Check(_claim(form), True, detail=str(agreed))
    sizes = " and ".join(map(str, agreed.batch_sizes))
    return Check(_claim(form), True, agreed.max_abs, agreed.max_rel, agreed.tolerance, f"batch sizes {sizes}")


def _claim(form: Format) -> str:
    return f"{form.file} {'answers as the float model' if form is Format.INT8 else '= model in PyTorch'}"


def _doubts(found: Exported) -> list[str]:
    if not isinstance(found.agreed, Quantised) or found.agreed.usual:
        return []
    return [
        f"{found.form.file} keeps {100 * found.agreed.kept:.1f} % of the float model's accuracy, less than the "
        f"{100 * USUAL_KEPT:g} % that are usual for 8 bits: {found.agreed}. Use the float file where that matters."
    ]


def _int8_latency(student: nn.Module, images: Tensor, draft: Path) -> tuple[LatencyRecord | None, list[str]]:
    in_float = draft / Format.ONNX.file
    try:
        before = in_float if in_float.exists() else onnx_bytes(copied(student).cpu(), (images,))
        return measure_files(before, draft / Format.INT8.file, OnnxRuntime(), images[:1]), []
    except ExportError as error:
        return None, [f"The latency of {Format.INT8.file} was not measured: {error}"]


def _shown(made: Exported) -> ExportedFile:
    size, agreed = sum(made.sizes), made.agreed
    if isinstance(agreed, Parity):
        return ExportedFile(made.form.file, size, difference=agreed.max_rel)
    return ExportedFile(
        made.form.file,
        size,
        accuracy=MeasuredAccuracy(agreed.top1, agreed.n),
        float_accuracy=MeasuredAccuracy(agreed.float_top1, agreed.n),
        agreement=agreed.agreement,
        latency=None if made.latency is None else shown_latency(made.latency),
    )
