"""Networks with several outputs, with one number, or with inputs of any form: every output counts in its own units."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from secateur.errors import DataError, ModelError
from secateur.graph import trace
from secateur.prune import Refit, cut
from secateur.search import Knapsack, PCASlimming, Reconstruction, ScoringInputs, Taylor, search_architecture
from secateur.search.pca import Activations

NO_LABELS = torch.zeros(512, dtype=torch.long)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().eval()


class Then(nn.Module):
    """A model and a function of its output."""

    def __init__(self, model: nn.Module, function: Callable[[Any], Any]):
        super().__init__()
        self.model, self.function = model, function

    def forward(self, *args: Tensor) -> Any:
        return self.function(self.model(*args))


def regressor(outputs: int) -> nn.Module:
    """A network whose outputs are one number, or the same number several times."""
    net = seeded(
        lambda: nn.Sequential(nn.Linear(8, 48), nn.ReLU(), nn.Linear(48, 24), nn.ReLU(), nn.Linear(24, outputs))
    )
    last: Any = net.get_submodule("4")
    with torch.no_grad():
        last.weight.copy_(last.weight[:1].expand_as(last.weight))
        last.bias.copy_(last.bias[:1].expand_as(last.bias))
    return net


def scored(model: nn.Module, x: Any, labels: Tensor = NO_LABELS, example: Any = None, **more: Any) -> dict[str, Any]:
    graph = trace(model, x[:1] if example is None else example)
    return Reconstruction().scores(ScoringInputs(model, graph, ((x, labels),), 0, **more))


@pytest.mark.parametrize("outputs", [1, 10])
def test_regressors_are_scored_like_the_same_function_with_another_shape(outputs):
    """Ten landmarks that move together have only a common shift, and a single number is nothing but one."""
    model = regressor(outputs)
    x = drawn(512, 8, seed=1)
    flat, deep = scored(model, x), scored(Then(model, lambda y: y[..., None]), x)
    for name, scores in flat.items():
        assert (scores > 0).sum() > len(scores) / 2
        np.testing.assert_array_equal(scores, deep[f"model.{name}"])


def test_a_cut_regressor_explains_as_much_as_the_same_function_with_another_shape():
    model, x, fresh = regressor(1), drawn(512, 8, seed=1), drawn(1024, 8, seed=2)
    left: list[float] = []
    for net in (model, Then(model, lambda y: y[..., None])):
        graph = trace(net, x[:1])
        found = search_architecture(net, graph, Knapsack(), budget="macs=40%", batches=[(x, NO_LABELS)])
        small = cut(net, graph, found.architecture, calibration=[x], repairs=[Refit()]).model
        with torch.no_grad():
            want = net(fresh).flatten()
            left.append(float((small(fresh).flatten() - want).square().mean() / want.var()))
    assert left[0] == left[1]
    assert left[0] < 0.1


class Heads(nn.Module):
    """A trunk with a branch for each of two heads, whose outputs have units of their own."""

    def __init__(self, scale: float = 1.0, make: Callable[[Tensor, Tensor], Any] = lambda one, two: (one, two)):
        super().__init__()
        self.trunk = nn.Conv2d(3, 16, 3)
        self.left, self.right = nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3)
        self.classes, self.boxes = nn.Conv2d(16, 6, 1), nn.Conv2d(16, 4, 1)
        self.scale, self.make = scale, make

    def forward(self, x: Tensor) -> Any:
        x = self.trunk(x).relu()
        boxes = self.boxes(self.right(x).relu()) * self.scale
        return self.make(self.classes(self.left(x).relu()), boxes)


@pytest.mark.parametrize("scale", [1e-6, 1e4, 1e8])
def test_the_unit_of_a_head_decides_nothing(scale):
    x = drawn(64, 3, 10, 10)
    kept: list[Any] = []
    for unit in (1.0, scale):
        model = seeded(lambda unit=unit: Heads(unit))
        graph = trace(model, x[:1])
        batches = [(part, NO_LABELS[:16]) for part in x.split(16)]
        kept.append(search_architecture(model, graph, Knapsack(), budget="macs=40%", batches=batches).architecture)
    assert kept[0] == kept[1]
    widths = kept[0].widths
    assert min(widths["left"], widths["right"]) > 2


FORMS = {
    "mapping": lambda one, two: {"classes": one, "boxes": two},
    "nested": lambda one, two: [one, (two, torch.ones(3))],
    "each image": lambda one, two: [{"classes": a, "boxes": b} for a, b in zip(one, two, strict=True)],
}


@pytest.mark.parametrize("form", FORMS)
def test_the_form_of_the_output_decides_nothing(form):
    x = drawn(64, 3, 10, 10)
    plain = scored(seeded(Heads), x, NO_LABELS[:64])
    other = scored(seeded(lambda: Heads(make=FORMS[form])), x, NO_LABELS[:64])
    for name, scores in plain.items():
        correlation = np.corrcoef(scores, other[name])[0, 1]
        assert correlation > 0.98


def test_two_outputs_weigh_as_much_as_each_in_its_own_spread():
    """d of two outputs is the mean of the d of each, divided by its spread, but for the noise of random signs."""
    x, labels = drawn(512, 3, 6, 6), NO_LABELS
    pick = [seeded(lambda i=i: Heads(50.0, lambda one, two: (one, two)[i])) for i in range(2)]
    alone = [scored(model, x, labels)["trunk"] for model in pick]
    spreads = []
    with torch.no_grad():
        for model in pick:
            out = model(x)
            spreads.append(float((out - out.mean(0)).square().sum() / len(x)))
    both = scored(seeded(lambda: Heads(50.0)), x, labels)["trunk"]
    first = int(both.argmin())
    want = sum(scores[first] / spread for scores, spread in zip(alone, spreads, strict=True)) / 2
    assert both[first] == pytest.approx(want, rel=0.3)


def shifting() -> nn.Sequential:
    """Channel 2 of the first layer does nothing but shift all five outputs."""
    model = seeded(lambda: nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 5)))
    assert isinstance(model, nn.Sequential)
    with torch.no_grad():
        model[2].weight[1] = model[2].weight[:, 2] = 0.0
        model[2].weight[1, 2] = 2.0
        model[4].weight[:, 1] = 3.0
    return model


@pytest.mark.parametrize(
    ("labels", "shift_counts"),
    [
        (torch.arange(64) % 5, False),
        (torch.zeros(64, dtype=torch.long), True),
        (torch.arange(64) % 6, True),
        (torch.arange(64) % 5 - 1, True),
        (torch.randn(64), True),
        (torch.zeros(64, 2, dtype=torch.long), True),
    ],
    ids=["classes", "no labels", "more classes than columns", "negative", "numbers", "pairs"],
)
def test_a_common_shift_counts_unless_labels_say_that_outputs_are_class_logits(labels, shift_counts):
    model = shifting()
    scores = scored(model, drawn(64, 8), labels)["0"]
    assert (scores[2] > 1e-3 * scores.max()) == shift_counts
    for said in (True, False):
        said_so = scored(model, drawn(64, 8), labels, class_logits=said)["0"]
        assert (said_so[2] > 1e-3 * said_so.max()) == (not said)


def test_of_several_outputs_the_narrowest_with_a_column_for_each_class_is_the_logits():
    model = shifting()
    pair = Then(model, lambda y: (y, torch.cat([y, y], 1)))
    wide = scored(pair, drawn(64, 8), torch.arange(64) % 7)["model.0"]
    narrow = scored(pair, drawn(64, 8), torch.arange(64) % 5)["model.0"]
    # Where only the ten columns can be the logits, the shift of the five counts, and the other way round.
    assert wide[2] > 1e-3 * wide.max()
    assert narrow[2] > 1e-3 * narrow.max()
    assert scored(Then(model, lambda y: (y, y)), drawn(64, 8), torch.arange(64) % 5)["model.0"][2] < 1e-9


class Pair(nn.Module):
    """One encoder for two images, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), nn.Conv2d(6, 2, 1)

    def encode(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu()).relu()

    def forward(self, one: Tensor, two: Tensor) -> Tensor:
        return self.out((self.encode(one) - 3 * self.encode(two)).abs())


