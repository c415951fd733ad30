"""Write files for other runtimes, compare each with the model, and record the result."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from secateur._kinds import checked
from secateur._provenance import sha256_of
from secateur._runtime import copy_model
from secateur.cost.measure import LatencyRecord, measure_files
from secateur.cost.runtimes import OnnxRuntime
from secateur.cost.timing import Quartiles
from secateur.data.dataset import ImageData
from secateur.errors import ExportError
from secateur.export._common import Parity, Samples
from secateur.export.artifact import amend, is_artifact, read_manifest
from secateur.export.formats import Format, check_formats, parse_formats
from secateur.export.int8 import USUAL_KEPT_ACCURACY, Quantized
from secateur.export.onnx import onnx_bytes
from secateur.export.onnx_config import OnnxConfig
from secateur.models.source import ModelSource
from secateur.pipeline.config import Output, RunConfig
from secateur.pipeline.workspace import check_output
from secateur.report.run import Check, ExportedFile, MeasuredLatency
from secateur.tasks.base import Score
from secateur.tasks.classification import TOP1

ONNX = "onnx"
"""Key of the `OnnxConfig` of an exported file, if it is not the usual one."""
RECORD = "exports"
"""Key of the exported files in the verification of secateur.json."""


@dataclass(frozen=True)
class Exported:
    """A written file of one format, and how it compares with the model.

    Attributes:
        form: Which.
        agreed: How it was compared with the model.
        sizes: Bytes of each file.
        sha256: Of each file, hexadecimal.
        latency: Of the float file (before) and of this one (after), or None.
        onnx: How it was written, if it is an ONNX file.
    """

    form: Format
    agreed: Parity | Quantized
    sizes: tuple[int, ...]
    sha256: tuple[str, ...]
    latency: LatencyRecord | None = None
    onnx: OnnxConfig = OnnxConfig()  # noqa: RUF009 - frozen

    def to_json(self) -> dict[str, object]:
        """A JSON object."""
        rows = zip(self.form.exporter.files, self.sizes, self.sha256, strict=True)
        files = [{"name": name, "bytes": size, "sha256": digest} for name, size, digest in rows]
        measured = {} if self.latency is None else {"latency": self.latency.to_json()}
        written = {} if self.onnx == OnnxConfig() else {ONNX: self.onnx.to_json()}
        return {"format": self.form.value, "files": files, "agreement": self.agreed.to_json(), **measured, **written}


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
    agreed = form.exporter.write(model, samples, folder / form.exporter.file)
    contents = [(folder / name).read_bytes() for name in form.exporter.files]
    onnx = samples.onnx if form is Format.ONNX else OnnxConfig()
    return Exported(form, agreed, tuple(map(len, contents)), tuple(sha256_of(each) for each in contents), onnx=onnx)


@checked
def export_files(
    model: nn.Module,
    images: Tensor,
    folder: Path,
    formats: str | Sequence[Format | str],
    *,
    data: ImageData | None = None,
    onnx: OnnxConfig = OnnxConfig(),  # noqa: B008 - frozen
) -> dict[Path, Parity | Quantized]:
    """Write exported files into a folder; if the folder is an artifact, its secateur.json records them.

    Args:
        model: Not changed.
        images: At least two real ones.
        folder: Where.
        formats: Which files.
        data: For int8, which takes ranges from training images and its accuracy from test images.
        onnx: How an ONNX file is written.

    Returns:
        How closely each file follows the model.

    Raises:
        ExportError: If one cannot be made or disagrees; those before it stay.
    """
    formats = parse_formats(formats)
    check_exports(formats, onnx, model)
    samples, made = Samples(images, data, onnx=onnx), list[Exported]()
    try:
        for form in formats:
            made.append(export_file(model, samples, folder, form))
    finally:
        if made and is_artifact(folder):
            _record(folder, made)
    return {folder / each.form.exporter.file: each.agreed for each in made}


def check_exports(formats: Sequence[Format], onnx: OnnxConfig, model: nn.Module) -> None:
    """Refuse formats whose library is missing, and settings of ONNX that the model or the formats do not fit.

    Raises:
        ExportError: Before any work.
    """
    check_formats(formats)
    if onnx == OnnxConfig():
        return
    onnx.check(model)
    if Format.ONNX not in formats:
        raise ExportError(
            "`export` must name onnx if it is set how an ONNX file is written; got "
            f"{', '.join(form.value for form in formats) or 'nothing'} and {onnx}. Add onnx, or leave the settings out."
        )


def checked_output(
    out: Path | str | None,
    export: str | Sequence[Format | str],
    model: nn.Module,
    *,
    source: ModelSource | None,
    name: str,
    run: RunConfig,
) -> Output | None:
    """Return what a run writes at its end, or None; refuse what could not be written then.

    Args:
        out: The folder; one that is relative means the same if a model changes the working directory.
        export: Files for other runtimes.
        model: What is exported.
        source: How it is built.
        name: What the artifact calls it if there is no source.
        run: For how ONNX is written.

    Raises:
        ArtifactError: If the folder could not be written.
        ExportError: See `check_exports`.
    """
    if out is None:
        return None
    output = Output(Path(out).absolute(), parse_formats(export), source, name)
    check_output(output.folder)
    check_exports(output.formats, run.onnx, model)
    return output


def exports_json(exports: Sequence[Exported]) -> dict[str, object]:
    """Exported files by format, for the verification in secateur.json."""
    return {each.form.value: each.to_json() for each in exports}


def _record(folder: Path, made: Sequence[Exported]) -> None:
    before = read_manifest(folder).recipe.verification.get(RECORD)
    amend(folder, verification={RECORD: {**(before if isinstance(before, dict) else {}), **exports_json(made)}})


_PARITY_IMAGES = 8


@dataclass(frozen=True)
class Exports:
    """The result of exporting the requested formats.

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
        """The files as the report shows them."""
        return tuple(map(_shown, self.made))

    def to_json(self) -> dict[str, object]:
        """Return what secateur.json records of them."""
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
            if isinstance(
                cause, OSError
            ):  # A full disk says nothing about the file; the run can be resumed when there is room.
                raise cause from None
            checks.append(Check(_claim(form), False, detail=f"not written: {error}"))
            continue
        made.append(found)
        checks.append(agreement_check(form, found.agreed))
        notes += _doubts(found)
    # After all of them: the float file may be one that is asked for later.
    for at, each in enumerate(made):
        if each.form is Format.INT8:
            latency, said = _int8_latency(student, few.images, draft, is_usual=samples.onnx == OnnxConfig())
            made[at] = replace(each, latency=latency)
            notes += said
    return Exports(tuple(checks), tuple(made), tuple(notes))


