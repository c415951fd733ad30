"""Run all stages of a subnet in one forward pass, each fed with the features of the full net.

With x_0 the images, f_s stage s of the full net and x_s = f_s(x_(s-1)), a subnet's stages compute y_s = g_s(x_(s-1)).
Each starts from the full net's feature, so no stage's error reaches the next, and no gradient crosses a cut.
`stage_losses` compares the y_s with the x_s, and `stage_effects` measures how much of a stage's error arrives at the
output, which makes losses of different stages comparable.
"""

import contextlib
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur._runtime import evaluating
from secateur.distill.logit_losses import upcast
from secateur.errors import SurgeryError
from secateur.graph.stages import Stage
from secateur.nas.supernet import (
    Subnet,
    Supernet,
    check_any_batches,
    fresh_statistics,
    measuring_batch_norms,
)

_VARIANCE_FLOOR = 1e-12
"""Added to the variance of a target, relative to its mean square, so that a constant target is no division by zero."""


def stage_features(
    supernet: Supernet, stages: Sequence[Stage], images: Tensor, *, tensors: Mapping[str, Tensor] | None = None
) -> tuple[Any, tuple[Tensor, ...]]:
    """Run the full net, and keep the feature that it passes on at every cut.

    Args:
        supernet: In any mode.
        stages: Of its model, see `secateur.graph.find_stages`.
        images: Normalized.
        tensors: As for `Supernet.forward`, for example the full net's own batch-norm statistics.

    Returns:
        The model's output, with its gradient, and a detached copy of the tensor that ends each stage but the last.
    """
    found: list[Tensor] = []

    def keep(_number: int, output: Tensor) -> Tensor:
        # A copy, because the layer that reads the tensor may write into it (an in-place ReLU).
        found.append(output.detach().clone())
        return output

    with _at_cuts(supernet, stages, keep):
        output = supernet(supernet.full, images, tensors=tensors)
    return output, tuple(found)


def run_stages(
    supernet: Supernet,
    subnet: Subnet,
    stages: Sequence[Stage],
    images: Tensor,
    features: Sequence[Tensor],
    *,
    tensors: Mapping[str, Tensor] | None = None,
) -> tuple[Any, ...]:
    """Run a subnet once, feeding each of its stages with the full net's feature.

    What a cut module returns is taken as its stage's output, and replaced by the full net's feature. The outputs have
    gradients for the parameters of their own stages only; these land in the supernet's tensors.

    Args:
        supernet: In any mode.
        subnet: Any widths of the stages' axes, any of their blocks removed; boundary axes whole.
        stages: Of its model.
        images: Normalized, for the first stage.
        features: What the full net passes on at each cut, see `stage_features`.
        tensors: As for `Supernet.forward`, for example statistics of `measure_stage_batch_norms`.

    Returns:
        Each stage's own output; the last is what the model returns.

    Raises:
        SurgeryError: If a stage's output has another shape than the full net's, or a cut went with a removed block.
    """
    found: list[Tensor] = []

    def exchange(number: int, output: Tensor) -> Tensor:
        wanted = features[number]
        if output.shape != wanted.shape:
            raise SurgeryError(
                f"`subnet` must be whole where stages meet; after {stages[number].cut!r} it has shape "
                f"{tuple(output.shape)} instead of {tuple(wanted.shape)}. Narrow the axes of the stages only."
            )
        found.append(output)
        # Detached, so that no gradient crosses the cut. A copy, because the next layer may write into it, and the
        # feature is also the target of this stage and the input of all other subnets.
        return wanted.detach().clone()

    with _at_cuts(supernet, stages, exchange):
        output = supernet(subnet, images, tensors=tensors)
    # The hook of a cut module never runs if the module was removed together with its block.
    if len(found) != len(stages) - 1:
        raise SurgeryError(
            f"`subnet` must leave the modules that end stages; got removed blocks {', '.join(subnet.removed_blocks)}. "
            "Remove the blocks of the stages only."
        )
    return (*found, output)


def run_remaining_stages(
    supernet: Supernet,
    stages: Sequence[Stage],
    images: Tensor,
    number: int,
    feature: Tensor,
    *,
    tensors: Mapping[str, Tensor] | None = None,
) -> Any:
    """Run the full net, with another tensor in place of the feature that it passes on at one cut.

    Args:
        supernet: In any mode.
        stages: Of its model.
        images: Normalized.
        number: The number of the stage that ends at the cut; not the last one.
        feature: The tensor to continue with, for example what a candidate of the stage has computed.
        tensors: As for `Supernet.forward`.

    Returns:
        The model's output.
    """
    with _at_cuts(supernet, stages, lambda at, output: feature.clone() if at == number else output):
        return supernet(supernet.full, images, tensors=tensors)


def stage_losses(outputs: Sequence[Tensor], targets: Sequence[Tensor], variances: Tensor | None = None) -> Tensor:
    """Compare each stage's output with the full net's, in units of the variance of the latter.

    L_s = mean((y_s - x_s)^2) / Var(x_s), the mean over all elements, images and channels alike: 1 is what the best
    constant reaches, 0 is the full net. In single precision at least, under autocast too.

    Args:
        outputs: Those of `run_stages`, of any shapes.
        targets: The features and the output of the full net, of the same shapes. Detached here.
        variances: Those of the targets, see `stage_variances`, if many outputs are compared with the same targets.
            None measures them here.

    Returns:
        (stages,), dimensionless.
    """
    of_targets = stage_variances(targets) if variances is None else variances
    # The paper does not give the loss. Divided by the variance of the target it has the same unit in every stage.
    pairs = zip(outputs, targets, of_targets, strict=True)
    return torch.stack([_mean_square(y, x.detach()) / variance for y, x, variance in pairs])


