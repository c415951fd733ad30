"""Tracing without surprises from memory layouts."""

import copy

import torch
from torch import Tensor, nn

from secateur.graph import ChannelGraph, trace


def trace_contiguous(model: nn.Module, images: Tensor) -> ChannelGraph:
    """`trace` with model and images in the usual order in memory.

    Some layers run other operations on channels-last tensors (adaptive average pooling ends in ``as_strided``), which
    say nothing about the channels and would freeze them. The graph is the same for every layout.

    Args:
        model: In any layout; not changed.
        images: A batch in any layout.
    """
    plain = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    return trace(plain, images.contiguous())