def agreement_check(form: Format, agreed: Parity | Quantized) -> Check:
    """Return the agreement of an accepted file as a check of the report."""
    if isinstance(agreed, Quantized):
        return Check(_claim(form), True, detail=str(agreed))
    sizes = " and ".join(map(str, agreed.batch_sizes))
    return Check(_claim(form), True, agreed.max_abs, agreed.max_rel, agreed.tolerance, f"batch sizes {sizes}")


def _claim(form: Format) -> str:
    return f"{form.exporter.file} {'answers as the float model' if form.exporter.quantized else '= model in PyTorch'}"


def _doubts(found: Exported) -> list[str]:
    agreed = found.agreed
    if not isinstance(agreed, Quantized) or agreed.usual:
        return []
    kept, usual = 100 * agreed.kept, 100 * USUAL_KEPT_ACCURACY
    return [
        f"{found.form.exporter.file} keeps {kept:.1f} % of the float model's accuracy, less than the {usual:g} % that "
        f"are usual for 8 bits: {agreed}. Use the float file where that matters."
    ]


def _int8_latency(
    student: nn.Module, images: Tensor, draft: Path, *, is_usual: bool
) -> tuple[LatencyRecord | None, list[str]]:
    in_float = draft / Format.ONNX.exporter.file
    try:
        before = in_float if is_usual and in_float.exists() else onnx_bytes(copy_model(student).eval().cpu(), (images,))
        return measure_files(before, draft / Format.INT8.exporter.file, OnnxRuntime(), images[:1]), []
    except ExportError as error:
        return None, [f"The latency of {Format.INT8.exporter.file} was not measured: {error}"]


def _shown(made: Exported) -> ExportedFile:
    size, agreed = sum(made.sizes), made.agreed
    if isinstance(agreed, Parity):
        return ExportedFile(made.form.exporter.file, size, difference=agreed.max_rel)
    return ExportedFile(
        made.form.exporter.file,
        size,
        accuracy=Score(agreed.top1, None, agreed.n, TOP1),
        float_accuracy=Score(agreed.float_top1, None, agreed.n, TOP1),
        agreement=agreed.agreement,
        latency=None if made.latency is None else shown_latency(made.latency),
    )


def shown_latency(record: LatencyRecord) -> MeasuredLatency:
    """Return a measurement as the report shows it."""
    return MeasuredLatency(
        runtime=record.runtime,
        threads=record.threads,
        batch_size=record.batch_size,
        rounds=record.rounds,
        before=quartiles(record.before),
        after=quartiles(record.after),
        speedup=quartiles(record.speedup),
        clock=record.clock,
    )


def quartiles(found: Quartiles) -> tuple[float, float, float]:
    """Return first quartile, median and third quartile, in seconds."""
    return found.lower, found.median, found.upper
