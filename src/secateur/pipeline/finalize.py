"""The end of a run, for `compress` and `distill_model` alike: check, measure, export, report, write.

Everything is written into a draft folder that appears whole or not at all.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from secateur._batches import batch_length, call_model, float_tensors, take
from secateur._files import atomic_folder, disk_errors
from secateur._json import finite
from secateur._outputs import output_leaves
from secateur._provenance import Provenance
from secateur._runtime import copy_model, run_isolated
from secateur.architecture import Architecture
from secateur.cost.budget import Budget
from secateur.cost.denormals import without_denormals
from secateur.cost.macs import count_params
from secateur.cost.measure import LatencyRecord, inputs_for, measure_pairs
from secateur.cost.runtimes import OnnxRuntime, Target, TorchEager
from secateur.data.dataset import ImageData, guessing_accuracy
from secateur.data.image_files import describe_skipped
from secateur.data.loaders import OwnData
from secateur.errors import ArtifactError, ExportError
from secateur.export.artifact import FACTORY_KIND, amend, replaceable_files, save_artifact, weights_bytes
from secateur.export.formats import Format
from secateur.export.manifest import Recipe, edits_between
from secateur.export.onnx_config import OnnxConfig
from secateur.pipeline.config import Output, RunConfig
from secateur.pipeline.evidence import with_layer_seconds
from secateur.pipeline.exports import Exports, Samples, deliver_exports, quartiles, shown_latency
from secateur.pipeline.load import load
from secateur.pipeline.workspace import run_directory_path
from secateur.prune.masks import nonzero_params
from secateur.report.html import write_report
from secateur.report.run import Check, Measured, RunReport, Step, TrainedEpoch
from secateur.search.base import SearchResult
from secateur.search.latency import limit_of, lower_quartile_ratio, used
from secateur.train.fit import Trained

if TYPE_CHECKING:
    from lightning_fabric import Fabric


@dataclass(frozen=True, eq=False)
class Finished:
    """A run whose computing is done.

    Attributes:
        report: Everything known so far: numbers, checks and notes of the run itself.
        original: The model that the student is compared with, in eval mode.
        student: The final model in eval mode, on the device of the run.
        given: The caller's model, which the source of the artifact builds.
        trained: The training, or None.
        images: A few normalized training images, on the CPU.
        data: Where exported files in 8 bits take their ranges and their accuracy from.
        architecture: What the student keeps of the model that its source builds.
        costs: Costs of original and student, as JSON objects.
        output: What is to be written, or None.
        run: Command and seed.
        fabric: The processes of the run; only the first one measures and writes.
        log: Called with one sentence per note and check.
        target: The runtime whose times come first, also without ``output``; None leaves it out.
        latency_bound: The budget, if it bounds the latency on the target; else None.
        search: The result of the search that the student comes from, or None.
        doubts: What a reader must know before believing the rest; also in the notes of the report.
        metrics: What secateur.json says of this kind of run beside what all have.
    """

    report: RunReport
    original: nn.Module
    student: nn.Module
    given: nn.Module
    trained: Trained | None
    images: Any
    data: ImageData | OwnData
    architecture: Architecture
    costs: tuple[Mapping[str, int | float], Mapping[str, int | float]]
    output: Output | None
    run: RunConfig
    fabric: "Fabric"
    log: Callable[[str], None]
    target: Target | None = None
    latency_bound: Budget | None = None
    search: SearchResult | None = None
    doubts: tuple[str, ...] = ()
    metrics: Mapping[str, object] = field(default_factory=dict[str, object])


def finalize(run: Finished) -> tuple[RunReport, Path | None, tuple[Path, ...]]:
    """Check and measure the finished student, and write what was asked for.

    Returns:
        The whole report, the folder of the artifact or None, and all files that were written.
    """
    if not run.fabric.is_global_zero:
        return run.report, None, ()
    if run.output is None:
        report, notes = _with_latency(run)
        for note in notes:
            run.log(f"Note: {note}")
        return report, None, ()
    folder = run.output.folder
    with disk_errors(folder), atomic_folder(folder, replaceable=replaceable_files) as draft:
        save_artifact(draft, run.student, _recipe(run, run.output))
        own = (lambda: copy_model(run.given).eval()) if run.output.source is None else None
        reloaded = reload_check(run.student, run.images, draft, own)
        exports = _exports(run, draft, run.output.formats)
        checks = (*run.report.checks, reloaded, *exports.checks)
        checked = replace(run.report, checks=checks, exports=exports.shown, loading=run.output.loading)
        report, notes = _with_latency(
            replace(run, report=checked), exports.notes, _onnx_file(run.output, run.run, draft)
        )
        write_report(draft / "report.html", report)
        run_directory_path(folder).hand_on_history(draft)
        # A number that is NaN or infinite must not end a run whose work is done.
        amend(draft, metrics=finite(_metrics(run, report)), verification=finite(_verification(run, report, exports)))
        names = sorted(path.name for path in draft.iterdir())
    for note in (*notes, *run.doubts):
        run.log(f"Note: {note}")
    for check in report.checks:
        run.log(
            f"{'Checked' if check.passed else 'FAILED'}: {check.name}"
            + (f" ({check.detail})." if check.detail else ".")
        )
    return report, folder, tuple(folder / name for name in names)


def report_of(
    model: str,
    data: ImageData | OwnData,
    measured: tuple[Measured, Measured],
    *,
    strategy: str,
    steps: tuple[Step, ...],
    trained: Trained | None,
    run: RunConfig,
) -> RunReport:
    """Return the part of a report that every kind of run has.

    Args:
        model: Its name.
        data: For its name and the sizes of its splits.
        measured: Original and student.
        strategy: How the student came about, in words.
        steps: Test accuracy on the way.
        trained: For the curve of the training.
        run: Command and seed.
    """
    provenance, history = Provenance.here(run.command, run.seed), () if trained is None else trained.history
    return RunReport(
        model=model,
        data=f"{data.name}: {len(data.train)} training, {len(data.validation)} validation and {len(data.test)} test "
        "images",
        strategy=strategy,
        before=measured[0],
        after=measured[1],
        steps=steps,
        training=tuple(TrainedEpoch(record.epoch, record.train_loss, record.validation_score) for record in history),
        command=provenance.command,
        seed=provenance.seed,
        versions=provenance.versions,
        machine=provenance.machine,
        date=provenance.date,
    )


def measured_model(model: nn.Module, macs: int, step: Step) -> Measured:
    """Return the numbers of one model for the report."""
    return Measured(macs, count_params(model), weights_bytes(model), step.score, nonzero_params(model))


def guessing_doubt(name: str, step: Step, data: ImageData | OwnData) -> tuple[str, ...]:
    """Return a sentence if a model is not better than naming the most frequent class; none otherwise.

    It is better if that accuracy lies below the 95 % interval of its own.

    Args:
        name: The model, as a word.
        step: Its accuracy on the test images.
        data: For the labels of the test images.
    """
    if (interval := step.score.interval) is None or not data.classes:
        return ()
    chance, (low, high) = guessing_accuracy(data.test, len(data.classes)), interval
    if low > chance:
        return ()
    return (
        f"The {name} is right on {100 * step.score.value:.1f} % of the {step.score.n} test images (95 % interval "
        f"{100 * low:.1f} to {100 * high:.1f} %), about what guessing gives ({100 * chance:.1f} %). Check its weights "
        "(--weights) and normalization (--mean, --std).",
    )


def data_doubts(name: str, step: Step, data: ImageData | OwnData) -> tuple[str, ...]:
    """Return what a reader must know of the images: those that were left out, and a model that guesses on them."""
    skipped = describe_skipped(data.name, data.skipped)
    return (*([f"{skipped}."] if skipped else []), *guessing_doubt(name, step, data))


def _onnx_file(output: Output, run: RunConfig, draft: Path) -> bytes | None:
    """The content of the student's ONNX file if it was written as usual, so that it is not exported again."""
    path = draft / Format.ONNX.exporter.file
    usual = Format.ONNX in output.formats and run.onnx == OnnxConfig() and path.is_file()
    return path.read_bytes() if usual else None


