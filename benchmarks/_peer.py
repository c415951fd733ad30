"""Torch-Pruning, with which Secateur is compared, used through its own documented API."""

import copy
import warnings

import torch
from torch import nn


def prune_inner_convolutions(model: nn.Module, example: torch.Tensor, *, kept_fraction: float) -> nn.Module:
    """Prune the first convolution of every residual block by GroupMagnitudeImportance, with the same ratio.

    Torch-Pruning 1.6.1 does not handle option-A shortcuts (subsampling and zero-padding of channels), so the residual
    streams are left whole: every other layer is in its ``ignored_layers``.
    """
    import torch_pruning as tp  # type: ignore[import-not-found]

    small = copy.deepcopy(model).eval()
    inner = {m for name, m in small.named_modules() if name.startswith("layer") and name.endswith(".conv1")}
    ignored = [m for m in small.modules() if isinstance(m, nn.Conv2d | nn.Linear) and m not in inner]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner = tp.pruner.BasePruner(
            small,
            example,
            importance=tp.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=1 - kept_fraction,
            ignored_layers=ignored,
        )
        pruner.step()
    for parameter in small.parameters():
        parameter.requires_grad_(True)
    return small.eval()


def name_heads_(model: nn.Module) -> dict[nn.Module, int]:
    """Use timm's unfused attention, and return the heads of every fused ``qkv``, like examples/timm_models."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return {module.qkv: module.num_heads for module in model.modules() if has_heads(module)}


def has_heads(module: nn.Module) -> bool:
    """Return whether a module is attention with a fused ``qkv`` and a number of heads."""
    fused = isinstance(getattr(module, "qkv", None), nn.Linear | nn.Conv2d)
    return fused and isinstance(getattr(module, "num_heads", None), int)
