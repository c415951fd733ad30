"""The distance of outputs: every output tensor in units of its own spread, whatever the form of the output."""

import math
from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur.errors import SurgeryError
from secateur.prune.distance import OutputDistance, named_outputs, output_distance

Named = namedtuple("Named", "scores boxes")


@dataclass
class Result:
    scores: Tensor
    boxes: Tensor
    sizes: tuple[int, int] = (1, 1)


class Returning(nn.Module):
    """A model whose output is a function of its input."""

    def __init__(self, function: Any):
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_it_is_the_written_formula():
    images = [drawn(6, 5), drawn(4, 5, seed=1)]
    z, other = torch.cat(images), torch.cat(images).tanh()
    spread = (z - z.mean(0)).square().sum(1).mean()
    want = float((other - z).square().sum(1).mean() / spread)
    assert output_distance(nn.Identity(), nn.Tanh(), images) == pytest.approx(want, rel=1e-6)
    assert OutputDistance(nn.Identity(), images).of(nn.Identity()) == 0
    mean = z.mean(0)
    assert output_distance(nn.Identity(), Returning(mean.expand_as), images) == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("scale", [1e-9, 1e-3, 1.0, 1e4, 1e9])
def test_every_output_counts_in_units_of_its_own_spread(scale):
    images = [drawn(8, 4), drawn(8, 4, seed=1)]
    original = Returning(lambda x: (x, 7 + scale * x.square()))
    small = Returning(lambda x: (0.9 * x, 7 + 1.2 * scale * x.square()))
    first, second = OutputDistance(original, images).per_output(small)
    square = torch.cat(images).square()
    assert first == pytest.approx(
        0.01 * float(square.sum(1).mean() / (torch.cat(images) - torch.cat(images).mean(0)).square().sum(1).mean()),
        rel=1e-4,
    )
    # An offset of 7 leaves float32 no digits of 1e-9, so that this output does not vary.
    if scale > 1e-6:
        spread = (square - square.mean(0)).square().sum(1).mean()
        assert second == pytest.approx(0.04 * float(square.square().sum(1).mean() / spread), rel=1e-2)
    distance = OutputDistance(original, images)
    assert distance.of(small) == pytest.approx((first + second) / 2)
    assert distance.worst(small) == max(first, second)


