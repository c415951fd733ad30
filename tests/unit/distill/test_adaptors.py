import pytest
import torch
from torch import nn

from secateur.distill import Resize, compute_features, make_adaptors, record_taps
from secateur.errors import TrainingError


class Net(nn.Module):
    """Maps at two resolutions, a vector, tokens, and a module that never runs."""

    def __init__(self, width: int, stride: int, tokens: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, stride=stride, padding=1), nn.BatchNorm2d(width), nn.Dropout())
        self.body = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.tokens = nn.Linear(16 * tokens, width * tokens)
        self.rows = nn.Identity()
        self.head = nn.Linear(2 * width, 10)
        self.spare = nn.Linear(2, 2)
        self.count = tokens

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pooled = nn.functional.adaptive_avg_pool2d(images.mean(1), (4, 4 * self.count)).flatten(1)
        self.rows(self.tokens(pooled).unflatten(1, (self.count, -1)))
        return self.head(self.body(self.stem(images)).mean((2, 3)))


STUDENT, TEACHER = Net(4, stride=2), Net(6, stride=1)
EXAMPLE = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
TAPS = {"stem": "stem", "stem.0": "body", "head": "body", "rows": "rows", "spare": "spare"}


def taps(*names: str) -> dict[str, str]:
    return {name: TAPS[name] for name in names}


def test_adaptors_bring_the_students_features_to_the_teachers_shapes() -> None:
    pairs = {"stem": "stem", "body": "body", "rows": "rows"}
    adaptors = make_adaptors(STUDENT, TEACHER, pairs, EXAMPLE)
    assert list(adaptors) == ["stem", "body", "rows"]
    students, teachers = compute_features(STUDENT, TEACHER, pairs, EXAMPLE)
    for adaptor, student, teacher in zip(adaptors.values(), students, teachers, strict=True):
        assert student.shape != teacher.shape
        assert adaptor(student).shape == teacher.shape


def test_layers_are_chosen_by_shapes() -> None:
    kinds = {name: repr(a).split("(")[0] for name, a in make_adaptors(STUDENT, TEACHER, taps("rows"), EXAMPLE).items()}
    assert kinds == {"rows": "Linear"}
    growing = make_adaptors(STUDENT, TEACHER, {"stem.0": "stem.0"}, EXAMPLE)["stem/0"]
    assert [type(layer) for layer in growing] == [nn.Conv2d, Resize]
    shrinking = make_adaptors(TEACHER, STUDENT, {"stem.0": "stem.0"}, EXAMPLE)["stem/0"]
    assert [type(layer) for layer in shrinking] == [Resize, nn.Conv2d]
    assert isinstance(make_adaptors(STUDENT, STUDENT, {"body": "body"}, EXAMPLE)["body"], nn.Identity)
    assert isinstance(make_adaptors(Net(4, stride=1), STUDENT, {"body": "body"}, EXAMPLE)["body"], Resize)
    assert isinstance(make_adaptors(Net(4, stride=1), Net(6, stride=1), {"body": "body"}, EXAMPLE)["body"], nn.Conv2d)
    assert isinstance(make_adaptors(STUDENT, Net(8, stride=1), {"head": "head"}, EXAMPLE)["head"], nn.Identity)


def test_vectors_get_a_linear_layer() -> None:
    student, teacher = nn.Sequential(nn.Linear(8, 3)), nn.Sequential(nn.Linear(8, 5))
    adaptor = make_adaptors(student, teacher, {"0": "0"}, torch.zeros(1, 8))["0"]
    assert isinstance(adaptor, nn.Linear)
    assert (adaptor.in_features, adaptor.out_features) == (3, 5)


def test_resize_pools_down_and_interpolates_up() -> None:
    feature = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert Resize((2, 2))(feature).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert Resize((1, 4))(feature).flatten().tolist() == [6.0, 7.0, 8.0, 9.0]
    # Bilinear on a plane is the plane, at pixel centres: x at (k + 1/2) / 2 - 1/2.
    grown = Resize((4, 8))(feature)[0, 0, 0]
    torch.testing.assert_close(grown, torch.tensor([0.0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3.0]))
    assert "size=(4, 8)" in repr(Resize((4, 8)))


def test_the_forward_pass_for_shapes_does_not_change_models_and_random_state() -> None:
    student = Net(4, stride=2).train()
    student.stem[1].eval()
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    modes = [module.training for module in student.modules()]
    state = torch.random.get_rng_state()
    adaptors = make_adaptors(student, TEACHER, taps("stem"), EXAMPLE, seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [module.training for module in student.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
    assert not any(module._forward_hooks for module in student.modules())
    again, other = (make_adaptors(student, TEACHER, taps("stem"), EXAMPLE, seed=seed)["stem"] for seed in (3, 4))
    assert torch.equal(adaptors["stem"][0].weight, again[0].weight)
    assert not torch.equal(adaptors["stem"][0].weight, other[0].weight)


def test_features_that_no_adaptor_can_join_are_refused() -> None:
    with pytest.raises(TrainingError, match=r"join; got \(1, 10\) and \(1, 12, 8, 8\) at 'head'\. Pair two maps"):
        make_adaptors(STUDENT, TEACHER, taps("head"), EXAMPLE)
    with pytest.raises(TrainingError, match=r"join; got \(1, 4, 4\) and \(1, 3, 4\) at 'rows'"):
        make_adaptors(STUDENT, Net(4, stride=1, tokens=3), taps("rows"), EXAMPLE)


def test_unknown_names_are_refused_with_suggestions() -> None:
    with pytest.raises(TrainingError, match=r"`student` must have the tapped module 'stem\.00'.*Did you mean stem\.0"):
        make_adaptors(STUDENT, TEACHER, {"stem.00": "stem"}, EXAMPLE)
    with pytest.raises(
        TrainingError, match=r"`teacher` must have the tapped module 'bodyy'; it has none\. Did you mean"
    ):
        make_adaptors(STUDENT, TEACHER, {"stem": "bodyy"}, EXAMPLE)
    with pytest.raises(TrainingError, match="`taps` must name at least one pair of modules; got none"):
        make_adaptors(STUDENT, TEACHER, {}, EXAMPLE)
    with pytest.raises(TrainingError, match="`student` must run module 'spare' before the features are compared"):
        make_adaptors(STUDENT, TEACHER, taps("spare"), EXAMPLE)


def test_a_recorder_keeps_modules_named_twice_and_can_be_cleared() -> None:
    with record_taps(STUDENT, TEACHER, {"stem": "stem"}, {"stem": "body", "head": "stem"}) as recorder:
        assert len(STUDENT.stem._forward_hooks) == 1
        logits = STUDENT(EXAMPLE)
        TEACHER(EXAMPLE)
        (stem, head), (body, _) = recorder.features({"stem": "body", "head": "stem"})
        assert torch.equal(head, logits)
        assert (stem.shape[1], body.shape[1]) == (4, 12)
        recorder.clear()
        with pytest.raises(TrainingError, match="`student` must run module 'stem'"):
            recorder.features({"stem": "stem"})
    assert not STUDENT.stem._forward_hooks
