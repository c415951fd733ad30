"""Masks on every small network of the zoo: shared weights, groups, attention, embeddings of patches."""

import copy

import pytest
import torch
from zoo import ZOO

from secateur.prune import (
    density_of,
    erk,
    keep_globally,
    keep_largest,
    magnitude,
    make_permanent_,
    masked,
    masked_like,
    masks_of,
    prunable,
    random_scores,
)


@pytest.mark.parametrize("name", ZOO)
def test_a_masked_net_is_the_net_with_zeros(name: str) -> None:
    model, example = ZOO[name]()
    weights = prunable(model)
    total = sum(weight.numel() for weight in weights.values())
    for masks in (
        keep_globally(magnitude(weights), 0.6),
        keep_largest(random_scores(weights), erk(weights, 0.6)),
    ):
        assert density_of(masks) == round(0.6 * total) / total
        small, zeroed = masked(model, masks), copy.deepcopy(model)
        with torch.no_grad():
            for tensor, kept in masks.items():
                zeroed.get_parameter(tensor).mul_(kept)
        expected = zeroed(example)
        assert torch.equal(small(example), expected)
        assert masks_of(small).keys() == masks.keys()
        loaded = masked_like(copy.deepcopy(model), small.state_dict())
        assert torch.equal(loaded(example), expected)
        assert torch.equal(make_permanent_(loaded)(example), expected)
