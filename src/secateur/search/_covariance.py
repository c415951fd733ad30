"""Covariances of channels, gathered while a model runs."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur.graph import ChannelGraph
from secateur.importance import channel_positions
from secateur.search._problem import FloatArray
from secateur.search._space import IntArray

_PIECE = 1 << 22
"""Numbers turned into float64 at a time (32 MB)."""


class RunningCovariance:
    """Covariance over all samples seen so far, in float64, by the parallel update of Chan, Golub and LeVeque (1983).

    Attributes:
        samples: Number of samples seen.
    """

    def __init__(self, channels: int):
        self.samples = 0
        self._mean = np.zeros(channels)
        self._scatter = np.zeros((channels, channels))

    def add(self, data: FloatArray) -> None:
        """See (channels, samples)."""
        count = data.shape[1]
        total = self.samples + count
        mean = data.mean(axis=1)
        centred = data - mean[:, None]
        shift = mean - self._mean
        self._scatter += centred @ centred.T + np.outer(shift, shift) * (self.samples * count / total)
        self._mean += shift * (count / total)
        self.samples = total

    def covariance(self) -> FloatArray:
        """(channels, channels), divided by the number of samples."""
        return self._scatter / self.samples


def observe(
    model: nn.Module, graph: ChannelGraph, taps: Mapping[str, Mapping[str, int]], batches: Sequence[Tensor]
) -> dict[str, dict[str, RunningCovariance]]:
    """Run the batches and gather the covariance of every axis at every module that shows all of its channels.

    A channel with several positions gives as many samples.

    Args:
        model: Runs with hooks, which are removed again. It should be a copy in evaluation mode.
        graph: For the channels of module outputs.
        taps: Axis name to module names.
        batches: Inputs.

    Returns:
        Axis name to module name to its covariance; modules that do not show the axis, or never ran, are left out.
    """
    found: dict[str, dict[str, RunningCovariance]] = {axis: {} for axis in taps}
    hooks: list[Any] = []
    for axis, modules in taps.items():
        for module in modules:
            positions = channel_positions(graph, module, axis)
            if positions is None:
                continue
            found[axis][module] = RunningCovariance(len(positions))
            hook = _gather(found[axis][module], positions, graph.activations[module].dim)
            hooks.append(model.get_submodule(module).register_forward_hook(hook))
    try:
        with torch.no_grad():
            for images in batches:
                model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return {axis: {name: run for name, run in runs.items() if run.samples > 1} for axis, runs in found.items()}


def _gather(run: RunningCovariance, positions: IntArray, dim: int) -> Callable[..., None]:
    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        if not isinstance(output, Tensor):
            return
        flat = output.detach().movedim(dim, 0).flatten(1).cpu()
        data = flat[torch.from_numpy(positions)].flatten(1)
        for piece in data.split(max(1, _PIECE // len(data)), dim=1):
            run.add(piece.double().numpy())

    return hook
