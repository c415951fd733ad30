"""Two widths of every axis and several depths of every chain, mixed within one forward pass of a supernet.

This is what a differentiable search (TAS) looks at: the output is differentiable in the weight of each width and depth.
`Mixture` says what is mixed, `WidthExpansion` how features of a narrow width are compared with those of a wider one,
and `MixtureHooks` installs it all on a model for the time of one call.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from secateur._arrays import FloatArray, IntArray
from secateur._kinds import settings
from secateur.graph._record import shadow_copy
from secateur.graph.graph import Block, ChannelAxis, ChannelGraph, Role, StandIn
from secateur.search.importance_data import is_batch_norm, shown_along


class WidthExpansion(ABC):
    """How features of a narrow width are expanded to a wider one, of which they are the first channels.

    Attributes:
        behind_norms: Whether to mix again behind every batch norm that reads the channels. In training a norm undoes
            a mere scaling of channels, and turns a channel of zeros into its bias.
    """

    behind_norms: ClassVar[bool] = False

    @abstractmethod
    def sources(self, narrow: int, wide: int) -> tuple[IntArray, IntArray, FloatArray]:
        """Say of what channel i of the wide features is made: share[i] * (z[first[i]] + z[second[i]]) / 2.

        Returns:
            first, second and share, (wide,) each.
        """


@settings
class Interpolate(WidthExpansion):
    """Channel-wise interpolation: the narrow features are spread over all channels of the wide ones.

    References:
        Dong & Yang (TAS), arXiv:1905.09717, Eq. (4).
    """

    def sources(self, narrow: int, wide: int) -> tuple[IntArray, IntArray, FloatArray]:
        """One channel or the mean of two neighbors, see `neighbors`."""
        return (*neighbors(narrow, wide), np.ones(wide))


@settings
class ZeroPad(WidthExpansion):
    """Every channel stays where it is, and those that the narrow features lack are zero, as in a real cut.

    This is ours, not the paper's. Interpolated channels meet the weights of other channels, which a network must first
    learn to tolerate; a search of few epochs that starts from trained weights has no time for that.
    """

    behind_norms: ClassVar[bool] = True

    def sources(self, narrow: int, wide: int) -> tuple[IntArray, IntArray, FloatArray]:
        """The channel itself, or nothing."""
        own = np.arange(wide)
        return own, own, (own < narrow).astype(np.float64)


@dataclass(frozen=True, eq=False)
class Mixture:
    """What is mixed into the outputs of a subnet.

    Where axis a is produced, with z the features at its width w_a in the subnet,

        out = weights[a, 1] * z + weights[a, 0] * expansion(z[first narrow[a] channels], w_a),

    the same again behind every batch norm that reads these channels if `WidthExpansion.behind_norms`, and where a chain
    of n residual blocks ends, with x_d the residual stream after d of them,

        out = sum_d depths[chain][d] * x_d.

    Attributes:
        narrow: The narrower width of each prunable axis, in the order of the graph; the subnet's own mixes nothing.
        weights: (axes, 2), of the narrow and of the wide one; rows sum to 1. Differentiable.
        depths: For each chain of the graph: (n + 1,) weight of every number of blocks; sums to 1. Differentiable.
            Empty leaves the chains alone. Where the blocks of a chain are not modules that return the stream itself,
            every branch is scaled by the weight of the depths that have it. There x_d differs from the above, because
            the blocks see the scaled stream.
        expansion: How narrow features are expanded to the wider width.

    References:
        Dong & Yang (TAS), arXiv:1905.09717, Eq. (4) and (5).
    """

    narrow: tuple[int, ...]
    weights: Tensor
    depths: tuple[Tensor, ...] = ()
    expansion: WidthExpansion = Interpolate()  # noqa: RUF009 - frozen


@dataclass(frozen=True, eq=False)
class _Point:
    """A module whose output shows channels of axes.

    Attributes:
        module: Its name.
        dim: The dimension of its output that carries the channels.
        size: Full length of that dimension.
        axes: (number of the axis, (axis size, multiplicity) positions along the dimension).
    """

    module: str
    dim: int
    size: int
    axes: tuple[tuple[int, IntArray], ...]


class MixtureHooks:
    """Where the widths and depths of a model can be mixed, and the hooks that do it.

    Args:
        points: Modules that produce channels.
        norms: Batch norms that read them further on, for expansions that also mix behind norms.
        chains: Chains of removable blocks.
        names: The names of the prunable axes.

    Attributes:
        axes: Names of the axes that can be mixed.
        single: The modules at which all channels of one axis are mixed, and the axis.
    """

    def __init__(
        self,
        points: Sequence[_Point],
        norms: Sequence[_Point],
        chains: Sequence[tuple[Block, ...]],
        names: Sequence[str],
    ):
        self._points, self._norms, self._chains = tuple(points), tuple(norms), tuple(chains)
        self.axes = frozenset(names[number] for point in points for number, _ in point.axes)
        self.single = {
            point.module: names[point.axes[0][0]]
            for point in points
            if len(point.axes) == 1 and np.array_equal(point.axes[0][1].ravel(), np.arange(point.size))
        }

    @classmethod
    def of(cls, model: nn.Module, graph: ChannelGraph) -> "MixtureHooks":
        """Find the points: where a producing layer, or the batch norm that reads it, returns its channels."""
        after: Mapping[str, tuple[str, ...]] = {}
        names = _names_of_parameters(model)
        producers = {axis.name: _producers(graph, axis, names) for axis in graph.prunable}
        # A graph without an example cannot be run; widths are then mixed right behind the producing layers.
        if graph.example:
            every = {name for each in producers.values() for name in each}
            # The states that a recurrent layer returns besides its output would stay as they are.
            plain = _find_plain_outputs(shadow_copy(model), graph.example, every)
            producers = {axis: each if plain.issuperset(each) else [] for axis, each in producers.items()}
            after = find_following_norms(shadow_copy(model), graph.example, plain)
        found: _Positions = {}
        norms: _Positions = {}
        first = {name for each in after.values() for name in each}
        others = [name for name, module in model.named_modules() if is_batch_norm(module) and name not in first]
        for number, axis in enumerate(graph.prunable):
            for module in producers[axis.name]:
                # A branch is mixed where it joins its stream: that output counts as the stream's, although it is
                # narrower until it is widened.
                places = [
                    ((axis.residual_output,), axis.residual_axis),
                    # Otherwise behind the norm that alone reads the layer: Eq. (4) expands the output of BN(conv(x)),
                    # and the ReLU follows the sum.
                    (after.get(module, ()), axis.name),
                    ((module,), axis.name),
                ]
                for name, dim, positions in _first_shown(graph, places):
                    found.setdefault((name, dim), []).append((number, positions))
            for norm in others:
                for name, dim, positions in _first_shown(graph, [((norm,), axis.name)]):
                    norms.setdefault((name, dim), []).append((number, positions))
        # A norm at which channels are mixed already must not fade them a second time.
        norms = {place: axes for place, axes in norms.items() if place not in found}
        return cls(_points(graph, found), _points(graph, norms), graph.chains, [axis.name for axis in graph.prunable])

    @contextmanager
    def active(
        self,
        model: nn.Module,
        widths: Sequence[int],
        mixture: Mixture,
        gone: Callable[[str], bool],
        tensors: Mapping[str, Tensor],
        *,
        affine_of: "AffineOf | None" = None,
    ) -> Generator[Mapping[str, Tensor]]:
        """Mix for as long as the context lasts.

        Args:
            model: Runs at the subnet's widths.
            widths: Those of the subnet.
            mixture: What to mix.
            gone: Says of a module that it is removed.
            tensors: Those of the subnet, by name.
            affine_of: Scale and shift of a batch norm at a width, where every width has its own.

        Yields:
            The tensors to run with. Where a batch norm only has to scale its channels, its own scale and shift do it,
            which saves a pass over the features.
        """
        mixers, given = _Mixers(widths, mixture), dict(tensors)
        with ExitStack() as stack:
            for point in (*self._points, *(self._norms if mixture.expansion.behind_norms else ())):
                own = None if affine_of is None or gone(point.module) else mixers.with_norms(point, affine_of)
                mix = None if gone(point.module) else own or mixers.at(point)
                if mix is None:
                    continue
                module, affine = model.get_submodule(point.module), [f"{point.module}.{n}" for n in ("weight", "bias")]
                if own is not None:  # The module only normalizes; scales and shifts are mixed.
                    given |= {
                        affine[0]: torch.ones_like(given[affine[0]]),
                        affine[1]: torch.zeros_like(given[affine[1]]),
                    }
                # f * (gamma * x + beta) = (f * gamma) * x + f * beta, which took a step of ResNet-56 in bfloat16 from
                # 1.40 to 1.18 ordinary steps (docs/log.md). A norm without gamma and beta is mixed like other modules.
                if isinstance(mix, _Scaling) and is_batch_norm(module) and all(name in given for name in affine):
                    given.update((name, mix.scale_vector(given[name])) for name in affine)
                else:
                    stack.callback(module.register_forward_hook(_on_output(mix)).remove)
            # Not strict, because empty depths leave all chains alone.
            for chain, weights in zip(self._chains, mixture.depths, strict=False):
                # A chain within a removed block is gone with it.
                if all(_has_module(model, each.module) for block in chain for each in block.replacements):
                    for hook in _add_depth_hooks(model, chain, weights):
                        stack.callback(hook.remove)
            yield given


_Positions = dict[tuple[str, int], list[tuple[int, IntArray]]]
"""Module and dimension of its output: number and positions of each axis along it."""


def _points(graph: ChannelGraph, found: _Positions) -> list[_Point]:
    shapes = {name: activation.shape for name, activation in graph.activations.items()}
    return [_Point(name, dim, shapes[name][dim], tuple(axes)) for (name, dim), axes in found.items()]


def _first_shown(
    graph: ChannelGraph, places: Iterable[tuple[tuple[str, ...], str | None]]
) -> list[tuple[str, int, IntArray]]:
    """Return name, dimension and positions for the first (modules, axis) whose outputs all show the axis."""
    for modules, axis in places:
        shown = [(name, shown_along(graph, name, axis)) for name in modules if name and axis]
        if shown and all(where is not None for _, where in shown):
            return [(name, *where) for name, where in shown if where is not None]
    return []


def _producers(graph: ChannelGraph, axis: ChannelAxis, names: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the modules whose weights produce an axis, each once; ``names`` has all names of a tensor."""
    # Only weights count: the bias of a depthwise convolution has the same role, but produces no channels.
    sites = (site for site in axis.sites if site.role is Role.OUTPUT and len(graph.tensors[site.tensor]) > 1)
    return list(dict.fromkeys(_owner(name) for site in sites for name in names.get(site.tensor, (site.tensor,))))


