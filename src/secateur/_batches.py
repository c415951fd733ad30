"""Batches of any kind: trees of tensors, or lists of items, and how a model is called with them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from secateur.errors import DataError

AnyBatch = TypeVar("AnyBatch")
TARGET_KEYS = ("labels", "label", "targets", "target")
"""Keys under which a batch that is a mapping may hold its targets. The first one that is there is taken."""


def split_batch(batch: Any) -> tuple[Any, Any]:
    """Return inputs and targets of a batch of a user's loader.

    A pair is inputs and targets. Of a mapping, the targets are the entry named labels, label, targets or target, and
    the inputs all others, which become keyword arguments of the model. Anything else is inputs without targets.
    """
    if isinstance(batch, list | tuple) and len(batch) == 2:
        return batch[0], batch[1]
    if isinstance(batch, Mapping):
        key = next((key for key in TARGET_KEYS if key in batch), None)
        return {name: value for name, value in batch.items() if name != key}, None if key is None else batch[key]
    if isinstance(batch, list | tuple) and len(batch) == 1:
        return batch[0], None
    return batch, None


def arguments_of(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a forward pass: a tuple by position, a mapping by name, anything else as one input."""
    if isinstance(batch, Mapping):
        return (), dict(cast("Mapping[str, Any]", batch))
    return (cast("tuple[Any, ...]", batch) if isinstance(batch, tuple) else (batch,)), {}


def call_model(model: Callable[..., Any], inputs: Any) -> Any:
    """Return what a model gives for a batch, see `arguments_of`."""
    positional, by_name = arguments_of(inputs)
    return model(*positional, **by_name)


_TARGETS = "targets"


def with_targets(inputs: Any, targets: Any) -> tuple[Any, Any]:
    """Return a pair in which the targets are in a mapping, so that no score and no search takes them for labels."""
    return inputs, {_TARGETS: targets}


def targets_of(labels: Any) -> Any:
    """Return the targets in what `with_targets` made; labels as they are."""
    return cast("Mapping[str, Any]", labels)[_TARGETS] if has_targets(labels) else labels


def has_targets(labels: object) -> bool:
    """Whether the second part of a pair is what `with_targets` made."""
    return isinstance(labels, Mapping) and set(cast("Mapping[str, Any]", labels)) == {_TARGETS}


def batch_length(tree: Any) -> int:
    """Return the number of items of a batch, see `count_images`.

    Raises:
        DataError: If there is no tensor.
    """
    listed = isinstance(tree, list) and bool(tree)
    if not listed and not any(isinstance(leaf, Tensor) and leaf.ndim for leaf in tree_leaves(tree)):
        raise DataError(f"A batch must hold tensors with a batch dimension; got {type(tree).__name__}.")
    return count_images(tree)


def count_images(batch: Any) -> int:
    """Return the number of images of a batch: the first dimension of its first tensor, or the length of its first list.

    Tensors in a list are images of their own, as in `secateur.trace`. A batch without either counts as one.
    """
    if isinstance(batch, Tensor):
        return len(batch) if batch.dim() else 1
    if isinstance(batch, list):
        return len(cast(list[Any], batch))
    parts = tuple(batch.values()) if isinstance(batch, Mapping) else batch if isinstance(batch, tuple) else ()
    direct = [part for part in cast(tuple[Any, ...], parts) if isinstance(part, Tensor) and part.dim()]
    if direct:
        return len(direct[0])
    inside = (part for part in cast(tuple[Any, ...], parts) if isinstance(part, Mapping | tuple | list))
    return next((count_images(part) for part in inside), 1)


def select_images(batch: AnyBatch, index: Sequence[int]) -> AnyBatch:
    """Return some images of a batch, in the same form.

    Every tensor whose first dimension is the number of images, and every list of that length, is reduced to them;
    anything else is passed on.
    """
    return cast(AnyBatch, _select(batch, count_images(batch), index))


