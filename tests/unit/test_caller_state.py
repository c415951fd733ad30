"""Nothing that a caller has set around a call changes a result, and no call changes the caller's world."""

import contextlib
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _len_torch_dispatch_stack
from zoo import ZOO

from secateur._caller_state import OPEN, default_state, in_default_state
from secateur.cost import count_macs
from secateur.errors import SecateurError
from secateur.graph import trace
from secateur.models import load_model
from secateur.prune import RecalibrateBatchNorm, Refit, cut
from secateur.search import Knapsack, Taylor, Uniform, search_architecture


class CountingFunctions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))


class DoublingDispatch(TorchDispatchMode):
    """Changes every result."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return out * 2 if isinstance(out, Tensor) and out.is_floating_point() and not func.is_view else out


@contextlib.contextmanager
def default_dtype():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def meta_device():
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


STATES: dict[str, Callable[[], contextlib.AbstractContextManager[object]]] = {
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "default dtype": default_dtype,
    "meta device": meta_device,
    "device context": lambda: torch.device("meta"),
    "deterministic": deterministic,
    "function mode": CountingFunctions,
    "dispatch mode": DoublingDispatch,
}


def pruned(name: str, strategy) -> tuple[object, ...]:
    """Kept channels, costs, and every number of the cut model and of its verification."""
    model, example = ZOO[name]()
    images = torch.randn(8, *example.shape[1:], generator=torch.Generator().manual_seed(1))
    return run(model, example, images, strategy)


def run(model: nn.Module, example: Tensor, images: Tensor, strategy) -> tuple[object, ...]:
    graph = trace(model, example)
    batches = [(images, torch.zeros(8, dtype=torch.int64, device="cpu"))]
    found = search_architecture(model, graph, strategy, budget="macs=50%", batches=batches)
    repairs = (Refit(), RecalibrateBatchNorm())
    made = cut(model, graph, found.architecture, calibration=[images], repairs=repairs)
    with default_state():  # The reading of the numbers is not tested.
        state = {key: tensor.tolist() for key, tensor in made.model.state_dict().items()}
    return len(graph.axes), found.architecture, found.cost, made.architecture, made.verification, made.repairs, state


STRATEGIES = {"uniform": Uniform(), "knapsack": Knapsack(), "taylor": Uniform(Taylor())}


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_a_state_around_the_calls_changes_nothing(state, strategy):
    model, example = ZOO["residual"]()
    images = torch.randn(8, *example.shape[1:], generator=torch.Generator().manual_seed(1))
    expected = run(model, example, images, strategy)
    model, example = ZOO["residual"]()
    with state():
        found = run(model, example, images, strategy)
    assert found == expected


@pytest.mark.parametrize("name", ["residual", "attention", "inverted_residual_se"])
def test_a_model_and_an_example_that_were_made_in_inference_mode(name):
    expected = pruned(name, Uniform(Taylor()))
    with torch.inference_mode():
        model, example = ZOO[name]()
        images = torch.randn(8, *example.shape[1:], generator=torch.Generator().manual_seed(1))
        assert next(model.parameters()).is_inference()
        assert example.is_inference()
        # What is created in inference mode is an inference tensor for good; the model is used in it and outside of it.
        inside = run(model, example, images, Uniform(Taylor()))
    assert inside == expected
    assert run(model, example, images, Uniform(Taylor())) == expected


@pytest.mark.parametrize("before", [None, "cpu", "meta"])
@pytest.mark.parametrize("inside", [None, "cpu", "meta"])
def test_a_default_device_that_code_sets_inside_is_gone_afterward(before: str | None, inside: str | None):
    def devices() -> tuple[str, str]:
        return torch.empty(1).device.type, torch.get_default_device().type

    with torch.device("cpu"):  # Puts back what this test sets.
        torch.set_default_device(before)
        expected = devices()
        with default_state(nn.Linear(2, 2, device="cpu")):
            torch.set_default_device(inside)
            assert devices() == (inside or "cpu",) * 2
        assert devices() == expected
        torch.set_default_device(None)
        assert devices() == ("cpu", "cpu")


def test_a_factory_that_sets_the_default_device_does_not_change_it_for_anybody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    code = "import torch\ndef net():\n    torch.set_default_device('meta')\n    return torch.nn.Linear(2, 2)\n"
    (tmp_path / "my_meta_nets.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    model, _ = load_model("python:my_meta_nets:net", trust_source=True)
    assert model.weight.device.type == "meta"
    assert torch.empty(1).device.type == "cpu"


def world(model: nn.Module) -> dict[str, object]:
    return {
        "tensors": {k: t.detach().clone() for k, t in model.state_dict().items()},
        "identities": [(id(p), p.data_ptr(), p.requires_grad, id(p.grad)) for p in model.parameters()],
        "modes": [m.training for m in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "attributes": {name: sorted(vars(m)) for name, m in model.named_modules()},
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),
        "torch": torch.get_rng_state().tolist(),
    }


def same(first: dict[str, object], second: dict[str, object]) -> bool:
    tensors = first.pop("tensors"), second.pop("tensors")
    return first == second and all(torch.equal(a, tensors[1][k]) for k, a in tensors[0].items())


class Codebook(nn.Module):
    """Parameters and buffers that follow the inputs, written in every way that PyTorch offers."""

    def __init__(self, write: Callable[[nn.Module, Tensor], None]) -> None:
        super().__init__()
        self.stem, self.conv, self.fc = nn.Conv2d(3, 64, 3), nn.Conv2d(64, 32, 3), nn.Linear(32, 10)
        self.codebook = nn.Parameter(torch.ones(32), requires_grad=False)
        self.register_buffer("seen", torch.zeros(()))
        self.write, self.cache, self.steps = write, {}, 0

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(self.stem(x).relu()).relu().mean((2, 3))
        with torch.no_grad():
            self.write(self, h.mean(0))
            self.seen.add_(1)
        self.cache["last"], self.steps = h, self.steps + 1
        return self.fc(h - self.codebook)


def by_view(m: nn.Module, h: Tensor) -> None:
    for i in (0, 1):
        m.codebook.view(2, 16)[i].mul_(0.9).add_(h.view(2, 16)[i], alpha=0.1)


def by_data(m: nn.Module, h: Tensor) -> None:
    m.codebook.data = 0.9 * m.codebook.data + 0.1 * h


def by_random(m: nn.Module, h: Tensor) -> None:
    m.codebook.add_(random.random() + np.random.rand() + float(torch.rand(())))


WRITES = {
    "in place": lambda m, h: m.codebook.mul_(0.9).add_(0.1 * h),
    "in place on data": lambda m, h: m.codebook.data.mul_(0.9).add_(0.1 * h),
    "copy": lambda m, h: m.codebook.copy_(0.9 * m.codebook + 0.1 * h),
    "lerp": lambda m, h: m.codebook.lerp_(h, 0.1),
    "item": lambda m, h: m.codebook.__setitem__(slice(None), 0.9 * m.codebook + 0.1 * h),
    "view": by_view,
    "data": by_data,
    "foreach": lambda m, h: torch._foreach_mul_([m.codebook, m.fc.bias.detach()], 0.9),
    "out": lambda m, h: torch.mul(m.codebook, 0.9, out=m.codebook),
    "weights of a layer": lambda m, h: m.fc.weight.data.clamp_(-0.1, 0.1),
    "random": by_random,
}


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_forward_that_writes_changes_copies_only(write, mode):
    torch.manual_seed(0)
    model, images = Codebook(write).train(mode), torch.randn(8, 3, 12, 12)
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    before = world(model)
    graph = trace(model, images)
    batches = [(images, torch.zeros(8, dtype=torch.int64))]
    found = search_architecture(model, graph, Uniform(Taylor()), budget="macs=50%", batches=batches)
    cut(model, graph, found.architecture, calibration=[images], repairs=(Refit(), RecalibrateBatchNorm()))
    count_macs(model, images)
    assert same(before, world(model))
    assert (model.steps, model.cache) == (0, {})
    # The cut model is verified on copies too.
    made = cut(model, graph, found.architecture).model
    assert torch.equal(made.codebook, torch.ones(len(made.codebook)))
    assert int(made.seen) == made.steps == 0


def test_the_states_are_restored_and_a_function_keeps_its_name():
    @in_default_state
    def inner(model: nn.Module) -> tuple[bool, ...]:
        """What it does."""
        torch.rand(3), random.random(), np.random.rand()
        return torch.is_inference_mode_enabled(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")

    model = nn.Linear(2, 2)
    before = torch.get_rng_state(), random.getstate()
    with torch.inference_mode(), torch.autocast("cpu"), CountingFunctions() as counting:
        calls = counting.calls
        assert inner(model) == (False, True, False)
        assert counting.calls == calls
        assert torch.is_inference_mode_enabled()
        assert torch.is_autocast_enabled("cpu")
        torch.ones(1)
        assert counting.calls > calls
    assert inner.__name__ == "inner"
    assert inner.__doc__ == "What it does."
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()


RUNS_LEFT = [0]
"""Of the model below and all of its copies."""


class Interrupted(nn.Module):
    """Its forward pass is ended from outside at one of its calls: by Ctrl-C, or by an exit."""

    def __init__(self, error: type[BaseException]) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)
        self.error = error

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(self.one(x).relu())
        RUNS_LEFT[0] -= 1
        if RUNS_LEFT[0] == 0:
            raise self.error
        return x.mean((2, 3))


def modes() -> tuple[object, ...]:
    return (
        _len_torch_dispatch_stack(), torch._C._len_torch_function_stack(), torch.backends.mha.get_fastpath_enabled(),
        torch.is_grad_enabled(), OPEN.stacks,
    )  # fmt: skip


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupted_run_leaves_no_mode_behind(error: type[BaseException]) -> None:
    model, x, before = Interrupted(error).eval(), torch.randn(2, 3, 8, 8), modes()
    images = (torch.randn(8, 3, 8, 8),)

    def whole() -> None:
        graph = trace(model, x)
        search = search_architecture(
            model, graph, Knapsack(), budget="macs=60%", batches=((images[0], torch.arange(8) % 4),)
        )
        cut(model, graph, search.architecture, calibration=images, repairs=(Refit(), RecalibrateBatchNorm()))

    ended = 0
    for call in range(1, 60):
        RUNS_LEFT[0] = call
        try:
            whole()
        except error:
            ended += 1
        assert modes() == before
    assert ended >= 10
    # The last ones ran to the end.
    assert RUNS_LEFT[0] > 0


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        (
            "strategy",
            "uniform",
            r"`strategy` must be of the type Strategy; got 'uniform' \(str\)\. See secateur\.search",
        ),
        (
            "strategy",
            Knapsack,
            r"`strategy` must be of the type Strategy; got the class Knapsack\. Call it: Knapsack\(\)",
        ),
        ("budget", 0.5, r"`budget` must be of the type Budget or text; got 0\.5 \(float\)\. See secateur\.cost"),
        ("space", None, r"`space` must be of the type SearchSpace; got None"),
        ("graph", {}, r"`graph` must be of the type ChannelGraph; got \{\} \(dict\)"),
    ],
)
def test_arguments_of_another_type_are_refused_at_the_door(name: str, value: object, said: str):
    model, example = ZOO["plain"]()
    given = {"graph": trace(model, example), "strategy": Uniform(), "budget": "macs=50%"} | {name: value}
    with pytest.raises(SecateurError, match=said):
        search_architecture(model, **given)
    with pytest.raises(TypeError, match="missing 2 required positional arguments"):
        search_architecture(model)