def both_files(run: Finished, original: nn.Module, student_file: bytes | None) -> tuple[tuple[nn.Module, bytes], ...]:
    """Each of both models with the content of its ONNX file, so that it is exported once for all measurements.

    A model that cannot be exported is left out: what measures it says why.
    """
    target = run.target if type(run.target) is OnnxRuntime else OnnxRuntime()
    inputs, found = inputs_for(target, run.images), list[tuple[nn.Module, bytes]]()
    for model, written in ((original, None), (run.student, student_file)):
        with suppress(ExportError, ImportError):
            found.append((model, target.exported(model, inputs) if written is None else written))
    return tuple(found)


def _opening(target: Target, files: Sequence[tuple[nn.Module, bytes]]) -> Target:
    if type(target) is not OnnxRuntime:
        return target
    for model, content in files:
        target = target.with_file(model, content)
    return target


def _with_latency(
    run: Finished, notes: tuple[str, ...] = (), file: bytes | None = None
) -> tuple[RunReport, tuple[str, ...]]:
    """The report with the times of both models, and all notes about files and times.

    Those on the target come first, and are checked if the budget limits them. Other runtimes follow if there is a
    report to be written.
    """
    records: tuple[LatencyRecord, ...] = ()
    said: tuple[str, ...] = ()
    checks: tuple[Check, ...] = ()
    report, original, plain = run.report, run.original, _is_plain(run)
    files: tuple[tuple[nn.Module, bytes], ...] = ()
    if plain and run.output is not None and run.run.times:
        # What is measured is the original without its denormal numbers; without any this is the model itself.
        original = without_denormals(original)
        files = both_files(run, original, file)
    if not plain:
        said = ("Latency was not measured: the model takes several inputs or lists of images, or returns lists.",)
    elif run.target is not None and run.latency_bound is not None:
        target = _opening(run.target, files)
        record, check = check_latency(run.latency_bound, target, original, run.student, run.images)
        records, checks = (record,), (check,)
    elif run.target is not None and run.run.times:
        records, said = latency_on(_opening(run.target, files), original, run.student, run.images)
    if run.output is not None and run.run.times and plain:
        # What was measured on the target is not measured twice.
        others, more = latency_between(original, run.student, run.images, run.target, files)
        records, said = (*records, *others), tuple(dict.fromkeys((*said, *more)))
    if len(files) == 2 and report.layers and isinstance(run.target, OnnxRuntime):
        report = with_layer_seconds(report, run.target, files, run.images)
    slow = slow_because(run.search, records[0]) if records and run.search is not None else ()
    notes = (*said, *slow, *notes)
    report = replace(
        report,
        latency=tuple(map(shown_latency, records)),
        checks=(*run.report.checks, *checks),
        notes=(*notes, *run.report.notes),
        warnings=(*notes, *run.report.warnings),
        input_size=tuple(run.data.size) if plain and len(run.data.size) == 3 else (),
    )
    return report, notes


