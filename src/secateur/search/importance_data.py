"""Importances from data: the first-order change of the loss, and the error that remains after the best repair.

Both read the channels of an axis from the activations of a running model.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_map_only

from secateur._arrays import FloatArray, IntArray
from secateur._batches import (
    arguments_of,
    call_model,
    count_images,
    first_images,
    first_output,
    has_targets,
    targets_of,
)
from secateur._kinds import settings
from secateur._runtime import with_recurrent_gradients_
from secateur.errors import DataError, ModelError
from secateur.graph._record import shadow_copy
from secateur.graph.graph import ChannelAxis, ChannelGraph, Role, Site
from secateur.graph.trace import Example
from secateur.prune.distance import named_outputs, spread_per_image
from secateur.search.importance import Importance, ScoringInputs, checked_scores
from secateur.tasks.base import Task
from secateur.tasks.classification import Classification
from secateur.tasks.imitation import Imitation


def readers(model: nn.Module, example: tuple[Any, ...], names: set[str]) -> dict[str, str]:
    """Run once: which batch norm reads the very tensor that a module returns.

    Args:
        model: Runs on the example with hooks, which are removed again. It should be a copy in evaluation mode.
        example: Positional arguments.
        names: Modules of interest.

    Returns:
        Module name to batch norm name, for the modules that have one.
    """
    outputs: list[tuple[str, Tensor]] = []  # holding the tensors keeps their identities unique
    found: dict[str, str] = {}

    def returned(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                outputs.append((name, output))

        return hook

    def read(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            for producer, output in outputs:
                if inputs and inputs[0] is output:
                    found[producer] = name

        return hook

    hooks = [model.get_submodule(name).register_forward_hook(returned(name)) for name in sorted(names)]
    norms = [(name, module) for name, module in model.named_modules() if is_batch_norm(module)]
    hooks += [module.register_forward_pre_hook(read(name)) for name, module in norms]
    try:
        model(*example)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def channel_positions(graph: ChannelGraph, module: str, axis: str) -> IntArray | None:
    """(axis size, multiplicity) positions of the channels of an axis in a module's output, along its main dimension.

    None if the output does not show every channel equally often.
    """
    activation = graph.activations.get(module)
    return None if activation is None else _positions(graph, axis, activation.axis, activation.channel)


def shown_along(graph: ChannelGraph, module: str, axis: str) -> tuple[int, IntArray] | None:
    """The dimension of a module's output along which an axis runs, and `channel_positions` along it."""
    activation = graph.activations.get(module)
    if activation is None:
        return None
    lanes = [(activation.dim, activation.axis, activation.channel)]
    lanes += [(lane.dim, lane.axis, lane.channel) for lane in activation.others]
    found = ((dim, _positions(graph, axis, axes, channels)) for dim, axes, channels in lanes)
    return next(((dim, positions) for dim, positions in found if positions is not None), None)


def _positions(graph: ChannelGraph, axis: str, axes: IntArray, channels: IntArray) -> IntArray | None:
    number = next(index for index, each in enumerate(graph.axes) if each.name == axis)
    here = np.flatnonzero(axes == number)
    counts = np.bincount(channels[here], minlength=graph.axes[number].size)
    if counts.min() < 1 or counts.min() != counts.max():
        return None
    return here[np.argsort(channels[here], kind="stable")].reshape(len(counts), -1)


def is_batch_norm(module: nn.Module) -> bool:
    """A module that keeps a running variance for each channel."""
    return isinstance(getattr(module, "running_var", None), Tensor)


