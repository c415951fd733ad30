"""TAS: transformable architecture search, on any traced model."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from secateur.cost.budget import Cost
from secateur.errors import BudgetError, DataError
from secateur.nas.common import Depths, OriginalWeights, Pretrained, RandomInit, SupernetWeights, Widths, halves
from secateur.nas.mixture import Blending, Fade
from secateur.nas.supernet import Supernet, best_first, order_digest
from secateur.nas.tas_cost import ExpectedCost
from secateur.nas.tas_sampler import WidthCandidates, WidthDistribution
from secateur.nas.tas_train import (
    AlphaOptimizer,
    CosineTemperature,
    DifferentiableSearch,
    LinearTemperature,
    TASSearchConfig,
)
from secateur.search.base import Proposal, SearchContext, Strategy, describe
from secateur.search.importance import Importance
from secateur.search.importance_data import Reconstruction
from secateur.train.checkpoint import Saved, digest, keeping, load_checkpoint
from secateur.train.config import Batches, TrainConfig
from secateur.train.device import one_device, placed, precision_of

_CALIBRATION = 8
"""Batches that batch-norm statistics are measured on."""


@dataclass(frozen=True)
class TAS(Strategy):
    """Learn how wide every axis and how deep every chain of residual blocks should be, by gradient descent.

    Every axis has a few candidate widths with probabilities p = softmax(alpha). In each step two of them are drawn
    (Gumbel-softmax, without replacement) and the network runs once, at the wider one of each axis: the features of the
    narrower one are a part of it, and blended in with the weights of the draw. Every chain of blocks ends with the sum
    of the streams after each candidate number of blocks. One half of the training images teaches the weights, the other
    one alpha, in turns, with 2 * `Price.loss` added for the budget.

    Found is the most likely architecture, moved as little as it takes to fill the budget (`derive`).

    Departures from the paper: weights are sliced before the convolution is computed, not its output after; the network
    is sliced from one trained network with its channels in order of importance, so that candidates of one axis share
    their first channels; the batch norm is shared by the candidates, whose statistics, those of the batch, are the
    same; channels that must stay the same (residual streams) have one choice, unless the graph is untied
    (`secateur.graph.untie`). The search is short and starts from trained weights, so that the learning rate of alpha
    is higher (0.001 in the paper, for 600 epochs), and so that by default channels that the narrower width lacks fade
    instead of all of them being interpolated: interpolated channels meet the weights of others, and the trained network
    is lost. With ``RandomInit``, ``Interpolate``, its learning rate and an untied graph it is the paper's search.

    Attributes:
        widths: Candidate widths; None leaves them alone.
        depths: Candidate depths; None keeps all blocks.
        schedule: Of the weights: epochs of the search, batch size, learning rate, optimizer. Its seed is replaced by
            that of the search.
        architecture: Optimizer of alpha.
        temperature: Of the draws, `LinearTemperature` as in the paper or `CosineTemperature` as in its code.
        blending: How the narrower width is seen at the wider one: `Fade`, or `Interpolate` as in the paper.
        tolerance: A network cheaper than the budget by more than this fraction of the whole model's cost is drawn to
            grow, 0 to 1.
        importance: The order of the channels: every width keeps the first ones.
        begin: The weights that the search begins with.
        hand_on: The weights that the student is cut from.

    Raises:
        BudgetError: If neither widths nor depths are searched, or the tolerance is out of range.

    References:
        Dong & Yang, Network Pruning via Transformable Architecture Search, NeurIPS 2019, arXiv:1905.09717.
    """

    widths: Widths | None = Widths()  # noqa: RUF009 -- frozen
    depths: Depths | None = None
    schedule: TrainConfig = TrainConfig(epochs=5, batch_size=64, learning_rate=0.02)  # noqa: RUF009 -- frozen
    architecture: AlphaOptimizer = AlphaOptimizer(learning_rate=0.1)  # noqa: RUF009 -- frozen
    temperature: LinearTemperature | CosineTemperature = LinearTemperature()  # noqa: RUF009 -- frozen
    blending: Blending = Fade()  # noqa: RUF009 -- frozen
    tolerance: float = 0.05
    importance: Importance = field(default_factory=Reconstruction)
    begin: Pretrained | RandomInit = Pretrained()  # noqa: RUF009 -- frozen
    hand_on: OriginalWeights | SupernetWeights = OriginalWeights()  # noqa: RUF009 -- frozen

    def __post_init__(self) -> None:
        if self.widths is None and self.depths is None:
            raise BudgetError("`widths` or `depths` must be given, or there is nothing to search; got None for both.")
        if not 0 <= self.tolerance < 1:
            raise BudgetError(f"`tolerance` must lie in [0, 1); got {self.tolerance}. 0.05 is usual.")
        if self.schedule.epochs < 1:
            raise BudgetError(f"`schedule` must have at least one epoch of search; got {self.schedule.epochs}.")

    @property
    def trains(self) -> bool:
        """See `Strategy.trains`."""
        return True

    def least(self, problem: SearchContext) -> Cost:
        """Cost of the smallest candidates."""
        graph = problem.evidence.graph
        widths = [w if self.widths is None else np.array(self.widths.of(w)) for w in problem.levels]
        smallest = np.array([w[-1] if self.widths is None else w[0] for w in widths], dtype=np.int64)
        chains = graph.chains if self.depths is not None else ()
        gone = [b.name for chain in chains for b in chain[self.depths.of(len(chain))[0] :]] if self.depths else []
        return problem.costs.without(gone).cost_of(problem.streams.fitted(smallest[None])[0])

    def find(self, problem: SearchContext) -> Proposal:
        """Notes: ``search``, what every epoch looked like (see the report), and ``unsearched``: axes left whole.

        Raises:
            DataError: If there are no training images, they cannot be split in two, or batches are missing that
                `SupernetWeights` needs.
            BudgetError: If nothing has two candidates.
            TrainingError: If a loss is no longer finite; the last checkpoints stay.
            Stopped: If that was asked for.
        """
        if problem.training is None:
            raise DataError("`data` must hold training images for TAS; got none. Pass data=secateur.load_data(...).")
        self.hand_on.check(problem)
        # Modules made in inference mode could not be trained.
        with torch.inference_mode(mode=False), torch.enable_grad():
            return self._find(problem)

    def _find(self, problem: SearchContext) -> Proposal:
        evidence = problem.evidence
        order = best_first(problem.scores(self.importance))
        supernet = Supernet(self.begin.of(evidence.model, evidence.seed), evidence.graph, order)
        candidates = WidthCandidates.of(problem, self.widths, self.depths, supernet.blended)
        run = self._run(problem, supernet, candidates)
        derived = run.derived()
        # Streams that are nothing but sums follow their branches.
        chosen = supernet.blended.union(problem.costs.axes[stream] for stream, _ in problem.streams.sums)
        unsearched = sorted(set(evidence.graph.sizes) - chosen) if self.widths else []
        notes = {"search": run.history, "unsearched": unsearched}
        architecture = run.supernet.architecture(run.subnet(derived))
        return Proposal(architecture, notes, self.hand_on.of(run.supernet, run.calibration, problem))

    def _run(self, problem: SearchContext, supernet: Supernet, candidates: WidthCandidates) -> DifferentiableSearch:
        """Search, or go on with a search that was interrupted."""
        assert problem.training is not None
        course = self.course(problem, candidates, halves(problem.training.train, problem.evidence.seed))
        run = DifferentiableSearch(
            course, placed(supernet, course.fabric.device), WidthDistribution(candidates).to(course.fabric.device)
        )
        run.derived()  # Refuses a budget that the axes with a choice cannot reach, before anything is trained.
        settings = {} if problem.checkpoint is None else self._settings(problem, course, supernet)
        saved = None if problem.checkpoint is None else load_checkpoint(problem.checkpoint, settings)
        epochs = course.schedule.epochs
        if saved is not None:
            run.restore(saved)

        def state() -> Saved:
            return run.saved(settings)

        with (
            keeping(problem.checkpoint, problem.saving, course.fabric) as keeper,
            problem.watch.watch("search", epochs=epochs, steps=course.steps, done=run.epoch) as meter,
        ):
            while run.epoch < epochs:
                run.train_epoch(meter, lambda: keeper.between(state))
                keeper.save(state)
        return run

    def course(
        self, problem: SearchContext, candidates: WidthCandidates, images: tuple[Batches, Batches]
    ) -> TASSearchConfig:
        """Everything of a search that does not change.

        Args:
            problem: What to solve.
            candidates: What there is to choose from.
            images: For the weights, and for the choice.
        """
        data, seed = problem.training, problem.evidence.seed
        fabric = one_device(problem.fabric, None if problem.fabric is not None else self.schedule.precision)
        calibration = tuple(images.to(fabric.device) for images, _ in problem.evidence.batches[:_CALIBRATION])
        return TASSearchConfig(
            price=ExpectedCost(problem, candidates, self.tolerance),
            for_weights=images[0],
            for_choice=images[1],
            validation=data.validation if data and len(data.validation) and calibration else None,
            augment=data.augment if data else None,
            calibration=calibration,
            schedule=replace(self.schedule, seed=seed),
            adam=self.architecture,
            temperature=self.temperature,
            blending=self.blending,
            fabric=fabric,
        )

    def _settings(self, problem: SearchContext, course: TASSearchConfig, supernet: Supernet) -> Mapping[str, str]:
        """Everything that must be equal for a search to be the same search."""
        return {
            "strategy": describe(self),
            "budget": str(problem.budget),
            "space": repr(problem.space),
            "seed": str(problem.evidence.seed),
            "precision": precision_of(course.fabric).name,
            "model": digest(problem.evidence.model),
            "axes": f"{len(supernet.order)}, {order_digest(supernet.order)}",
            "images": f"{len(course.for_weights)} and {len(course.for_choice)}",
            "validation": "none" if course.validation is None else f"{len(course.validation)} images",
            "augment": repr(course.augment),
            "calibration": f"{sum(map(len, course.calibration))} images",
        }