def _recipe(run: Finished, output: Output) -> Recipe:
    data, source = run.data, output.source
    # Against the model as its source builds it: the caller's model may be a cut one already.
    pristine = run.given if source is None else source.build(trust_source=True)
    return Recipe(
        source={"kind": FACTORY_KIND, "name": output.factory} if source is None else source.to_json(),
        architecture=run.architecture,
        edits=edits_between(pristine, run.student),
        input_shape=data.size,
        mean=data.mean,
        std=data.std,
        preprocessing=data.preprocessing,
        classes=data.classes,
        cost_before=run.costs[0],
        cost_after=run.costs[1],
        provenance=Provenance.here(run.run.command, run.run.seed),
    )


def _is_plain(run: Finished) -> bool:
    """Whether the model takes one tensor and gives tensors of the whole batch, as files for other runtimes do."""
    if not isinstance(run.images, Tensor):
        return False
    with torch.no_grad():
        outputs = copy_model(run.student).eval().cpu()(run.images[:2])
    return all(len(tensor) == 2 for tensor in float_tensors(outputs) if tensor.ndim)


def _exports(run: Finished, draft: Path, formats: tuple[Format, ...]) -> Exports:
    if _is_plain(run):
        data = run.data if isinstance(run.data, ImageData) else None
        return deliver_exports(run.student, Samples(run.images, data, onnx=run.run.onnx), draft, formats)
    written = Exports((), (), ())
    samples = _samples_of_one_kind(run)
    if samples is not None and run.run.onnx.outputs and Format.ONNX in formats:
        written = deliver_exports(run.student, samples, draft, (Format.ONNX,))
        formats = tuple(form for form in formats if form is not Format.ONNX)
    names = ", ".join(form.value for form in formats)
    note = (
        f"No file was written for {names}: the model takes several inputs or lists of images, or returns lists. Export "
        "a wrapper that takes and returns tensors, or name the modules whose outputs an ONNX file shall return, such "
        "as the raw heads of a detector (--onnx-outputs; in Python: OnnxConfig(outputs=...))."
    )
    return Exports(written.checks, written.made, (note,) if formats else ())


