"""How a model runs for a comparison: isolated and seeded, if need be in double precision or with constant noise.

`KeptFeatures` also records what every module returns, and `depends_on_training` tells whether the training mode
can change more than torch's own layers.
"""

import contextlib
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import (
    TorchDispatchMode,
)
from torch.utils._pytree import tree_leaves, tree_map_only

from secateur._outputs import Leaf, output_leaves
from secateur._runtime import run_isolated
from secateur.architecture import Architecture
from secateur.graph._shadow import mentioned_names, written_arguments
from secateur.graph.graph import ChannelDim, ChannelGraph
from secateur.prune.narrow_branches import original_names

_LOW = frozenset({torch.float32, torch.float16, torch.bfloat16})


@dataclass(frozen=True)
class ComparisonRun:
    """The settings of one run.

    Attributes:
        double: Whether everything is computed in float64, also what the model creates in another precision.
        constant_noise: Whether random operations return constants.
    """

    double: bool = False
    constant_noise: bool = False

    def outputs(self, model: nn.Module, example: tuple[Any, ...]) -> dict[str, Leaf]:
        """Return all that the model returns, by its place.

        Raises:
            ModelError: If it returns what cannot be compared.
        """
        with run_isolated(model), torch.no_grad(), ExitStack() as stack:
            if self.constant_noise:
                stack.enter_context(ConstantNoiseMode())
            if self.double:
                stack.enter_context(DoublePrecisionMode())
            # Clones, because a model may write to its inputs.
            return output_leaves(model(*tree_map_only(Tensor, Tensor.clone, example)))


class DoublePrecisionMode(TorchDispatchMode):
    """A mode in which all calls compute in float64, whatever precision the model asks for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # What a call writes to must stay the model's own tensor: a converted copy would be written to in vain.
        written = written_arguments(func)
        positions, names = {n for n, _ in written}, {name for _, name in written}
        args = tuple(a if n in positions else _doubled(a) for n, a in enumerate(args))
        kwargs = {name: a if name in names else _doubled(a) for name, a in kwargs.items()}
        out = func(*args, **kwargs)
        # A result on the memory of an argument must stay there.
        return out if written or _returns_views(func) else _doubled(out)


def _doubled(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.dtype in _LOW else value
    if isinstance(value, torch.dtype):
        return torch.float64 if value in _LOW else value
    return type(value)(map(_doubled, value)) if type(value) in {list, tuple} else value


@lru_cache(4096)
def _returns_views(func: Any) -> bool:
    return any(result.alias_info is not None for result in func._schema.returns)


_IN_PLACE_NOISE: Mapping[str, Callable[..., float]] = {
    "bernoulli_": lambda *_, **__: 1.0,
    "uniform_": lambda low=0.0, high=1.0, **__: (low + high) / 2,
    # Not the mean, which is usually zero: a product with zero would hide that a channel is wrong.
    "normal_": lambda mean=0.0, std=1.0, **__: mean + std / 2,
    "exponential_": lambda rate=1.0, **__: 1 / rate,
    "log_normal_": lambda *_, **__: 1.0,
    "cauchy_": lambda median=0.0, *_, **__: median,
    "geometric_": lambda *_, **__: 1.0,
}
"""By the name of an operation that fills a tensor with random numbers: the constant that takes their place."""
_NEW_NOISE: Mapping[str, float] = {"rand": 0.5, "rand_like": 0.5, "randn": 0.5, "randn_like": 0.5, "bernoulli": 1.0}
_RANDOM = frozenset({
    *(name.rstrip("_") for name in _IN_PLACE_NOISE), *_NEW_NOISE, "native_dropout", "multinomial", "poisson", "randint",
    "randint_like", "random", "randperm", "rrelu_with_noise", "binomial",
})  # fmt: skip
"""Names as in `ChannelGraph.calls`, where those of operations in place have no underscore."""


def is_random(graph: ChannelGraph) -> bool:
    """Return whether the forward pass of a traced model draws random numbers from torch."""
    return not _RANDOM.isdisjoint(graph.calls)


class ConstantNoiseMode(TorchDispatchMode):
    """A mode in which random numbers are constants, and dropout keeps everything.

    A cut model draws fewer numbers than the original, so even under one seed the numbers of its channels would be
    others. With constants the two can be compared, and every channel that is wrong still shows.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if name in _IN_PLACE_NOISE:
            numbers = [number for number in args[1:] if isinstance(number, int | float)]
            return args[0].fill_(_IN_PLACE_NOISE[name](*numbers))
        if name == "native_dropout":
            rate = float(args[1])
            kept = args[0] / (1 - rate) if rate < 1 else torch.zeros_like(args[0])
            return kept, torch.ones_like(args[0], dtype=torch.bool)
        out = func(*args, **kwargs)
        return out.fill_(_NEW_NOISE[name]) if name in _NEW_NOISE and isinstance(out, Tensor) else out


