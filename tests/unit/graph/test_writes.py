"""Writes into a part of a tensor: followed where the part is one of space or batch, and piece by piece of channels."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from resized_nets import IMAGES, Resized, kept_promises, net, reasons
from torch import Tensor, nn

from secateur.graph import trace


def adds_to_a_part(m, x):
    z = torch.zeros_like(x)
    z[:, :, 1:] += x[:, :, :-1]
    return z


def upsamples(m, x):
    b, c, h, w = x.shape
    z = x.new_zeros(b, c, h * 2, w * 2)
    z[:, :, ::2, ::2] = x
    z[:, :, 1::2, 1::2] = x
    return z


def surrounds(m, x):
    z = torch.zeros(x.shape[0], m.dim, 10, 10)
    z[:, :, 1:-1, 1:-1] = x
    return z


def joins(m, x):
    y = m.other(x)
    b, c, h, w = x.shape
    z = x.new_empty(b, c + y.shape[1], h, w)
    z[:, :c] = x
    z[:, c:] = y
    return z


def shifts(m, x):
    """The temporal shift module, along the rows."""
    fold = x.shape[1] // m.parts
    z = torch.zeros_like(x)
    z[:, :fold, :-1] = x[:, :fold, 1:]
    z[:, fold : 2 * fold, 1:] = x[:, fold : 2 * fold, :-1]
    z[:, 2 * fold :] = x[:, 2 * fold :]
    return z


def shifts_a_number(m, x):
    z = torch.zeros_like(x)
    z[:, : m.fold, :-1] = x[:, : m.fold, 1:]
    z[:, m.fold :] = x[:, m.fold :]
    return z


def swaps_halves(m, x):
    half = x.shape[1] // 2
    z = torch.empty_like(x)
    z[:, :half] = x[:, half:]
    z[:, half:] = x[:, :half]
    return z


def copies_into_a_view(m, x):
    z = torch.zeros_like(x)
    z[:, :, 2:].copy_(x[:, :, :-2])
    z.narrow(3, 0, 4).copy_(x.narrow(3, 2, 4))
    return z


def rows_backward(m, x):
    z = torch.empty_like(x)
    for i in range(x.shape[2]):
        z[:, :, i] = x[:, :, -1 - i]
    return z


def image_by_image(m, x):
    z = torch.empty_like(x)
    for i in range(x.shape[0]):
        z[i] = x[i]
    return z


def changes_views(m, x):
    y = x.clone()
    y[:, :, ::2].mul_(2)
    y[:, :, 1::2] -= 1
    F.relu(y[:, :, :4], inplace=True)
    y[:, :3] *= 2
    return y


def writes_through_a_view(m, x):
    z = torch.zeros_like(x)
    z.view(x.shape[0], x.shape[1], -1)[:, :, 3:] = x.flatten(2)[:, :, :-3]
    z.permute(0, 2, 3, 1)[:, 1:] += x.permute(0, 2, 3, 1)[:, :-1]
    return z


def stacks(m, x):
    z = x.new_zeros(2, *x.shape)
    z[0] = x
    z[1] = x * 2
    return z.sum(0)


def writes_constants(m, x):
    y = x.clone()
    y[:, :, 0] = 0
    y[y < 0.2] = 0.2
    y[:, :, torch.tensor([0, 2]), torch.tensor([1, 1])] = 0.5
    y[:, :, 1] = x.mean(2)
    return y


def writes_a_bias(m, x):
    y = x.clone()
    y[:, :, 0] = m.bias[:, None]
    return y


def writes_a_buffer(m, x):
    m.memory[:, :, :4] = x[:, :, :4]
    return x + m.memory


def scatters(m, x):
    x = torch.slice_scatter(x, x[:, :, :2] * 2, 2, 3, 5)
    return torch.select_scatter(x, x[:, :, 0] * 2, 2, 3)


def into_an_output(m, x):
    z = torch.empty(x.shape[0], 2 * x.shape[1], 8, 8)
    torch.cat([x, x], 1, out=z)
    return z


FOLLOWED: dict[str, Callable[[], Resized]] = {
    "add_to_a_part": net(adds_to_a_part),
    "upsample": net(upsamples),
    "surround": net(surrounds, dim=12),
    "join": net(joins, 24, other=nn.Conv2d(12, 12, 1)),
    "shift": net(shifts, parts=4),
    "shift_a_number": net(shifts_a_number, fold=3),
    "swap_halves": net(swaps_halves),
    "copy_into_a_view": net(copies_into_a_view),
    "rows_backward": net(rows_backward),
    "image_by_image": net(image_by_image),
    "writes_through_a_view": net(writes_through_a_view),
    "stack": net(stacks),
    "constants": net(writes_constants),
    "bias": net(writes_a_bias, bias=nn.Parameter(torch.randn(12))),
    "buffer": net(writes_a_buffer, memory=torch.zeros(1, 12, 8, 8)),
    "scatter": net(scatters),
    "out": net(into_an_output, 24),
    "circular_padding": net(lambda m, x: F.pad(x, (1, 1, 2, 0), mode="circular")),
    "circular_convolution": net(lambda m, x: m.mix(x), mix=nn.Conv2d(12, 12, 3, padding=1, padding_mode="circular")),
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_writes_into_a_part_are_followed(name):
    with torch.no_grad():
        graph = kept_promises(FOLLOWED[name]())
    assert reasons(graph) == []
    assert all(axis.size >= 2 for axis in graph.prunable)


def test_a_part_of_the_channels_that_is_written_in_the_code_freezes_only_that_part():
    graph = kept_promises(Resized(changes_views))
    assert graph.sizes["stem#2"] == 9
    assert [a.size for a in graph.axes if a.frozen_because and a.name == "stem"] == [3]


def into_literal_zeros(m, x):
    z = torch.zeros(x.shape[0], 12, 10, 10)
    z[:, :, 1:-1, 1:-1] = x
    return z


def adds_to_literal_zeros(m, x):
    z = torch.zeros(1, 12, 8, 8)
    z[:, :, 1:] += x[:, :, 1:]
    return z


def writes_other_numbers(m, x):
    y = x.clone()
    y[:, :, 0] = torch.ones(12, 8)
    return y


FROZEN: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "into_literal_zeros": into_literal_zeros,
    "adds_to_literal_zeros": adds_to_literal_zeros,
    "other_numbers": writes_other_numbers,
}


@pytest.mark.parametrize("name", FROZEN)
def test_tensors_of_a_size_written_in_the_code_freeze_what_meets_them(name):
    graph = kept_promises(Resized(FROZEN[name]))
    assert reasons(graph)
    assert all("meets a tensor that does not follow the channels" in reason for reason in reasons(graph))


def test_a_write_ties_what_is_written_to_what_is_kept():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.left(x)
            y[:, :, :4] = self.right(x)[:, :, :4]
            return self.head(y).mean((2, 3))

    graph = trace(Both().eval(), IMAGES)
    assert graph.sizes == {"left": 8}
    assert {site.tensor for site in graph.by_name["left"].sites} >= {"left.weight", "right.weight", "head.weight"}