def _samples_of_one_kind(run: Finished) -> Samples | None:
    """Return images of one size for a file that returns chosen outputs; None if the model takes anything else."""
    if isinstance(run.images, Tensor):
        return Samples(run.images, onnx=run.run.onnx)
    if not isinstance(run.images, list):
        return None
    images = [image for image in cast("list[object]", run.images) if isinstance(image, Tensor)]
    same = [image for image in images if image.shape == images[0].shape]
    return Samples(torch.stack(same), one_image=True, onnx=run.run.onnx) if same else None


def _metrics(run: Finished, report: RunReport) -> dict[str, object]:
    trained = run.trained
    return {
        **_stored_scores(report),
        "size_bytes": {"before": report.before.size_bytes, "after": report.after.size_bytes},
        "performance_efficiency": None if report.efficiency is None else list(report.efficiency),
        "history": [] if trained is None else [record.to_json() for record in trained.history],
        "best_epoch": None if trained is None else trained.best_epoch,
        **run.metrics,
        **({} if run.search is None else {"latency": [asdict(latency) for latency in report.latency]}),
    }


def _stored_scores(report: RunReport) -> dict[str, object]:
    """The scores after the steps; those of classifiers under the key that they have had from the first release on."""
    if report.metric.is_share:
        return {"test_accuracy": [{"step": s.name, "top1": s.score.value, "n": s.score.n} for s in report.steps]}
    scores = [{"step": s.name, "value": s.score.value, "n": s.score.n} for s in report.steps]
    return {"test_scores": {"metric": asdict(report.metric), "steps": scores}}


def _verification(run: Finished, report: RunReport, exports: Exports) -> dict[str, object]:
    found = {**exports.to_json(), "checks": [asdict(check) for check in report.checks]}
    probe = probe_json(copy_model(run.student).eval().cpu(), run.data.size) if _is_plain(run) else None
    return found if probe is None else {**found, "probe": probe}


_PARITY_IMAGES = 8
_PROOF_ROUNDS = 50

_NOTABLE = 0.1
"""The fraction of the MACs that must be gone before anybody expects a faster network."""
_PAID = 0.5
"""The time must have fallen by this part of the fraction of the MACs, or a note says why it did not."""
_NOISE = 0.03
"""A model that takes longer by this fraction is slower; less may be chance."""
_ALIGNED = 8
"""Kernels are made for multiples of this width."""


def slow_because(result: SearchResult, record: LatencyRecord) -> tuple[str, ...]:
    """Return a sentence with the cause, if the MACs fell and the time did not; none otherwise.

    Args:
        result: Costs, widths, and what the search noted of the latency.
        record: Original and student, measured.
    """
    macs = result.cost.macs / max(result.original.macs, 1)
    time = 1 / record.speedup.median
    slower = time > 1 + _NOISE
    if not slower and (1 - macs < _NOTABLE or 1 - time >= _PAID * (1 - macs)):
        return ()
    where = f"{record.threads} thread{'s' if record.threads > 1 else ''}, batch {record.batch_size}"
    if slower:
        fell = f", although its MACs fell by {100 * (1 - macs):.0f} %" if macs < 1 else ""
        said = (
            f"The compressed model is {100 * (time - 1):.0f} % slower than the original on {record.runtime} ({where})"
        )
        return (f"{said}{fell}. {_cause(result)}",)
    said = (
        f"The MACs fell by {100 * (1 - macs):.0f} %, the time on {record.runtime} by {100 * max(1 - time, 0):.0f} % "
        f"only ({where})."
    )
    return (f"{said} {_cause(result)}",)


