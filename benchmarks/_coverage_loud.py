"""Give every branch of a model random weights that affect its output, and run one training pass of it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves


def example_of(size: tuple[int, ...], batch: int = 1) -> torch.Tensor:
    """Return a seeded input batch."""
    return torch.rand(batch, *size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def make_loud_(model: nn.Module, example: torch.Tensor) -> None:
    """Fill every parameter and running statistic with seeded numbers that are not zero, one or equal.

    Weights have variance 1.6 / fan-in, vectors lie in 0.6..1.4, biases have deviation 0.3. Running statistics are
    those of the example, disturbed (mean by 0.3 deviations, variance by a factor of 0.5..1.5): a deep residual
    network stays in the range where no gate saturates.
    """
    draw = torch.Generator().manual_seed(0)
    seen: set[int] = set()
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if id(parameter) not in seen and parameter.is_floating_point():
                    seen.add(id(parameter))
                    parameter.copy_(_draw(module, name, parameter, draw))
        hooks = [
            module.register_forward_pre_hook(_settle(draw))
            for module in model.modules()
            if isinstance(getattr(module, "running_var", None), torch.Tensor)
        ]
        try:
            model(example)
        finally:
            for hook in hooks:
                hook.remove()


def _draw(module: nn.Module, name: str, parameter: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    noise = torch.randn(parameter.shape, generator=draw)
    size = parameter.numel()
    if name.endswith("bias"):
        return 0.3 * noise
    if size == max((*parameter.shape, 1)):
        return 0.6 + 0.8 * torch.rand(parameter.shape, generator=draw)
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return noise * (1.6 * module.groups / (size / parameter.shape[1])) ** 0.5
    if isinstance(module, nn.Linear | nn.modules.conv._ConvNd | nn.MultiheadAttention | nn.LSTM) or "weight" in name:
        return noise * (1.6 / (size / parameter.shape[0])) ** 0.5
    return 0.5 * noise  # position tables, class tokens


def _settle(draw: torch.Generator) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(module: Any, args: tuple[Any, ...]) -> None:
        features = args[0].detach().float().transpose(0, 1).flatten(1) if args[0].dim() > 1 else args[0][:, None]
        if features.shape[0] != module.running_mean.shape[0]:
            return
        variance = features.var(1, correction=0)
        variance = torch.where(variance > 1e-3 * variance.mean() + 1e-6, variance, variance.mean() + 1e-3)
        shape = variance.shape
        noise = torch.randn(shape, generator=draw)
        module.running_mean.copy_(features.mean(1) + 0.3 * noise * variance.sqrt())
        module.running_var.copy_(variance * (0.5 + torch.rand(shape, generator=draw)))

    return hook


def training_pass(model: nn.Module, size: tuple[int, ...]) -> str:
    """Run forward and backward in training mode at batch 2, or 1 where the model accepts no more.

    Returns:
        ``ok``, ``ok at batch 1``, or what went wrong.
    """
    model.train()
    try:
        return _pass(model, size, 2)
    except Exception as error:
        first = message(error)
    try:
        return f"{_pass(model, size, 1)} at batch 1"
    except Exception:
        return first
    finally:
        model.eval()


def _pass(model: nn.Module, size: tuple[int, ...], batch: int) -> str:
    torch.manual_seed(0)
    images = example_of(size, batch)
    out = model(images, targets(images)) if hasattr(model, "roi_heads") or hasattr(model, "anchor_generator") else None
    out = model(images) if out is None else out
    outputs = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and t.requires_grad]
    loss = sum(t.float().square().mean() for t in outputs)
    model.zero_grad()
    loss.backward()  # type: ignore[union-attr]
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if not gradients:
        return "no gradients"
    return "ok" if all(bool(torch.isfinite(g).all()) for g in gradients) else "gradients are not finite"


def targets(images: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """Return one box per image, with the fields that torchvision's detectors may read."""
    side = images.shape[-1]
    box = torch.tensor([[0.2 * side, 0.2 * side, 0.8 * side, 0.8 * side]])
    points = torch.cat([torch.rand(1, 17, 2) * 0.5 * side + 0.25 * side, torch.ones(1, 17, 1)], 2)
    mask = torch.ones(1, side, side, dtype=torch.uint8)
    one = {"boxes": box, "labels": torch.tensor([1]), "masks": mask, "keypoints": points}
    return [one for _ in images]


def message(error: BaseException) -> str:
    """Return the first line of an error message."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]
