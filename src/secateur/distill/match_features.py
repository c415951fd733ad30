"""`MatchFeatures`: a repair that trains a cut model for a few hundred steps to give the original's features again."""

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import field
from itertools import islice

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from secateur._batches import call_model, count_images, float_tensors, select_images
from secateur._kinds import settings
from secateur._runtime import run_isolated, with_recurrent_gradients_
from secateur.distill.logit_losses import feature_loss
from secateur.distill.taps import AlignedFeatureRecorder, AlignedFeatures
from secateur.errors import TrainingError
from secateur.graph._record import shadow_copy
from secateur.graph.trace import Example
from secateur.prune.cut import RepairContext

_VALUES_IN_A_STEP, _FEWEST, _MOST = 2**20, 8, 64
_ALL_MACS, _FEWEST_STEPS, _MOST_STEPS = 5e12, 100, 400
_TARGET_BYTES = 2**29
"""Memory for what the original gives; batches that find no room are run through it again in every pass."""


@settings
class MatchFeatures:
    """Train the cut model to give the outputs and the features of the original again, without labels.

    For s steps of Adam on batches of calibration images x, with the rate falling from ``learning_rate`` to 0 along a
    half cosine, it minimizes

        mean over stages l of  d(f_l(x), F_l(x)[kept])  +  mean over output tensors k of  d(z_k(x), Z_k(x)),

    where d(s, t) = mean((s - t)^2) / Var(t) (see `feature_loss`), small letters are the cut model's features and
    outputs, capital ones the original's, and stages are the last outputs at each spatial resolution. Both models run in
    evaluation mode, so batch norms use the statistics that they have, and what is minimized is what will be computed.

    The closed-form repairs mend one layer at a time, each with inputs that are wrong already. Here all layers share
    what is left. Use it after them; it takes about as long as training on ``steps`` batches does. Many different images
    help more than many steps with few.

    Attributes:
        steps: Steps of the optimizer, s. None takes as many as need 5e12 multiply-accumulates, between 100 and 400: up
            to two minutes on a core.
        learning_rate: At the beginning.
        batch_size: Images in a step. None takes as many as have a million values together, between 8 and 64.
        seed: Of the order of the images.
        more: Batches of images beside those of the context. `secateur.pipeline.compress` passes up to 3,072 training
            images.

    References:
        Li et al., BRECQ, arXiv:2102.05426 (reconstruction of blocks from calibration images without labels); Romero et
        al., FitNets, arXiv:1412.6550 (features of stages as targets).
    """

    steps: int | None = None
    learning_rate: float = 1e-3
    batch_size: int | None = None
    seed: int = 0
    more: tuple[Example, ...] = field(default=(), compare=False, repr=False)

    def __post_init__(self) -> None:
        for name, value in (("steps", self.steps), ("batch_size", self.batch_size)):
            if value is not None and value < 1:
                raise TrainingError(
                    f"`{name}` must be at least 1; got {value}. Leave it out for what the model can take."
                )
        if not 0 < self.learning_rate < math.inf:
            raise TrainingError(f"`learning_rate` must be positive; got {self.learning_rate}. 1e-3 is usual.")

    def apply_(self, small: nn.Module, context: RepairContext) -> dict[str, str]:
        """Train ``small`` in place; see `Repair.apply_`. Numbers of less than 32 bits are not trained."""
        parameters = [p for p in small.parameters() if p.is_floating_point()]
        if any(p.element_size() < 4 for p in parameters):
            return {"the model": "its numbers have less than 32 bits, in which small steps are lost"}
        flags = [p.requires_grad for p in parameters]
        modes = [(m, m.training, m.dropout if isinstance(m, nn.RNNBase) else 0.0) for m in small.modules()]
        try:
            for parameter in parameters:
                parameter.requires_grad_(True)
            self._train_(with_recurrent_gradients_(small.eval()), parameters, context)
        finally:
            for parameter, flag in zip(parameters, flags, strict=True):
                parameter.requires_grad_(flag)
                parameter.grad = None
            for module, training, dropout in modes:
                module.training = training
                if isinstance(module, nn.RNNBase):
                    module.dropout = dropout
        return {}

    def _train_(self, small: nn.Module, parameters: Sequence[nn.Parameter], context: RepairContext) -> None:
        original = shadow_copy(context.original).eval()
        optimizer = torch.optim.Adam(parameters, self.learning_rate)
        alignment, batches = _stages_of(small, context), self._batches((*context.images, *self.more))
        steps = self.steps or _steps_for(small, batches[0])
        recording = nullcontext() if alignment is None else alignment.record(small, original)
        with run_isolated(small), recording as recorder:
            targets = _Targets(original, recorder)
            for step, number in enumerate(self._order(len(batches), steps)):
                for group in optimizer.param_groups:
                    group["lr"] = self.learning_rate * 0.5 * (1 + math.cos(math.pi * step / steps))
                calibration, rows = batches[number]
                images = select_images(calibration, rows)
                wanted = targets.of(number, images)
                # Both models draw the same numbers, if they draw any.
                torch.manual_seed(number)
                loss = _output_loss(float_tensors(call_model(small, images)), wanted)
                if recorder is not None:
                    loss = loss + recorder.loss()
                if not loss.requires_grad:
                    return
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()

    def _batches(self, images: Sequence[Example]) -> list[tuple[Example, list[int]]]:
        """The batches of the steps: random images of one calibration batch each."""
        generator = torch.Generator().manual_seed(self.seed)
        found: list[tuple[Example, list[int]]] = []
        for calibration in images:
            order = torch.randperm(count_images(calibration), generator=generator).tolist()
            size = self.batch_size or _images_in_a_step(calibration)
            found += [(calibration, order[start : start + size]) for start in range(0, len(order), size)]
        return found

    def _order(self, batches: int, steps: int) -> Iterator[int]:
        """Yield the number of a batch for every step, each once in a pass over all."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        passes = range(-(-steps // batches))
        return islice((n for _ in passes for n in torch.randperm(batches, generator=generator).tolist()), steps)


class _Targets:
    """Outputs and features of the original, which are kept for the next pass as long as there is room for them.

    The original needs as long for its outputs as a cut model of half its size needs for a step.
    """

    def __init__(self, original: nn.Module, recorder: AlignedFeatureRecorder | None) -> None:
        self._original, self._recorder = original, recorder
        self._known: dict[int, tuple[list[Tensor], dict[str, Tensor]]] = {}
        self._room = _TARGET_BYTES

    def of(self, number: int, images: Example) -> list[Tensor]:
        """Return the outputs for a batch, and give its features to the recorder."""
        known = self._known.get(number)
        if known is not None:
            outputs, features = known
            if self._recorder is not None:
                self._recorder.teacher_features = features
            return outputs
        torch.manual_seed(number)
        with torch.no_grad():
            outputs = float_tensors(call_model(self._original, images))
        features = {} if self._recorder is None else self._recorder.teacher_features
        size = sum(tensor.numel() * tensor.element_size() for tensor in (*outputs, *features.values()))
        if size <= self._room:
            self._room -= size
            self._known[number] = outputs, features
        return outputs


def _steps_for(small: nn.Module, batch: tuple[Example, list[int]]) -> int:
    """As many as need `_ALL_MACS`; a backward pass takes twice the operations of the forward pass."""
    calibration, rows = batch
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        call_model(small, select_images(calibration, rows[:1]))
    macs = 3 * len(rows) * counted.get_total_flops() / 2
    return int(min(max(_ALL_MACS / max(macs, 1), _FEWEST_STEPS), _MOST_STEPS))


def _images_in_a_step(batch: Example) -> int:
    """How many images have a million values together: convolutions of larger ones take longer."""
    values = sum(leaf.numel() for leaf in tree_leaves(batch) if isinstance(leaf, Tensor))
    return min(max(_VALUES_IN_A_STEP * count_images(batch) // max(values, 1), _FEWEST), _MOST)


def _stages_of(small: nn.Module, context: RepairContext) -> AlignedFeatures | None:
    """The ends of stages that the cut model still has; None if there are none."""
    left = {name for name, _ in small.named_modules()}
    stages = [name for name in context.graph.stages if name in left]
    return AlignedFeatures.of(context.graph, context.architecture, modules=stages) if stages else None


def _output_loss(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """The mean over output tensors; those whose number of rows depends on the images are left out."""
    pairs = [(mine, theirs) for mine, theirs in zip(found, wanted, strict=False) if mine.shape == theirs.shape]
    return torch.stack([feature_loss(*pair) for pair in pairs]).mean() if pairs else torch.zeros(())