def _cause(result: SearchResult) -> str:
    widths = result.architecture.widths
    odd = [name for name, width in widths.items() if width % _ALIGNED]
    if 4 * len(odd) > len(widths):
        return (
            f"{len(odd)} of {len(widths)} widths are no multiple of {_ALIGNED}, for which kernels are made: set a "
            "divisor (--divisor 8 or 16), or bound the latency, which is then met by measuring (--budget latency=50%)."
        )
    noted = result.notes.get("latency")
    parts = cast(Mapping[str, Mapping[str, float]], noted).get("parts", {}) if isinstance(noted, Mapping) else {}
    elsewhere = 1 - parts.get("layers", 1.0)
    if elsewhere > 0.4:
        return (
            f"About {100 * elsewhere:.0f} % of it is not spent in convolutions and linear layers, but in activations, "
            "sums and what every pass costs: fewer blocks (--remove-blocks) take that away, fewer channels hardly."
        )
    return (
        "Its layers are so small that what a layer costs whatever its width weighs most, or are bound by memory: fewer "
        "blocks (--remove-blocks), a larger batch or another runtime may gain more."
    )


def reload_check(student: nn.Module, images: Any, draft: Path, own: Callable[[], nn.Module] | None) -> Check:
    """Check that the artifact gives the bits of the model in memory.

    Args:
        student: The model in memory.
        images: A few, normalized, on the CPU.
        draft: The artifact.
        own: Builds the original, if the artifact does not name a source.

    Raises:
        ArtifactError: If not.
    """
    reloaded = load(draft, factory=own, trust_source=True).model
    equal = same_bits(copy_model(student).eval().cpu(), reloaded, take(images, slice(_PARITY_IMAGES)))
    detail = f"{min(_PARITY_IMAGES, batch_length(images))} images, bit for bit" if equal else "outputs differ"
    if not equal:
        raise ArtifactError(
            "The saved artifact must give the same bits as the model in memory; it does not. This is a bug in "
            "Secateur: nothing was written; please report the model."
        )
    return Check("Reloaded artifact = model in memory", True, 0.0, 0.0, 0.0, detail)


def latency_on(
    target: Target, original: nn.Module, student: nn.Module, images: Tensor
) -> tuple[tuple[LatencyRecord, ...], tuple[str, ...]]:
    """Return the times of both models on one target, measured in turns, or a note why there are none."""
    try:
        return (measure_pairs(original, student, target, images[: target.batch]),), ()
    except (ExportError, ImportError) as error:
        return (), (f"Latency was not measured: {error}",)


def latency_between(
    original: nn.Module,
    student: nn.Module,
    images: Tensor,
    but: Target | None = None,
    files: Sequence[tuple[nn.Module, bytes]] = (),
) -> tuple[tuple[LatencyRecord, ...], tuple[str, ...]]:
    """Return the times of both models for one image in the usual runtimes, and notes why there are none.

    Args:
        original: Any device; not changed.
        student: The same.
        images: At least one.
        but: A target that is left out, because it was measured.
        files: Models with the content of their ONNX files; others are exported.
    """
    records: tuple[LatencyRecord, ...] = ()
    notes: tuple[str, ...] = ()
    for target in (OnnxRuntime(), TorchEager()):
        if target != but:
            found, said = latency_on(_opening(target, files), original, student, images)
            records, notes = (*records, *found), (*notes, *said)
    return records, notes


