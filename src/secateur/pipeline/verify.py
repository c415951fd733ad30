"""Verify an artifact in place: its weights, costs, outputs, accuracy and exported files."""

import contextlib
import os
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from secateur._caller_state import in_default_state
from secateur._files import read_bytes
from secateur._provenance import sha256_of
from secateur.cost.macs import count_macs, count_params
from secateur.data.dataset import ImageData
from secateur.data.loaders import USUAL_BATCH, OwnData, evaluation_batch
from secateur.errors import ArtifactError, ExportError
from secateur.export._common import PARITY_TOLERANCE, check_extra, eval_copy
from secateur.export.formats import Format, compare_file
from secateur.export.int8 import INT8_BATCH_SIZE, MIN_KEPT_ACCURACY, compare_int8_file
from secateur.export.isolation import IsolatedRuntimes, isolated_runtimes
from secateur.export.manifest import Manifest
from secateur.export.onnx import onnx_bytes
from secateur.export.onnx_config import OnnxConfig
from secateur.export.onnx_model import file_model, tolerance_of
from secateur.pipeline.exports import ONNX, RECORD
from secateur.pipeline.finalize import PROBE_TOLERANCE, probe_difference, probe_images
from secateur.pipeline.load import check_runs, image_size_of, load
from secateur.prune.masks import nonzero_params
from secateur.report.run import Check
from secateur.tasks.base import Metric, Task
from secateur.tasks.classification import Classification
from secateur.train.evaluate import evaluate

_MOST_BYTES = 2**31
"""Of an int8 file: it is one protobuf message, and those end there."""


def check_files(
    folder: Path,
    model: nn.Module,
    manifest: Manifest,
    data: ImageData | None,
    *,
    trust_source: bool,
    runtimes: IsolatedRuntimes | None = None,
) -> tuple[list[Check], tuple[str, ...]]:
    """Compare every exported file with the model.

    Args:
        folder: The artifact.
        model: Loaded from it.
        manifest: What it says.
        data: For the accuracy of an int8 file; without it the file must be the one whose accuracy was recorded.
        trust_source: Whether to read files that could do harm.
        runtimes: The process that runs the files; None starts one for each file.

    Returns:
        A check for each file that was run, and a sentence for each that was not.
    """
    checks, passed_over = list[Check](), list[str]()
    images = probe_images(manifest.recipe.input_shape)
    for form in Format:
        path = folder / form.exporter.file
        if not os.path.lexists(path):
            if _at(_at(_at(manifest.recipe.verification, RECORD), form.value), "files"):
                passed_over.append(
                    f"{form.exporter.file} was not checked: secateur.json records it, but it is not there."
                )
            continue
        reason = _not_now(form, trust_source=trust_source)
        if reason:
            passed_over.append(f"{form.exporter.file} was not checked: {reason}")
        elif form is Format.INT8:
            checks.append(_int8_check(path, model, manifest, data, runtimes))
        else:
            written = _as_written(manifest) if form is Format.ONNX else None
            checks.append(_file_check(path, model, images, runtimes, written=written))
    return checks, tuple(passed_over)


def _not_now(form: Format, *, trust_source: bool) -> str:
    """Return why a format is not checked; empty if it is."""
    if form.exporter.needs_trust and not trust_source:
        return "a file from a stranger could do harm when it is read. If you trust it, say --trust-source."
    try:
        if form.exporter.extra is not None:
            check_extra(form.exporter.extra)
    except ExportError as error:
        return str(error)
    return ""


@contextlib.contextmanager
def _runtimes_for(folder: Path, data: ImageData | None, *, trust_source: bool) -> Generator[IsolatedRuntimes | None]:
    """Start the process for all files of an artifact that will be run; None if there are none."""
    there = [form for form in Format if os.path.lexists(folder / form.exporter.file)]
    wanted = {form for form in there if not _not_now(form, trust_source=trust_source)}
    if data is None:
        wanted.discard(Format.INT8)
    names = {Format.ONNX.value if form is Format.INT8 else form.value for form in wanted}
    if not names:
        yield None
        return
    with isolated_runtimes(names) as runtimes:
        yield runtimes


