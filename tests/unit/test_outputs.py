"""Everything that a model returns is found, whatever it is packed in, or refused."""

import collections
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from secateur._outputs import output_leaves, output_tensors
from secateur.errors import ModelError

A, B = torch.ones(2), torch.zeros(3)


class Pair(NamedTuple):
    first: Tensor
    second: object


@dataclass
class Boxes:
    boxes: Tensor
    scores: Tensor


class Slotted:
    __slots__ = ("held", "never_set")

    def __init__(self, held):
        self.held = held


class Free:
    def __init__(self, held):
        self.held, self.me = held, self


class Output(collections.OrderedDict):
    """As the outputs of transformers: a dict with attributes."""

    def __init__(self, **items):
        super().__init__(**items)
        self.__dict__.update(items)


@pytest.mark.parametrize(
    ("output", "places"),
    [
        (A, ("",)),
        ((A, [B]), ("[0]", "[1][0]")),
        ({"a": A, 3: B}, ("['a']", "[3]")),
        (Output(logits=A, state=(B,)), ("['logits']", "['state'][0]")),
        (Pair(A, (B,)), (".first", ".second[0]")),
        (Boxes(A, B), (".boxes", ".scores")),
        (Slotted({"a": A, "b": B}), (".held['a']", ".held['b']")),
        (Free([A, B]), (".held[0]", ".held[1]")),
        ((torch.distributions.Normal(A, 1.0), B), ("[0].loc", "[0].scale", "[1]")),
        (collections.deque([A, B]), ("[0]", "[1]")),
    ],
)
def test_tensors_in_any_nesting_are_found(output, places):
    tensors = {place: leaf for place, leaf in output_leaves(output).items() if isinstance(leaf, Tensor)}
    assert tuple(tensors) == places
    assert [id(t) for t in output_tensors(output)] == [id(t) for t in tensors.values()]


def test_plain_values_and_arrays_are_leaves_too():
    leaves = output_leaves({"n": 3, "who": "me", "none": None, "size": torch.Size([1, 2]), "array": np.arange(3)})
    assert torch.equal(leaves.pop("['array']"), torch.arange(3))
    assert leaves == {"['n']": 3, "['who']": "me", "['none']": None, "['size'][0]": 1, "['size'][1]": 2}


def test_tensors_that_are_not_plain_are_compared_by_their_parts():
    assert output_leaves(torch.ones(2, dtype=torch.complex64))[""].shape == (2, 2)
    assert set(output_leaves({"s": torch.eye(2).to_sparse()})) == {"['s'].indices", "['s'].values"}


@pytest.mark.parametrize("output", [(t for t in [A]), iter([A]), {"a": map(abs, [A])}, lambda: A])
def test_what_cannot_be_looked_into_is_refused(output):
    with pytest.raises(ModelError, match=r"which cannot be compared\. Wrap the model in a module that returns tensors"):
        output_leaves(output)
