"""`TAS.paper()` is the search of the reference code: candidates, batch norms, blending, schedules."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from secateur.graph import trace
from secateur.graph.untie import untie
from secateur.models import CifarResNet
from secateur.nas import TAS, Depths, Interpolate, RandomInit, ReferenceDepths, Supernet, Widths
from secateur.nas.mixture import Mixture


def test_widths_are_those_of_get_width_choices() -> None:
    for channels in (16, 32, 64, 10, 3, 128):
        expected = sorted({int(channels * r) for r in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)} - {0})
        assert list(Widths(truncated=True).of(np.arange(1, channels + 1))) == expected
    assert Widths(truncated=True).of(np.arange(1, 17)) == (4, 6, 8, 9, 11, 12, 14, 16)
    assert Widths().of(np.arange(1, 17)) == (5, 6, 8, 10, 11, 13, 14, 16)
    # A divisor allows fewer: the next narrower ones.
    assert Widths(truncated=True).of(np.array([4, 8, 12, 16])) == (4, 8, 12, 16)


@pytest.mark.parametrize(
    ("blocks", "stage_one", "others"),
    [
        (3, (1, 2, 3), (0, 1, 2)),
        (5, (1, 3, 5), (0, 2, 4)),
        (9, (1, 3, 5, 7, 9), (0, 2, 4, 6, 8)),
        (18, (1, 3, 5, 7, 9, 11, 13, 15, 17, 18), (0, 2, 4, 6, 8, 10, 12, 14, 16, 17)),
    ],
)
def test_depths_are_those_of_get_depth_choices(
    blocks: int, stage_one: tuple[int, ...], others: tuple[int, ...]
) -> None:
    # The first block of the later stages changes the resolution, is counted by the reference, and always stays.
    graph = trace(CifarResNet(blocks, widths=(2, 2, 2), num_classes=2).eval(), torch.zeros(1, 3, 8, 8))
    assert ReferenceDepths().of_chains(graph) == [stage_one, others, others]
    assert Depths().of_chains(graph) == [Depths().of(len(chain)) for chain in graph.chains]


def test_depths_on_imagenet_are_in_proportion() -> None:
    torchvision = pytest.importorskip("torchvision")
    small = trace(torchvision.models.resnet18(num_classes=2).eval(), torch.zeros(1, 3, 32, 32))
    assert ReferenceDepths(proportional=True).of_chains(small) == [(1, 2), (0, 1), (0, 1), (0, 1)]


def test_the_preset_has_the_numbers_of_the_reference() -> None:
    paper = TAS.paper()
    assert (paper.train.epochs, paper.train.batch_size, paper.train.learning_rate) == (600, 256, 0.1)
    assert (paper.alpha_optimizer.learning_rate, paper.alpha_optimizer.weight_decay) == (0.001, 0.001)
    assert paper.alpha_optimizer.betas == (0.5, 0.999)
    assert [paper.temperature.at(x) for x in (0.0, 0.5, 1.0)] == pytest.approx([5.0, 2.55, 0.1])
    assert (paper.expansion, paper.init, paper.separate_norms) == (Interpolate(), RandomInit(), True)
    imagenet = TAS.paper(imagenet=True)
    assert (imagenet.train.epochs, imagenet.train.warmup_fraction) == (120, 5 / 120)
    assert imagenet.depths == ReferenceDepths(proportional=True)


def net() -> nn.Sequential:
    made = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6))
    return nn.Sequential(*made, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))


def test_a_step_is_the_forward_pass_of_the_reference_with_separate_norms() -> None:
    """Conv at full width, sliced; a batch norm for each width; adaptive pooling along channels; weights; ReLU."""
    torch.manual_seed(0)
    model, images = net().train(), torch.randn(4, 3, 9, 9)
    graph = trace(model.eval(), images[:1])
    supernet = Supernet(model, graph, {}).train()
    assert [axis.size for axis in graph.prunable] == [8, 6]
    candidates = {axis.name: (2, 3, 5, axis.size) for axis in graph.prunable}
    supernet.separate_norms_(candidates)
    norms = supernet.width_norms
    assert norms is not None
    with torch.no_grad():
        for parameter in norms.parameters():
            parameter.uniform_(-1, 1)
    drawn, weights = [(3, 5), (2, 6)], torch.tensor([[0.3, 0.7], [0.6, 0.4]])
    mixture = Mixture(tuple(n for n, _ in drawn), weights, expansion=Interpolate())
    subnet = supernet.subnet({axis.name: wide for axis, (_, wide) in zip(graph.prunable, drawn, strict=True)})
    x = images
    for place, ((narrow, wide), share) in enumerate(zip(drawn, weights, strict=True)):
        convolution, norm = supernet.model[3 * place], f"{3 * place + 1}"
        filled = torch.cat([x, x.new_zeros(len(x), convolution.in_channels - x.shape[1], *x.shape[2:])], 1)
        out = convolution(filled)
        parts = []
        for width in (narrow, wide):
            row = candidates[graph.prunable[place].name].index(width)
            scale, shift = norms.scales[norm][row, :width], norms.shifts[norm][row, :width]
            part = F.batch_norm(out[:, :width], None, None, scale, shift, training=True)
            parts.append(F.adaptive_avg_pool3d(part, (wide, *part.shape[2:])))
        x = F.relu(parts[0] * share[0] + parts[1] * share[1])
    expected = F.linear(x.mean((2, 3)), supernet.model[8].weight[:, : x.shape[1]], supernet.model[8].bias)
    found = supernet(subnet, images, mixture=mixture)
    assert torch.allclose(found, expected, atol=1e-5)
    found.sum().backward()
    used = norms.scales["1"].grad
    assert used is not None
    assert used[1, :3].abs().min() > 0  # the narrow one's
    assert used[0].abs().max() == 0  # not drawn


def test_separate_norms_begin_as_the_models_and_are_merged() -> None:
    torch.manual_seed(1)
    model, images = net().eval(), torch.randn(4, 3, 9, 9)
    graph = trace(model, images[:1])
    supernet = Supernet(model, graph, {}).eval()
    subnet = supernet.subnet({graph.prunable[0].name: 4})
    before = supernet(subnet, images)
    supernet.separate_norms_({axis.name: (3, axis.size) for axis in graph.prunable})
    assert torch.equal(supernet(subnet, images), before)
    assert supernet.width_norms is not None
    with torch.no_grad():
        supernet.width_norms.scales["1"][-1] = 3.0
    supernet.merge_norms_()
    assert torch.equal(supernet.model[1].weight, torch.full((8,), 3.0))


def test_first_logits_are_drawn_by_the_seed() -> None:
    from secateur.nas.tas_sampler import WidthCandidates, WidthDistribution
    from secateur.search.space import Streams

    table = np.array([[1, 2, 3, 4]] * 200)
    shown = np.ones_like(table, dtype=bool)
    none = np.zeros((0, 1), dtype=np.int64)
    streams = Streams(np.zeros((0, 2), dtype=np.int64), ())
    candidates = WidthCandidates(np.arange(200), table, shown, none[:, 0], none, none.astype(bool), streams)
    drawn = WidthDistribution(candidates, 0.01, 3)
    assert math.isclose(float(drawn.widths.std()), 0.01, rel_tol=0.1)
    assert torch.equal(drawn.widths, WidthDistribution(candidates, 0.01, 3).widths)
    assert not WidthDistribution(candidates).widths.any()


def test_a_short_search_by_the_paper_finds_a_network_within_the_budget() -> None:
    from secateur.data import draw_calibration, load_data
    from secateur.search import SearchSpace, search_architecture
    from secateur.train import RunSettings, Silent

    data = load_data("digits", limit=120)
    model = CifarResNet(2, widths=(4, 6, 8), in_channels=1, num_classes=10).eval()
    graph = untie(model, trace(model, torch.zeros(1, 1, 8, 8)))
    paper = TAS.paper()
    found = search_architecture(
        model, graph, replace(paper, train=replace(paper.train, epochs=1, batch_size=32)), budget="macs=60%",
        batches=draw_calibration(data.train, 32, device=torch.device("cpu"), seed=0), space=SearchSpace(), seed=0,
        data=data, run=RunSettings(callbacks=Silent()),
    )  # fmt: skip
    assert found.cost.macs <= 0.6 * found.original.macs


def test_the_expected_macs_of_an_untied_graph_are_the_mean_over_draws() -> None:
    from secateur.cost import Budget, CostModel
    from secateur.nas.tas_cost import ExpectedCost
    from secateur.nas.tas_sampler import WidthCandidates, WidthDistribution
    from secateur.search import ScoringInputs, SearchContext, SearchSpace

    model = CifarResNet(2, widths=(4, 6, 8), num_classes=2).eval()
    graph = untie(model, trace(model, torch.zeros(1, 3, 8, 8)))
    context = SearchContext(
        ScoringInputs(model, graph, (), 0), CostModel(graph), Budget.parse("macs=50%"), SearchSpace(), lambda *_: None
    )
    supernet = Supernet(model, graph, {})
    candidates = WidthCandidates.of(context, Widths(truncated=True), ReferenceDepths(), supernet.mixable)
    distribution, cost = WidthDistribution(candidates, 1.0, 5), ExpectedCost(context, candidates, 0.05)
    with torch.no_grad():
        expected = float(cost.expected(distribution)["macs"])
        p = [each.exp().double().numpy() for each in (distribution.log_widths, distribution.log_depths)]
    random, n = np.random.default_rng(0), 1500
    draws = [np.stack([random.choice(len(row), n, p=row / row.sum()) for row in rows], 1) for rows in p]
    macs = [
        context.costs.cost_of(context.streams.fitted(cost.widths_at(w)[None])[0], cost.blocks_at(d)).macs
        for w, d in zip(*draws, strict=True)
    ]
    assert abs(expected - np.mean(macs)) < 4 * np.std(macs) / math.sqrt(n)
