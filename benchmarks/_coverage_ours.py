"""Measure one model with Secateur: trace, cut half of every axis, verify, train."""

import copy
import gc
import math
import re
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _coverage_loud import example_of, make_loud_, message, training_pass
from _coverage_models import Subject, build
from torch import nn
from torch.utils._pytree import tree_leaves

from secateur.architecture import Architecture
from secateur.cost import CostModel
from secateur.graph import ChannelGraph, trace
from secateur.prune import Cut, Verification, apply_architecture, cut, prunable_parameter_fraction
from secateur.prune.verify import compare_outputs

REMOVED = 0.05
"""A cut that removes a smaller fraction of the parameters counts as none."""


def prepare(subject: Subject, row: dict[str, Any]) -> tuple[nn.Module, torch.Tensor]:
    """Build a model with random weights that affect its output, and time one forward pass."""
    row["stage"] = "build"
    torch.manual_seed(0)
    model, example = build(subject), example_of(subject.size)
    row["stage"] = "forward"
    make_loud_(model, example)
    with torch.no_grad():
        began = time.process_time()
        out = model(example)
        row["forward_s"] = time.process_time() - began
    row["params"] = sum(p.numel() for p in model.parameters())
    row["finite"] = all(bool(torch.isfinite(t).all()) for t in tree_leaves(out) if isinstance(t, torch.Tensor))
    return model, example


def half(graph: ChannelGraph) -> Architecture:
    """Choose a seeded half of every prunable axis, a multiple of its divisor."""
    draw = np.random.default_rng(0)
    kept: dict[str, Any] = {}
    for axis in graph.prunable:
        width = min(axis.size, max(axis.divisor, axis.size // 2 // axis.divisor * axis.divisor, 1))
        kept[axis.name] = draw.choice(axis.size, width, replace=False)
    return Architecture.of(kept)


def measure(subject: Subject, row: dict[str, Any]) -> None:
    """Fill the row; ``row["stage"]`` is the current stage, so that a killed process shows where it was."""
    model, example = prepare(subject, row)
    row["stage"] = "trace"
    floor = reset_peak()
    began = time.process_time()
    graph = trace(model, example)
    row["trace_s"] = time.process_time() - began
    row["trace_peak_mb"] = (peak() - floor) / 2**20
    describe(row, model, graph)
    architecture = half(graph)
    row["stage"] = "slice"
    began = time.process_time()
    small = apply_architecture(model, graph, architecture)
    row["slice_s"] = time.process_time() - began
    del small
    row["stage"] = "cut"
    floor = reset_peak()
    began = time.process_time()
    done = cut(model, graph, architecture)
    row["cut_s"] = time.process_time() - began
    row["cut_peak_mb"] = (peak() - floor) / 2**20
    outcome(row, model, done)
    row["stage"] = "train"
    row["exact64"] = exactness(model, done) if row["forward_s"] < 1.0 and row["params"] < 60e6 else None
    del model, graph
    gc.collect()
    row["train"] = training_pass(done.model, subject.size)
    row["stage"] = "done" if row["train"].startswith("ok") else "train"


def describe(row: dict[str, Any], model: nn.Module, graph: ChannelGraph) -> None:
    """Describe the graph: prunable shares, axes, and why the rest is frozen."""
    sizes = graph.sizes
    macs = prunable = 0.0
    for operation in graph.operations:
        count = operation.factor * math.prod(extent.at(sizes) for extent in operation.extents)
        macs += count
        prunable += count if any(extent.terms for extent in operation.extents) else 0.0
    row["parameter_share"] = prunable_parameter_fraction(graph)
    row["mac_share"] = prunable / macs if macs else 0.0
    row["macs"] = macs
    row["axes"], row["prunable_axes"] = len(graph.axes), len(graph.prunable)
    row["frozen"] = frozen_reasons(model, graph)


def frozen_reasons(model: nn.Module, graph: ChannelGraph) -> list[dict[str, Any]]:
    """Reasons by the parameters that lie on no prunable axis because of them, largest first."""
    sizes = graph.sizes
    lost: dict[str, float] = {}
    number: Counter[str] = Counter()
    reasons: dict[str, set[str]] = {}
    for axis in graph.axes:
        if axis.frozen_because is not None:
            text = plain(model, axis.frozen_because)
            number[text] += 1
            for site in axis.sites:
                reasons.setdefault(site.tensor, set()).add(text)
    for name in graph.parameters:
        extents = graph.tensors[name]
        if any(extent.terms for extent in extents):
            continue
        count = math.prod(extent.at(sizes) for extent in extents)
        why = reasons.get(name, {"no axis reaches the tensor"})
        for text in why:
            lost[text] = lost.get(text, 0.0) + count / len(why)
    for text in number:
        lost.setdefault(text, 0.0)
    total = max(1, sum(p.numel() for p in model.parameters()))
    rows = [{"why": why, "axes": number[why], "share": round(count / total, 5)} for why, count in lost.items()]
    return sorted(rows, key=lambda entry: (-entry["share"], -entry["axes"]))[:12]


def plain(model: nn.Module, reason: str) -> str:
    """Replace module names in a reason by class names and drop numbers, so that equal causes have equal texts."""
    modules = {name: type(module).__name__ for name, module in model.named_modules() if name}
    words = (f"<{modules[w.strip('`,:;')]}>" if w.strip("`,:;") in modules else w for w in reason.split())
    words = (
        re.sub(r"(?:\w+\.){2,}(\w+)", r"*.\1", word) for word in words
    )  # sizes held by modules: keep the last name
    return re.sub(r"(?<![a-zA-Z_])\d+(\.\d+)?(e[-+]?\d+)?", "N", " ".join(words))[:200]


def outcome(row: dict[str, Any], model: nn.Module, done: Cut) -> None:
    """Describe the result of the cut."""
    found = done.verification
    costs = CostModel(done.graph)
    row["first_try"] = not found.frozen
    row["max_rel"], row["dtype"], row["tolerance"] = found.max_rel, found.dtype, found.tolerance
    row["refrozen"] = [[plain(model, why), n] for why, n in Counter(why for _, why in found.frozen).most_common(5)]
    row["refrozen_raw"] = [list(pair) for pair in found.frozen[:3]]
    row["final_parameter_share"] = prunable_parameter_fraction(done.graph)
    row["kept_params"] = sum(p.numel() for p in done.model.parameters()) / row["params"]
    row["kept_macs"] = costs.cost(done.architecture).macs / max(costs.original.macs, 1)


def exactness(model: nn.Module, done: Cut) -> float | str | None:
    """Repeat the comparison in float64, with its tolerance of 1e-12; None if a model cannot run in float64."""
    try:
        wide, small = copy.deepcopy(model).double(), copy.deepcopy(done.model).double()
        example = tuple(t.double() if isinstance(t, torch.Tensor) else t for t in done.graph.example)
        found = compare_outputs(wide, small, replace(done.graph, example=example), done.architecture)
    except Exception as error:
        return None if "dtype" in str(error).lower() or "double" in str(error).lower() else message(error)
    return found.max_rel if isinstance(found, Verification) else found.what


def peak() -> float:
    """Return the largest resident memory since `reset_peak`, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return float(line.split()[1]) * 1024
    return 0.0


def reset_peak() -> float:
    """Reset the largest resident memory; return what is resident now, in bytes."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    return peak()