def _as_written(manifest: Manifest) -> tuple[object, bool]:
    """Return how secateur.json says that the ONNX file was written, and whether it takes only one image."""
    found = _at(_at(manifest.recipe.verification, RECORD), Format.ONNX.value)
    return _at(found, ONNX), _at(_at(found, "agreement"), "batch_sizes") == [1]


def _file_check(
    path: Path,
    model: nn.Module,
    images: Tensor,
    runtimes: IsolatedRuntimes | None,
    *,
    written: tuple[object, bool] | None,
) -> Check:
    """Compare one file; whatever is wrong with it fails this check only."""
    name = f"{path.name} = model in PyTorch"
    try:
        tolerance = PARITY_TOLERANCE
        if written is not None:
            config, one_image = OnnxConfig.from_json(written[0]), written[1]
            config.check(model)
            images, tolerance = images[: 1 if one_image else None], tolerance_of(model, config)
            model = file_model(model, config, one_image=one_image)
        found = compare_file(path, model, images, tolerance=tolerance, runtimes=runtimes)
    except ExportError as error:
        return Check(name, False, detail=str(error))
    held = found.max_rel <= found.tolerance
    return Check(name, held, found.max_abs, found.max_rel, found.tolerance, f"batch size {len(images)}")


def _int8_check(
    path: Path, model: nn.Module, manifest: Manifest, data: ImageData | None, runtimes: IsolatedRuntimes | None
) -> Check:
    """Compare answers on the test images; without any, check that it is the file that was measured."""
    try:
        if data is None:
            same = _recorded_digest(manifest) == sha256_of(read_bytes(path, limit=_MOST_BYTES))
            said = "its accuracy is in secateur.json" if same else "another file: export it again, or say --data"
            return Check(f"{path.name} = the file that was measured", same, detail=said)
        in_float = onnx_bytes(eval_copy(model), (probe_images(manifest.recipe.input_shape),))
        found = compare_int8_file(path, in_float, data.test.batches(INT8_BATCH_SIZE), runtimes=runtimes)
    except (ArtifactError, ExportError) as error:
        return Check(f"{path.name} answers as the float model", False, detail=str(error))
    return Check(f"{path.name} answers as the float model", found.kept >= MIN_KEPT_ACCURACY, detail=str(found))


def _recorded_digest(manifest: Manifest) -> object:
    """Return the SHA-256 of the int8 file that secateur.json records, if any."""
    found: object = manifest.recipe.verification
    for key in (RECORD, Format.INT8.value, "files"):
        found = _at(found, key)
    first = cast(list[object], found)[0] if isinstance(found, list) and found else None
    return _at(first, "sha256")


def _at(found: object, key: str) -> object:
    return cast(Mapping[str, object], found).get(key) if isinstance(found, Mapping) else None


@dataclass(frozen=True, eq=False)
class Verified:
    """The result of `verify`.

    Attributes:
        model: The loaded model.
        manifest: What the artifact says.
        checks: Each with its result.
        passed_over: Files that were not checked, with the reason; this is no failure.
    """

    model: nn.Module
    manifest: Manifest
    checks: tuple[Check, ...]
    passed_over: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)