def _select(part: Any, images: int, index: Sequence[int]) -> Any:
    found = part
    if isinstance(part, Tensor):
        if part.dim() and len(part) == images:
            found = _select_rows(part, index)
    elif isinstance(part, Mapping):
        items = cast(Mapping[Any, Any], part).items()
        found = {name: _select(value, images, index) for name, value in items}
    elif isinstance(part, tuple):
        parts = [_select(each, images, index) for each in cast(tuple[Any, ...], part)]
        found = type(part)(*parts) if hasattr(part, "_fields") else tuple(parts)
    elif isinstance(part, list):
        parts = cast(list[Any], part)
        each = len(parts) == images and not _are_batches(parts, images)
        found = [parts[i] for i in index] if each else [_select(item, images, index) for item in parts]
    return found


def _select_rows(tensor: Tensor, index: Sequence[int]) -> Tensor:
    begin = index[0] if len(index) else 0
    if list(index) == list(range(begin, begin + len(index))):
        return tensor[begin : begin + len(index)]  # A view, without a copy.
    return tensor[torch.as_tensor(index).to(tensor.device)]


def _are_batches(parts: Sequence[Any], images: int) -> bool:
    """Whether a list as long as the batch holds batches of images, not images (channels, height, width)."""
    return all(isinstance(part, Tensor) and part.dim() > 3 and len(part) == images for part in parts)


def first_images(batches: Sequence[AnyBatch], most: int) -> list[AnyBatch]:
    """Return the first images of some batches, in their batches."""
    found: list[AnyBatch] = []
    for batch in batches:
        count = min(count_images(batch), most)
        if count < 1:
            break
        found.append(batch if count == count_images(batch) else select_images(batch, range(count)))
        most -= count
    return found


def float_tensors(outputs: Any) -> list[Tensor]:
    """Return the floating-point tensors of outputs, in the order of the tree."""
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def first_output(outputs: Any) -> Tensor | None:
    """Return the first floating-point tensor of outputs, such as the logits of a classifier; None without any."""
    return next(iter(float_tensors(outputs)), None)


def unusual(tensor: Tensor) -> str:
    """Return what keeps operations from computing with the numbers of a tensor, in words; "" for an ordinary one."""
    if tensor.is_meta:
        return "on the meta device, without values"
    if tensor.is_nested or tensor.is_quantized:
        return "nested" if tensor.is_nested else "quantized"
    if tensor.layout is not torch.strided:
        return f"of the layout {str(tensor.layout).removeprefix('torch.')}"
    return f"of the type {tensor.dtype}" if tensor.is_floating_point() and tensor.element_size() == 1 else ""


def in_float32(outputs: Any) -> Any:
    """Return outputs with their floating-point tensors in float32, in which losses are computed."""
    return tree_map_only(Tensor, lambda tensor: tensor.float() if tensor.is_floating_point() else tensor, outputs)


def take(tree: AnyBatch, part: slice) -> AnyBatch:
    """Return some items of a batch, see `select_images`.

    Args:
        tree: Inputs or targets of a batch: tensors and lists of items, also inside of tuples and mappings.
        part: Which items.
    """
    return select_images(tree, range(*part.indices(count_images(tree))))


def move(tree: Any, device: torch.device) -> Any:
    """Return a tree with its tensors on a device; arrays of numpy become tensors."""

    def moved(leaf: Any) -> Any:
        if isinstance(leaf, np.ndarray):
            leaf = torch.from_numpy(leaf)
        if not isinstance(leaf, Tensor):
            return leaf
        if leaf.is_meta and device.type != "meta":
            raise DataError(
                f"`data` must give tensors with values; got one of shape {tuple(leaf.shape)} on the meta device, which "
                "holds none. Make them on the CPU: they are moved to where the model is."
            )
        return leaf.to(device, non_blocking=True)

    return tree_map(moved, tree)
