"""A seeded input and the outputs for it: how a model can be recognized on another machine.

What is checked of a finished model before anybody sees it: its artifact, its exported files, its speed."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from secateur._runtime import copy_model
from secateur.cost.budget import Budget
from secateur.cost.measure import LatencyRecord, measure_latency, measure_pairs
from secateur.cost.targets import Target
from secateur.cost.timing import Quartiles
from secateur.errors import ArtifactError, ExportError
from secateur.pipeline.load import load
from secateur.report.run import Check, MeasuredLatency
from secateur.search.latency import limit_of, lower_quartile_ratio, used

_SEED = 20260101
_IMAGES = 2
PROBE_TOLERANCE = 1e-4
"""Largest difference, relative to the largest logit, that another machine's kernels may make in float32."""


def probe_images(size: Sequence[int]) -> Tensor:
    """Two images of standard normal noise, the same everywhere.

    Args:
        size: Channels, height, width.
    """
    return torch.randn(_IMAGES, *size, generator=torch.Generator().manual_seed(_SEED))


def probe_json(model: nn.Module, size: Sequence[int]) -> dict[str, object]:
    """The logits of a model in eval mode on the CPU for the probe, as JSON."""
    with torch.no_grad():
        return {"seed": _SEED, "logits": model(probe_images(size)).double().tolist()}


def probe_difference(model: nn.Module, size: Sequence[int], recorded: Mapping[str, object]) -> tuple[float, float]:
    """Largest absolute and relative difference of a model's logits from recorded ones; infinite if not comparable."""
    with torch.no_grad():
        found = model(probe_images(size)).double()
    wanted = torch.tensor(cast(Any, recorded["logits"]), dtype=torch.float64)
    if found.shape != wanted.shape:
        return float("inf"), float("inf")
    absolute = float((found - wanted).abs().max())
    return absolute, absolute / max(float(wanted.abs().max()), 1e-30)


def same_bits(one: nn.Module, other: nn.Module, images: Tensor) -> bool:
    """Whether two models in eval mode on the CPU give the same bits."""
    with torch.no_grad():
        return torch.equal(one(images), other(images))


_PARITY_IMAGES = 8
_PROOF_ROUNDS = 50


def reload_check(student: nn.Module, images: Tensor, draft: Path, own: Callable[[], nn.Module] | None) -> Check:
    """Whether the artifact gives the bits of the model in memory.

    Args:
        student: The model in memory.
        images: A few, normalized, on the CPU.
        draft: The artifact.
        own: Builds the original, where the artifact does not name a source.

    Raises:
        ArtifactError: If not.
    """
    reloaded = load(draft, factory=own, trust_source=True).model
    equal = same_bits(copy_in_eval_mode(student).cpu(), reloaded, images[:_PARITY_IMAGES])
    detail = f"{min(_PARITY_IMAGES, len(images))} images, bit for bit" if equal else "outputs differ"
    if not equal:
        raise ArtifactError(
            "The saved artifact must give the same bits as the model in memory; it does not. This is a bug in "
            "Secateur: nothing was written; please report the model."
        )
    return Check("Reloaded artifact = model in memory", True, 0.0, 0.0, 0.0, detail)


def latency_between(
    original: nn.Module, student: nn.Module, images: Tensor
) -> tuple[tuple[LatencyRecord, ...], tuple[str, ...]]:
    """The times of both models for one image, or a note why there are none."""
    try:
        return measure_latency(original, student, images[:1]), ()
    except ExportError as error:
        return (), (f"Latency was not measured: {error}",)


def check_latency(
    budget: Budget, target: Target, original: nn.Module, student: nn.Module, images: Tensor
) -> tuple[LatencyRecord, Check]:
    """Measure the finished model again and check that it is within a bound on latency.

    It is if it is not above the bound by more than the spread: the lower quartile is within.
    """
    record = measure_pairs(original, student, target, images[: target.batch], rounds=_PROOF_ROUNDS)
    limit = limit_of(budget, record.before.median)
    low, middle, high = (f"{1e3 * seconds:.4g}" for seconds in _triple(record.after))
    beside = "" if record.load is None else f", load average {record.load[0]:g} to {record.load[1]:g}"
    detail = (
        f"median {middle} ms, quartiles {low} and {high} ms, {100 * used(budget, record):.1f} % of the bound of "
        f"{1e3 * limit:.4g} ms; original {1e3 * record.before.median:.4g} ms ({target.key}, {record.rounds} pairs, "
        f"{record.clock}{beside})"
    )
    return record, Check(
        "Latency within the budget, measured again", lower_quartile_ratio(budget, record) <= 1, detail=detail
    )


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


def copy_in_eval_mode(model: nn.Module) -> nn.Module:
    """A copy in eval mode."""
    return copy_model(model).eval()


def _triple(found: Quartiles) -> tuple[float, float, float]:
    return found.lower, found.median, found.upper