def test_inputs_of_any_form_are_scored_alike():
    model = seeded(Pair)
    one, two = drawn(24, 3, 8, 8), drawn(24, 3, 8, 8, seed=1)
    graph = trace(model, (one, two))
    scores = [
        Reconstruction(images=20).scores(ScoringInputs(model, graph, ((batch, NO_LABELS[:24]),)))
        for batch in ((one, two), {"one": one, "two": two}, {"two": two, "one": one})
    ]
    assert all(values.min() > 0 for values in scores[0].values())
    for other in scores[1:]:
        assert all(np.array_equal(values, other[name]) for name, values in scores[0].items())
    batches = [((one, two), NO_LABELS[:24])]
    for strategy in (Knapsack(), PCASlimming(source=Activations())):
        assert search_architecture(model, graph, strategy, budget="macs=50%", batches=batches).cost.macs > 0


def test_every_call_of_a_shared_layer_counts():
    """An encoder that is called for two images listens to both: which one comes last decides nothing."""
    one, two = drawn(64, 3, 8, 8), drawn(64, 3, 8, 8, seed=1)
    model = seeded(Pair)

    class Swapped(Pair):
        def forward(self, one: Tensor, two: Tensor) -> Tensor:
            late = self.encode(two)
            return self.out((self.encode(one) - 3 * late).abs())

    swapped = Swapped().eval()
    swapped.load_state_dict(model.state_dict())
    found = [
        Reconstruction().scores(ScoringInputs(net, trace(net, (one, two)), (((one, two), NO_LABELS[:64]),)))["a"]
        for net in (model, swapped)
    ]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-4)