@settings
class Taylor(Importance):
    """Change of the loss when a channel becomes zero wherever it is read, to first order.

    For one batch with the mean loss L of the task, such as the cross-entropy:
    |sum over w reading the channel of w * dL/dw|. The weights that read a channel x are those of the convolutions and
    linears with the axis at their input; for them the sum is
    sum over images and positions of x * dL/dx, the derivative by a gate on the channel. The score is the mean over
    the batches; since the absolute value is taken first, many small batches tell more than few large ones. The model
    runs in evaluation mode. An axis that no weight reads (the queries of an attention) sums over all its sites.

    Only the reading weights count: the sums over the filters that produce the channel and over its norms estimate the
    same change again, and with less of it (under a batch norm the filter's sum leaves out the shift). Measured on a
    ResNet-20 for CIFAR-10 cut to 70 % of its MACs by one ranking, no repairs: accuracy 0.28 with all sites, 0.51 with
    the reading weights (first 1,000 test images, 256 images to score).

    Attributes:
        task: Its loss is L. `secateur.compress` puts its own task here.

    References:
        Molchanov et al., Importance Estimation for Neural Network Pruning, arXiv:1906.10771, Section 3: the first-order
        criterion with gates. The paper squares the sum; the absolute value ranks one
        batch alike and keeps the unit.
    """

    task: Task = field(default=Classification(), repr=False)

    def scores(self, inputs: ScoringInputs) -> dict[str, FloatArray]:
        """(axis size,) per axis, in units of the loss.

        Raises:
            DataError: If there are no batches, or no loss can be computed of them.
            ModelError: If a score is not finite.
        """
        if not inputs.batches:
            raise DataError("`batches` must hold labeled images for Taylor; got none. Pass calibration data.")
        model = with_recurrent_gradients_(shadow_copy(inputs.model))
        leaves = {
            id(weight): weight.detach().requires_grad_(weight.is_floating_point()) for weight in model.parameters()
        }
        named = model.named_parameters(remove_duplicate=False)
        parameters = {name: leaves[id(weight)] for name, weight in named if leaves[id(weight)].requires_grad}
        axes = inputs.graph.prunable
        sums = {axis.name: np.zeros(axis.size) for axis in axes}
        inputs = inputs.in_small_batches()
        for batch in inputs.batches:
            products = _weight_times_gradient(model, parameters, batch, self.task)
            for axis in axes:
                sums[axis.name] += np.abs(_channel_sums(axis, products))
        scores = {name: total / len(inputs.batches) for name, total in sums.items()}
        return checked_scores(scores, inputs.graph, self)


def _weight_times_gradient(
    model: nn.Module, parameters: Mapping[str, Tensor], batch: tuple[Example, Any], task: Task
) -> dict[str, FloatArray]:
    """w * dL/dw of every parameter, as float64 on the CPU."""
    inputs, targets = batch
    with torch.enable_grad():
        if isinstance(task, Classification):
            loss = task.loss(_logits(model, parameters, inputs, targets), targets)
        else:
            loss = _loss_of_task(task, model, parameters, inputs, targets)
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    gradients = cast("tuple[Tensor | None, ...]", found)  # the stubs forget allow_unused
    return {
        name: (weight.detach().double() * gradient.double()).cpu().numpy()
        for (name, weight), gradient in zip(parameters.items(), gradients, strict=True)
        if gradient is not None
    }


def _loss_of_task(
    task: Task, model: nn.Module, parameters: Mapping[str, Tensor], inputs: Example, targets: Any
) -> Tensor:
    named = f"the loss of {type(task).__name__} with gradients"
    if isinstance(task, Imitation) or not has_targets(targets):
        raise DataError(
            f"`batches` must hold targets for Taylor, whose scores are derivatives of a loss; got none ({named}). Use "
            "Reconstruction, which needs no labels."
        )
    positional, by_name = arguments_of(inputs)
    try:
        loss = task.loss(torch.func.functional_call(model, dict(parameters), positional, by_name), targets_of(targets))
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"`task` must give a loss of outputs in evaluation mode for Taylor; {type(task).__name__} stopped with: "
            f"{reason}. Use Reconstruction, which needs no labels."
        ) from error
    if not loss.requires_grad:
        raise DataError(f"`task` must give {named} for Taylor; got one without. Use Reconstruction.")
    return loss