def stage_variances(targets: Sequence[Tensor]) -> Tensor:
    """Return the biased variance Var(x_s) of each target over all its elements, by which `stage_losses` divides.

    1e-12 of the mean square of x_s and the smallest positive number are added, so that constant targets are no error.

    Args:
        targets: Any shapes.

    Returns:
        (stages,), not differentiable.
    """
    return torch.stack([_variance(target.detach()) for target in targets])


def _variance(target: Tensor) -> Tensor:
    x = upcast(target)
    mean = x.mean()
    variance = _mean_square(x, mean.expand_as(x))
    # variance + mean^2 is the mean square; `tiny` is for targets that are zero everywhere.
    return variance + _VARIANCE_FLOOR * (variance + mean**2) + torch.finfo(x.dtype).tiny


def _mean_square(output: Tensor, target: Tensor) -> Tensor:
    # The difference of nearly equal features needs single precision, whatever autocast is in force.
    with torch.autocast(output.device.type, enabled=False):
        wide = upcast(target)
        return F.mse_loss(output.to(wide.dtype), wide)


def measure_stage_batch_norms(
    supernet: Supernet,
    subnets: Sequence[Subnet],
    stages: Sequence[Stage],
    batches: Iterable[Tensor],
    full: Mapping[str, Tensor] | None = None,
) -> list[dict[str, Tensor]]:
    """Measure the batch-norm statistics of many subnets in the stage-wise pass of `run_stages`.

    This is `measure_batch_norms` for many subnets at once: the full net runs once for each batch, then every subnet.

    Args:
        supernet: In any mode; left as it is.
        subnets: The subnets to run, as for `run_stages`.
        stages: Of its model.
        batches: Normalized images, in batches of two or more.
        full: The full net's own statistics, see `measure_batch_norms`, with which it then runs in evaluation mode. None
            lets it use those of each batch.

    Returns:
        For each subnet, buffer name to its value, to be passed to `run_stages` as ``tensors``.

    Raises:
        DataError: If there are batch norms and no images.
    """
    statistics = [fresh_statistics(supernet, subnet) for subnet in subnets]
    # Without `full` the passes of the full net write their statistics here, not into the supernet. Nobody uses them.
    own = fresh_statistics(supernet, supernet.full)
    if not own:
        return statistics
    seen = 0
    for images in batches:
        with torch.no_grad():
            with evaluating(supernet) if full is not None else measuring_batch_norms(supernet):
                _, passed_on = stage_features(supernet, stages, images, tensors=own if full is None else full)
            with measuring_batch_norms(supernet):
                for subnet, tensors in zip(subnets, statistics, strict=True):
                    run_stages(supernet, subnet, stages, images, passed_on, tensors=tensors)
        seen += 1
    check_any_batches(seen)
    return statistics


@contextlib.contextmanager
def _at_cuts(supernet: Supernet, stages: Sequence[Stage], change: Callable[[int, Tensor], Tensor]) -> Generator[None]:
    """Change what cut modules return while the context is open."""

    def hook(number: int) -> Callable[..., Tensor]:
        return lambda _module, _inputs, output: change(number, output)

    with ExitStack() as stack:
        for number, stage in enumerate(stages[:-1]):
            module: nn.Module = supernet.model.get_submodule(stage.cut)
            stack.callback(module.register_forward_hook(hook(number)).remove)
        yield


def stage_effects(supernet: Supernet, subnets: Sequence[Subnet], stages: Sequence[Stage], images: Tensor) -> Tensor:
    """Return the loss at the output per loss at the end of each stage.

    With f_s the full net's stages, x_s its features, y_s the output of a subnet's stage s fed with x_(s-1), and L_s the
    loss of `stage_losses`,

        effect_s = sum L_S(f_S(...f_(s+1)(y_s))) / sum L_s(y_s)

    over the subnets. Some stages' errors are corrected by what follows, others are amplified. The last stage has 1.
    Every batch norm uses the statistics of the batch, as in a network whose norms have been measured anew.

    Args:
        supernet: In any mode; left as it is.
        subnets: As for `run_stages`; a handful is enough, because only a ratio of means is computed.
        stages: Of its model.
        images: Normalized, two or more.

    Returns:
        (stages,), float64, not differentiable; 1 for a stage where the subnets have no loss.
    """
    # The plain sum of the stages' losses ranks networks badly, because errors of the first stages are corrected by the
    # later ones: Kendall's tau with retrained accuracy was 0.33, and about 0.6 with these effects (docs/log.md). There
    # is one effect per stage, since one per candidate would cost a pass of all later stages for each.
    last = len(stages) - 1
    if not last:
        return torch.ones(1, dtype=torch.float64)
    # Sums over the subnets, so that the result is a ratio of means: single losses may be close to 0.
    own, arrived = torch.zeros(2, last + 1, dtype=torch.float64)
    full = fresh_statistics(supernet, supernet.full)
    with torch.no_grad(), measuring_batch_norms(supernet):
        output, passed_on = stage_features(supernet, stages, images, tensors=full)
        for subnet in subnets:
            statistics = fresh_statistics(supernet, subnet)
            outputs = run_stages(supernet, subnet, stages, images, passed_on, tensors=statistics)
            own += stage_losses(outputs, (*passed_on, output)).double().cpu()
            for number, feature in enumerate(outputs[:-1]):
                # Behind the candidate too, norms use the batch. With the full net's running statistics the ranking was
                # no better (tau 0.57).
                there = run_remaining_stages(supernet, stages, images, number, feature, tensors=full)
                arrived[number] += stage_losses((there,), (output,)).double().cpu()[0]
    # What the last stage returns is the output already.
    arrived[last] = own[last]
    return torch.where(own > 0, arrived / own, 1.0)
