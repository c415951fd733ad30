"""All stages of a subnet in one forward pass, each fed with what the full net hands on.

    features(supernet, stages, images, *, tensors=None) -> (output, features)
    run_stages(supernet, subnet, stages, images, features, *, tensors=None) -> outputs
    carried_on(supernet, stages, images, number, feature, *, tensors=None) -> output
    stage_losses(outputs, targets, variances=None) -> (stages,)
    stage_variances(targets) -> (stages,)
    calibrated_stages(supernet, subnets, stages, batches, full=None) -> [statistics of each subnet]

With x_0 the images, f_s stage s of the full net and x_s = f_s(x_(s-1)), a subnet's stages compute y_s = g_s(x_(s-1)):
each from the full net's feature, so that no stage's error reaches the next, and no gradient crosses a cut.

How much of a stage's error arrives at the output: what makes losses of different stages comparable."""

import contextlib
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.errors import SurgeryError
from secateur.graph.stages import Stage
from secateur.nas.supernet import Subnet, Supernet, check_seen, measuring, untouched

_LEAST_VARIANCE = 1e-12
"""Added to the variance of a target, relative to its mean square: a constant one is divided by this much."""


def features(
    supernet: Supernet, stages: Sequence[Stage], images: Tensor, *, tensors: Mapping[str, Tensor] | None = None
) -> tuple[Any, tuple[Tensor, ...]]:
    """Run the full net, and keep what it hands on at every cut.

    Args:
        supernet: In any mode.
        stages: Of its model, see `secateur.graph.stages_of`.
        images: Normalized.
        tensors: As for `Supernet.forward`, for example the full net's own batch-norm statistics.

    Returns:
        The model's output, with its gradient, and for each stage but the last the tensor that ends it: detached copies.
    """
    found: list[Tensor] = []

    def keep(_number: int, output: Tensor) -> Tensor:
        # A copy: the layer that reads the tensor may write into it.
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
    """One forward pass of a subnet in which each stage is fed with the full net's feature.

    Where a cut module returns, what it has computed is taken as its stage's output, and the full net's feature goes on
    in its place. The outputs have gradients for the parameters of their own stages only; these land in the whole
    tensors.

    Args:
        supernet: In any mode.
        subnet: Any widths of the stages' axes, any of their blocks removed; boundary axes whole.
        stages: Of its model.
        images: Normalized, for the first stage.
        features: What the full net hands on at each cut, see `features`.
        tensors: As for `Supernet.forward`, for example statistics of `calibrated_stages`.

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
        return wanted.detach().clone()

    with _at_cuts(supernet, stages, exchange):
        output = supernet(subnet, images, tensors=tensors)
    if len(found) != len(stages) - 1:
        raise SurgeryError(
            f"`subnet` must leave the modules that end stages; got removed blocks {', '.join(subnet.removed_blocks)}. "
            "Remove the blocks of the stages only."
        )
    return (*found, output)


def carried_on(
    supernet: Supernet,
    stages: Sequence[Stage],
    images: Tensor,
    number: int,
    feature: Tensor,
    *,
    tensors: Mapping[str, Tensor] | None = None,
) -> Any:
    """Run the full net with another tensor in the place of what it hands on at one cut.

    Args:
        supernet: In any mode.
        stages: Of its model.
        images: Normalized.
        number: Of the stage that ends at the cut; not the last one.
        feature: Goes on instead, for example what a candidate of the stage has computed.
        tensors: As for `Supernet.forward`.

    Returns:
        The model's output.
    """
    with _at_cuts(supernet, stages, lambda at, output: feature.clone() if at == number else output):
        return supernet(supernet.full, images, tensors=tensors)


def stage_losses(outputs: Sequence[Tensor], targets: Sequence[Tensor], variances: Tensor | None = None) -> Tensor:
    """How far each stage's output is from the full net's, in units of the variance of the latter.

    L_s = mean((y_s - x_s)^2) / Var(x_s), the mean over all elements, images and channels alike: 1 is what the best
    constant reaches, 0 is the full net. In single precision at least, under autocast too.

    Args:
        outputs: Of `run_stages`: any shapes.
        targets: Of the full net, of the same shapes: its features and its output. Detached here.
        variances: Of the targets, see `stage_variances`, where many outputs are compared with the same. None:
            measured here.

    Returns:
        (stages,), dimensionless.
    """
    of_targets = stage_variances(targets) if variances is None else variances
    pairs = zip(outputs, targets, of_targets, strict=True)
    return torch.stack([_mean_square(y, x.detach()) / variance for y, x, variance in pairs])


def stage_variances(targets: Sequence[Tensor]) -> Tensor:
    """Var(x_s) of each target, biased, over all its elements: what `stage_losses` divides by.

    To it 1e-12 of the mean square of x_s is added, and the least positive number, for targets that are constant.

    Args:
        targets: Any shapes.

    Returns:
        (stages,), not differentiable.
    """
    return torch.stack([_variance(target.detach()) for target in targets])


def _variance(target: Tensor) -> Tensor:
    x = target.to(torch.promote_types(torch.float32, target.dtype))
    mean = x.mean()
    variance = _mean_square(x, mean.expand_as(x))
    return variance + _LEAST_VARIANCE * (variance + mean**2) + torch.finfo(x.dtype).tiny


def _mean_square(output: Tensor, target: Tensor) -> Tensor:
    with torch.autocast(output.device.type, enabled=False):
        kind = torch.promote_types(torch.float32, target.dtype)
        return F.mse_loss(output.to(kind), target.to(kind))


def calibrated_stages(
    supernet: Supernet,
    subnets: Sequence[Subnet],
    stages: Sequence[Stage],
    batches: Iterable[Tensor],
    full: Mapping[str, Tensor] | None = None,
) -> list[dict[str, Tensor]]:
    """Batch-norm statistics of subnets in the stage-wise pass, where each stage is fed with the full net's features.

    As `calibrated`, for many subnets at once: the full net runs once for each batch, then every subnet.

    Args:
        supernet: In any mode; left as it is.
        subnets: Which ones, as for `run_stages`.
        stages: Of its model.
        batches: Normalized images, in batches of two or more.
        full: The full net's own statistics, see `calibrated`, with which it then runs in evaluation mode. None: it
            uses those of each batch.

    Returns:
        For each subnet, buffer name to its value, to be passed to `run_stages` as ``tensors``.

    Raises:
        DataError: If there are batch norms and no images.
    """
    statistics = [untouched(supernet, subnet) for subnet in subnets]
    own = untouched(supernet, supernet.full)
    if not own:
        return statistics
    seen = 0
    for images in batches:
        with torch.no_grad():
            with _evaluating(supernet) if full is not None else measuring(supernet):
                _, handed_on = features(supernet, stages, images, tensors=own if full is None else full)
            with measuring(supernet):
                for subnet, tensors in zip(subnets, statistics, strict=True):
                    run_stages(supernet, subnet, stages, images, handed_on, tensors=tensors)
        seen += 1
    check_seen(seen)
    return statistics


@contextlib.contextmanager
def _evaluating(supernet: Supernet) -> Generator[None]:
    training = {module: module.training for module in supernet.modules()}
    supernet.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


@contextlib.contextmanager
def _at_cuts(supernet: Supernet, stages: Sequence[Stage], change: Callable[[int, Tensor], Tensor]) -> Generator[None]:
    """Change what cut modules return, for as long as the context lasts."""

    def hook(number: int) -> Callable[..., Tensor]:
        return lambda _module, _inputs, output: change(number, output)

    with ExitStack() as stack:
        for number, stage in enumerate(stages[:-1]):
            module: nn.Module = supernet.model.get_submodule(stage.cut)
            stack.callback(module.register_forward_hook(hook(number)).remove)
        yield


def stage_effects(supernet: Supernet, subnets: Sequence[Subnet], stages: Sequence[Stage], images: Tensor) -> Tensor:
    """The loss at the output per loss at each stage's own end.

    With f_s the full net's stages, x_s its features, y_s the output of a subnet's stage s fed with x_(s-1), and L_s the
    loss of `stage_losses`,

        effect_s = sum L_S(f_S(...f_(s+1)(y_s))) / sum L_s(y_s)

    over the subnets: some stages' errors are mended by what follows, others are not. That of the last stage is 1.
    Every batch norm uses the statistics of the batch, as in a network whose norms have been measured again.

    Args:
        supernet: In any mode; left as it is.
        subnets: As for `run_stages`; a handful will do, because only the ratio of means is wanted.
        stages: Of its model.
        images: Normalized, two or more.

    Returns:
        (stages,), float64, not differentiable; 1 for a stage where the subnets have no loss.
    """
    last = len(stages) - 1
    if not last:
        return torch.ones(1, dtype=torch.float64)
    own, arrived = torch.zeros(2, last + 1, dtype=torch.float64)
    full = untouched(supernet, supernet.full)
    with torch.no_grad(), measuring(supernet):
        output, handed_on = features(supernet, stages, images, tensors=full)
        for subnet in subnets:
            outputs = run_stages(supernet, subnet, stages, images, handed_on, tensors=untouched(supernet, subnet))
            own += stage_losses(outputs, (*handed_on, output)).double().cpu()
            for number, feature in enumerate(outputs[:-1]):
                there = carried_on(supernet, stages, images, number, feature, tensors=full)
                arrived[number] += stage_losses((there,), (output,)).double().cpu()[0]
    arrived[last] = own[last]
    return torch.where(own > 0, arrived / own, 1.0)
