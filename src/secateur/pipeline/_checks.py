"""What is checked of a finished model before anybody sees it: its artifact, its exported files, its speed."""

import copy
from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn

from secateur.errors import ArtifactError, ExportError
from secateur.latency import LatencyRecord, Quartiles, measure_latency
from secateur.pipeline._export import export_file
from secateur.pipeline._open import load
from secateur.pipeline._plan import Format
from secateur.pipeline._probe import same_bits
from secateur.report import Check, MeasuredLatency

_PARITY_IMAGES = 8


def reload_check(student: nn.Module, images: Tensor, draft: Path, own: Callable[[], nn.Module] | None) -> Check:
    """Whether the artifact gives the bits of the model in memory.

    Args:
        student: The model in memory.
        images: A few, normalised, on the CPU.
        draft: The artifact.
        own: Builds the original, where the artifact does not name a source.

    Raises:
        ArtifactError: If not.
    """
    reloaded = load(draft, factory=own, trust_source=True).model
    equal = same_bits(copied(student).cpu(), reloaded, images[:_PARITY_IMAGES])
    detail = f"{min(_PARITY_IMAGES, len(images))} images, bit for bit" if equal else "outputs differ"
    if not equal:
        raise ArtifactError(
            "The saved artifact must give the same bits as the model in memory; it does not. This is a bug in "
            "Secateur: nothing was written; please report the model."
        )
    return Check("Reloaded artifact = model in memory", True, 0.0, 0.0, 0.0, detail)


def export_check(student: nn.Module, images: Tensor, draft: Path, form: Format) -> Check:
    """Export one file. A failure is a failed check: the artifact itself is good and must not be lost."""
    name = f"{form.file} = model in PyTorch"
    try:
        parity = export_file(student, images[:_PARITY_IMAGES], draft, form)
    except ExportError as error:
        return Check(name, False, detail=f"not written: {error}")
    sizes = " and ".join(map(str, parity.batch_sizes))
    return Check(name, True, parity.max_abs, parity.max_rel, parity.tolerance, f"batch sizes {sizes}")


def latency_between(
    original: nn.Module, student: nn.Module, images: Tensor
) -> tuple[tuple[LatencyRecord, ...], tuple[str, ...]]:
    """The times of both models for one image, or a note why there are none."""
    try:
        return measure_latency(original, student, images[:1]), ()
    except ExportError as error:
        return (), (f"Latency was not measured: {error}",)


def shown_latency(record: LatencyRecord) -> MeasuredLatency:
    """A measurement as the report has it."""
    return MeasuredLatency(
        runtime=record.runtime,
        threads=record.threads,
        batch_size=record.batch_size,
        rounds=record.rounds,
        before=_triple(record.before),
        after=_triple(record.after),
        speedup=_triple(record.speedup),
        clock=record.clock,
    )


def copied(model: nn.Module) -> nn.Module:
    """A copy in eval mode."""
    return copy.deepcopy(model).eval()


def _triple(found: Quartiles) -> tuple[float, float, float]:
    return found.lower, found.median, found.upper