@in_default_state
def verify(
    folder: Path | str,
    *,
    data: ImageData | OwnData | None = None,
    task: Task = Classification(),  # noqa: B008 - frozen
    factory: Callable[[], nn.Module] | None = None,
    trust_source: bool = False,
    device: torch.device | None = None,
) -> Verified:
    """Load an artifact and compare its behavior with what secateur.json records.

    Args:
        folder: The artifact.
        data: Also measure it on the test images.
        task: What outputs and targets mean.
        factory: See `secateur.load`.
        trust_source: See `secateur.load`; ``.pt2`` and ``.pte`` files are read only then, see `secateur.Format`.
        device: Where to measure the accuracy.

    Raises:
        ArtifactError: If it cannot be loaded or run at all.
    """
    folder, labeled = Path(folder), data if isinstance(data, ImageData) else None
    # The runtimes are imported while the model is loaded.
    with _runtimes_for(folder, labeled, trust_source=trust_source) as runtimes:
        loaded = load(folder, factory=factory, trust_source=trust_source)
        model, manifest = loaded.model, loaded.manifest
        listed = check_runs(model, image_size_of(manifest))
        checks = [
            Check(
                "Weights = SHA-256 in secateur.json",
                True,
                detail=f"{manifest.weights_bytes} bytes, {manifest.weights_sha256[:16]}",
            ),
            _cost_check(model, manifest, listed=listed),
            *_probe_checks(model, manifest),
        ]
        files, passed_over = check_files(folder, model, manifest, labeled, trust_source=trust_source, runtimes=runtimes)
    checks += files
    if data is not None:
        checks.append(_score_check(model, manifest, data, task, device))
    return Verified(model, manifest, tuple(checks), passed_over)


def _cost_check(model: nn.Module, manifest: Manifest, *, listed: bool) -> Check:
    recipe = manifest.recipe
    images = probe_images(recipe.input_shape)
    found = {"macs": count_macs(model, [images[0]] if listed else images), "params": count_params(model)}
    said = {name: recipe.cost_after.get(name) for name in found}
    if manifest.nonzero is not None:
        found["nonzero"], said["nonzero"] = nonzero_params(model), manifest.nonzero
    return Check("Counted costs = recorded costs", found == said, detail=f"counted {found}, recorded {said}")


def _probe_checks(model: nn.Module, manifest: Manifest) -> list[Check]:
    probe = manifest.recipe.verification.get("probe")
    if not isinstance(probe, Mapping):
        return []
    recorded = cast(Mapping[str, object], probe)
    name = "Outputs for a seeded input = recorded outputs"
    try:
        absolute, relative = probe_difference(model, manifest.recipe.input_shape, recorded)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError):
        return [Check(name, False, detail="`verification.probe` has no table of outputs (secateur.json)")]
    return [
        Check(name, relative <= PROBE_TOLERANCE, absolute, relative, PROBE_TOLERANCE, "as on the machine that made it")
    ]


def _score_check(
    model: nn.Module, manifest: Manifest, data: ImageData | OwnData, task: Task, device: torch.device | None
) -> Check:
    batch = evaluation_batch(data, USUAL_BATCH)
    found = evaluate(model, data.test, task=task, batch_size=batch, device=device)
    words = found.metric.words
    name = f"Test {words} on {data.name} = recorded {words}"
    n, said = _recorded_score(manifest, found.metric)
    if n != found.n or said is None:
        return Check(name, True, detail=f"{found.text} of {found.n} images; recorded on other images")
    # Other kernels may turn a prediction that was a tie: one image in a thousand is allowed.
    held = abs(found.value - said) <= max(1e-3 * max(abs(said), 1.0), 1.5 / found.n * found.metric.is_share)
    return Check(name, held, detail=f"{found.text} of {found.n} images; recorded {found.metric.text(said)}")


def _recorded_score(manifest: Manifest, metric: Metric) -> tuple[int | None, float | None]:
    """Return images and score of the last step, as far as secateur.json records them by this metric."""
    steps: object = manifest.recipe.metrics.get("test_accuracy")
    if not metric.is_share:
        scores = manifest.recipe.metrics.get("test_scores")
        steps = _at(scores, "steps") if _at(_at(scores, "metric"), "name") == metric.name else None
    last = cast(list[object], steps)[-1] if isinstance(steps, list) and steps else None
    n, value = _at(last, "n"), _at(last, "top1" if metric.is_share else "value")
    return n if type(n) is int else None, float(value) if isinstance(value, (int, float)) else None
