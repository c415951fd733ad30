"""Batches of any kind: trees of tensors, or lists of items, and how a model is called with them."""

from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from secateur.errors import DataError

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


def call_model(model: Callable[..., Any], inputs: Any) -> Any:
    """Call a model: a tuple gives positional arguments, a mapping keyword arguments, anything else the one argument."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def batch_length(tree: Any) -> int:
    """Return the number of items of a batch: the length of a list of items, or of the first tensor.

    Raises:
        DataError: If there is no tensor.
    """
    if isinstance(tree, list) and tree:
        return len(tree)
    tensor = next((leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.ndim), None)
    if tensor is None:
        raise DataError(f"A batch must hold tensors with a batch dimension; got {type(tree).__name__}.")
    return len(tensor)


def float_tensors(outputs: Any) -> list[Tensor]:
    """Return the floating-point tensors of outputs, in the order of the tree."""
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def take(tree: Any, part: slice) -> Any:
    """Return some items of a batch: of a list its entries, of a tensor its rows; scalars stay as they are.

    Args:
        tree: Inputs or targets of a batch: tensors and lists of items, also inside of tuples and mappings.
        part: Which items.
    """
    if isinstance(tree, Tensor):
        return tree[part] if tree.ndim else tree
    if isinstance(tree, list):
        return cast("list[Any]", tree)[part]
    if isinstance(tree, tuple):
        return tuple(take(each, part) for each in cast("tuple[Any, ...]", tree))
    if isinstance(tree, Mapping):
        return {name: take(each, part) for name, each in cast("Mapping[str, Any]", tree).items()}
    return tree


def move(tree: Any, device: torch.device) -> Any:
    """Return a tree with its tensors on a device; arrays of numpy become tensors."""

    def moved(leaf: Any) -> Any:
        if isinstance(leaf, np.ndarray):
            leaf = torch.from_numpy(leaf)
        return leaf.to(device, non_blocking=True) if isinstance(leaf, Tensor) else leaf

    return tree_map(moved, tree)
