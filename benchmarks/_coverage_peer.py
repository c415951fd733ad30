"""Measure one model with Torch-Pruning 1.6.1, with the settings of its README and its example scripts.

GroupMagnitudeImportance (p = 2), ratio 0.5, the classifier ignored (README, examples/timm_models); ``num_heads`` for
every module with a fused ``qkv`` and the unfused attention of timm (examples/timm_models), ``head_dim`` and
``num_heads`` of those modules set afterward; for torchvision's ViT ``round_to`` = heads and ``hidden_dim`` set
afterward, the heads of detectors ignored (examples/torchvision_models). It has no verification of its own.
"""

import time
import warnings
from typing import Any

import torch
from _coverage_loud import training_pass
from _coverage_models import Subject
from _coverage_ours import peak, prepare, reset_peak
from _peer import has_heads, name_heads_
from torch import nn
from torch.utils._pytree import tree_leaves

IGNORED = {
    "ssdlite": ("head",),
    "fasterrcnn": ("rpn.head.cls_logits", "rpn.head.bbox_pred", "backbone.fpn", "roi_heads"),
    "fcos": (
        "head.classification_head.cls_logits",
        "head.regression_head.bbox_reg",
        "head.regression_head.bbox_ctrness",
    ),
    "keypointrcnn": (
        "rpn.head.cls_logits",
        "backbone.fpn.layer_blocks",
        "rpn.head.bbox_pred",
        "roi_heads.box_head",
        "roi_heads.box_predictor",
        "roi_heads.keypoint_predictor",
    ),
    "maskrcnn": (
        "rpn.head.cls_logits",
        "rpn.head.bbox_pred",
        "roi_heads.box_predictor",
        "roi_heads.mask_predictor",
    ),
    "retinanet": ("head.classification_head.cls_logits", "head.regression_head.bbox_reg"),
}
"""What examples/torchvision_models ignores, by the beginning of the model's name."""


def measure(subject: Subject, row: dict[str, Any]) -> None:
    """Fill the row like `_coverage_ours.measure`."""
    import torch_pruning as tp  # type: ignore[import-not-found]

    warnings.simplefilter("ignore")
    model, example = prepare(subject, row)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    with torch.no_grad():
        wanted = shapes(model(example))
    heads = name_heads_(model)
    vit = type(model).__module__ == "torchvision.models.vision_transformer"
    row["stage"] = "prune"
    floor = reset_peak()
    began = time.process_time()
    pruner = tp.pruner.BasePruner(
        model,
        example,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=0.5,
        ignored_layers=ignored(subject, model),
        num_heads=heads,
        round_to=model.encoder.layers[0].num_heads if vit else None,  # type: ignore[union-attr, index]
    )
    row["constructor_s"] = time.process_time() - began
    pruner.step()
    row["prune_s"] = time.process_time() - began
    row["prune_peak_mb"] = (peak() - floor) / 2**20
    _repair_(model, pruner, vit)
    row["kept_params"] = sum(p.numel() for p in model.parameters()) / row["params"]
    row["stage"] = "run"
    with torch.no_grad():
        row["same_shapes"] = shapes(model.eval()(example)) == wanted or "rcnn" in subject.name
    row["stage"] = "train"
    row["train"] = training_pass(model, subject.size)
    row["stage"] = "done" if row["train"].startswith("ok") else "train"


def ignored(subject: Subject, model: nn.Module) -> list[nn.Module]:
    """Return the classifier and the layers that the examples ignore."""
    modules = dict(model.named_modules())
    for start, names in IGNORED.items():
        if subject.name.startswith(start):
            return [modules[name] for name in names]
    if subject.source == "ultralytics":
        return [list(model.model)[-1]]  # type: ignore[arg-type] # examples/yolov8: the Detect head
    classes = getattr(model, "num_classes", None) or (1000 if subject.source == "torchvision" else None)
    last = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    chosen = [m for m in last if classes in (getattr(m, "out_features", None), getattr(m, "out_channels", None))]
    return chosen if classes and chosen else last[-1:]


def shapes(out: Any) -> list[tuple[int, ...]]:
    """Return the shape of every tensor."""
    return [tuple(t.shape) for t in tree_leaves(out) if isinstance(t, torch.Tensor)]


def _repair_(model: Any, pruner: Any, vit: bool) -> None:
    for module in model.modules():
        if has_heads(module) and module.qkv in pruner.num_heads:
            module.num_heads = pruner.num_heads[module.qkv]
            width = getattr(module.qkv, "out_features", None) or module.qkv.out_channels
            module.head_dim = width // (3 * module.num_heads)
            if hasattr(module, "attn_dim"):
                module.attn_dim = width // 3
    if vit:
        model.hidden_dim = model.conv_proj.out_channels
