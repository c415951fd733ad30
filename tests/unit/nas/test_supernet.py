"""The supernet as a module: it restores its state, refuses bad subnets, and trains like the cut models."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cuts import apart, zoo_net
from torch import Tensor, nn

from secateur.errors import SurgeryError
from secateur.graph import trace, untie
from secateur.nas import Mixture, Subnet, Supernet, ZeroPad


def half(supernet: Supernet, *, removed: bool = True) -> Subnet:
    """Half of every width, every second block removed."""
    axes = supernet.graph.prunable
    blocks = [block.name for block in supernet.graph.removable][::2] if removed else []
    return Subnet(tuple(max(1, axis.size // 2 // axis.divisor) * axis.divisor for axis in axes), tuple(sorted(blocks)))


def state(module: nn.Module) -> dict[str, object]:
    """Everything that a call might change: the ids of modules and parameters, attributes, modes, hooks."""
    found: dict[str, object] = {}
    for name, each in module.named_modules():
        plain = {k: copy.copy(v) for k, v in vars(each).items() if isinstance(v, (int, float, str, tuple, list))}
        hooks = [len(v) for k, v in sorted(vars(each).items()) if "hooks" in k and hasattr(v, "__len__")]
        found[name] = (id(each), plain, hooks, list(each._modules), list(each._parameters), list(each._buffers))
    found["/tensors"] = {
        name: (id(t), t.requires_grad, t.detach().clone())
        for name, t in (*module.named_parameters(), *module.named_buffers())
    }
    return found


def same_state(one: dict[str, object], two: dict[str, object]) -> bool:
    tensors, others = one.pop("/tensors"), two.pop("/tensors")
    assert isinstance(tensors, dict)
    assert isinstance(others, dict)
    equal = tensors.keys() == others.keys() and all(
        tensors[name][:2] == others[name][:2] and torch.equal(tensors[name][2], others[name][2]) for name in tensors
    )
    return equal and one == two


NAMES = ("residual", "option_a_residual", "split", "depthwise_separable", "nested", "attention", "layer_norm")


@pytest.mark.parametrize("untied", [False, True], ids=["tied", "untied"])
@pytest.mark.parametrize("name", NAMES)
def test_a_call_does_not_change_the_supernet(name, untied):
    model, x, graph = zoo_net(name)
    supernet = Supernet(model, untie(model, graph) if untied else graph).eval()
    subnet = half(supernet)
    count = len(subnet.widths)
    mixture = Mixture(tuple(1 for _ in subnet.widths), torch.full((count, 2), 0.5), _even_depths(supernet), ZeroPad())
    before = state(supernet)
    supernet(subnet, x)
    if all(axis.divisor == 1 for axis in graph.prunable):
        supernet(subnet, x, mixture=mixture)
    assert same_state(before, state(supernet))


def _even_depths(supernet: Supernet) -> tuple[Tensor, ...]:
    return tuple(torch.full((len(chain) + 1,), 1 / (len(chain) + 1)) for chain in supernet.graph.chains)


@pytest.mark.parametrize("name", NAMES)
def test_a_failing_call_does_not_change_the_supernet(name):
    """In the last layer, in the first, and before the model runs."""
    model, x, graph = zoo_net(name)
    supernet = Supernet(model, graph).eval()
    subnet = half(supernet)
    mixture = Mixture(subnet.widths, torch.zeros(len(subnet.widths), 2), _even_depths(supernet))

    def fail(*_args: object) -> None:
        raise RuntimeError("it failed")

    gone = graph.removed_modules(subnet.removed_blocks)
    run = [module for module in graph.activations if not gone(module)]
    for module in (run[0], run[-1]):
        hook = supernet.model.get_submodule(module).register_forward_pre_hook(fail)
        before = state(supernet)
        with pytest.raises(RuntimeError, match="it failed"):
            supernet(subnet, x, mixture=mixture)
        assert same_state(before, state(supernet))
        hook.remove()
    before = state(supernet)
    with pytest.raises(RuntimeError):
        supernet(subnet, x[:, :1])
    with pytest.raises((IndexError, ValueError)):
        supernet(Subnet(subnet.widths[:-1], subnet.removed_blocks), x)
    assert same_state(before, state(supernet))


def test_the_callers_model_is_not_changed():
    model, x, graph = zoo_net("residual")
    before = state(model)
    supernet = Supernet(model, graph, {axis.name: np.arange(axis.size)[::-1].copy() for axis in graph.prunable})
    supernet.train()
    supernet(half(supernet), x).sum().backward()
    assert same_state(before, state(model))
    assert not any(a is b for a in supernet.parameters() for b in model.parameters())


def test_the_full_subnet_equals_the_model_bit_for_bit():
    model, x, graph = zoo_net("residual")
    supernet = Supernet(model, graph)
    with torch.no_grad():
        assert torch.equal(supernet(supernet.full, x), model(x))
    assert supernet.full == supernet.subnet({})


def test_weights_are_views_where_channels_are_contiguous():
    """Views need no copies, so a sliced layer costs only its computation."""
    model, _, graph = zoo_net("residual")
    supernet = Supernet(model, graph)
    parts = supernet.tensors_of(half(supernet))
    whole = dict(supernet.model.named_parameters())
    weights = [name for name in parts if name in whole and whole[name].dim() > 1]
    assert weights
    assert all(parts[name].data_ptr() == whole[name].data_ptr() for name in weights)


def test_parts_of_removed_blocks_are_left_out():
    model, _, graph = zoo_net("residual")
    supernet = Supernet(model, graph)
    names = supernet.tensors_of(supernet.subnet({}, ["1"]))
    assert "0.0.weight" in names
    assert not any(name.startswith("1.") for name in names)


def test_given_tensors_replace_those_of_the_supernet():
    model, x, graph = zoo_net("plain")
    supernet = Supernet(model, graph)
    subnet = half(supernet)
    bias = torch.full((5,), 3.0)
    with torch.no_grad():
        moved = supernet(subnet, x, tensors={"3.fc.bias": bias})
        want = supernet(subnet, x) - supernet.model.get_parameter("3.fc.bias") + bias
    torch.testing.assert_close(moved, want)


@pytest.mark.parametrize(
    ("widths", "got"), [({"0.0": 0}, "0 for '0.0'"), ({"0.0": 13}, "13 for '0.0'"), ({"x": 1}, "1 for 'x'")]
)
def test_widths_out_of_range_are_refused(widths, got):
    model, _, graph = zoo_net("plain")
    with pytest.raises(
        SurgeryError, match=rf"`widths` must name prunable axes with 1 to all of their channels; got {got}"
    ):
        Supernet(model, graph).subnet(widths)


def test_unknown_blocks_are_refused():
    model, _, graph = zoo_net("residual")
    with pytest.raises(SurgeryError, match=r"`removed_blocks` must name removable blocks; got \['2', 'x'\]"):
        Supernet(model, graph).subnet({}, ["x", "2", "1"])


def test_blocks_may_be_any_iterable():
    model, _, graph = zoo_net("residual")
    supernet = Supernet(model, graph)
    assert supernet.subnet({}, (name for name in ("3", "1", "3"))).removed_blocks == ("1", "3")


def test_branches_wider_than_their_stream_are_refused():
    model, _, graph = zoo_net("residual")
    graph = untie(model, graph)
    branch = next(axis for axis in graph.prunable if axis.residual_axis == "0.0")
    message = rf"`widths` must not be wider for '{branch.name}' than for '0.0', its stream; got 8 and 5"
    supernet, place = Supernet(model, graph), list(graph.sizes).index(branch.name)
    with pytest.raises(SurgeryError, match=message):
        supernet.subnet({"0.0": 5, branch.name: 8})
    assert supernet.subnet({"0.0": 5, branch.name: 4}).widths[place] == 4
    # One that is not named is as wide as its stream.
    assert supernet.subnet({"0.0": 5}).widths[place] == 5


class Remembering(nn.Module):
    """Caches a value derived from a parameter in its first call in evaluation mode, as attention does with biases."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.scale = nn.Parameter(torch.linspace(0.5, 2, 8))
        self.known: dict[str, Tensor] = {}
        self.latest: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return self.last(self.first(x) * self.scale.exp())
        if "factor" not in self.known:
            self.known["factor"] = self.scale.exp()
        if self.latest is None:
            self.latest = self.scale.sin()
        return self.last(self.first(x) * self.known["factor"] + self.latest)


