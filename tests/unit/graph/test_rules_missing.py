"""Operations beyond convolutions, each in a net: gates, samplings, foldings, transforms, tables, norms of weights."""

import re
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
import torchvision
from cuts import apart, outputs, random_architecture
from torch import Tensor, nn

from secateur.architecture import Architecture
from secateur.cost import Cost, CostModel, count_macs, count_params
from secateur.graph import ChannelGraph, trace
from secateur.graph.rules import Call, ChannelIds, CountedOperation, pointwise
from secateur.prune import cut, mask_removed
from secateur.search import Uniform, search_architecture

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Between(nn.Module):
    """conv (12 channels) -> some operation -> conv -> mean -> linear."""

    def __init__(self, operation: Callable[[Tensor], Tensor], arriving: int = 12):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.operation = operation
        self.second, self.head = nn.Conv2d(arriving, 6, 1), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.operation(self.norm(self.first(x)))
        return self.head(F.relu(self.second(x)).mean((2, 3)))


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build().eval()


def traced(model: nn.Module, x: Tensor = IMAGES) -> ChannelGraph:
    """Trace, and prove on two random cuts that nothing had to be frozen afterward and the cost is right."""
    graph = trace(model, x)
    for seed in range(2):
        architecture = random_architecture(graph, seed)
        made = cut(model, graph, architecture)
        assert made.verification.frozen == ()
        assert apart(outputs(mask_removed(model, graph, architecture), x), outputs(made.model, x)) < 1e-5
        assert CostModel(graph).cost(architecture) == Cost(count_macs(made.model, x), count_params(made.model))
    return graph


def warp(x: Tensor) -> Tensor:
    turn = torch.tensor([[0.9, 0.1, 0.0], [-0.1, 0.8, 0.1]])
    grid = F.affine_grid(turn[None].expand(len(x), 2, 3), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


def unpool(x: Tensor) -> Tensor:
    return F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2)


def rows_of(x: Tensor, k: int = 3) -> Tensor:
    """The k rows of every channel with the largest sums, by an index along space."""
    best = x.sum(3).topk(k, 2).indices
    return x.gather(2, best[..., None].expand(-1, -1, -1, x.shape[3]))


def fourier(x: Tensor) -> Tensor:
    return torch.fft.irfft2(torch.fft.rfft2(x) * 0.5, s=x.shape[2:])


def assigned(x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    out[:, :, torch.tensor([0, 3])] = x[:, :, 2:4]
    return out + x


def assigned_by_mask(x: Tensor) -> Tensor:
    out = torch.zeros(x.shape)
    out[torch.ones(x.shape[0], dtype=torch.bool)] = x
    return out


PASSING: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "grid_sample": (warp, 12),
    "max_unpool": (unpool, 12),
    "fold": (lambda x: F.fold(F.unfold(x, 2, stride=2), (8, 8), 2, stride=2), 12),
    "nearest_exact": (lambda x: F.interpolate(x, scale_factor=2.0, mode="nearest-exact"), 12),
    "bicubic_antialias": (lambda x: F.interpolate(x, 6, mode="bicubic", antialias=True), 12),
    "replication_pad": (nn.ReplicationPad2d(1), 12),
    "rot90": (lambda x: x.rot90(1, (2, 3)), 12),
    "sort_along_space": (lambda x: x.sort(2).values, 12),
    "topk_along_space": (lambda x: x.topk(3, 3).values, 12),
    "median_along_space": (lambda x: x - x.median(2, keepdim=True).values, 12),
    "median_without_its_dim": (lambda x: x - x.median(2).values.unsqueeze(2), 12),
    "mode_and_kthvalue": (lambda x: x + x.round().mode(3, keepdim=True).values + x.kthvalue(2, 3, True).values, 12),
    "quantile_along_space": (lambda x: x - x.flatten(2).quantile(0.3, dim=2)[..., None, None], 12),
    "gather_along_space": (rows_of, 12),
    "scatter_along_space": (lambda x: torch.zeros_like(x).scatter(3, x.argsort(3), x), 12),
    "index_copy_along_space": (lambda x: x.index_copy(2, torch.tensor([0, 1]), x[:, :, 2:4]), 12),
    "assigned_along_space": (assigned, 12),
    "assigned_by_mask": (assigned_by_mask, 12),
    "cumulative_maximum": (lambda x: x.cummax(3).values, 12),
    "log_cumulative_sum": (lambda x: x.logcumsumexp(2), 12),
    "lower_triangle": (lambda x: x.tril(), 12),
    "fourier": (fourier, 12),
    "fourier_magnitude": (lambda x: torch.fft.fft2(x).abs(), 12),
    "complex_as_real": (lambda x: torch.view_as_real(torch.fft.fft2(x)).sum(4), 12),
    "log_sigmoid": (F.logsigmoid, 12),
    "glu": (lambda x: F.glu(x, 1), 6),
    "glu_along_space": (lambda x: F.glu(x, 3), 12),
    "adaptive_maximum": (lambda x: F.adaptive_max_pool3d(x.unsqueeze(2), (1, 3, 3)).squeeze(2), 12),
    "roi_align": (lambda x: torchvision.ops.roi_align(x[:1], [torch.tensor([[0.0, 1.0, 6.0, 7.0]])], 3), 12),
    "roi_pool": (lambda x: torchvision.ops.roi_pool(x[:1], [torch.tensor([[0.0, 1.0, 6.0, 7.0]])], 3), 12),
    "ps_roi_align": (lambda x: torchvision.ops.ps_roi_align(x[:1], [torch.tensor([[0.0, 1.0, 6.0, 7.0]])], 2), 3),
    "ps_roi_pool": (lambda x: torchvision.ops.ps_roi_pool(x[:1], [torch.tensor([[0.0, 1.0, 6.0, 7.0]])], 2), 3),
    "distances_along_space": (lambda x: torch.cdist(x, x), 12),
}
"""Operations after which any channel (of pairs, of fours) of the first convolution may go."""