class FeatureSummaries:
    """Numbers that show whether two models compute the same channels in every module.

    For every channel of the first tensor that a module returns it is the sum over all other dimensions with fixed
    weights between 0.5 and 1.5, of shape (channels,). A channel in a wrong place changes it, and it needs no memory for
    the features.
    """

    def __init__(self) -> None:
        self.by_module: dict[str, Tensor] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}

    def first_difference(self, other: "FeatureSummaries", tolerance: float, floor: float) -> str | None:
        """Return the first module, in order of execution, that differs from another model's; None if none does.

        Args:
            other: The summaries of the other model.
            tolerance: The bound on the difference, relative to the largest number of the module.
            floor: The same, relative to the largest number of all modules.
        """
        common = [name for name in self.by_module if name in other.by_module]
        most = max((float(self.by_module[name].abs().max()) for name in common), default=0.0)
        for name in common:
            mine, theirs = self.by_module[name], other.by_module[name]
            bound = tolerance * float(mine.abs().max()) + floor * most
            # Negated, so that a NaN counts as a difference.
            if mine.shape != theirs.shape or not float((mine - theirs).abs().max()) <= bound:
                return name
        return None


class KeptFeatures:
    """The kept positions of what every module returns, under one architecture.

    Args:
        graph: The channel graph of the full model.
        architecture: The kept channels.
        every: Whether all modules count; if not, only those that do most of the arithmetic, which read all channels.
    """

    def __init__(self, graph: ChannelGraph, architecture: Architecture, *, every: bool) -> None:
        # Modules in a removed branch have no effect in either model, and may differ.
        idle = {name for block in architecture.removed_blocks for name in graph.blocks_by_name[block].modules}
        masks = graph.kept_masks(architecture.by_name)
        heavy = {operation.module for operation in graph.operations}
        self.activations = {
            name: a for name, a in graph.activations.items() if name not in idle and (every or name in heavy)
        }
        self._others = {
            name: [(channels.dim, torch.from_numpy(channels.kept(masks))) for channels in activation.others]
            for name, activation in self.activations.items()
            if activation.others
        }
        self._kept = {
            name: torch.from_numpy(ChannelDim(0, activation.dim, activation.axis, activation.channel).kept(masks))
            for name, activation in self.activations.items()
        }

    @contextlib.contextmanager
    def summarize(self, model: nn.Module, *, cut: bool) -> Generator[FeatureSummaries]:
        """Record the `FeatureSummaries` of the next run of a model.

        Args:
            model: The full model, or one that was cut to the architecture.
            cut: Whether the model was cut.
        """
        summaries = FeatureSummaries()
        outputs: dict[str, Tensor] = {}
        modules = dict(model.named_modules())
        # The channels of a branch that was expanded are, in the graph, those that it has after that.
        places = {original: name for name, original in original_names(model).items() if name not in self.activations}
        hooks = [
            modules[place].register_forward_hook(self._hook(name, outputs, cut=cut))
            for name, place in ((name, name if name in modules else places.get(name)) for name in self.activations)
            if place is not None
        ]
        try:
            yield summaries
        finally:
            for hook in hooks:
                hook.remove()
        # After the run, whose modes must neither see nor change these calls.
        for name, tensor in outputs.items():
            summaries.shapes[name] = tuple(tensor.shape)
            dim = self.activations[name].dim
            if not cut and tensor.size(dim) != self.activations[name].shape[dim]:
                continue
            sums = _weighted_sums(tensor, dim, () if cut else self._others.get(name, ()))
            summaries.by_module[name] = sums if cut else sums[self._kept[name].to(sums.device)]

    def fit(self, summaries: FeatureSummaries, batch: int) -> bool:
        """Return whether the full model has the channels and items of the traced run on an input of another size.

        Some models run on any number of pixels, but take a part of them for items or channels (``x.view(-1, 12, 64)``).

        Args:
            summaries: What the full model returned.
            batch: The number of items of the input.
        """
        for name, shape in summaries.shapes.items():
            traced, dim = self.activations[name].shape, self.activations[name].dim
            if len(shape) != len(traced) or shape[dim] != traced[dim]:
                return False
            if dim and traced[0] == 1 and shape[0] not in {1, batch}:
                return False
        return True

    def _hook(self, name: str, outputs: dict[str, Tensor], *, cut: bool) -> Callable[..., None]:
        shape = self.activations[name].shape

        def hook(_module: nn.Module, args: Any, out: Any) -> None:
            leaves = (out,) if isinstance(out, Tensor) else tree_leaves(out)
            tensor = next((t for t in leaves if isinstance(t, Tensor)), None)
            if tensor is None or not tensor.is_floating_point() or tensor.dim() != len(shape):
                return
            # A module that returns its input, such as dropout in evaluation, may do so in a removed branch.
            if not any(tensor is given for given in args):
                outputs[name] = tensor

        return hook


def _weighted_sums(tensor: Tensor, dim: int, others: Sequence[tuple[int, Tensor]]) -> Tensor:
    """Return (channels,), the weighted sum over all other dimensions, of which some may be narrowed before."""
    for other, positions in others:
        tensor = tensor.index_select(other, positions.to(tensor.device))
    rows = tensor.detach().movedim(dim, 0).reshape(tensor.size(dim), -1)
    return rows @ _weights(rows.size(1), rows.dtype, rows.device)


@lru_cache(64)
def _weights(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    drawn = torch.rand(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (drawn + 0.5).to(device, dtype)


def depends_on_training(model: nn.Module) -> bool:
    """Return whether the training mode may change more than what torch's own layers do in it.

    Those treat every channel alike in both modes (normalization, dropout).
    """
    return "training" in mentioned_names(model)
