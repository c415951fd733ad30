import numpy as np
import pytest
import torch
from small_runs import Blobs, same, small_net, state
from torch import nn

from secateur.errors import TrainingError
from secateur.tasks import Score
from secateur.tasks.classification import TOP1
from secateur.train import Precision, evaluate


def test_accuracy_and_loss_agree_with_numpy() -> None:
    model, split = small_net().eval(), Blobs(37)
    with torch.no_grad():
        z = model(split.images).double().numpy()
    labels = split.labels.numpy()
    log_p = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
    accuracy = evaluate(model, split, batch_size=10)
    assert (accuracy.value, accuracy.n) == ((z.argmax(axis=1) == labels).mean(), 37)
    # float32 logits and sums.
    assert accuracy.loss == pytest.approx(-log_p[np.arange(37), labels].mean(), rel=1e-5)


def test_batch_size_does_not_matter() -> None:
    results = [evaluate(small_net(), Blobs(37), batch_size=size) for size in (1, 10, 100)]
    assert results[0].value == results[1].value == results[2].value
    assert [r.loss for r in results] == pytest.approx([results[0].loss] * 3, rel=1e-5)


def test_the_model_is_measured_in_eval_mode_and_left_as_it_is() -> None:
    model = small_net(dropout=0.9).train()
    before, rng = state(model), torch.get_rng_state()
    first, second = evaluate(model, Blobs(20)), evaluate(model, Blobs(20))
    assert first == second
    assert model.training
    assert all(module.training for module in model.modules())
    assert same(state(model), before)
    assert torch.equal(torch.get_rng_state(), rng)


def test_runs_in_inference_mode_and_in_the_asked_precision() -> None:
    seen: list[tuple[bool, torch.dtype]] = []
    model = small_net()
    model[0].register_forward_hook(
        lambda module, args, out: seen.append((torch.is_inference_mode_enabled(), out.dtype))
    )
    with torch.autocast("cpu", torch.bfloat16):
        evaluate(model, Blobs(4))
    evaluate(model, Blobs(4), precision=Precision.BF16_MIXED, device=torch.device("cpu"))
    assert seen == [(True, torch.float32), (True, torch.bfloat16)]


def test_works_inside_the_callers_inference_mode() -> None:
    with torch.inference_mode():
        assert evaluate(small_net(), Blobs(4)).n == 4


def test_a_perfect_model() -> None:
    class Oracle(nn.Module):
        def forward(self, x):
            return 100.0 * nn.functional.one_hot(x.long(), 3).float()

    class Labels(Blobs):
        def batches(self, batch_size, **settings):
            return ((labels, labels) for _, labels in super().batches(batch_size, **settings))

    assert evaluate(Oracle(), Labels(9)) == Score(1.0, 0.0, 9, TOP1)


def test_an_empty_split_is_refused() -> None:
    with pytest.raises(TrainingError, match="`split` must hold at least one image; got none"):
        evaluate(small_net(), Blobs(0))


def test_a_batch_size_of_zero_is_refused() -> None:
    with pytest.raises(TrainingError, match="`batch_size` must be at least 1; got 0"):
        evaluate(small_net(), Blobs(4), batch_size=0)


def test_labels_without_a_class_are_refused() -> None:
    with pytest.raises(TrainingError, match=r"`labels` must lie in 0\.\.\.1, the model's classes; got 0\.\.\.2"):
        evaluate(small_net(classes=2), Blobs(30))


def test_a_model_that_gives_no_logits_is_refused() -> None:
    with pytest.raises(TrainingError, match=r"`model` must return logits .*got \(4, 3, 8, 8\)\. Wrap the model"):
        evaluate(nn.Identity(), Blobs(4))