@pytest.mark.parametrize("name", PASSING)
def test_channels_pass(name: str):
    operation, arriving = PASSING[name]
    graph = traced(seeded(lambda: Between(operation, arriving)))
    assert graph.by_name["first"].frozen_because is None
    assert graph.by_name["first"].size == min(arriving, 12)
    assert graph.uncounted == ()


OVER_KEPT: dict[str, Callable[[Tensor], Tensor]] = {
    "local_response_norm": lambda x: F.local_response_norm(x, 3),
    "local_response_norm_of_an_even_number": lambda x: F.local_response_norm(x, 4),
    "distances_between_pixels": lambda x: x * torch.cdist(x.flatten(2).mT, x.flatten(2).mT).mean(2).view(-1, 1, 8, 8),
    "many_distances": lambda x: (
        x * torch.cdist(*[x.flatten(2).mT] * 2, p=2.0, compute_mode="use_mm_for_euclid_dist").mean(2).view(-1, 1, 8, 8)
    ),
}
"""Operations that a cut model computes over the channels it kept."""


@pytest.mark.parametrize("name", OVER_KEPT)
def test_channels_are_compared_with_the_kept_ones(name: str):
    graph = traced(seeded(lambda: Between(lambda x: OVER_KEPT[name](x.sigmoid()))))
    assert graph.by_name["first"].frozen_because is None
    assert len([m for m in graph.mixings if m.kind != "sum"]) >= 1


STAYING: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "sorted": (lambda x: x.argsort(1).float() + x, "`sort` .* has no channel rule for the dimension"),
    "transformed": (lambda x: torch.fft.fft(x, dim=1).abs(), "transforms along channels"),
    "triangle": (lambda x: x.mT.transpose(1, 3).tril().transpose(1, 3).mT, "masks channels by their position"),
    "picked": (lambda x: x.gather(1, torch.zeros(1, 12, 8, 8, dtype=torch.long)), "picks channels by an index"),
    "written": (lambda x: x.index_add(1, torch.arange(12), x), "writes channels to places"),
    "random_regions": (nn.FractionalMaxPool2d(2, 3), "draws random regions for every channel"),
    "random_numbers": (lambda x: F.gumbel_softmax(x, dim=2), "draws random numbers for every channel"),
}


@pytest.mark.parametrize("name", STAYING)
def test_channels_stay_with_a_reason(name: str):
    operation, reason = STAYING[name]
    graph = trace(seeded(lambda: Between(operation)), IMAGES)
    assert re.search(reason, str(graph.by_name["first"].frozen_because)), graph.by_name["first"].frozen_because


# --- deformable convolutions ------------------------------------------------------------------------------------------