FORMS = {
    "tuple": (lambda a, b: (a, b), ("[0]", "[1]")),
    "nested": (lambda a, b: {"out": [a, (b, 3)], "count": torch.ones(3).long()}, (".out[0]", ".out[1][0]")),
    "named tuple": (Named, (".scores", ".boxes")),
    "dataclass": (Result, (".scores", ".boxes")),
    "pyramid as long as the batch": (lambda a, b: [a, b, a, b, a, b, a, b], tuple(f"[{i}]" for i in range(8))),
    "auxiliary heads as many as images": (
        lambda a, b: [{"a": a}] * 7 + [{"a": b}],
        tuple(f"[{i}].a" for i in range(8)),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_outputs_of_every_form_are_found_by_their_place(form):
    make, names = FORMS[form]
    images = [drawn(8, 3), drawn(5, 3, seed=1)] if "as" not in form.split() else [drawn(8, 3)]
    distance = OutputDistance(Returning(lambda x: make(x, x.sin())), images)
    assert distance.names == tuple(names)
    assert distance.of(Returning(lambda x: make(x, x.sin()))) == 0
    assert distance.of(Returning(lambda x: make(x, x.cos()))) > 0.1


def test_a_common_shift_is_taken_out_of_class_logits_only():
    images = [drawn(16, 5)]
    shifted = Returning(lambda x: (x + x[:, :1], x[:, :1], x[:, None] + 1))
    original = Returning(lambda x: (x, x[:, :1], x[:, None]))
    logits, number, wide = OutputDistance(original, images, class_logits=True).per_output(shifted)
    assert logits < 1e-12
    assert number == 0
    assert wide > 0.5
    plain, *_ = OutputDistance(original, images).per_output(shifted)
    assert plain > 0.5


def test_one_number_per_image_keeps_its_distance():
    for class_logits in (False, True):
        found = OutputDistance(nn.Identity(), [drawn(16, 1)], class_logits=class_logits)
        assert found.of(Returning(lambda x: 0 * x)) == pytest.approx(1, abs=0.2)


def detections(x: Tensor, keep: float) -> list[dict[str, Tensor]]:
    """Of each image as many boxes as there are large numbers in it."""
    return [
        {
            "boxes": row[row > keep][:, None].expand(-1, 4),
            "labels": (row > keep).nonzero()[:, 0],
            "scores": row[row > keep],
        }
        for row in x
    ]


def test_detections_of_variable_number_are_compared_row_by_row():
    images = [drawn(6, 20), drawn(3, 20, seed=1)]
    distance = OutputDistance(Returning(lambda x: detections(x, 0.0)), images)
    assert distance.names == ("[*].boxes", "[*].scores")
    assert distance.of(Returning(lambda x: detections(x, 0.0))) == 0
    fewer = distance.per_output(Returning(lambda x: [{k: v[:-1] for k, v in d.items()} for d in detections(x, 0.0)]))
    rows = sum(len(d["scores"]) for batch in images for d in detections(batch, 0.0))
    assert fewer == pytest.approx((9 / rows, 9 / rows))
    assert math.isfinite(distance.of(Returning(lambda x: detections(x, 0.1))))
    assert distance.of(Returning(lambda x: detections(x, 99.0))) == 1


@pytest.mark.parametrize(
    "sizes",
    [[(4, 3, 8, 8), (4, 3, 6, 8)], [(4, 7, 3), (4, 9, 3)], [(4, 7), (4, 9)], [(2, 3, 5, 5), (2, 4, 6, 6)], [(), ()]],
)
def test_images_of_several_sizes_are_compared(sizes):
    images = [drawn(*shape, seed=i) for i, shape in enumerate(sizes)]
    assert output_distance(nn.Identity(), nn.Identity(), images) == 0
    assert 0 < output_distance(nn.Identity(), nn.Tanh(), images) < 10


def test_outputs_that_do_not_vary_are_measured_by_their_size():
    images = [drawn(8, 4)]
    original = Returning(lambda x: (x, torch.full((len(x), 2), 10.0), torch.zeros(len(x), 2)))
    small = Returning(lambda x: (x, torch.full((len(x), 2), 11.0), torch.full((len(x), 2), 0.5)))
    assert OutputDistance(original, images).per_output(small) == pytest.approx((0, 0.01, 0.5))
    assert OutputDistance(original, images).of(original) == 0
    assert math.isfinite(output_distance(nn.Identity(), nn.Tanh(), [drawn(1, 4)]))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_in_the_cut_model_alone_is_infinitely_far(value):
    images = [drawn(8, 4)]
    assert output_distance(nn.Identity(), Returning(lambda x: x + value), images) == math.inf
    masked = Returning(lambda x: torch.where(x > 0, x, -math.inf))
    assert OutputDistance(masked, images).of(masked) == 0
    assert math.isfinite(output_distance(masked, Returning(lambda x: torch.where(x > 0, 2 * x, -math.inf)), images))


def test_missing_outputs_count_as_one():
    images = [drawn(8, 4)]
    original = Returning(lambda x: {"a": x, "b": x})
    assert OutputDistance(original, images).per_output(Returning(lambda x: {"a": x})) == (0, 1)
    assert OutputDistance(original, images).per_output(Returning(lambda x: {"a": x, "b": x[:, :3]})) == (0, 1)


def test_a_model_without_floating_point_output_is_refused():
    with pytest.raises(SurgeryError, match="must hold a floating-point tensor"):
        OutputDistance(Returning(lambda x: x.argmax(1)), [drawn(8, 4)])


def test_models_with_several_inputs_run_and_random_numbers_are_left_alone():
    batches = [{"a": drawn(4, 3), "b": drawn(4, 3, seed=1)}]
    state = torch.get_rng_state()
    noisy = Returning(lambda a, b: a * b + torch.rand_like(a))
    assert output_distance(noisy, noisy, batches) == 0
    assert torch.equal(state, torch.get_rng_state())
    assert output_distance(Returning(lambda a, b: a * b), Returning(lambda a, b: a), [(drawn(4, 3), drawn(4, 3))]) > 0


def test_half_precision_is_compared():
    for dtype in (torch.float16, torch.bfloat16):
        images = [drawn(8, 4).to(dtype)]
        assert output_distance(nn.Identity(), nn.Identity(), images) == 0
        assert 0 < output_distance(nn.Identity(), nn.Tanh(), images) < 1


def test_integers_are_no_outputs():
    assert named_outputs((torch.ones(2), torch.ones(2).long()), 2).keys() == {"[0]"}
