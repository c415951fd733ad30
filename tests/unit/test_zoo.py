"""The zoo itself: every net is deterministic, and all its weights have a visible effect, as other tests assume."""

import pytest
import torch
from zoo import ZOO


@pytest.mark.parametrize("name", ZOO)
def test_same_model_every_time_and_global_rng_untouched(name: str):
    state = torch.get_rng_state()
    first, second = ZOO[name](), ZOO[name]()
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first.model(first.example), second.model(second.example))


@pytest.mark.parametrize("name", ZOO)
def test_every_used_tensor_is_loud(name: str):
    model, example = ZOO[name]()
    output = model(example)
    assert output.isfinite().all()
    assert (output[0] - output[1]).abs().max() > 1e-3, "the output does not depend on the image"
    assert not model.training
    for tensor in model.state_dict().values():
        if tensor.is_floating_point() and tensor.numel() > 1:
            assert tensor.std() > 1e-2
            assert (tensor != 0).all()


@pytest.mark.parametrize("name", ZOO)
def test_every_parameter_reaches_the_output(name: str):
    model, example = ZOO[name]()
    model(example).square().sum().backward()
    silent = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 1e-7]
    expected = ["auxiliary.weight", "auxiliary.bias", "spare.weight", "spare.bias"] if name == "unused_layer" else []
    # A softmax over keys does not see a bias added to every key: true of attention itself.
    assert [key for key in silent if not key.endswith(".k.bias")] == expected