class Deformable(nn.Module):
    def __init__(self, groups: int, offset_groups: int, masked: bool):
        super().__init__()
        self.offset = nn.Conv2d(12, 18 * offset_groups, 3, padding=1)
        self.mask = nn.Conv2d(12, 9 * offset_groups, 3, padding=1) if masked else None
        self.conv = torchvision.ops.DeformConv2d(12, 12, 3, padding=1, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x, self.offset(x), None if self.mask is None else self.mask(x).sigmoid())


@pytest.mark.parametrize(
    ("groups", "offset_groups", "masked"),
    [(1, 1, False), (1, 1, True), (3, 1, False), (12, 1, True), (1, 2, False), (2, 2, True), (6, 3, False)],
)
def test_deformable_convolution(groups: int, offset_groups: int, masked: bool):
    model = seeded(lambda: Between(Deformable(groups, offset_groups, masked)))
    graph = traced(model)
    assert graph.by_name["first"].frozen_because is None
    assert "used as places" in str(graph.by_name["operation.offset"].frozen_because)
    macs = [o for o in graph.operations if o.kind == "deform_conv2d"]
    assert len(macs) == 1
    sizes = graph.sizes
    product = macs[0].factor
    for extent in macs[0].extents:
        product *= extent.at(sizes)
    assert product == 64 * 9 * 12 * 12 // groups


def test_declared_sizes_of_a_cut_deformable_convolution():
    model = seeded(lambda: Between(Deformable(1, 1, True)))
    made = cut(model, trace(model, IMAGES), Architecture.of({"first": range(5), "operation.conv": range(7)}))
    assert (made.model.operation.conv.in_channels, made.model.operation.conv.out_channels) == (5, 7)


# --- tables, bilinear layers, products --------------------------------------------------------------------------------


