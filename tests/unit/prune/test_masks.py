"""Masks hold weights at zero in training, copies and checkpoints, and can be made permanent."""

import copy
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load, save
from small_runs import LABELS_ONLY, Blobs, same, small_config, small_net, state
from torch import nn
from torch.nn.utils import parametrize

from secateur.errors import SparsityError
from secateur.prune import (
    apply_masks,
    get_masks,
    keep_largest,
    load_masked,
    magnitude_scores,
    make_permanent_,
    prunable_weights,
    set_masks_,
    uniform_counts,
)
from secateur.train import RunSettings, Silent, fit

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def half(model: nn.Module, density: float = 0.5) -> dict[str, torch.Tensor]:
    weights = prunable_weights(model)
    return keep_largest(magnitude_scores(weights), uniform_counts(weights, density))


class Tied(nn.Module):
    """Two layers that share one weight, and an attention whose weight is no module's ``weight``."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm((3, 8))
        self.token = nn.Parameter(torch.ones(1, 1, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(self.first(x) + self.token)
        return self.norm(self.attention(x, x, x, need_weights=False)[0])


def tied() -> Tied:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Tied()


TOKENS = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(2))


def test_prunable_names_weights_once_and_leaves_out_the_rest() -> None:
    weights = prunable_weights(tied())
    # The norm's weight has two dimensions here, and is one by its name: left out by name where that is not wanted.
    assert list(weights) == ["first.weight", "attention.in_proj_weight", "attention.out_proj.weight", "norm.weight"]
    assert list(prunable_weights(tied(), exclude=("norm", "*.out_proj"))) == [
        "first.weight",
        "attention.in_proj_weight",
    ]
    assert list(prunable_weights(small_net())) == ["0.weight", "6.weight"]
    assert list(prunable_weights(small_net(), exclude=("6",))) == ["0.weight"]
    assert list(prunable_weights(small_net(), exclude=("0.weight",))) == ["6.weight"]


def test_patterns_that_mean_nothing_are_refused_with_names_near_to_them() -> None:
    with pytest.raises(
        SparsityError, match=r"`exclude` must match a weight.*'attentions' matches none\. Did you mean att"
    ):
        prunable_weights(tied(), exclude=("attentions",))
    with pytest.raises(SparsityError, match="'second' matches none"):
        prunable_weights(tied(), exclude=("second",))
    with pytest.raises(
        SparsityError, match=r"`model` must have weights to prune; got none of 2 after exclude=\['\*'\]"
    ):
        prunable_weights(small_net(), exclude=("*",))


@pytest.mark.parametrize(("make", "inputs"), [(small_net, IMAGES), (tied, TOKENS)])
def test_a_masked_model_computes_with_zeros_and_leaves_the_original_alone(
    make: Callable[[], nn.Module], inputs: torch.Tensor
) -> None:
    model = make().eval()
    before = state(model)
    masks = half(model)
    small = apply_masks(model, masks)
    assert same(state(model), before)
    assert not any(parametrize.is_parametrized(module) for module in model.modules())
    expected = copy.deepcopy(model)
    with torch.no_grad():
        for name, kept in masks.items():
            expected.get_parameter(name).mul_(kept)
    torch.testing.assert_close(small(inputs), expected(inputs), rtol=0, atol=0)
    assert all(torch.equal(kept, masks[name]) for name, kept in get_masks(small).items())
    assert list(get_masks(small)) == list(masks)
    assert not small.training


def test_shared_weights_share_their_mask_and_their_parameter() -> None:
    model = tied()
    small = apply_masks(model, {"second.weight": half(model)["first.weight"]})
    assert list(get_masks(small)) == ["first.weight"]
    assert small.first.parametrizations.weight.original is small.second.parametrizations.weight.original
    assert torch.equal(small.first.weight, small.second.weight)
    assert int((small.second.weight == 0).sum()) == 32
    make_permanent_(small)
    assert small.first.weight is small.second.weight
    assert int((small.second.weight == 0).sum()) == 32


def test_pruned_weights_get_no_gradient_and_stay_zero_in_training() -> None:
    model = small_net()
    masks = half(model)
    small = apply_masks(model, masks)
    nn.functional.cross_entropy(small(IMAGES), torch.tensor([0, 1, 2, 0])).backward()
    for name, kept in masks.items():
        module, _, own = name.rpartition(".")
        gradient = small.get_submodule(module).parametrizations[own].original.grad
        assert gradient is not None
        assert torch.equal(gradient[~kept], torch.zeros_like(gradient[~kept]))
        assert gradient[kept].abs().sum() > 0
    source = Blobs(64)
    trained = fit(
        small, source, train=small_config(2), objective=LABELS_ONLY, run=RunSettings(callbacks=Silent())
    ).model
    weights = prunable_weights(trained)
    for name, kept in masks.items():
        assert torch.equal(get_masks(trained)[name], kept)
        assert torch.equal(weights[name] == 0, ~kept)
        assert not torch.equal(weights[name], prunable_weights(small)[name])


def test_masks_survive_averaging_and_an_interrupted_run(tmp_path) -> None:
    small = apply_masks(small_net(), half(small_net(), 0.25))

    def run(source: Blobs, folder: str) -> nn.Module:
        schedule = small_config(3, ema_decay=0.9)
        settings = {"train": schedule, "objective": LABELS_ONLY}
        return fit(small, source, run=RunSettings(folder=tmp_path / folder, callbacks=Silent()), **settings).model

    whole = run(Blobs(64), "a")
    with pytest.raises(KeyboardInterrupt):
        run(Interrupted(64), "b")
    resumed = run(Blobs(64), "b")
    assert same(state(whole), state(resumed))
    assert all(torch.equal(kept, get_masks(small)[name]) for name, kept in get_masks(resumed).items())


class Interrupted(Blobs):
    """A user who presses Ctrl-C in the second epoch."""

    def batches(self, *args, epoch: int = 0, **settings):  # type: ignore[no-untyped-def]
        if epoch == 1:
            raise KeyboardInterrupt
        return super().batches(*args, epoch=epoch, **settings)


def test_state_dict_round_trip_through_a_file() -> None:
    model = small_net(seed=1)
    small = apply_masks(model, half(model))
    loaded = load_masked(small_net(seed=2), load(save(small.state_dict())))
    assert same(state(loaded), state(small))
    assert torch.equal(loaded.eval()(IMAGES), small.eval()(IMAGES))
    tied_small = apply_masks(tied(), half(tied()))
    again = load_masked(tied(), copy.deepcopy(tied_small.state_dict()))
    assert torch.equal(again(TOKENS), tied_small(TOKENS))
    assert again.first.parametrizations.weight[0] is again.second.parametrizations.weight[0]


def test_permanent_masks_leave_an_ordinary_model_with_the_same_parameters() -> None:
    model = small_net()
    masks = half(model)
    small = apply_masks(model, masks).eval()
    output, parameters = small(IMAGES), list(small.parameters())
    assert make_permanent_(small) is small
    assert torch.equal(small(IMAGES), output)
    assert [type(module) for module in small.modules()] == [type(module) for module in model.modules()]
    assert small.state_dict().keys() == model.state_dict().keys()
    assert {id(p) for p in small.parameters()} == {id(p) for p in parameters}
    assert all(torch.equal(small.get_parameter(name) == 0, ~kept) for name, kept in masks.items())
    assert get_masks(small) == {}
    assert same(state(make_permanent_(copy.deepcopy(small))), state(small))


def test_copies_do_not_share_what_parametrization_does_to_classes() -> None:
    small = apply_masks(tied(), {"attention.in_proj_weight": half(tied())["attention.in_proj_weight"]}).eval()
    output = small(TOKENS)
    twin = copy.deepcopy(small)
    make_permanent_(twin)
    assert torch.equal(small(TOKENS), output)
    both = apply_masks(small, {"attention.out_proj.weight": half(tied())["attention.out_proj.weight"]})
    assert len(get_masks(both)) == 2
    assert len(get_masks(small)) == 1
    make_permanent_(small)
    assert torch.equal(small(TOKENS), output)
    assert len(get_masks(both)) == 2


def test_masked_weights_keep_their_memory_order() -> None:
    # One channel in, or a 1x1 kernel: where several orders mean the same, and products choose another one.
    model = nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 3, groups=8)).to(memory_format=torch.channels_last)
    small = apply_masks(model, half(model))
    for before, after in zip(model, small, strict=True):
        assert after.weight.stride() == before.weight.stride()
    for before, after in zip(model, make_permanent_(small), strict=True):
        assert after.weight.stride() == before.weight.stride()


def test_masks_are_replaced_in_place_and_what_is_pruned_counts_as_zero() -> None:
    model = small_net()
    small = apply_masks(model, half(model, 0.5))
    parameters = {id(p) for p in small.parameters()}
    fewer = half(small, 0.25)
    assert set_masks_(small, fewer) is small
    assert {id(p) for p in small.parameters()} == parameters
    for name, kept in get_masks(small).items():
        assert torch.equal(kept, fewer[name])
        # The quarter of largest magnitude lies within the half.
        assert not (kept & ~half(model, 0.5)[name]).any()
    # A masked model masked again takes the new masks into its old ones.
    again = apply_masks(small, {"0.weight": ~fewer["0.weight"]})
    assert torch.equal(get_masks(again)["0.weight"], ~fewer["0.weight"])
    assert torch.equal(get_masks(again)["6.weight"], fewer["6.weight"])
    assert len(again[0].parametrizations.weight) == 1


def test_a_mask_joins_another_parametrization() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    nn.utils.parametrizations.weight_norm(model[0])
    small = apply_masks(model, half(model))
    assert torch.equal(small[0].weight, model[0].weight * get_masks(small)["0.weight"])
    with pytest.raises(SparsityError, match=r"must have only masks on its weights; got _WeightNorm on '0\.weight'"):
        make_permanent_(small)


def test_masks_that_do_not_fit_are_refused() -> None:
    model = small_net()
    masks = half(model)
    with pytest.raises(SparsityError, match=r"`masks` must name weights of the model; '7\.weight' is none"):
        apply_masks(model, {"7.weight": masks["0.weight"]})
    with pytest.raises(
        SparsityError, match=r"got torch.float32 \(3, 8\) for '6\.weight' \(3, 8\)\. Use `keep_largest`"
    ):
        apply_masks(model, {"6.weight": masks["6.weight"].float()})
    with pytest.raises(SparsityError, match=r"got torch.bool \(8, 3\) for '6\.weight' \(3, 8\)"):
        apply_masks(model, {"6.weight": masks["6.weight"].T})
    small = apply_masks(model, masks)
    before = get_masks(small)
    with pytest.raises(SparsityError, match=r"the model's masks; got unknown \[\] and missing \['6\.weight'\]"):
        set_masks_(small, {"0.weight": masks["0.weight"]})
    with pytest.raises(SparsityError, match=r"got torch.bool \(8, 3\) for '6\.weight'"):
        set_masks_(small, masks | {"0.weight": ~masks["0.weight"], "6.weight": masks["6.weight"].T})
    assert all(torch.equal(kept, before[name]) for name, kept in get_masks(small).items())


def test_a_mask_that_keeps_nothing_warns() -> None:
    model = small_net()
    empty = {"6.weight": torch.zeros(3, 8, dtype=torch.bool)}
    with pytest.warns(UserWarning, match=r"the mask of '6\.weight' keeps no weight: its layer is reduced to its bias"):
        small = apply_masks(model, empty).eval()
    torch.testing.assert_close(small(IMAGES), model[6].bias.expand(4, 3))


def test_zeros_that_stay_are_plain_zeros() -> None:
    model = small_net()
    permanent = make_permanent_(apply_masks(model, half(model)))
    for name, weight in prunable_weights(model).items():
        found = permanent.get_parameter(name)
        assert bool((weight < 0).logical_and(found == 0).any()), "a negative weight is pruned"
        assert not bool((found == 0).logical_and(found.signbit()).any()), "a file would hold -0.0 as a value"


def test_a_mask_shows_its_shape_and_density():
    model = nn.Sequential(nn.Linear(4, 5))
    sparse = apply_masks(model, half(model, 0.25))
    assert "Mask(5 x 4, 25.0% kept)" in repr(sparse)