def check_latency(
    budget: Budget, target: Target, original: nn.Module, student: nn.Module, images: Tensor
) -> tuple[LatencyRecord, Check]:
    """Measure the finished model again and check that it is within a bound on latency.

    It is if it is not above the bound by more than the spread: the lower quartile is within.
    """
    record = measure_pairs(original, student, target, images[: target.batch], rounds=_PROOF_ROUNDS)
    limit = limit_of(budget, record.before.median)
    low, middle, high = (f"{1e3 * seconds:.4g}" for seconds in quartiles(record.after))
    beside = "" if record.load is None else f", load average {record.load[0]:g} to {record.load[1]:g}"
    detail = (
        f"median {middle} ms, quartiles {low} and {high} ms, {100 * used(budget, record):.1f} % of the bound of "
        f"{1e3 * limit:.4g} ms; original {1e3 * record.before.median:.4g} ms ({target.key}, {record.rounds} pairs, "
        f"{record.clock}{beside})"
    )
    return record, Check(
        "Latency within the budget, measured again", lower_quartile_ratio(budget, record) <= 1, detail=detail
    )


_PROBE_SEED = 20260101
_PROBE_IMAGES = 2
_PROBE_VALUES = 4096
"""Of larger outputs, such as the classes of all pixels, so many numbers are recorded."""
PROBE_TOLERANCE = 1e-4
"""Largest difference, relative to the largest logit, that another machine's kernels may make in float32."""


def probe_images(size: Sequence[int]) -> Tensor:
    """Return two images of standard normal noise, the same on every machine.

    Args:
        size: Channels, height, width.
    """
    return torch.randn(_PROBE_IMAGES, *size, generator=torch.Generator().manual_seed(_PROBE_SEED))


def probe_json(model: nn.Module, size: Sequence[int]) -> dict[str, object] | None:
    """Return the output of a model in eval mode on the CPU for the probe images; None if it is no finite tensor.

    Of an output of more than 4,096 numbers, it is the shape and that many of them, drawn at random with a fixed seed.
    """
    # A forward that is random draws the same numbers every time.
    with run_isolated(model), torch.no_grad():
        output = model(probe_images(size))
    if not isinstance(output, Tensor):
        return None
    logits = output.double()
    # Noise is not what the model was trained on: it may overflow there, and compares with nothing then.
    if not bool(logits.isfinite().all()):
        return None
    if logits.numel() <= _PROBE_VALUES:
        return {"seed": _PROBE_SEED, "logits": logits.tolist()}
    return {"seed": _PROBE_SEED, "shape": list(logits.shape), "values": _drawn_values(logits).tolist()}


def _drawn_values(output: Tensor) -> Tensor:
    """Return 4,096 numbers of an output, always those at the same places."""
    places = torch.randint(output.numel(), (_PROBE_VALUES,), generator=torch.Generator().manual_seed(_PROBE_SEED))
    return output.flatten()[places]


def probe_difference(model: nn.Module, size: Sequence[int], recorded: Mapping[str, object]) -> tuple[float, float]:
    """Return the largest absolute and relative difference of logits from recorded ones; infinite if shapes differ."""
    with run_isolated(model), torch.no_grad():
        found = model(probe_images(size)).double()
    is_drawn = "values" in recorded
    if is_drawn and list(found.shape) != recorded["shape"]:
        return float("inf"), float("inf")
    found = _drawn_values(found) if is_drawn else found
    wanted = torch.tensor(cast(Any, recorded["values" if is_drawn else "logits"]), dtype=torch.float64)
    if found.shape != wanted.shape:
        return float("inf"), float("inf")
    absolute = float((found - wanted).abs().max())
    return absolute, absolute / max(float(wanted.abs().max()), 1e-30)


def same_bits(one: nn.Module, other: nn.Module, images: Any) -> bool:
    """Return whether two models in eval mode on the CPU give the same bits."""
    found: list[dict[str, Any]] = []
    for model in (one, other):
        with run_isolated(model), torch.no_grad():
            found.append(output_leaves(call_model(model, images)))
    first, second = found
    return list(first) == list(second) and all(
        torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b
        for a, b in zip(first.values(), second.values(), strict=True)
    )