def _logits(model: nn.Module, parameters: Mapping[str, Tensor], images: Example, labels: Tensor) -> Tensor:
    positional, by_name = arguments_of(images)
    outputs = torch.func.functional_call(model, dict(parameters), positional, by_name)
    output = first_output(outputs)
    if output is None or output.ndim != 2 or len(output) != len(labels) or output.shape[1] < 2:
        got = f"shape {tuple(output.shape)}" if output is not None else type(outputs).__name__
        raise DataError(
            f"`model` must return logits ({len(labels)}, classes) for Taylor; got {got}. Wrap the model so that it "
            "returns those of two classes or more, or use Reconstruction, which needs no labels."
        )
    if int(labels.max()) >= output.shape[1] or int(labels.min()) < 0:
        raise DataError(
            f"`labels` must be 0 to {output.shape[1] - 1}, the classes of the model; "
            f"got {int(labels.min())} to {int(labels.max())}."
        )
    return output


def _channel_sums(axis: ChannelAxis, products: dict[str, FloatArray]) -> FloatArray:
    sites = [site for site in axis.sites if site.tensor in products]
    total = np.zeros(axis.size)
    for site in [site for site in sites if site.role is Role.INPUT] or sites:
        values = np.moveaxis(products[site.tensor], site.dim, 0)
        total += values.reshape(len(values), -1).sum(axis=1)[site.index].sum(axis=1)
    return total


_GONE = 1e-30


