"""Masks on every small network of the zoo, with shared weights, groups, attention and patch embeddings."""

import copy

import pytest
import torch
from zoo import ZOO

from secateur.prune import (
    apply_masks,
    erk_counts,
    get_masks,
    keep_globally,
    keep_largest,
    load_masked,
    magnitude_scores,
    make_permanent_,
    mask_density,
    prunable_weights,
    random_scores,
)


@pytest.mark.parametrize("name", ZOO)
def test_a_masked_net_is_the_net_with_zeros(name: str) -> None:
    model, example = ZOO[name]()
    weights = prunable_weights(model)
    total = sum(weight.numel() for weight in weights.values())
    for masks in (
        keep_globally(magnitude_scores(weights), 0.6),
        keep_largest(random_scores(weights), erk_counts(weights, 0.6)),
    ):
        assert mask_density(masks) == round(0.6 * total) / total
        small, zeroed = apply_masks(model, masks), copy.deepcopy(model)
        with torch.no_grad():
            for tensor, kept in masks.items():
                zeroed.get_parameter(tensor).mul_(kept)
        expected = zeroed(example)
        assert torch.equal(small(example), expected)
        assert get_masks(small).keys() == masks.keys()
        loaded = load_masked(copy.deepcopy(model), small.state_dict())
        assert torch.equal(loaded(example), expected)
        assert torch.equal(make_permanent_(loaded)(example), expected)