class Words(nn.Module):
    """Embedding of words and positions, a bag of them, and a head; every table has columns to lose."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(20, 10), nn.Embedding(6, 10)
        self.bag = nn.EmbeddingBag(20, 8)
        self.head, self.bag_head = nn.Linear(10, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        own = self.words(x) + self.places(torch.arange(x.shape[1]))
        return self.head(own.relu()).mean(1) + self.bag_head(self.bag(x))


def test_embeddings_lose_columns():
    model, x = seeded(Words), torch.randint(0, 20, (2, 6), generator=torch.Generator().manual_seed(0))
    graph = traced(model, x)
    assert graph.sizes == {"words": 10, "bag": 8}
    made = cut(model, graph, Architecture.of({"words": [0, 4, 5], "bag": [1]}))
    assert (made.model.words.embedding_dim, made.model.places.embedding_dim, made.model.bag.embedding_dim) == (3, 3, 1)
    assert made.model.words.weight.shape == (20, 3)


class Pairs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(5, 10), nn.Linear(5, 8)
        self.pair, self.head = nn.Bilinear(10, 8, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pair(self.left(x), self.right(x)).relu())


@pytest.mark.parametrize("shape", [(2, 5), (2, 4, 5)])
def test_bilinear_layers_lose_both_inputs_and_outputs(shape: tuple[int, ...]):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    model = seeded(Pairs)
    graph = traced(model, x)
    assert graph.sizes == {"left": 10, "right": 8, "pair": 6}
    assert [o.kind for o in graph.operations].count("_trilinear") == 1
    made = cut(model, graph, Architecture.of({"left": range(4), "right": range(5), "pair": range(2)}))
    assert (made.model.pair.in1_features, made.model.pair.in2_features, made.model.pair.out_features) == (4, 5, 2)


class Product(nn.Module):
    def __init__(self, product: Callable[[Tensor, Tensor, Tensor], Tensor]):
        super().__init__()
        self.first, self.matrix = nn.Linear(5, 8), nn.Parameter(torch.randn(8, 10))
        self.vector, self.product, self.head = nn.Parameter(torch.randn(10)), product, nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.product(self.first(x), self.matrix, self.vector))


PRODUCTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "mv": lambda x, m, v: torch.mv(m.t(), x[0]).unsqueeze(0) + v,
    "addmv": lambda x, m, v: torch.addmv(v, m.t(), x[0]).unsqueeze(0),
    "baddbmm": lambda x, m, v: torch.baddbmm(v[None, None], x[:, None], m.expand(len(x), *m.shape))[:, 0],
    "addbmm": lambda x, m, v: torch.addbmm(v[None], x[:1, None], m[None])[:1],
    "einsum_with_two_letters": lambda x, m, v: torch.einsum("bi,ij,j->bj", x, m, v),
    "einsum_gate": lambda x, m, v: torch.einsum("bi,bi,ij->bj", x, x.sigmoid(), m),
    "einsum_of_an_ellipsis": lambda x, m, v: torch.einsum("...i,ij->...j", x, m) * v,
    "weight_from_weights": lambda x, m, v: x @ (m * v) + v,
    "scaled_by_a_dot": lambda x, m, v: (x @ m) * torch.dot(v, v),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_of_all_kinds(name: str):
    x = torch.randn(1, 5, generator=torch.Generator().manual_seed(0))
    graph = traced(seeded(lambda: Product(PRODUCTS[name])), x)
    assert graph.sizes == {"first": 8, "matrix": 10}


# --- norms of weights -------------------------------------------------------------------------------------------------


def by_spectral_norm(layer: nn.Module) -> nn.Module:
    return nn.utils.spectral_norm(layer)


NORMED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight_norm": nn.utils.weight_norm,
    "spectral_norm": by_spectral_norm,
    "parametrized_weight_norm": nn.utils.parametrizations.weight_norm,
    "parametrized_spectral_norm": nn.utils.parametrizations.spectral_norm,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("kind", ["convolution", "transposed", "linear"])
@pytest.mark.parametrize("name", NORMED)
def test_norms_of_weights_are_followed(name: str, kind: str):
    def build() -> nn.Module:
        if kind == "linear":
            return nn.Sequential(
                NORMED[name](nn.Linear(3, 8)), nn.ReLU(), NORMED[name](nn.Linear(8, 6)), nn.Linear(6, 2)
            )
        conv = nn.Conv2d if kind == "convolution" else nn.ConvTranspose2d
        layers = (NORMED[name](conv(3, 8, 3)), nn.ReLU(), NORMED[name](conv(8, 6, 3)), nn.Conv2d(6, 2, 1))
        return nn.Sequential(*layers)

    model = seeded(build)
    x = IMAGES[:, :, 0, 0] if kind == "linear" else IMAGES
    graph = traced(model, x)
    assert sorted(axis.size for axis in graph.prunable) == [6, 8]
    architecture = Architecture.of({axis.name: [0, 2, 3] for axis in graph.prunable})
    made = cut(model, graph, architecture).model
    made.train()(x).sum().backward()  # The vectors of spectral norm have the lengths of the cut weight.


# --- torch.nn.MultiheadAttention --------------------------------------------------------------------------------------


class Attending(nn.Module):
    """Tokens of 12 channels, three heads; the second sequence is another function of the input."""

    def __init__(self, *, causal: bool = False, weights: bool = False, other: int = 0, **options: bool) -> None:
        super().__init__()
        more = {"kdim": other, "vdim": other} if other else {}
        self.first, self.second = nn.Linear(5, 12), nn.Linear(5, other or 12)
        self.attend = nn.MultiheadAttention(12, 3, **more, **options)
        self.head, self.causal, self.weights = nn.Linear(12, 2), causal, weights

    def forward(self, x: Tensor) -> Tensor:
        query, others = self.first(x), self.second(x).relu()
        mask = torch.full((x.shape[1],) * 2, -1e9).triu(1) if self.causal else None
        found = self.attend(query, others, others, attn_mask=mask, need_weights=self.weights)
        return self.head(query + found[0])


TOKENS = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weights": True},
        {"causal": True},
        {"bias": False},
        {"add_bias_kv": True, "weights": True},
        {"other": 7},
    ],
    ids=str,
)
def test_attention_of_torch_loses_whole_heads(options: dict[str, int]):
    model = seeded(lambda: Attending(batch_first=True, **options))
    graph = traced(model, TOKENS)
    assert graph.by_name["first"].size == 3
    site = next(s for s in graph.by_name["first"].sites if s.tensor == "attend.out_proj.weight" and s.dim == 1)
    assert site.index.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    if options.get("other"):
        assert graph.by_name["second"].size == 7
    made = cut(model, graph, Architecture.of({"first": [0, 2]})).model
    assert (made.attend.embed_dim, made.attend.num_heads, made.attend.head_dim) == (8, 2, 4)
    # The fast path of torch, which the comparison does not take, reads the same ints.
    torch.testing.assert_close(made.eval()(TOKENS), made(TOKENS.clone().requires_grad_()))


@pytest.mark.parametrize("norm_first", [False, True])
def test_transformers_of_torch_lose_heads_and_hidden_units(norm_first: bool):
    def build() -> nn.Module:
        layer = nn.TransformerEncoderLayer(12, 3, 16, batch_first=True, norm_first=norm_first)
        return nn.Sequential(
            nn.Linear(5, 12), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(12, 2)
        )

    graph = traced(seeded(build), TOKENS)
    assert {axis.name: axis.size for axis in graph.prunable} == {
        "0": 3,
        "1.layers.0.linear1": 16,
        "1.layers.1.linear1": 16,
    }


# --- what no rule counts, and reasons that say how to lift them -------------------------------------------------------


@torch.library.custom_op("tests_missing::fused", mutates_args=())
def fused(x: Tensor, weight: Tensor) -> Tensor:
    return x * weight.sum(0)


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 8), nn.Linear(8, 2)
        self.weight = nn.Parameter(torch.randn(1, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(fused(self.first(x), self.weight))


def test_an_operation_that_no_rule_counts_is_listed_and_budgets_say_so():
    model, x = seeded(Fused), torch.randn(2, 3)
    graph = trace(model, x, rules={"tests_missing::fused": pointwise})
    (operation,) = graph.uncounted
    assert (operation.kind, operation.parameters, operation.module) == ("tests_missing::fused", 8, "")
    assert "tests_missing::fused in the model itself, with 8 parameters" in graph.uncounted_text
    with pytest.warns(UserWarning, match="limits the counted MACs only"):
        search_architecture(model, graph, Uniform(), budget="macs=90%")


@pytest.mark.parametrize(
    ("returned", "rule"),
    [
        (lambda x: x.sin(), "pointwise"),
        (lambda x: x[..., ::2].contiguous(), "per_channel"),
        (lambda x: x.reshape(len(x), -1, 1).clone(), "move_channels"),
        (lambda x: x.sum((2, 3)), "a function of yours"),
    ],
)
def test_a_reason_names_the_rule_that_may_lift_it(returned: Callable[[Tensor], Tensor], rule: str):
    name = f"tests_missing::op_{rule.partition(' ')[0]}"

    @torch.library.custom_op(name, mutates_args=())
    def operation(x: Tensor) -> Tensor:
        return returned(x)

    graph = trace(seeded(lambda: nn.Sequential(nn.Conv2d(3, 8, 1), Operation(operation))), IMAGES)
    reason = str(graph.by_name["0"].frozen_because)
    assert "has no channel rule" in reason
    assert f"pass rules={{'{name}': {rule}}}" in reason


class Operation(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def test_a_rule_for_tensors_of_one_length_freezes_those_of_different_ones():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 8), nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return together(self.first(x), self.second(x))

    @torch.library.custom_op("tests_missing::together", mutates_args=())
    def together(x: Tensor, y: Tensor) -> Tensor:
        return x * y.sum()

    graph = trace(seeded(Net), torch.randn(2, 3), rules={"tests_missing::together": pointwise})
    assert "combines tensors of different lengths" in str(graph.by_name["first"].frozen_because)


def test_the_operation_of_another_library_is_not_taken_for_one_of_aten():
    @torch.library.custom_op("tests_missing::relu", mutates_args=())
    def relu(x: Tensor) -> Tensor:
        return x.flip(1)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(relu(self.first(x)))

    graph = trace(seeded(Net), torch.randn(2, 3))
    assert "has no channel rule" in str(graph.by_name["first"].frozen_because)


def test_a_rule_of_ones_own_may_count():
    def counting(call: Call) -> Sequence[ChannelIds]:
        ids = pointwise(call)
        width = ids[0].get(1, call.outputs[0].size(1))
        call.ledger.operations.append(CountedOperation(call.module, call.name, 2.0, (width,)))
        return ids

    graph = trace(seeded(Fused), torch.randn(2, 3), rules={"tests_missing::fused": counting})
    assert graph.uncounted == ()
    costs = CostModel(graph)
    assert costs.original.macs == 3 * 8 + 2 * 8 + 8 * 2
    assert costs.cost(Architecture.of({"first": [0, 5]})).macs == 3 * 2 + 2 * 2 + 2 * 2
