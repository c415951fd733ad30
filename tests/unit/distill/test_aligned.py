import numpy as np
import pytest
import torch
from hand_graphs import Plain, plain
from torch import nn

from secateur.architecture import Architecture
from secateur.distill import AlignedFeatures, Tap
from secateur.errors import TrainingError
from secateur.graph import trace
from secateur.prune import apply_architecture

KEPT = {"conv1": (0, 2, 5, 6), "conv2": (1, 3, 4, 7, 8, 11)}
ARCHITECTURE = Architecture.of(KEPT)


def cut_plain() -> tuple[Plain, Plain]:
    """A teacher, and a student of its kept channels, sliced by hand."""
    teacher, _ = plain()
    assert isinstance(teacher, Plain)
    student = Plain(4, 6)
    first, second = list(KEPT["conv1"]), list(KEPT["conv2"])
    state = teacher.state_dict()
    state["conv1.weight"] = state["conv1.weight"][first]
    state["conv2.weight"] = state["conv2.weight"][second][:, first]
    state["fc.weight"] = state["fc.weight"][:, second]
    for name, kept in (("bn1", first), ("bn2", second)):
        for part in ("weight", "bias", "running_mean", "running_var"):
            state[f"{name}.{part}"] = state[f"{name}.{part}"][kept]
    student.load_state_dict(state)
    return teacher.eval(), student.eval()


def images(seed: int = 0) -> torch.Tensor:
    return torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def test_taps_hold_the_kept_channels_of_the_graph() -> None:
    _, graph = plain()
    alignment = AlignedFeatures.of(graph, ARCHITECTURE, modules=["bn1", "conv2"])
    assert alignment.taps == (Tap("bn1", 1, 8, KEPT["conv1"]), Tap("conv2", 1, 12, KEPT["conv2"]))


def test_loss_is_the_mean_over_taps_of_the_formula_in_numpy() -> None:
    teacher, student = cut_plain()
    _, graph = plain()
    x = images()
    with AlignedFeatures.of(graph, ARCHITECTURE, modules=["bn1", "bn2"]).record(student, teacher) as recorder:
        teacher(x)
        student(x)
        loss = recorder.loss()
    expected = []
    with torch.no_grad():
        t1, s1 = teacher.bn1(teacher.conv1(x)), student.bn1(student.conv1(x))
        t2, s2 = teacher.bn2(teacher.conv2(t1.relu())), student.bn2(student.conv2(s1.relu()))
    for t, s, kept in ((t1, s1, KEPT["conv1"]), (t2, s2, KEPT["conv2"])):
        target, feature = t.double().numpy()[:, list(kept)], s.double().numpy()
        expected.append(((feature - target) ** 2).mean() / (target.var() + 1e-6))
    # float32 in the product, float64 here.
    assert loss.item() == pytest.approx(np.mean(expected), rel=1e-5)
    # The first tap lies before any input was lost, so it is exactly the teacher's; the second is not.
    assert expected[0] == 0.0
    assert expected[1] > 0.01


def test_defaults_to_the_stages_of_a_traced_graph_and_is_zero_for_the_uncut_model() -> None:
    model, _ = plain()
    graph = trace(model.eval(), torch.zeros(1, 3, 8, 8))
    alignment = AlignedFeatures.of(graph, Architecture())
    assert tuple(tap.module for tap in alignment.taps) == graph.stages
    assert len(alignment.taps) == 2
    twin = apply_architecture(model, graph, Architecture()).eval()
    with alignment.record(twin, model) as recorder:
        model(images())
        twin(images())
        assert recorder.loss().item() == 0.0


def test_gradients_reach_the_student_and_not_the_teacher() -> None:
    teacher, student = cut_plain()
    with AlignedFeatures.of(plain()[1], ARCHITECTURE, modules=["bn2"]).record(student, teacher) as recorder:
        teacher(images())
        student(images())
        recorder.loss().backward()
    assert student.conv1.weight.grad is not None
    assert student.conv1.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in teacher.parameters())


