"""One step on several processes, with threads that stand for them; real processes are in tests/integration."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur.errors import TrainingError
from secateur.train import average_gradients_, mean_over_processes, own_shard


@dataclass
class Meeting:
    """Where the processes exchange tensors."""

    size: int
    said: dict[int, Tensor] = field(default_factory=dict)
    calls: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.size)

    def fabric(self, rank: int) -> Any:
        """What one process sees of it."""

        def all_reduce(tensor: Tensor, reduce_op: str) -> Tensor:
            assert reduce_op == "mean"
            self.said[rank] = tensor.clone()
            self.calls.append(rank)
            self.barrier.wait(30)
            mean = torch.stack([self.said[n] for n in range(self.size)]).mean(0)
            self.barrier.wait(30)
            return mean

        return SimpleNamespace(world_size=self.size, global_rank=rank, all_reduce=all_reduce)


def together(meeting: Meeting, work: Callable[[int, Any], None]) -> None:
    """Each process in a thread of its own."""
    threads = [threading.Thread(target=work, args=(n, meeting.fabric(n))) for n in range(meeting.size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)


def alone() -> Any:
    def all_reduce(*_: object, **__: object) -> None:
        raise AssertionError("there is nobody to talk to")

    return SimpleNamespace(world_size=1, global_rank=0, all_reduce=all_reduce)


@pytest.mark.parametrize(("items", "processes"), [(8, 1), (8, 2), (9, 2), (7, 3), (3, 3)])
def test_parts_are_the_batch_each_item_once(items, processes):
    batch = torch.arange(items)
    fabrics = [SimpleNamespace(world_size=processes, global_rank=rank) for rank in range(processes)]
    parts = [own_shard(fabric, batch) for fabric in fabrics]  # type: ignore[arg-type]
    assert sorted(torch.cat(parts).tolist()) == list(range(items))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    # Images and labels are divided alike.
    assert all(torch.equal(own_shard(f, batch * 10), part * 10) for f, part in zip(fabrics, parts, strict=True))  # type: ignore[arg-type]


def test_more_processes_than_images_are_refused():
    fabric: Any = SimpleNamespace(world_size=4, global_rank=1)
    with pytest.raises(TrainingError, match="`batch_size` must give every process an image; got 3 for 4 processes"):
        own_shard(fabric, torch.zeros(3, 1))


def model_of() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2, bias=False)).double()


@pytest.mark.parametrize("processes", [2, 4])
def test_gradients_are_those_of_the_whole_batch(processes):
    draw = torch.Generator().manual_seed(1)
    batch = torch.randn(8, 3, generator=draw, dtype=torch.float64)
    whole = model_of()
    whole(batch).square().mean().backward()
    models = [model_of() for _ in range(processes)]
    meeting = Meeting(processes)

    def work(rank: int, fabric: Any) -> None:
        # Two backward passes, as in a step of several networks.
        for _ in range(2):
            (models[rank](own_shard(fabric, batch)).square().mean() / 2).backward()
        average_gradients_(fabric, models[rank].parameters())

    together(meeting, work)
    assert sorted(meeting.calls) == list(range(processes))
    for model in models:
        for got, wanted in zip(model.parameters(), whole.parameters(), strict=True):
            assert got.grad is not None
            assert got.grad.dtype == torch.float64
            # They travel in float32.
            torch.testing.assert_close(got.grad, wanted.grad, rtol=1e-6, atol=1e-7)


def test_parameters_without_a_gradient_count_as_zero_and_frozen_ones_not_at_all():
    models = [model_of() for _ in range(2)]
    for model in models:
        model[2].weight.requires_grad = False
    models[0][0].weight.grad = torch.ones_like(models[0][0].weight)
    meeting = Meeting(2)
    together(meeting, lambda rank, fabric: average_gradients_(fabric, models[rank].parameters()))
    for model in models:
        assert torch.equal(model[0].weight.grad, torch.full((4, 3), 0.5, dtype=torch.float64))
        assert torch.equal(model[0].bias.grad, torch.zeros(4, dtype=torch.float64))
        assert model[2].weight.grad is None


def test_gradients_keep_their_memory_order():
    convolutions = [nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last) for _ in range(2)]
    for number, convolution in enumerate(convolutions):
        convolution.weight.grad = torch.arange(216.0).view(6, 4, 3, 3).contiguous(memory_format=torch.channels_last)
        convolution.weight.grad *= number
    meeting = Meeting(2)
    together(meeting, lambda rank, fabric: average_gradients_(fabric, [convolutions[rank].weight]))
    for convolution in convolutions:
        assert torch.equal(convolution.weight.grad, torch.arange(216.0).view(6, 4, 3, 3) / 2)


def test_one_process_talks_to_nobody():
    model = model_of()
    model(torch.ones(1, 3).double()).sum().backward()
    before = [parameter.grad for parameter in model.parameters()]
    average_gradients_(alone(), model.parameters())
    assert all(parameter.grad is gradient for parameter, gradient in zip(model.parameters(), before, strict=True))
    values = torch.ones(2)
    assert mean_over_processes(alone(), values) is values
    assert own_shard(alone(), values) is values


def test_values_are_averaged():
    found: dict[int, Tensor] = {}
    meeting = Meeting(2)
    together(
        meeting, lambda rank, fabric: found.update({rank: mean_over_processes(fabric, torch.tensor([1.0, 3.0]) * rank)})
    )
    assert torch.equal(found[0], torch.tensor([0.5, 1.5]))
    assert torch.equal(found[1], found[0])
