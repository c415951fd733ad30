"""Verification of a cut: the sliced model must equal the original in which the removed channels are zeroed.

Two passes compare the two: one on the example or a crop of it, one on images of another size, in training mode if the
mode can matter. Each also compares what all modules return. A pass in which rounding may be the reason of a difference
is repeated in float64, which decides.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from secateur._outputs import Leaf
from secateur._runtime import copy_model
from secateur.architecture import Architecture
from secateur.errors import SurgeryError
from secateur.graph._ledger import MIXING_KINDS
from secateur.graph._shadow import SharedMemory, shadow_copy, share_memory
from secateur.graph.channel_rules.layers import compute_over_kept_channels_
from secateur.graph.graph import ChannelGraph
from secateur.prune.differences import UNSTABLE, Difference, changes_between, largest_difference, perturbed
from secateur.prune.masked_reference import (
    ExpectedCalls,
    ObservedCalls,
    WrittenParameterError,
    zero_branches_,
    zero_weights_,
)
from secateur.prune.model_runs import (
    ComparisonRun,
    FeatureSummaries,
    KeptFeatures,
    depends_on_training,
    is_random,
)
from secateur.prune.slice import kept_weights, mask_readers, mask_removed

TOLERANCES: Mapping[torch.dtype, float] = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.bfloat16: 3e-2,
    torch.float16: 4e-3,
}
"""Largest |sliced - masked| relative to the spread of an output, see `largest_difference`. Sums of the same terms in
another order differ by a few ulps per layer; a wrong channel causes differences of percents (rolling one bias by one:
2e-2)."""
FLOAT64_TOLERANCE = 1e-9
"""Tolerance of the second comparison in float64, which is made if the first exceeds its tolerance."""
_FLOAT64_FLOOR = 1e-3
"""Part of the largest value of an output that float64 adds to the spread: rounding is relative to that value."""
_FEATURE_TOLERANCE, _FLOAT64_FEATURE_TOLERANCE, _FLOAT64_FEATURE_FLOOR = 1e-4, 1e-7, 1e-12
_SENSITIVITY = 10.0
"""Without float64, a difference may be this many times that of an input that is changed by one rounding step..."""
_MOST_WITHOUT_FLOAT64 = 0.02
"""... but not more than this part of the spread."""
_HEAVY_KINDS = frozenset({"convolution", "mm", "addmm", "bmm"})


@dataclass(frozen=True)
class Verification:
    """How closely the sliced model follows the masked original on the example input.

    Attributes:
        max_abs: Largest absolute difference of the outputs.
        max_rel: Largest difference relative to the spread of its output, see `largest_difference`.
        tolerance: The bound on ``max_rel``.
        dtype: The precision of the comparison.
        frozen: (axis, reason) pairs that had to be frozen until the cut was correct.
        shape: The shape of the input: that of the example, or of a crop on which the models make the same calls.
        second_shape: The shape of a second input on which they agree; empty if the model does not run on one.
        in_training: Whether they agree in training mode, or no module depends on it. False if the model does not run in
            training mode without labels.
        not_run: Modules with parameters that no call of the example used, such as those of another branch. What they
            compute in the cut model is not verified.
    """

    max_abs: float
    max_rel: float
    tolerance: float
    dtype: str
    frozen: tuple[tuple[str, str], ...] = ()
    shape: tuple[int, ...] = ()
    second_shape: tuple[int, ...] = ()
    in_training: bool = False
    not_run: tuple[str, ...] = ()

    @property
    def summary(self) -> str:
        """What was compared, for reports."""
        sizes = [" x ".join(map(str, shape)) for shape in (self.shape, self.second_shape) if shape]
        parts = [f"in {self.dtype}", *([f"inputs {' and '.join(sizes)}"] if sizes else [])]
        parts += [] if self.in_training else ["evaluation mode only"]
        parts += [f"not run by the example: {', '.join(self.not_run)}"] if self.not_run else []
        return ", ".join(parts)

    def __repr__(self) -> str:
        names = ", ".join(name for name, _ in self.frozen[:5]) + (", ..." if len(self.frozen) > 5 else "")
        frozen = f", frozen: {names}" if self.frozen else ""
        not_run = f", not run: {', '.join(self.not_run[:5])}" if self.not_run else ""
        return f"Verification(max_rel={self.max_rel:.1e} <= {self.tolerance:.0e}, {self.dtype}{frozen}{not_run})"


@dataclass(frozen=True)
class Mismatch:
    """A difference between the sliced and the masked model: the module where it first occurs, and a description."""

    module: str
    what: str


def compare_outputs(
    model: nn.Module, small: nn.Module, graph: ChannelGraph, architecture: Architecture
) -> Verification | Mismatch:
    """Compare all outputs of both models on the example, in float64 if rounding may be the reason of a difference.

    Whether the channels are right does not depend on the number of pixels. So a crop of the images is enough if the
    models run on it, make the same calls as when traced, and agree. In any other case the whole example decides. A
    second, small image with other pixels is compared if the original runs on it with the same calls; in training mode,
    if the model's own code mentions that mode.

    Raises:
        SurgeryError: If the original returns no floating-point tensor, or values that are not finite.
        ModelError: If it returns what cannot be compared.
    """
    pair = _Pair(model, small, graph, architecture)
    crop = _cropped(graph.example)
    depends = depends_on_training(model)
    aside, trained = None, None
    if depends:
        trained = pair.compare_in_training(_second_example(graph.example, crop, 64) or graph.example)
    # What is the same on two sizes, one of them in training mode, needs no third pass.
    second = None if trained is not None else _second_example(graph.example, crop, 32)
    if second is not None:
        aside = pair.compare_aside(second)
    for found in (trained, aside):
        if isinstance(found, Mismatch):
            return found
    found = None if crop is None else pair.compare_aside(crop)
    if isinstance(found, Mismatch):
        return found
    # Outputs that do not depend on the channels prove nothing; perhaps they do on the whole example.
    if found is None or found.max_rel == 0:
        found = pair.compare_whole()
    if isinstance(found, Mismatch):
        return found
    return replace(
        found,
        second_shape=next((other.shape for other in (trained, aside) if isinstance(other, Verification)), ()),
        in_training=not depends or trained is not None,
        not_run=_not_run(graph),
    )


def _not_run(graph: ChannelGraph) -> tuple[str, ...]:
    """Return the modules of the parameters that were not used; of a module that used others, the parameter itself."""
    unseen = set(graph.unseen)
    ran: set[str] = set()
    for name in graph.parameters:
        module = "" if name in unseen else name.rpartition(".")[0]
        while module and module not in ran:
            ran.add(module)
            module = module.rpartition(".")[0]
    modules = ((name.rpartition(".")[0], name) for name in graph.unseen)
    return tuple(dict.fromkeys(name if not module or module in ran else module for module, name in modules))


_Reference = Callable[[nn.Module], nn.Module]
"""Makes the masked original of a model, in eval mode."""


class _Pair:
    """The two models to compare. Copies of them run, so that both stay as they are.

    The same two copies serve several passes, in which both make the same runs, so that what they remember of a run
    (a running mean, a step count) stays the same in both.
    """

    def __init__(self, model: nn.Module, small: nn.Module, graph: ChannelGraph, architecture: Architecture) -> None:
        self._model, self._small, self._graph, self._architecture = model, small, graph, architecture
        self._noise = is_random(graph)
        # Features are compared only in the first pass that proves anything. After it there is nothing here.
        self._features: KeptFeatures | None = KeptFeatures(graph, architecture, every=False)
        self._running: tuple[nn.Module, nn.Module | None] | None = None
        self._memory: SharedMemory | None = None
        self._calls: ExpectedCalls | ObservedCalls | None = None

    def compare_aside(self, example: tuple[Any, ...]) -> Verification | Mismatch | None:
        """Compare on another example than the traced one; return None if the original makes other calls on it."""
        calls = ExpectedCalls(self._graph.calls)
        ran = self._run_masked(example, ComparisonRun(constant_noise=self._noise), calls)
        if ran is None or not calls.complete:
            # The masked copy has made a run that the cut one will not make, so neither is used again.
            self._running = None
            return None
        return self._judged_aside(ran, example, training=False)

    def compare_in_training(self, example: tuple[Any, ...]) -> Verification | Mismatch | None:
        """Compare in training mode; return None if the original does not run in it, or as another network."""
        example = _batch_of_two(self._model, example)
        calls = ObservedCalls()
        ran = self._run_masked(example, ComparisonRun(constant_noise=True), calls, training=True)
        if ran is None or not self._is_same_network(calls.names):
            self._running = None
            return None
        return self._judged_aside(ran, example, training=True)

    def _judged_aside(self, ran: "_Ran", example: tuple[Any, ...], *, training: bool) -> Verification | Mismatch | None:
        found = self._judge(self._zeroed_while_running, ran, example, training=training)
        if isinstance(found, Mismatch):
            # On inputs of another size, the original itself may take other numbers for channels.
            features = KeptFeatures(self._graph, self._architecture, every=True)
            original = shadow_copy(self._model).train(training)
            again = self._run(original, example, ComparisonRun(constant_noise=True), features)
            batch = next((part.size(0) for part in example if isinstance(part, Tensor) and part.dim()), 1)
            if not features.fit(again.features, batch):
                self._running = None
                return None
        return found

    def _run_masked(
        self,
        example: tuple[Any, ...],
        run: ComparisonRun,
        calls: ExpectedCalls | ObservedCalls,
        *,
        training: bool = False,
    ) -> "_Ran | None":
        """Run the masked original; return None if it cannot run, or its outputs prove nothing."""
        masked = self._masked()
        self._calls = calls
        try:
            # The model may not run on this input, or make other calls than expected, which raises too.
            want = self._run(masked.train(training), example, run)
        except Exception:
            return None
        finally:
            self._calls = None
        return want if _floating(want.outputs) and _all_finite(want.outputs) else None

    def _masked(self) -> nn.Module:
        """Return the masked original that runs."""
        if self._running is None:
            self._running = self._zeroed_while_running(self._model), None
        return self._running[0]

    def _sliced(self) -> nn.Module:
        """Return the cut model that runs."""
        masked, sliced = self._masked(), None if self._running is None else self._running[1]
        if sliced is None:
            # The guard of shared memory takes time in every call. Without writes of the original there are none here.
            sliced = shadow_copy(self._small) if self._may_write() else share_memory(self._small)[0]
            self._running = masked, sliced
        return sliced

    def _may_write(self) -> bool:
        return self._memory is None or self._memory.was_written

    def _is_same_network(self, names: Sequence[str]) -> bool:
        """Return whether the calls in training mode are those of the traced run, besides those of auxiliary heads."""

        def only(kinds: frozenset[str], names: Sequence[str]) -> list[str]:
            return [name for name in names if name in kinds]

        traced, found = only(_HEAVY_KINDS, self._graph.calls), only(_HEAVY_KINDS, names)
        if self._graph.mixings and only(MIXING_KINDS, self._graph.calls) != only(MIXING_KINDS, names):
            return False  # Calls that mix channels are found by their number.
        if self._architecture.removed_blocks:
            return traced == found  # So are the sums that add the removed branches.
        # `in` uses up the iterator: the traced calls must occur in their order, perhaps with others between.
        rest = iter(found)
        return all(name in rest for name in traced)

    def compare_whole(self) -> Verification | Mismatch:
        """Compare on the traced example."""
        example, run = self._graph.example, ComparisonRun(constant_noise=self._noise)
        for reference in (self._zeroed_while_running, self._without_channels, self._without_readers):
            # The copies of earlier passes, or new ones of both.
            self._running = self._running or (reference(self._model), None)
            try:
                want = self._run(self._running[0].eval(), example, run)
            except WrittenParameterError:
                # The next references hold copies of the weights, which a run may write to.
                self._running = self._memory = None
                continue
            if not _floating(want.outputs):
                raise SurgeryError(
                    "the model's output must hold a floating-point tensor to compare cuts by; it holds none."
                )
            if _all_finite(want.outputs):
                return self._judge(reference, want, example, training=False)
            self._running = None
        raise SurgeryError(
            "the model's output on the example is not finite (NaN or inf). Check its weights and the input."
        )

    def _run(
        self,
        model: nn.Module,
        example: tuple[Any, ...],
        run: ComparisonRun,
        features: KeptFeatures | None = None,
        *,
        cut: bool = False,
    ) -> "_Ran":
        features = features or self._features
        if features is None:
            return _Ran(run.outputs(model, example), FeatureSummaries())
        with features.summarize(model, cut=cut) as summaries:
            return _Ran(run.outputs(model, example), summaries)

    def _judge(
        self, reference: _Reference, want: "_Ran", example: tuple[Any, ...], *, training: bool
    ) -> Verification | Mismatch:
        run = ComparisonRun(constant_noise=self._noise or training)
        sliced = self._sliced().train(training)
        try:
            got = self._run(sliced, example, run, cut=True)
        except Exception as error:
            mode = " in training mode" if training else ""
            return Mismatch(_find_failing_module(sliced, example, run), f"the cut model does not run{mode}: {error}")
        dtype = _floating(want.outputs)[0].dtype
        tolerance = TOLERANCES.get(dtype, 1e-5)
        found = largest_difference(want.outputs, got.outputs)
        within = found is not None and found.relative <= tolerance
        self._features = None
        if within and want.features.first_difference(got.features, _FEATURE_TOLERANCE, 0.0) is None:
            return _verification(found, tolerance, dtype, example)
        try:
            exact, tolerance64, module = self._compare_in_float64(reference, example, run, training=training)
        except Exception as error:
            return self._judge_without_float64(reference, want.outputs, found, example, training=training, error=error)
        if exact is not None and exact.relative <= tolerance64 and module is None:
            if within:
                return _verification(found, tolerance, dtype, example)
            return _verification(exact, tolerance64, torch.float64, example)
        return Mismatch(module or "", _describe(exact, tolerance64, training=training))

    def _compare_in_float64(
        self, reference: _Reference, example: tuple[Any, ...], run: ComparisonRun, *, training: bool
    ) -> tuple[Difference | None, float, str | None]:
        """Return the difference of the outputs in float64, its tolerance, and the first module that differs."""
        run = replace(run, double=True)
        features = KeptFeatures(self._graph, self._architecture, every=True)
        example = tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, example)

        # New copies for every run, because a run may change what a model remembers.
        def masked() -> nn.Module:
            return reference(copy_model(self._model).double()).train(training)

        def sliced() -> nn.Module:
            return copy_model(self._small).double().train(training)

        want = self._run(masked(), example, run, features)
        got = self._run(sliced(), example, run, features, cut=True)
        found, tolerance = largest_difference(want.outputs, got.outputs, _FLOAT64_FLOOR), FLOAT64_TOLERANCE
        if found is None or found.relative > tolerance:
            whole = found
            # What the smallest change of the input changes, such as the index of the larger of two equal numbers, shows
            # nothing. Several changes of both models, because one alone may leave it as it is.
            again: list[Mapping[str, Tensor | bool]] = []
            for seeds in (range(2), range(2, 8)):
                for seed in seeds:
                    changed = perturbed(example, seed)
                    again.append(changes_between(want.outputs, run.outputs(masked(), changed)))
                    again.append(changes_between(got.outputs, run.outputs(sliced(), changed)))
                if not any(change is not False for changes in again for change in changes.values()):
                    break
            found = largest_difference(want.outputs, got.outputs, _FLOAT64_FLOOR, again)
            if found is None and whole is not None and whole.relative <= UNSTABLE:
                # Rounding changes every output, by more than the cut does: batch norms whose batches hardly vary.
                found, tolerance = whole, UNSTABLE
        between = _FLOAT64_FEATURE_TOLERANCE if tolerance == FLOAT64_TOLERANCE else _FEATURE_TOLERANCE
        return found, tolerance, want.features.first_difference(got.features, between, _FLOAT64_FEATURE_FLOOR)

    def _judge_without_float64(
        self,
        reference: _Reference,
        want: dict[str, Leaf],
        found: Difference | None,
        example: tuple[Any, ...],
        *,
        training: bool,
        error: Exception,
    ) -> Verification | Mismatch:
        """Judge a difference by what the smallest change of the input does, where the model cannot run in float64."""
        masked = reference(self._model).train(training)
        run = ComparisonRun(constant_noise=self._noise or training)
        change = largest_difference(want, run.outputs(masked, perturbed(example, 0)))
        if found is not None and change is not None:
            bound = min(_SENSITIVITY * change.relative, _MOST_WITHOUT_FLOAT64)
            dtype = _floating(want)[0].dtype
            bound = max(bound, TOLERANCES.get(dtype, 1e-5))
            if found.relative <= bound:
                return _verification(found, bound, dtype, example)
        why = " ".join(str(error).split())[:200]
        what = _describe(found, 0.0, training=training)
        return Mismatch("", f"{what}, and the model does not run in float64, which would tell: {why}")

    def _zeroed_while_running(self, model: nn.Module) -> nn.Module:
        """Return the model of `mask_removed` without a second set of weights: it multiplies them as it runs."""
        kept = kept_weights(self._graph, self._architecture)
        shadow, self._memory = share_memory(model)
        masked = zero_weights_(shadow, kept, lambda: self._calls, self._memory)
        masked = compute_over_kept_channels_(masked, self._graph, self._architecture.by_name)
        removed = [self._graph.blocks_by_name[name] for name in self._architecture.removed_blocks]
        return zero_branches_(masked, removed) if removed else masked

    def _without_channels(self, model: nn.Module) -> nn.Module:
        """A weight that is not finite stays so when it is multiplied by zero."""
        return mask_removed(model, self._graph, self._architecture).eval()

    def _without_readers(self, model: nn.Module) -> nn.Module:
        """A channel of zeros may be divided by its own norm. Then only what reads it is zeroed."""
        return mask_readers(model, self._graph, self._architecture).eval()


@dataclass(frozen=True)
class _Ran:
    """What one run has returned, and the features of its modules."""

    outputs: dict[str, Leaf]
    features: FeatureSummaries


def _verification(
    found: Difference | None, tolerance: float, dtype: torch.dtype, example: tuple[Any, ...]
) -> Verification:
    assert found is not None, "a difference that cannot be measured is never within a tolerance"
    shape = next((tuple(part.shape) for part in example if isinstance(part, Tensor)), ())
    return Verification(found.absolute, found.relative, tolerance, str(dtype).removeprefix("torch."), shape=shape)


def _describe(found: Difference | None, tolerance: float, *, training: bool) -> str:
    mode = " in training mode" if training else ""
    if found is None:
        return f"output shapes differ{mode}"
    if found.relative <= tolerance:
        return f"features differ although the outputs are equal{mode}"
    where = f" at output{found.place}" if found.place else ""
    return f"outputs differ by {found.relative:.1e} (relative){where}{mode}"


def _floating(leaves: Mapping[str, Leaf]) -> list[Tensor]:
    return [t for t in leaves.values() if isinstance(t, Tensor) and t.is_floating_point()]


def _all_finite(leaves: Mapping[str, Leaf]) -> bool:
    return all(bool(torch.isfinite(t).all()) for t in _floating(leaves))


def _cropped(example: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Crop images (n, channels, height, width) to at most half of the rows and columns, in multiples of 32."""
    crop = tuple(
        _center(part, *(size // 64 * 32 for size in part.shape[2:])) if _is_image(part) else part for part in example
    )
    return None if all(part is whole for part, whole in zip(crop, example, strict=True)) else crop


def _second_example(example: tuple[Any, ...], crop: tuple[Any, ...] | None, most: int) -> tuple[Any, ...] | None:
    """Return other images, of a size that no other pass compares: at most so many pixels, or twice as many if few.

    Their pixels are those of the example in another order, in every channel another one. So the values are in the range
    that the model expects, but what is right for one image only, such as the order of sorted channels, differs.
    """
    images = [part for part in example if _is_image(part)]
    whole = max((max(part.shape[2:]) for part in images), default=0)
    if not images or (crop is None and whole > 64):
        return None
    if crop is None:
        second = tuple(_doubled_size(part) if _is_image(part) else part for part in example)
    elif whole <= 128 and max(max(part.shape[2:]) for part in crop if _is_image(part)) <= most:
        second = example
    else:
        sides = 32 if max(max(part.shape[2:]) for part in crop if _is_image(part)) <= most else most
        second = tuple(
            _center(part, *(min(size, sides) for size in part.shape[2:])) if _is_image(part) else part for part in crop
        )
    return tuple(_shuffled(part) if _is_image(part) else part for part in second)


def _shuffled(part: Tensor) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    planes = part.flatten(2)
    order = torch.rand(planes.shape[1:], generator=draw).argsort(1).expand(planes.shape).to(part.device)
    return planes.gather(2, order).view_as(part).contiguous(memory_format=torch.contiguous_format)


def _is_image(part: Any) -> bool:
    return isinstance(part, Tensor) and part.dim() == 4 and part.is_floating_point()


def _center(part: Tensor, height: int, width: int) -> Tensor:
    top, left = (part.size(2) - height) // 2, (part.size(3) - width) // 2
    middle = part[:, :, top : top + height, left : left + width]
    return middle.contiguous() if middle.numel() else part


def _doubled_size(part: Tensor) -> Tensor:
    # Mirrored, so that the statistics are those of an image.
    wide = torch.cat([part, part.flip(3)], 3)
    return torch.cat([wide, wide.flip(2)], 2)


def _batch_of_two(model: nn.Module, example: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return two different items, if the model has batch statistics: these need more than one."""
    if not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):  # pyright: ignore[reportPrivateUsage]
        return example
    return tuple(
        torch.cat([t, t.flip(t.dim() - 1)]) if isinstance(t, Tensor) and t.dim() and t.size(0) == 1 else t
        for t in example
    )


def _find_failing_module(model: nn.Module, example: tuple[Any, ...], run: ComparisonRun) -> str:
    """Return the innermost module whose forward was running when the model raised."""
    stack: list[str] = []
    hooks: list[Any] = []

    def enter(name: str) -> Callable[..., None]:
        return lambda *_: stack.append(name)

    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(enter(name)))
        # `and None`, because what a hook returns replaces the output.
        hooks.append(module.register_forward_hook(lambda *_: stack.pop() and None))
    try:
        with contextlib.suppress(Exception):
            run.outputs(model, example)
            stack.clear()
    finally:
        for hook in hooks:
            hook.remove()
    return stack[-1] if stack else ""
