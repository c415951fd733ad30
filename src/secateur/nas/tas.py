"""TAS: transformable architecture search, on any traced model."""

from collections.abc import Mapping
from dataclasses import field, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from secateur._kinds import settings
from secateur.cost.budget import Cost
from secateur.errors import BudgetError, DataError
from secateur.nas.common import (
    Depths,
    OriginalWeights,
    Pretrained,
    RandomInit,
    ReferenceDepths,
    SupernetWeights,
    Widths,
    check_searched_task,
    settings_of_task,
    split_in_half,
)
from secateur.nas.mixture import Interpolate, WidthExpansion, ZeroPad
from secateur.nas.supernet import Supernet, order_by_score, order_digest
from secateur.nas.tas_cost import ExpectedCost
from secateur.nas.tas_sampler import WidthCandidates, WidthDistribution
from secateur.nas.tas_train import AlphaOptimizer, CosineTemperature, LinearTemperature, TASSearchConfig, TASStep
from secateur.search.base import Proposal, SearchContext, Strategy, stable_repr
from secateur.search.history import SearchHistory
from secateur.search.importance import L1, Importance
from secateur.search.importance_data import Reconstruction
from secateur.tasks.base import Task
from secateur.tasks.classification import Classification
from secateur.train.checkpoint import model_sha256
from secateur.train.config import SGD, Batches, TrainConfig
from secateur.train.device import copy_to_device, fabric_precision, resolve_fabric
from secateur.train.trainer import Trainer

_CALIBRATION = 8
"""Batches that batch-norm statistics are measured on."""