def test_values_cached_by_one_subnet_are_not_used_by_another():
    torch.manual_seed(0)
    model, x = Remembering().eval(), torch.randn(4, 6)
    supernet = copy.deepcopy(Supernet(model, trace(model, x))).eval()
    (axis,) = supernet.graph.prunable
    for width in (axis.size, 3, 5, axis.size):
        subnet = Subnet((width,))
        wanted = supernet.extract(subnet).eval()(x)
        torch.testing.assert_close(supernet(subnet, x), wanted, rtol=1e-6, atol=1e-6)
    assert supernet.model.known == {}
    assert supernet.model.latest is None


def test_copies_are_independent():
    model, x, graph = zoo_net("residual")
    supernet = Supernet(model, graph, {"0.0": np.arange(8)[::-1].copy()})
    subnet = half(supernet)
    with torch.no_grad():
        before = supernet(subnet, x)
    copied = copy.deepcopy(supernet)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
        assert torch.equal(supernet(subnet, x), before)
        assert not torch.equal(copied(subnet, x), before)
        copied.load_state_dict(supernet.state_dict())
        assert torch.equal(copied(subnet, x), before)


def test_bfloat16_autocast_computes_what_the_cut_model_computes_under_it():
    model, x, graph = zoo_net("residual")
    supernet = Supernet(model, graph)
    subnet = half(supernet)
    small = supernet.extract(subnet)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = supernet(subnet, x), small(x)
        mixed = supernet(subnet, x, mixture=_half_mixture(supernet, subnet))
    assert got.dtype == mixed.dtype == torch.bfloat16
    assert torch.equal(got, want)
    exact = supernet(subnet, x, mixture=_half_mixture(supernet, subnet))
    assert apart([exact.detach()], [mixed.detach().float()]) < 0.05  # bfloat16 has 8 bits; about ten layers
    mixed.float().sum().backward()
    gradient = supernet.model.get_parameter("0.0.weight").grad
    assert gradient.dtype == torch.float32
    assert gradient.isfinite().all()