@settings
class Reconstruction(Importance):
    """Remove channels one after the other, each time the one whose loss the others can repair best.

    A channel that its neighbors predict is worth little, however large it is. With x the channels of an axis as one
    of its readers (convolution or linear, weight W) receives them, G = E[x x^T] over images and positions, and a set S
    kept, the best linear prediction of channel j from the others leaves the energy r_j = 1 / (G^-1)_jj. The damage
    to the outputs z, to second order, is

        d_j = 1/2 * sum over readers, sum_o E||dz/dy_o||^2 * sum_t W_ojt^2 * r_j

    where y_o is the reader's output channel o (squared Jacobian summed over its positions, estimated with random
    signs), and t runs over the kernel (and over the positions of a flattened channel). If the reader is a recurrent
    layer, E||dz/dx_j||^2 takes the place of the sum over o. If the model has several output
    tensors, each is measured in units of its own spread on the images, and all have equal weight:

        ||dz/dy||^2 = mean over outputs k of ||dz_k/dy||^2 / E||z_k - mean(z_k)||^2

    so that boxes in pixels do not hide class scores. A shift that all class logits have in common counts nothing,
    because softmax does not see it; of other outputs it counts like any change. The channel with the smallest
    d_j goes, G^-1 is downdated (Schur complement), and so on; the score of a channel is the largest damage done up to
    its removal. So the scores of all axes have one unit and one network-wide threshold makes sense, and within an axis
    the last ones standing are the set that explains the others: a greedy selection. No labels are needed.

    Attributes:
        ridge: Added to the diagonal of G, relative to its mean; dimensionless, > 0.
        images: The largest number of images to use.

    References:
        Optimal Brain Surgeon, Hassibi & Stork, NeurIPS 1992, Eq. (5), for channels, with the Gauss-Newton matrix
        factored as in Wang et al. (EigenDamage), arXiv:1905.05934, Section 3; the greedy order over all readers of a
        coupled axis is ours.
    """

    ridge: float = 1e-4
    images: int = 512

    def scores(self, inputs: ScoringInputs) -> dict[str, FloatArray]:
        """(axis size,) per axis: in squared units of the output, or dimensionless if there are several outputs.

        An axis none of whose readers is a module of its own gets the highest score of all: it goes last.

        Raises:
            DataError: If there are no batches.
            ModelError: If a score is not finite, or no output is a floating-point tensor.
        """
        if not inputs.batches:
            raise DataError("`batches` must hold images for Reconstruction; got none. Pass calibration data.")
        readers = _readers(inputs.model, inputs.graph)
        moments = _Moments(readers)
        moments.collect(inputs, self.images)
        found: dict[str, FloatArray] = {}
        for axis in inputs.graph.prunable:
            pairs = [moments.of(axis, site) for site in readers.get(axis.name, ())]
            if pairs:
                found[axis.name] = self._eliminate(pairs)
        highest = max((float(values.max()) for values in found.values()), default=1.0)
        scores = {axis.name: found.get(axis.name, np.full(axis.size, highest)) for axis in inputs.graph.prunable}
        return checked_scores(scores, inputs.graph, self)

    def _eliminate(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> FloatArray:
        """Damage at removal for every channel, from (G, sum_o,t Jacobian * W^2) of every reader."""
        if not all(bool(torch.isfinite(tensor).all()) for pair in pairs for tensor in pair):
            return np.full(len(pairs[0][1]), np.nan)
        inverses: list[Tensor] = []
        for gram, _ in pairs:
            mean = gram.diagonal().mean()
            # Inputs may be of any scale; only where all are zero there is none to go by.
            floor = self.ridge * torch.where(mean > 0, mean, 1e-12)
            inverses.append(torch.linalg.inv(gram + floor * torch.eye(len(gram), dtype=gram.dtype)))
        size = len(pairs[0][1])
        alive = torch.ones(size, dtype=torch.bool)
        scores, worst = np.zeros(size), 0.0
        for _ in range(size):
            damage = torch.stack(
                [
                    weight / inverse.diagonal().clamp_min(_GONE)
                    for inverse, (_, weight) in zip(inverses, pairs, strict=True)
                ]
            ).sum(0)
            damage[~alive] = torch.inf
            gone = int(damage.argmin())
            worst = max(worst, float(damage[gone]))
            scores[gone] = 0.5 * worst
            alive[gone] = False
            for inverse in inverses:
                _downdate_(inverse, gone)
        return scores


def _downdate_(inverse: Tensor, gone: int) -> None:
    """The inverse Gram matrix of the remaining channels, in place: (G_SS)^-1 = A - a a^T / a_jj."""
    column = inverse[:, gone].clone()
    inverse.addr_(column, column, alpha=-1.0 / float(column[gone].clamp_min(_GONE)))
    inverse[gone, :] = 0
    inverse[:, gone] = 0
    inverse[gone, gone] = _GONE


Readers = dict[str, tuple[Site, ...]]


def _readers(model: nn.Module, graph: ChannelGraph) -> Readers:
    """The INPUT sites of every prunable axis that are weights of modules which can be watched."""
    modules = dict(model.named_modules())

    def watched(site: Site) -> bool:
        module, _, parameter = site.tensor.rpartition(".")
        reader = modules.get(module)
        plain = isinstance(reader, nn.Linear | nn.modules.conv._ConvNd)  # pyright: ignore[reportPrivateUsage]
        # Both directions of a recurrent layer receive the same input.
        recurrent = isinstance(reader, nn.RNNBase) and parameter == "weight_ih_l0"
        return site.role is Role.INPUT and (recurrent or (parameter == "weight" and plain))

    return {axis.name: tuple(filter(watched, axis.sites)) for axis in graph.prunable}


class _Moments:
    """Gram matrices of what readers receive, and squared Jacobians of the logits at what they give.

    What the gates of a recurrent layer give is not seen; the Jacobian is taken at its input instead, where it needs no
    weights.
    """

    def __init__(self, readers: Readers) -> None:
        self.readers = readers
        self.by_module: dict[str, list[Site]] = {}
        for sites in readers.values():
            for site in sites:
                self.by_module.setdefault(_module_of(site), []).append(site)
        self.grams: dict[int, Tensor] = {}
        self.counts: dict[int, int] = {}
        self.jacobians: dict[str, Tensor] = {}
        self.weights: dict[str, Tensor] = {}
        self.seen = 0

    def of(self, axis: ChannelAxis, site: Site) -> tuple[Tensor, Tensor]:
        """(size, size) E[x x^T] and (size,) sum over outputs and taps of Jacobian * W^2."""
        gram = self.grams[id(site)] / max(self.counts[id(site)], 1)
        jacobian = self.jacobians[_module_of(site)] / max(self.seen, 1)
        if site.tensor not in self.weights:
            return gram, jacobian[torch.from_numpy(site.index)].sum(1)
        weight = self.weights[site.tensor].movedim(site.dim, 0).flatten(2) if self._is_conv(site) else None
        if weight is None:
            weight = self.weights[site.tensor].movedim(site.dim, 0)[:, :, None]
        energy = torch.einsum("cot,o->c", weight.square(), jacobian.to(weight.dtype))
        return gram, energy[torch.from_numpy(site.index)].sum(1)

    def _is_conv(self, site: Site) -> bool:
        return self.weights[site.tensor].dim() > 2

    def collect(self, inputs: ScoringInputs, images: int) -> None:
        """One forward and one backward pass over up to ``images`` images."""
        if not self.by_module:
            return
        shadow = with_recurrent_gradients_(shadow_copy(inputs.model))
        inputs = inputs.in_small_batches()
        batches: list[Example] = first_images([batch for batch, _ in inputs.batches], images)
        probe = _Probe(inputs, batches)
        given: dict[str, list[Tensor]] = {}
        for name in self.by_module:
            layer: Any = shadow.get_submodule(name)
            if isinstance(layer, nn.RNNBase):
                layer.register_forward_pre_hook(self._watch_input(name, given), with_kwargs=True)
                continue
            self.weights[f"{name}.weight"] = layer.weight.detach().double().cpu()
            layer.register_forward_hook(self._watch(name, given), with_kwargs=True)
        for batch in batches:
            given.clear()
            with torch.enable_grad():
                # Clones, because a model may write into its input.
                outputs = call_model(shadow, tree_map_only(Tensor, _fresh, batch))
                projected = probe.of(outputs, count_images(batch))
                calls = [(name, out) for name, outs in given.items() for out in outs]
                gradients: Sequence[Tensor | None] = [None] * len(calls)
                if projected.requires_grad and calls:
                    gradients = torch.autograd.grad(projected, [out for _, out in calls], allow_unused=True)
            for (name, out), gradient in zip(calls, gradients, strict=True):
                self._add_jacobian(name, out, gradient)
            self.seen += count_images(batch)

    def _watch(self, name: str, given: dict[str, list[Tensor]]) -> Any:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> Tensor:
            self._add_gram(name, layer, _channels_last(layer, _precise((args or tuple(kwargs.values()))[0].detach())))
            return _given(out, given.setdefault(name, []))

        return hook

    def _watch_input(self, name: str, given: dict[str, list[Tensor]]) -> Any:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            whole = (*args, *kwargs.values())[0]
            packed = isinstance(whole, PackedSequence)
            x = whole.data if packed else whole
            self._add_gram(name, layer, _precise(x.detach()).reshape(-1, x.shape[-1]))
            x = _given(x, given.setdefault(name, []))
            first = whole._replace(data=x) if packed else x
            return ((first, *args[1:]), kwargs) if args else (args, {**kwargs, "input": first})

        return hook

    def _add_gram(self, name: str, layer: nn.Module, rows: Tensor) -> None:
        """Add (positions, channels) of the input of a layer."""
        for site in self.by_module[name]:
            index = _arriving(layer, site)
            part = rows[:, index.to(rows.device)]
            part = part.movedim(1, -1).reshape(-1, part.shape[1]) if index.shape[1] > 1 else part[:, :, 0]
            self.grams[id(site)] = self.grams.get(id(site), 0) + (part.T @ part).double().cpu()
            self.counts[id(site)] = self.counts.get(id(site), 0) + len(part)

    def _add_jacobian(self, name: str, out: Tensor, gradient: Tensor | None) -> None:
        squares = torch.zeros_like(out) if gradient is None else _precise(gradient.detach()).square()
        weight = self.weights.get(f"{name}.weight")
        dim = 1 if out.dim() > 2 and weight is not None and weight.dim() > 2 else out.dim() - 1
        total = squares.movedim(dim, 0).flatten(1).double().sum(1).cpu()
        self.jacobians[name] = self.jacobians.get(name, 0) + total


def _given(tensor: Tensor, calls: list[Tensor]) -> Tensor:
    """Append a tensor whose gradient is wanted, and return what takes its place in the run."""
    if not tensor.requires_grad:
        # Of token ids and frozen weights, no gradient comes on its own.
        tensor = tensor.detach().requires_grad_()
    calls.append(tensor)
    # What follows may write in place; the gradient is wanted before that.
    return tensor.clone()


def _arriving(layer: nn.Module, site: Site) -> Tensor:
    """(axis size, positions): where the channels lie in the layer's input; a grouped weight names one group's."""
    index = torch.from_numpy(site.index)
    if not isinstance(layer, nn.modules.conv._ConvNd) or site.dim == 0 or layer.groups == 1:  # pyright: ignore[reportPrivateUsage]
        return index
    return torch.cat([index + group * layer.weight.size(1) for group in range(layer.groups)], 1)


def _module_of(site: Site) -> str:
    return site.tensor.rpartition(".")[0]


def _channels_last(layer: nn.Module, x: Tensor) -> Tensor:
    """(positions, channels)."""
    return x.reshape(-1, x.shape[-1]) if isinstance(layer, nn.Linear) else x.movedim(1, -1).reshape(-1, x.shape[1])


def _fresh(tensor: Tensor) -> Tensor:
    """A copy that gradients are computed for, if it can have any."""
    return tensor.detach().requires_grad_(tensor.is_floating_point()).clone()


def _precise(tensor: Tensor) -> Tensor:
    """In float32 at least: squares of half precision overflow."""
    return tensor.float() if tensor.dtype in {torch.float16, torch.bfloat16} else tensor


class _Probe:
    """The sum of all outputs with random signs, whose gradients are those of the outputs in squared mean.

    Several outputs are divided by sqrt(K * spread), K their number, so that each counts by its own spread. Class
    logits are centered, since softmax does not see a common shift.
    """

    def __init__(self, inputs: ScoringInputs, batches: Sequence[Example]) -> None:
        self._draw = torch.Generator().manual_seed(inputs.seed)
        self._columns = inputs.logit_columns()
        self._factors: dict[str, float] | None = None
        self._model, self._batches = inputs.model, batches

    def of(self, outputs: Any, images: int) -> Tensor:
        """Return the projected output for a number of images."""
        named = named_outputs(outputs, images)
        if not named:
            raise ModelError("the model's output must hold a floating-point tensor for Reconstruction; it holds none.")
        logits = self._logits(named, images)
        if self._factors is None:
            # One output needs no unit: every factor leaves the ranking as it is.
            self._factors = self._measured(logits) if len(named) > 1 else {}
        total: Any = 0.0
        for name, tensors in named.items():
            factor = self._factors.get(name)
            for tensor in tensors:
                out = _precise(tensor)
                signs = torch.randint(0, 2, out.shape, generator=self._draw).to(out) * 2 - 1
                signs = signs - signs.mean(-1, keepdim=True) if name in logits else signs
                total = total + (out * signs if factor is None else out * (factor * signs)).sum()
        return total

    def _logits(self, named: Mapping[str, list[Tensor]], images: int) -> set[str]:
        """The places of class logits: of outputs of shape (images, columns), the narrowest with enough columns."""
        widths = {
            name: tensors[0].shape[1]
            for name, tensors in named.items()
            if len(tensors) == 1 and tensors[0].dim() == 2 and len(tensors[0]) == images
        }
        enough = {name: width for name, width in widths.items() if width >= max(self._columns, 2)}
        return {name for name, width in enough.items() if self._columns and width == min(enough.values())}

    def _measured(self, logits: set[str]) -> dict[str, float]:
        """1 / sqrt(K * spread per image) of every output, from a pass without gradients."""
        model, parts, images = shadow_copy(self._model), dict[str, list[list[Tensor]]](), 0
        with torch.no_grad():
            for batch in self._batches:
                here = count_images(batch)
                # A copy, because a model may write into its input.
                outputs = call_model(model, tree_map_only(Tensor, torch.clone, batch))
                for name, tensors in named_outputs(outputs, here).items():
                    parts.setdefault(name, []).append(tensors)
                images += here
        spreads = {n: spread_per_image(found, images, class_logits=n in logits) for n, found in parts.items()}
        return {name: (len(spreads) * spread) ** -0.5 for name, spread in spreads.items()}