def _names_of_parameters(model: nn.Module) -> dict[str, list[str]]:
    """Return all names of every parameter by its first one; a parameter that modules share has several."""
    first: dict[int, str] = {}
    names: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(first.setdefault(id(parameter), name), []).append(name)
    return names


def _owner(tensor: str) -> str:
    """Return the module of a tensor; for a parametrized tensor, the module that has the parametrization."""
    module, found, _ = tensor.partition(".parametrizations.")
    return module if found else tensor.rpartition(".")[0]


def _on_output(mix: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        return mix(output) if isinstance(output, Tensor) else output

    return hook


AffineOf = Callable[[str, int], "tuple[Tensor, Tensor] | None"]
"""Scale and shift, (width,) each, that a batch norm has at a width of its axis; None where it has only its own."""
_MATRIX_UP_TO = 256
"""Up to so many channels, mixing is a product with a matrix: quicker than gathering, and a fraction of the layer."""


class _Mixers:
    """The functions that mix widths in one forward pass."""

    def __init__(self, widths: Sequence[int], mixture: Mixture):
        self._widths, self._mixture = widths, mixture
        # The last row is for positions of no axis, which stay as they are.
        self._weights = torch.cat([mixture.weights, torch.tensor([[0.0, 1.0]]).to(mixture.weights)])

    def at(self, point: _Point) -> "_Scaling | Callable[[Tensor], Tensor] | None":
        """Return the function for the output of a point, or None if it is left alone:
        out = own * z + other * (z[first] + z[second]) / 2 for each position.
        """
        if all(self._mixture.narrow[number] == self._widths[number] for number, _ in point.axes):
            return None
        first, second, share, row = (torch.from_numpy(part) for part in self._sources(point))
        rows = self._weights[row.to(self._weights.device)]
        own, other, dim = rows[:, 1], rows[:, 0] * share.to(rows), point.dim
        # The expansion moves no channel (`ZeroPad`), so that mixing only scales.
        if torch.equal(first, second) and torch.equal(first, torch.arange(len(first))):
            # Channels that the narrow features have too get the factor 1, because the weights sum to 1. So only the
            # others are scaled, and only they are kept in memory for the backward pass.
            lacking = torch.nonzero(share < 1)[:, 0]
            # Positions of no axis have share 0 as well, but must not be scaled.
            lacking = lacking[row[lacking] >= 0].to(rows.device)
            return _Scaling((own + other)[lacking], lacking, dim)
        if len(row) <= _MATRIX_UP_TO:
            matrix = torch.diag(own) + other[:, None] * _averaging_matrix(first, second).to(rows)
            return lambda z: _multiply(matrix, z, dim)
        lower, upper = first.to(rows.device), second.to(rows.device)
        average = lambda z: 0.5 * (z.index_select(dim, lower) + z.index_select(dim, upper))  # noqa: E731
        return lambda z: _shaped(own, z, dim) * z + _shaped(other, z, dim) * average(z)

    def with_norms(self, point: _Point, affine_of: AffineOf) -> "Callable[[Tensor], Tensor] | None":
        """Return the function for the normalized channels x of a batch norm, if each width has a scale and shift there.

        out = own * (g_w x + b_w) + other * A (g_n x + b_n), A the expansion.
        """
        (number, _), *others = point.axes
        wide, narrow = self._widths[number], min(self._mixture.narrow[number], self._widths[number])
        at_wide, at_narrow = affine_of(point.module, wide), affine_of(point.module, narrow)
        if others or at_wide is None or at_narrow is None:
            return None
        other, own = self._weights[number]
        first, second, share = map(torch.from_numpy, self._mixture.expansion.sources(narrow, wide))
        expansion = (share[:, None] * _averaging_matrix(first, second)).to(self._weights)[:, :narrow]
        from_narrow = F.pad(expansion * at_narrow[0], (0, wide - narrow))
        matrix = own * torch.diag(at_wide[0]) + other * from_narrow
        shift, dim = own * at_wide[1] + other * (expansion @ at_narrow[1]), point.dim
        return lambda z: _multiply(matrix, z, dim) + _shaped(shift, z, dim)

    def _sources(self, point: _Point) -> tuple[IntArray, IntArray, FloatArray, IntArray]:
        """For each position that the subnet has: what is mixed into it (first, second, share), and its row of weights.

        Positions are those of the whole dimension, so they are renumbered to those that the subnet still has.
        """
        stays = np.ones(point.size, dtype=np.bool_)
        for number, positions in point.axes:
            stays[positions[self._widths[number] :]] = False
        place, count = np.cumsum(stays) - 1, int(stays.sum())
        first, second, share, row = np.arange(count), np.arange(count), np.zeros(count), np.full(count, -1)
        for number, positions in point.axes:
            # (width, multiplicity): after a flatten a channel has several positions, which are all mixed alike.
            mine = place[positions[: self._widths[number]]]
            low, high, part = self._mixture.expansion.sources(self._mixture.narrow[number], self._widths[number])
            first[mine], second[mine], share[mine], row[mine] = mine[low], mine[high], part[:, None], number
        return first, second, share, row


@dataclass(frozen=True, eq=False)
class _Scaling:
    """Multiplies some channels, see `scale_channels`."""

    factors: Tensor
    positions: Tensor
    dim: int

    def __call__(self, z: Tensor) -> Tensor:
        return scale_channels(z, self.factors, self.positions, dim=self.dim)

    def scale_vector(self, vector: Tensor) -> Tensor:
        """Scale one number per channel in the same way."""
        return vector * torch.ones_like(vector).index_copy(0, self.positions, self.factors.to(vector.dtype))


def _averaging_matrix(first: Tensor, second: Tensor) -> Tensor:
    """Return the (n, n) matrix whose rows average two positions."""
    rows, matrix = torch.arange(len(first)), torch.zeros(len(first), len(first))
    for column in (first, second):
        # Accumulated, so that a row whose two positions are the same has 1 there.
        matrix.index_put_((rows, column), torch.tensor(0.5), accumulate=True)
    return matrix


def _shaped(values: Tensor, z: Tensor, dim: int) -> Tensor:
    """Return one value per position of a dimension in a shape that multiplies z along it."""
    shape = [1] * z.dim()
    shape[dim] = len(values)
    return values.view(shape).to(z.dtype)


def _multiply(matrix: Tensor, z: Tensor, dim: int) -> Tensor:
    """Multiply z by a matrix along one dimension."""
    matrix = matrix.to(z.dtype)
    if z.dim() == 4 and dim == 1:
        return F.conv2d(z, matrix[:, :, None, None])
    if dim == z.dim() - 1:
        return F.linear(z, matrix)
    return F.linear(z.movedim(dim, -1), matrix).movedim(-1, dim)


def _add_depth_hooks(model: nn.Module, chain: tuple[Block, ...], weights: Tensor) -> list[Any]:
    if all(_returns_stream(block) for block in chain):
        # Eq. (5) as it is written: the outputs of these modules are the streams x_d.
        return _add_sum_hooks(model, [block.replacements[0].module for block in chain], weights)
    # The stream after each block cannot be seen, so every branch is scaled instead, by the weight of all depths that
    # have it: present[d] is the weight of d blocks or more.
    present = weights.flip(0).cumsum(0).flip(0)
    return [
        model.get_submodule(replacement.module).register_forward_hook(
            _scaled_branch(present[number], from_input=_returns_stream(block)), with_kwargs=True
        )
        for number, block in enumerate(chain, 1)
        for replacement in block.replacements
        if replacement.stand_in is StandIn.SILENCE or _returns_stream(block)
    ]


def _has_module(model: nn.Module, module: str) -> bool:
    try:
        model.get_submodule(module)
    except AttributeError:
        return False
    return True


def _returns_stream(block: Block) -> bool:
    """Whether the block is one module that takes the stream and returns it with the branch added."""
    return len(block.replacements) == 1 and block.replacements[0].stand_in is StandIn.PASS_THROUGH


def _add_sum_hooks(model: nn.Module, modules: Sequence[str], weights: Tensor) -> list[Any]:
    """Let the last module return the weighted sum of the streams after every number of blocks."""
    streams: list[Tensor] = []

    def begin(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        streams[:] = [_first_tensor(inputs, named)]

    def after(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        streams.append(output)
        # The blocks before the last pass on x_d itself, because the deeper streams of the sum are computed from it.
        if len(streams) < len(weights):
            return output
        return torch.stack([w.to(x.dtype) * x for w, x in zip(weights, streams, strict=True)]).sum(0)

    hooks = [model.get_submodule(name).register_forward_hook(after) for name in modules]
    return [model.get_submodule(modules[0]).register_forward_pre_hook(begin, with_kwargs=True), *hooks]


def _scaled_branch(by: Tensor, *, from_input: bool) -> Callable[..., Any]:
    """A hook that scales what a branch returns; of a module that returns the stream, what it adds to its input."""

    def hook(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
        if from_input:
            before = _first_tensor(inputs, named)
            return before + (output - before) * by.to(output.dtype)
        if isinstance(output, Tensor):
            return output * by.to(output.dtype)
        # Attention returns its weights too; a block is removable only if nothing reads more than the first tensor.
        return (output[0] * by.to(output[0].dtype), *output[1:])

    return hook


def _first_tensor(inputs: tuple[Any, ...], named: Mapping[str, Any]) -> Tensor:
    return next(value for value in (*inputs, *named.values()) if isinstance(value, Tensor))


# Every step asks for a pair of widths of each axis, and the same few pairs are drawn again and again.
@lru_cache(maxsize=4096)
def neighbors(channels: int, onto: int) -> tuple[IntArray, IntArray]:
    """Return the first and the last channel that each of ``onto`` channels averages in channel-wise interpolation.

    Row i averages the channels from floor(i * channels / onto) up to, not including, ceil((i + 1) * channels / onto):
    adaptive average pooling along the channels. Expanded to as many or more, that is one channel or two neighbors.

    Args:
        channels: Width of the features.
        onto: Width to expand them to.

    Returns:
        Two (onto,) arrays.

    References:
        Dong & Yang (TAS), arXiv:1905.09717, Eq. (4), with adaptive average pooling as in the reference code.
    """
    rows = np.arange(onto)
    return rows * channels // onto, -(-(rows + 1) * channels // onto) - 1


def interpolation_matrix(channels: int, onto: int) -> FloatArray:
    """Return the matrix A of channel-wise interpolation, CWI(x)_i = sum_j A_ij x_j; see `neighbors`.

    Args:
        channels: Width of the features.
        onto: Width to expand them to.

    Returns:
        (onto, channels), rows sum to 1.
    """
    first, last = neighbors(channels, onto)
    columns = np.arange(channels)[None, :]
    inside = (columns >= first[:, None]) & (columns <= last[:, None])
    return inside / inside.sum(axis=1, keepdims=True)


def interpolate_channels(x: Tensor, onto: int, *, dim: int = 1) -> Tensor:
    """Interpolate features of any shape to ``onto`` channels, which lie along ``dim``; see `interpolation_matrix`."""
    matrix = torch.as_tensor(interpolation_matrix(x.shape[dim], onto), dtype=x.dtype, device=x.device)
    return (x.movedim(dim, -1) @ matrix.T).movedim(-1, dim)


def scale_channels(z: Tensor, factors: Tensor, positions: Tensor, *, dim: int) -> Tensor:
    """Multiply some channels: out[p] = factors[i] * z[p] for p = positions[i], and out[p] = z[p] elsewhere.

    A plain product with a vector would keep all of z for the gradient of the factors; this keeps the scaled channels.

    Args:
        z: Features of any shape.
        factors: (n,).
        positions: (n,) increasing, along the dimension.
        dim: The dimension with the channels.

    Returns:
        The shape and type of ``z``; differentiable once in ``z`` and ``factors``.
    """
    return _ScaleChannels.apply(z, factors, positions, dim)  # type: ignore[no-any-return]


class _ScaleChannels(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, factors: Tensor, positions: Tensor, dim: int) -> Tensor:  # pyright: ignore
        every = torch.ones(z.shape[dim], dtype=z.dtype, device=z.device).index_copy(0, positions, factors.to(z.dtype))
        every = every.view([-1 if number == dim else 1 for number in range(z.dim())])
        ctx.dim, ctx.of_factors = dim, factors.dtype
        # While the weights learn, alpha needs no gradient, and nothing of z is kept.
        scaled = _select(z, positions, dim) if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(every, positions, scaled)
        return z * every

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore
        every, positions, scaled = ctx.saved_tensors
        of_factors = None
        if scaled is not None:
            product = _select(gradient, positions, ctx.dim) * scaled
            others = [number for number in range(product.dim()) if number != ctx.dim]
            # In the type of the factors: a sum of ones in bfloat16 stops growing at 256.
            of_factors = product.sum(others, dtype=ctx.of_factors)
        return gradient * every if ctx.needs_input_grad[0] else None, of_factors, None, None


def _select(z: Tensor, positions: Tensor, dim: int) -> Tensor:
    """Copy some channels, by a slice where they lie in a row, which is quicker than an index."""
    first, count = int(positions[0]), len(positions)
    if int(positions[-1]) - first == count - 1:
        # Not a view, which would keep all of z in memory until the backward pass.
        return z.narrow(dim, first, count).clone()
    return z.index_select(dim, positions)


def _find_plain_outputs(model: nn.Module, example: tuple[Any, ...], modules: Collection[str]) -> frozenset[str]:
    """Run a model once, and return those of some modules that always return a tensor, and nothing else."""
    tuples: set[str] = set()

    def look(name: str) -> Callable[..., None]:
        return lambda _module, _inputs, output: None if isinstance(output, Tensor) else tuples.add(name)

    with ExitStack() as stack, torch.no_grad():
        for name in sorted(modules):
            stack.callback(model.get_submodule(name).register_forward_hook(look(name)).remove)
        model(*example)
    return frozenset(modules) - tuples


def find_following_norms(
    model: nn.Module, example: tuple[Any, ...], modules: Collection[str]
) -> dict[str, tuple[str, ...]]:
    """Run a model once, and find the batch norms that alone read what some modules return.

    A stream that also goes past the norm that reads it (pre-activation blocks, dense layers) is not mixed there.

    Args:
        model: Runs on the example with hooks, which are removed again. It should be a copy in evaluation mode.
        example: Positional arguments.
        modules: Names of the modules whose outputs are followed.

    Returns:
        Module name to the norms that read it, one for each different one of its calls. Modules of which any call is
        read by something else, too, are left out.
    """
    reads = _ReadCounter()
    # Holding the tensors keeps their ids unique: the id of a freed tensor may be given to a later one.
    returned: list[tuple[str, Tensor]] = []
    norms: dict[int, tuple[Tensor, str]] = {}

    def after(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                returned.append((name, output))
                # A tensor that was freed before may have had the same id; its reads must not count.
                reads.times[id(output)] = 0

        return hook

    def before(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if inputs:
                norms[id(inputs[0])] = (inputs[0], name)

        return hook

    with ExitStack() as stack, torch.no_grad():
        for name in sorted(modules):
            stack.callback(model.get_submodule(name).register_forward_hook(after(name)).remove)
        for name, module in model.named_modules():
            if is_batch_norm(module):
                stack.callback(module.register_forward_pre_hook(before(name)).remove)
        with reads:
            model(*example)
    seen: dict[str, list[str]] = {}
    for name, output in returned:
        # If a norm is given the tensor and a single operation reads it, then this operation is the norm's.
        alone = reads.times[id(output)] == 1
        _, norm = norms.get(id(output), (output, ""))
        seen.setdefault(name, []).append(norm if alone else "")
    return {name: tuple(dict.fromkeys(after)) for name, after in seen.items() if all(after)}


class _ReadCounter(TorchDispatchMode):
    """Counts the operations that read each tensor, by the tensor's id."""

    def __init__(self) -> None:
        super().__init__()
        self.times: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.times.update(id(each) for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor))
        return func(*args, **(kwargs or {}))