def _half_mixture(supernet: Supernet, subnet: Subnet) -> Mixture:
    narrow = tuple(max(1, width - 2) for width in subnet.widths)
    return Mixture(narrow, torch.full((len(narrow), 2), 0.5), _even_depths(supernet), ZeroPad())


class Normless(nn.Module):
    """A residual net without batch norms, so that images do not depend on each other."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first, self.second = nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(6, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = x + self.second(F.relu(self.first(x)))
        return self.head(x.mean((2, 3)))


def normless() -> tuple[Supernet, Tensor, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model, x = Normless().eval(), torch.randn(8, 3, 6, 6)
    return Supernet(model, trace(model, x[:1])), x, torch.arange(8) % 4


def test_two_half_batches_give_the_gradients_of_a_whole_one():
    supernet, x, labels = normless()
    supernet = supernet.double()
    subnet, x = supernet.subnet({"stem": 5, "first": 3}), x.double()
    F.cross_entropy(supernet(subnet, x), labels).backward()
    whole = {name: parameter.grad.clone() for name, parameter in supernet.named_parameters()}
    supernet.zero_grad()
    for rows in (slice(0, 4), slice(4, 8)):
        (F.cross_entropy(supernet(subnet, x[rows]), labels[rows]) / 2).backward()
    for name, parameter in supernet.named_parameters():
        torch.testing.assert_close(parameter.grad, whole[name], rtol=1e-12, atol=1e-14)


def test_gradients_of_different_subnets_add_up():
    """Gradients of two subnets in one step, as in the sandwich rule."""
    supernet, x, labels = normless()
    wide, slim = supernet.full, supernet.subnet({"stem": 2, "first": 2})
    gradients = []
    for subnet in (wide, slim):
        supernet.zero_grad()
        F.cross_entropy(supernet(subnet, x), labels).backward()
        gradients.append({name: p.grad.clone() for name, p in supernet.named_parameters()})
    supernet.zero_grad()
    (F.cross_entropy(supernet(wide, x), labels) + F.cross_entropy(supernet(slim, x), labels)).backward()
    for name, parameter in supernet.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[0][name] + gradients[1][name])


def test_training_a_subnet_equals_training_the_cut_model():
    """Three steps of SGD on both; the kept parts of the weights are the cut model's."""
    supernet, x, labels = normless()
    supernet = supernet.double()
    subnet, x = supernet.subnet({"stem": 5, "first": 3}), x.double()
    small = supernet.extract(subnet)
    mine, theirs = (torch.optim.SGD(net.parameters(), 0.1, momentum=0.9) for net in (supernet, small))
    for _ in range(3):
        for optimizer, logits in ((mine, supernet(subnet, x)), (theirs, small(x))):
            optimizer.zero_grad()
            F.cross_entropy(logits, labels).backward()
            optimizer.step()
    trained = dict(supernet.extract(subnet).named_parameters())
    for name, parameter in small.named_parameters():
        torch.testing.assert_close(trained[name], parameter, rtol=1e-11, atol=1e-13)


PROCESSES = """
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from test_supernet import SUBNETS, normless
from torch.nn.parallel import DistributedDataParallel


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    supernet, x, labels = normless()
    parallel = DistributedDataParallel(supernet, find_unused_parameters=True)
    rows = slice(4 * rank, 4 * rank + 4)
    for number, given in enumerate(SUBNETS):
        supernet.zero_grad()
        loss = F.cross_entropy(parallel(supernet.subnet(*given), x[rows]), labels[rows])
        loss.backward()
        gradients = {name: p.grad for name, p in supernet.named_parameters() if p.grad is not None}
        torch.save({"loss": loss.detach(), **gradients}, f"{folder}/{number}-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(work, (sys.argv[1],), nprocs=2)
"""
SUBNETS = [({"stem": 5, "first": 3}, ()), ({"stem": 4}, ("first",))]
"""Narrow, and without the residual block."""


@pytest.mark.long
def test_two_processes_give_the_gradients_of_one(tmp_path):
    """DistributedDataParallel over gloo, half of the batch each: mean losses and equal gradients."""
    script = tmp_path / "processes.py"
    script.write_text(PROCESSES)
    here = Path(__file__).parent
    paths = [str(here), str(here.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, script, tmp_path], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    supernet, x, labels = normless()
    for number, given in enumerate(SUBNETS):
        supernet.zero_grad()
        loss = F.cross_entropy(supernet(supernet.subnet(*given), x), labels)
        loss.backward()
        got = [torch.load(tmp_path / f"{number}-{rank}.pt", weights_only=True) for rank in (0, 1)]
        torch.testing.assert_close((got[0].pop("loss") + got[1].pop("loss")) / 2, loss.detach())
        for mine in got:
            for name, parameter in supernet.named_parameters():
                want = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                torch.testing.assert_close(mine.get(name, torch.zeros_like(parameter)), want)
