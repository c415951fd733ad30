"""Verify an artifact where it lies: does it still compute what it did when it was made?"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import nn

from secateur.artifact import Manifest
from secateur.cost import counted_macs, counted_params
from secateur.data import ImageData
from secateur.pipeline._open import image_size_of, load
from secateur.pipeline._probe import TOLERANCE, probe_difference, probe_images
from secateur.pipeline._trial import check_runs
from secateur.pipeline._verify_files import check_files
from secateur.report import Check
from secateur.sparsity import nonzero_params
from secateur.train import evaluate


@dataclass(frozen=True, eq=False)
class Verified:
    """What was checked.

    Attributes:
        model: The loaded model.
        manifest: What the artifact says.
        checks: Each with its result.
        passed_over: Files that were not checked, with the reason; which is no failure.
    """

    model: nn.Module
    manifest: Manifest
    checks: tuple[Check, ...]
    passed_over: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every check held."""
        return all(check.passed for check in self.checks)


def verify(
    folder: Path | str,
    *,
    data: ImageData | None = None,
    factory: Callable[[], nn.Module] | None = None,
    trust_source: bool = False,
    device: torch.device | None = None,
) -> Verified:
    """Load an artifact and compare what it does with what it says.

    Args:
        folder: The artifact.
        data: Also measure its accuracy on the test images.
        factory: See `secateur.load`.
        trust_source: See `secateur.load`; ``.pt2`` and ``.pte`` files are read only then, see `secateur.Format`.
        device: Where to measure the accuracy.

    Raises:
        ArtifactError: If it cannot be loaded or run at all.
    """
    folder = Path(folder)
    loaded = load(folder, factory=factory, trust_source=trust_source)
    model, manifest = loaded.model, loaded.manifest
    check_runs(model, image_size_of(manifest))
    checks = [
        Check(
            "Weights = SHA-256 in secateur.json",
            True,
            detail=f"{manifest.weights_bytes} bytes, {manifest.weights_sha256[:16]}",
        ),
        _cost_check(model, manifest),
    ]
    checks += _probe_checks(model, manifest)
    files, passed_over = check_files(folder, model, manifest, data, trust_source=trust_source)
    checks += files
    if data is not None:
        checks.append(_accuracy_check(model, manifest, data, device))
    return Verified(model, manifest, tuple(checks), passed_over)


def _cost_check(model: nn.Module, manifest: Manifest) -> Check:
    recipe = manifest.recipe
    found = {"macs": counted_macs(model, probe_images(recipe.input_shape)), "params": counted_params(model)}
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
        return [Check(name, False, detail="`verification.probe` has no table of logits (secateur.json)")]
    return [Check(name, relative <= TOLERANCE, absolute, relative, TOLERANCE, "as on the machine that made it")]


def _accuracy_check(model: nn.Module, manifest: Manifest, data: ImageData, device: torch.device | None) -> Check:
    found = evaluate(model, data.test, device=device)
    name = f"Test accuracy on {data.name} = recorded accuracy"
    n, said = _recorded_accuracy(manifest)
    if n != found.n or said is None:
        return Check(name, True, detail=f"{100 * found.top1:.2f} % of {found.n} images; recorded on other images")
    # Other kernels may turn a prediction that was a tie: one image in a thousand is allowed.
    held = abs(found.top1 - said) <= max(1e-3, 1.5 / found.n)
    return Check(name, held, detail=f"{100 * found.top1:.2f} % of {found.n} images; recorded {100 * said:.2f} %")


def _recorded_accuracy(manifest: Manifest) -> tuple[int | None, float | None]:
    """Images and accuracy of the last step, as far as secateur.json says them."""
    steps = manifest.recipe.metrics.get("test_accuracy")
    last = cast(list[object], steps)[-1] if isinstance(steps, list) and steps else None
    recorded = cast(Mapping[str, object], last) if isinstance(last, Mapping) else {}
    n, top1 = recorded.get("n"), recorded.get("top1")
    return n if type(n) is int else None, float(top1) if isinstance(top1, (int, float)) else None