@settings
class TAS(Strategy):
    """Learn how wide every axis and how deep every chain of residual blocks should be, by gradient descent.

    Every axis has a few candidate widths with probabilities p = softmax(alpha). In each step two of them are drawn
    (Gumbel-softmax, without replacement) and the network runs once, at the wider one of each axis: the features of the
    narrower one are a part of it, and blended in with the weights of the draw. Every chain of blocks ends with the sum
    of the streams after each candidate number of blocks. One half of the training images teaches the weights, the other
    one alpha, in turns, with 2 * `ExpectedCost.loss` added for the budget.

    The result is the most likely architecture, changed as little as it takes to fill the budget (`derive`).

    Departures from the paper: weights are sliced before the convolution is computed, not its output after; the network
    is sliced from one trained network with its channels in order of importance, so that candidates of one axis share
    their first channels; the batch norm is shared by the candidates, whose statistics, those of the batch, are the
    same; channels that must stay the same (residual streams) have one choice, unless the graph is untied
    (`secateur.graph.untie`). The search is short and starts from trained weights. So the learning rate of alpha is
    higher (0.001 in the paper, for 600 epochs), and by default the channels that the narrower width lacks are zero
    instead of all of them being interpolated: interpolated channels meet the weights of others, and the trained network
    is lost. `paper` makes the search of the paper's reference code.

    Attributes:
        widths: Candidate widths; None leaves them alone.
        depths: Candidate depths; None keeps all blocks.
        train: Training of the weights: epochs of the search, batch size, learning rate, optimizer. Its seed is replaced
            by that of the search.
        alpha_optimizer: Optimizer of alpha.
        temperature: Temperature of the draws: `LinearTemperature` as in the paper, `CosineTemperature` as in its code.
        expansion: How the narrower width is seen at the wider one: `ZeroPad`, or `Interpolate` as in the paper.
        tolerance: A network cheaper than the budget by more than this fraction of the whole model's cost is drawn to
            grow, 0 to 1.
        importance: The order of the channels: every width keeps the first ones.
        init: The weights that the search begins with.
        student_weights: The weights that the student is cut from.
        separate_norms: Whether every candidate width has a scale and a shift of its own at each batch norm.
        task: The loss of weights and architecture. `secateur.compress` puts its own task here.

    Raises:
        BudgetError: If neither widths nor depths are searched, or the tolerance is out of range.

    References:
        Dong & Yang, Network Pruning via Transformable Architecture Search, NeurIPS 2019, arXiv:1905.09717.
    """

    widths: Widths | None = Widths()
    depths: Depths | ReferenceDepths | None = None
    # Both rates were measured on ResNet-20 (docs/log.md): 0.005 for the weights, or 0.05 for alpha, cost about a point.
    train: TrainConfig = TrainConfig(epochs=5, batch_size=64, learning_rate=0.02)
    alpha_optimizer: AlphaOptimizer = AlphaOptimizer(learning_rate=0.1)
    temperature: LinearTemperature | CosineTemperature = LinearTemperature()
    expansion: WidthExpansion = ZeroPad()
    tolerance: float = 0.05
    importance: Importance = field(default_factory=Reconstruction)
    init: Pretrained | RandomInit = Pretrained()
    student_weights: OriginalWeights | SupernetWeights = OriginalWeights()
    separate_norms: bool = False
    task: Task = field(default=Classification(), repr=False)

    @classmethod
    def paper(cls, *, imagenet: bool = False) -> "TAS":
        """Make the search of the paper's reference code.

        Candidate widths are int(C * r), depths those of `ReferenceDepths`; every width has its batch norms, applied
        before channel-wise interpolation; the search begins with random weights. SGD at 0.1 with a cosine and
        Nesterov's momentum, Adam at 0.001 for alpha, batches of 256, temperatures from 5 to 0.1 by a cosine, 600 epochs
        (115 after 5 of warm-up on ImageNet, where the decay is 1e-4 instead of 5e-4). The graph must be untied, because
        there every convolution has widths of its own, and the network found is trained from scratch (``Reinitialize``,
        305 epochs).

        What still differs: weights are sliced before the convolution instead of its output behind it, which is the same
        number; temperatures follow the steps, not the epochs; the expected cost is that of the network that is made,
        whose stream is as wide as its widest branch, where the reference counts the last branch only.

        Args:
            imagenet: Whether to take the numbers for ImageNet instead of those for CIFAR.

        References:
            Dong & Yang, arXiv:1905.09717; github.com/D-X-Y/AutoDL-Projects, scripts-search/search-shape-cifar.sh with
            configs/search-opts/CIFARX.config, and configs/search-opts/ImageNet-ResNet.config.
        """
        decay = 1e-4 if imagenet else 5e-4
        return cls(
            widths=Widths(truncated=True),
            depths=ReferenceDepths(proportional=imagenet),
            train=TrainConfig(
                epochs=120 if imagenet else 600,
                batch_size=256,
                learning_rate=0.1,
                warmup_fraction=5 / 120 if imagenet else 0.0,
                optimizer=SGD(weight_decay=decay, vector_weight_decay=decay),
            ),
            alpha_optimizer=AlphaOptimizer(learning_rate=0.001, initial_deviation=0.01),
            temperature=CosineTemperature(),
            expansion=Interpolate(),
            # Random weights have no order; the cheapest importance gives one.
            importance=L1(),
            init=RandomInit(),
            separate_norms=True,
        )

    def __post_init__(self) -> None:
        if self.widths is None and self.depths is None:
            raise BudgetError("`widths` or `depths` must be given, or there is nothing to search; got None for both.")
        if not 0 <= self.tolerance < 1:
            raise BudgetError(f"`tolerance` must lie in [0, 1); got {self.tolerance}. 0.05 is usual.")
        if self.train.epochs < 1:
            raise BudgetError(f"`train` must have at least one epoch of search; got {self.train.epochs}.")

    @property
    def trains(self) -> bool:
        """See `Strategy.trains`."""
        return True

    def least(self, context: SearchContext) -> Cost:
        """Return the cost of the smallest candidates."""
        graph = context.inputs.graph
        widths = [w if self.widths is None else np.array(self.widths.of(w)) for w in context.levels]
        smallest = np.array([w[-1] if self.widths is None else w[0] for w in widths], dtype=np.int64)
        chains = graph.chains if self.depths is not None else ()
        least = self.depths.of_chains(graph) if self.depths is not None else []
        gone = [b.name for chain, depths in zip(chains, least, strict=True) for b in chain[depths[0] :]]
        return context.costs.without(gone).cost_of(context.streams.fitted(smallest[None])[0])

    def find(self, context: SearchContext) -> Proposal:
        """Search, see `Strategy.find`.

        The notes are ``search``, a record of every epoch, and ``unsearched``, the axes that were left whole.

        Raises:
            DataError: If there are no training images, they cannot be split in two, or batches are missing that
                `SupernetWeights` needs.
            BudgetError: If nothing has two candidates.
            TrainingError: If a loss is no longer finite; the last checkpoints stay.
            Stopped: If that was requested.
        """
        if context.training is None:
            raise DataError("`data` must hold training images for TAS; got none. Pass data=secateur.load_data(...).")
        check_searched_task(self.task, context, "TAS")
        self.student_weights.check(context)
        # Modules made in inference mode could not be trained.
        with torch.inference_mode(mode=False), torch.enable_grad():
            return self._find(context)

    def _find(self, context: SearchContext) -> Proposal:
        inputs = context.inputs
        order = order_by_score(context.scores(self.importance))
        supernet = Supernet(self.init.of(inputs.model, inputs.seed), inputs.graph, order)
        candidates = WidthCandidates.of(context, self.widths, self.depths, supernet.mixable)
        if self.separate_norms:
            names = context.costs.axes
            supernet.separate_norms_({names[axis]: candidates.widths[n] for n, axis in enumerate(candidates.axes)})
        assert context.training is not None
        # First-order bi-level optimization: alpha is judged by images that the weights have not learned from.
        halves = split_in_half(context.training.train, inputs.seed)
        config = self.search_config(context, candidates, halves)
        device = config.fabric.device
        deviation = self.alpha_optimizer.initial_deviation
        distribution = WidthDistribution(candidates, deviation, inputs.seed).to(device)
        step = TASStep(config, copy_to_device(supernet, device), distribution)
        notes: dict[str, object] = {"search": self._search(context, config, step)}
        # Streams that are nothing but sums follow their branches.
        chosen = supernet.mixable.union(context.costs.axes[stream] for stream, _ in context.streams.sums)
        notes["unsearched"] = sorted(set(inputs.graph.sizes) - chosen) if self.widths else []
        architecture = step.supernet.architecture(step.subnet(step.derived()))
        weights = self.student_weights.of(step.supernet, config.calibration, context)
        history = SearchHistory.of_records(notes, inputs.graph.sizes, context.costs.original.macs)
        return Proposal(architecture, notes, weights, history)

    def _search(self, context: SearchContext, config: TASSearchConfig, step: TASStep) -> list[dict[str, Any]]:
        """Search, or resume a search that was interrupted; returns the history."""
        step.derived()  # Refuses a budget that the axes with a choice cannot reach, before anything is trained.
        run, trainer = context.run, Trainer(step)
        settings = {} if run.folder is None else self._settings(context, config, step.supernet)
        trainer.resume(run.folder, settings)
        trainer.run(run, partial(trainer.saved, settings))
        return trainer.history

    def search_config(
        self, context: SearchContext, candidates: WidthCandidates, images: tuple[Batches, Batches]
    ) -> TASSearchConfig:
        """Return what a search is made of.

        Args:
            context: The search to run.
            candidates: The candidates to choose from.
            images: The images for the weights, and those for alpha.
        """
        data, seed = context.training, context.inputs.seed
        fabric = resolve_fabric(context.run.fabric, None if context.run.fabric is not None else self.train.precision)
        calibration = tuple(images.to(fabric.device) for images, _ in context.inputs.batches[:_CALIBRATION])
        return TASSearchConfig(
            cost=ExpectedCost(context, candidates, self.tolerance),
            for_weights=images[0],
            for_alpha=images[1],
            # Without calibration images the derived network has no batch-norm statistics with which it could be
            # validated.
            validation=data.validation if data and len(data.validation) and calibration else None,
            augment=data.augment if data else None,
            calibration=calibration,
            train=replace(self.train, seed=seed),
            alpha_optimizer=self.alpha_optimizer,
            temperature=self.temperature,
            expansion=self.expansion,
            fabric=fabric,
            task=self.task,
        )

    def _settings(self, context: SearchContext, config: TASSearchConfig, supernet: Supernet) -> Mapping[str, str]:
        """Everything that must be equal for a search to be the same search."""
        return {
            "strategy": stable_repr(self),
            "budget": str(context.budget),
            "space": repr(context.space),
            "seed": str(context.inputs.seed),
            "precision": fabric_precision(config.fabric).name,
            "model": model_sha256(context.inputs.model),
            # Scores of other batches give another order, in which the weights of a checkpoint would belong to other
            # channels.
            "axes": f"{len(supernet.order)}, {order_digest(supernet.order)}",
            "images": f"{len(config.for_weights)} and {len(config.for_alpha)}",
            "validation": "none" if config.validation is None else f"{len(config.validation)} images",
            "augment": repr(config.augment),
            "calibration": f"{sum(map(len, config.calibration))} images",
            **settings_of_task(self.task),
        }