class Words(nn.Module):
    """Whole numbers go in, so that no gradient comes from the input."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.first, self.second = nn.Embedding(20, 8), nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.second(self.first(input=self.embed(ids)).relu()).mean(1)


def test_token_ids_and_frozen_weights_are_scored():
    model = seeded(Words).requires_grad_(False)
    ids = torch.arange(96).reshape(24, 4) % 20
    scores = scored(model, ids, torch.arange(24) % 3)
    assert scores["first"].max() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_scored_nearly_like_float32(dtype):
    model = seeded(lambda: nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3)))
    x = drawn(256, 8)
    want = scored(model, x, NO_LABELS[:256])["0"]
    found = scored(model.to(dtype), x.to(dtype), NO_LABELS[:256])["0"]
    assert np.isfinite(found).all()
    assert np.corrcoef(want, found)[0, 1] > 0.99
    large = scored(model, 300 * x.to(dtype), NO_LABELS[:256])["0"]
    assert np.isfinite(large).all()


@pytest.mark.parametrize("scale", [1e-9, 1e-4, 1e9])
def test_the_scale_of_activations_decides_nothing(scale):
    model = seeded(lambda: nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3)))
    x = drawn(256, 8)
    want = scored(model, x, NO_LABELS[:256])["0"]
    with torch.no_grad():
        model[0].weight.mul_(scale)
        model[0].bias.mul_(scale)
        model[2].weight.div_(scale)
    found = scored(model, x, NO_LABELS[:256])["0"]
    assert (np.argsort(found) == np.argsort(want)).all()
    np.testing.assert_allclose(found, want, rtol=1e-3)


def test_a_model_without_floating_point_output_is_refused():
    model = Then(seeded(lambda: nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3))), lambda y: y)
    graph = trace(model, drawn(1, 8))
    model.function = lambda y: y.argmax(1)
    with pytest.raises(ModelError, match="must hold a floating-point tensor for Reconstruction"):
        Reconstruction().scores(ScoringInputs(model, graph, ((drawn(16, 8), NO_LABELS[:16]),)))


def test_taylor_refuses_one_number_whose_cross_entropy_is_always_zero():
    model = seeded(lambda: nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 1)))
    x = drawn(16, 8)
    with pytest.raises(DataError, match=r"must return logits \(16, classes\) for Taylor; got shape \(16, 1\)"):
        Taylor().scores(ScoringInputs(model, trace(model, x), ((x, NO_LABELS[:16]),)))


def maps() -> nn.Module:
    return seeded(
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Flatten(),
            nn.Linear(6 * 6 * 6, 4),
        )
    )  # fmt: skip


def test_batches_whose_activations_do_not_fit_are_divided_evenly() -> None:
    graph = trace(maps(), drawn(1, 3, 8, 8))
    pair = {"image": drawn(10, 3, 8, 8)}, torch.arange(10)
    whole = ScoringInputs(maps(), graph, (pair,))
    assert whole.in_small_batches().batches == (pair,)
    # Three maps of 8 x 64 numbers, two of 6 x 36, one vector as long, and 4 logits; two tensors of each, of four bytes.
    image = 2 * 4 * (3 * 8 * 64 + 3 * 6 * 36 + 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("secateur.search.importance._GRADIENT_BYTES", 4 * image)
        parts = whole.in_small_batches().batches
        assert [len(labels) for _, labels in parts] == [3, 3, 4]
        assert torch.equal(torch.cat([inputs["image"] for inputs, _ in parts]), pair[0]["image"])
        assert torch.equal(torch.cat([labels for _, labels in parts]), pair[1])
        # A single image is not divided, and neither is what does not say how many there are.
        patch.setattr("secateur.search.importance._GRADIENT_BYTES", 1)
        assert len(whole.in_small_batches().batches) == 10
        odd = ScoringInputs(maps(), graph, ((drawn(10, 3, 8, 8), torch.zeros(())),))
        assert odd.in_small_batches().batches == odd.batches


def test_scores_do_not_depend_on_the_memory_of_a_pass() -> None:
    model, x = maps(), drawn(64, 3, 8, 8)
    whole = scored(model, x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("secateur.search.importance._GRADIENT_BYTES", 2**20)
        parts = scored(model, x)
    assert whole.keys() == parts.keys()
    for name, scores in whole.items():
        np.testing.assert_allclose(parts[name], scores, rtol=1e-5)
