import pytest
import torch
from cuts import apart, zoo_net
from torch import Tensor, nn

from secateur.errors import DataError
from secateur.graph import untie
from secateur.nas import Subnet, Supernet, measure_batch_norms
from secateur.prune import original_names

NETS = ("plain", "residual", "option_a_residual", "dense", "few_groups", "shared_weights", "split", "nested", "dropout")
BatchNorm = nn.modules.batchnorm._BatchNorm


def batches(seed: int = 0) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(n, 3, 8, 8, generator=draw) for n in (6, 4, 6)]


def thin(supernet: Supernet) -> Subnet:
    axes = supernet.graph.prunable
    removed = tuple(sorted(block.name for block in supernet.graph.removable)[:1])
    return Subnet(tuple(max(1, axis.size // 2 // axis.divisor) * axis.divisor for axis in axes), removed)


@pytest.mark.parametrize("untied", [False, True], ids=["tied", "untied"])
@pytest.mark.parametrize("name", NETS)
def test_statistics_equal_those_measured_by_the_cut_model(name, untied):
    """The cut model runs in training mode with momentum None, which is torch's plain mean over all batches."""
    model, x, graph = zoo_net(name)
    supernet = Supernet(model, untie(model, graph) if untied else graph)
    subnet = thin(supernet)
    small = supernet.extract(subnet).eval()
    for norm in small.modules():
        if isinstance(norm, BatchNorm):
            norm.reset_running_stats()
            norm.train()
            norm.momentum = None
    with torch.no_grad():
        for images in batches():
            small(images)
    got, names = measure_batch_norms(supernet, subnet, batches()), original_names(small)
    measured = {
        f"{names[module]}.{leaf}": tensor
        for module, _, leaf in ((*name.rpartition("."), ) for name, _ in small.named_buffers())
        if module in names
        for tensor in [small.get_buffer(f"{module}.{leaf}")]
    }  # fmt: skip
    assert got
    for buffer, value in got.items():
        torch.testing.assert_close(value, measured[buffer], rtol=1e-5, atol=1e-6)
    norms = {n for n, m in small.named_modules() if isinstance(m, BatchNorm) and m.track_running_stats}
    assert {buffer.rpartition(".")[0] for buffer in got} == {names[norm] for norm in norms}
    small.eval()
    with torch.no_grad():
        assert apart([small(x)], [supernet.eval()(subnet, x, tensors=got)]) <= 1e-5


@pytest.mark.parametrize("training", [True, False])
def test_measuring_changes_nothing(training):
    model, _, graph = zoo_net("residual")
    supernet = Supernet(model, graph).train(training)
    supernet.model[2].bn1.eval()
    supernet.model[1].bn1.momentum = 0.3
    before = {name: tensor.clone() for name, tensor in supernet.state_dict().items()}
    modes = {name: (module.training, getattr(module, "momentum", 0)) for name, module in supernet.named_modules()}
    state = torch.get_rng_state()
    measure_batch_norms(supernet, thin(supernet), batches())
    assert all(torch.equal(before[name], tensor) for name, tensor in supernet.state_dict().items())
    assert modes == {n: (m.training, getattr(m, "momentum", 0)) for n, m in supernet.named_modules()}
    assert torch.equal(state, torch.get_rng_state())
    with pytest.raises(RuntimeError):
        measure_batch_norms(supernet, thin(supernet), [torch.zeros(2, 1, 8, 8)])
    assert modes == {n: (m.training, getattr(m, "momentum", 0)) for n, m in supernet.named_modules()}
    assert all(torch.equal(before[name], tensor) for name, tensor in supernet.state_dict().items())


def test_statistics_carry_no_gradient_and_share_no_memory():
    model, _, graph = zoo_net("plain")
    supernet = Supernet(model, graph)
    found = measure_batch_norms(supernet, thin(supernet), batches())
    own = {tensor.data_ptr() for tensor in supernet.buffers()}
    assert not any(tensor.requires_grad or tensor.data_ptr() in own for tensor in found.values())
    assert found["0.1.num_batches_tracked"] == 3


def test_a_net_without_batch_norms_has_no_statistics():
    model, _, graph = zoo_net("layer_norm")
    supernet = Supernet(model, graph)
    assert measure_batch_norms(supernet, supernet.full, batches()) == {}
    assert measure_batch_norms(supernet, supernet.full, []) == {}


def test_no_images_are_refused():
    """Otherwise every channel would have mean 0 and variance 1 without any measurement."""
    model, _, graph = zoo_net("plain")
    supernet = Supernet(model, graph)
    with pytest.raises(DataError, match=r"`batches` must hold images to measure batch norms on; got none\. Pass"):
        measure_batch_norms(supernet, supernet.full, [])
    with pytest.raises(DataError, match="`batches` must hold images"):
        measure_batch_norms(supernet, supernet.full, iter(()))