def test_bfloat16_features_are_compared_in_float32() -> None:
    teacher, student = cut_plain()
    with AlignedFeatures.of(plain()[1], ARCHITECTURE, modules=["bn2"]).record(student, teacher) as recorder:
        with torch.autocast("cpu", torch.bfloat16):
            teacher(images())
            student(images())
        assert recorder.loss().dtype is torch.float32


def test_first_tensor_of_a_tuple_is_the_feature() -> None:
    class Pair(nn.Module):
        def forward(self, x):
            return x, x.sum()

    teacher, student = nn.Sequential(Pair()), nn.Sequential(Pair())
    with AlignedFeatures((Tap("0", 1, 3, (0, 2)),)).record(student, teacher) as recorder:
        teacher(torch.tensor([[1.0, 9.0, 3.0]]))
        student(torch.tensor([[1.0, 1.0]]))
        # ((1-1)^2 + (1-3)^2) / 2 = 2; Var([1, 3]) = 1.
        assert recorder.loss().item() == pytest.approx(2.0, rel=1e-5)


def test_first_tensor_of_a_dict_is_the_feature() -> None:
    class Named(nn.Module):
        def forward(self, x):
            return {"note": "text", "out": x}

    teacher, student = nn.Sequential(Named()), nn.Sequential(Named())
    with AlignedFeatures((Tap("0", 1, 2, (0, 1)),)).record(student, teacher) as recorder:
        teacher(torch.tensor([[1.0, 3.0]]))
        student(torch.tensor([[1.0, 3.0]]))
        assert recorder.loss().item() == 0.0


def test_hooks_are_removed_also_after_an_error() -> None:
    teacher, student = cut_plain()
    alignment = AlignedFeatures.of(plain()[1], ARCHITECTURE, modules=["bn1"])
    with alignment.record(student, teacher):
        assert (hooks(student), hooks(teacher)) == (1, 1)
    assert (hooks(student), hooks(teacher)) == (0, 0)
    with pytest.raises(RuntimeError, match="stop"), alignment.record(student, teacher):
        raise RuntimeError("stop")
    assert (hooks(student), hooks(teacher)) == (0, 0)


def test_hooks_of_the_first_model_are_removed_when_the_second_lacks_the_module() -> None:
    teacher, student = cut_plain()
    alignment = AlignedFeatures.of(plain()[1], ARCHITECTURE, modules=["bn1"])
    with (
        pytest.raises(TrainingError, match="`teacher` must have the tapped module 'bn1'; it has none"),
        alignment.record(student, nn.Linear(1, 1)),
    ):
        pass
    assert hooks(student) == 0
    assert teacher is not None


def test_features_are_cleared_after_each_batch() -> None:
    teacher, student = cut_plain()
    with AlignedFeatures.of(plain()[1], ARCHITECTURE, modules=["bn1"]).record(student, teacher) as recorder:
        teacher(images())
        student(images())
        recorder.loss()
        teacher(images())
        with pytest.raises(TrainingError, match="`student` must run module 'bn1' before the features are compared"):
            recorder.loss()


def test_a_student_with_other_channels_is_refused() -> None:
    teacher, _ = cut_plain()
    alignment = AlignedFeatures.of(plain()[1], ARCHITECTURE, modules=["bn1"])
    with alignment.record(teacher, teacher) as recorder:
        teacher(images())
        with pytest.raises(TrainingError, match=r"must have 4 and 8 channels at 'bn1'; got 8 and 8\. Use the graph"):
            recorder.loss()


def test_modules_without_channels_are_refused() -> None:
    with pytest.raises(TrainingError, match=r"must name modules with traced channels; got 'nothing'\. Some that have"):
        AlignedFeatures.of(plain()[1], ARCHITECTURE, modules=["nothing"])


def test_no_taps_are_refused() -> None:
    with pytest.raises(TrainingError, match="`taps` must name at least one module; got none"):
        AlignedFeatures.of(plain()[1], ARCHITECTURE)


def test_variance_floor_must_be_positive() -> None:
    with pytest.raises(TrainingError, match=r"`variance_floor` must be positive; got 0\.0"):
        AlignedFeatures((Tap("a", 1, 2, (0,)),), variance_floor=0.0)
