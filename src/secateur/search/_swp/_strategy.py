"""SWP: stage-wise pruning, on any traced model."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from secateur.cost import Cost
from secateur.errors import BudgetError, DataError
from secateur.graph import stages_of
from secateur.importance import Importance, Reconstruction
from secateur.search._begin import Redrawn, Warm
from secateur.search._describe import describe
from secateur.search._halves import held_out
from secateur.search._hand_on import OriginalWeights, SearchedWeights
from secateur.search._problem import Problem, Proposal, Strategy
from secateur.search._ratios import Depths, Widths
from secateur.search._swp._candidates import Candidates
from secateur.search._swp._exact import Exact
from secateur.search._swp._fill import filled
from secateur.search._swp._hunt import Hunt
from secateur.search._swp._nets import Nets, Sandwich
from secateur.search._swp._options import Options
from secateur.search._swp._score import Judge
from secateur.search._swp._supervision import InPlace, Supervision
from secateur.search._swp._table import Choice, Combination
from secateur.search._swp._train import Course, Run
from secateur.supernet import Supernet, best_first, order_digest
from secateur.train import Schedule, digest, open_fabric, placed, precision_of
from secateur.workers import InProcess, Workers

_CALIBRATION = 4
"""Image batches that the batch norms of a candidate are measured on."""

_PROBES = 16
"""Networks by which the weight of each stage's losses is measured."""


@dataclass(frozen=True)
class SWP(Strategy):
    """Train the networks of a space a little, all at once and stage by stage; judge many; combine the best exactly.

    The model is divided into stages. In every step the full net learns from the labels, and the tiny net and some that
    are drawn learn beside it: each of their stages is fed with the full net's feature and learns to give what the full
    net's stage gives, so that one pass trains a candidate of every stage. Candidates of all stages are then judged on
    images held out, by the same loss, one of every stage in a pass, times what arrives of it at the output
    (`stage_effects`). Their losses and their costs add up, so that the best combination within the budget is a
    multiple-choice knapsack. Axes whose channels are seen where stages meet stay whole (see
    `secateur.graph.stages_of`); untie the graph to search residual branches as well.

    Attributes:
        widths: Candidate widths; None leaves them alone.
        depths: Candidate depths of chains of residual blocks; None keeps all blocks.
        cuts: Modules that end a stage; None finds them, () is the ablation without stages.
        nets: Which networks learn in a step: `Sandwich`, or `Drawn`, the ablation.
        supervision: What they learn from: `InPlace`; without stages also `SoftLabels` and `Labels`.
        schedule: Of the training: epochs, batch size, learning rate, optimiser. Its seed is replaced by the search's.
        candidates: Judged in every stage, over all rounds.
        rounds: The first draws from the whole space, the others near the best of the rounds before.
        held_out: Training images that no weights learn from, to judge on.
        combination: How one candidate of every stage is chosen: `Exact`, or `Evolution` as in the paper.
        importance: The order of the channels: every width keeps the first ones.
        begin: The weights that the training begins with.
        hand_on: The weights that the student is cut from.
        workers: Where candidates are judged: `InProcess`, or `OnRay`; the same bits if these compute with as many
            threads as this process.

    Raises:
        BudgetError: If neither widths nor depths are searched, or a number is out of range.

    References:
        Zhang, Rong, Yu & Ou (SWP), arXiv:2011.04908. The exact combination is ours, as is what the paper leaves open:
        where stages end, the loss and its weight, how candidates are drawn (docs/decisions.md).
    """

    widths: Widths | None = Widths()  # noqa: RUF009 -- frozen
    depths: Depths | None = None
    cuts: tuple[str, ...] | None = None
    nets: Nets = Sandwich()  # noqa: RUF009 -- frozen
    supervision: Supervision = InPlace()  # noqa: RUF009 -- frozen
    schedule: Schedule = Schedule(epochs=1, batch_size=64, learning_rate=0.02)  # noqa: RUF009 -- frozen
    candidates: int = 128
    rounds: int = 4
    held_out: int = 2000
    combination: Combination = Exact()  # noqa: RUF009 -- frozen
    importance: Importance = field(default_factory=Reconstruction)
    begin: Warm | Redrawn = Warm()  # noqa: RUF009 -- frozen
    hand_on: OriginalWeights | SearchedWeights = OriginalWeights()  # noqa: RUF009 -- frozen
    workers: Workers = InProcess()  # noqa: RUF009 -- frozen

    def __post_init__(self) -> None:
        if self.widths is None and self.depths is None:
            raise BudgetError("`widths` or `depths` must be given, or there is nothing to search; got None for both.")
        if self.rounds < 1 or self.candidates < 2 * self.rounds:
            raise BudgetError(
                f"`candidates` must be at least two for each of the `rounds`; got {self.candidates} in {self.rounds}."
            )
        if self.held_out < 1:
            raise BudgetError(f"`held_out` must be at least 1 image; got {self.held_out}. 2000 are usual.")

    @property
    def trains(self) -> bool:
        """See `Strategy.trains`."""
        return True

    def least(self, problem: Problem) -> Cost:
        """Cost of the smallest candidates of all stages."""
        options = self._options(problem)
        widths, blocks = options.network(options.tiny)
        return problem.costs.cost_of(widths, blocks)

    def find(self, problem: Problem) -> Proposal:
        """Notes.

        ``training``: what every epoch looked like, with how fairly channels were trained; ``stages``: for each one
        where it ends, its axes and blocks, how many candidates it has, how many were trained, the judged ones' losses
        and costs, and which was chosen; ``loss``, their sum; ``weights``, what the losses of each stage were
        multiplied by. What the chosen ones leave of the budget is then filled by widening them (`filled`).

        Raises:
            DataError: If there are no training images or calibration batches, or images cannot be held out.
            BudgetError: If there is nothing to choose, or no combination of the candidates is within the budget.
            TrainingError: If a loss is no longer finite; the checkpoint of the last epoch stays.
        """
        if problem.training is None:
            raise DataError("`data` must hold training images for SWP; got none. Pass data=secateur.load_data(...).")
        self.hand_on.check(problem)
        # Modules made in inference mode could not be trained.
        with torch.inference_mode(mode=False), torch.enable_grad():
            return self._find(problem)

    def _options(self, problem: Problem) -> Options:
        stages = stages_of(problem.evidence.model, problem.evidence.graph, self.cuts)
        self.supervision.check(stages)
        return Options.of(problem, stages, self.widths, self.depths)

    def _find(self, problem: Problem) -> Proposal:
        evidence, data = problem.evidence, problem.training
        assert data is not None
        options = self._options(problem)
        fabric = open_fabric(self.schedule.precision) if problem.fabric is None else problem.fabric
        order = best_first(problem.scores(self.importance))
        supernet = placed(Supernet(self.begin.of(evidence.model, evidence.seed), evidence.graph, order), fabric.device)
        learnt, judged = held_out(data.train, self.held_out, evidence.seed)
        schedule = replace(self.schedule, seed=evidence.seed)
        course = Course(options, self.nets, self.supervision, learnt, data.augment, schedule, fabric)
        calibration = tuple(images.to(fabric.device) for images, _ in evidence.batches[:_CALIBRATION])
        if not calibration:
            raise DataError("`batches` must hold training images for SWP, to measure batch norms on; got none.")
        hunt = Hunt(
            Run(course, supernet),
            Candidates(options, evidence.seed),
            {
                **self._settings(problem),
                "precision": precision_of(fabric).name,
                "stages": ", ".join(stage.cut for stage in options.stages),
                "order": order_digest(supernet.order),
                "images": f"{len(learnt)} and {len(judged)}",
                "augment": repr(data.augment),
                "calibration": f"{sum(map(len, calibration))} images",
            },
        )
        hunt.restore()
        hunt.train()
        judge = Judge.of(
            supernet,
            stages=options.stages,
            supervision=self.supervision,
            calibration=calibration,
            images=judged,
            fabric=fabric,
        )
        draw = np.random.default_rng((evidence.seed, _PROBES))
        probes = [options.subnet(options.drawn(draw)) for _ in range(_PROBES)]
        judge = judge.weighing(probes)
        hunt.judge(judge, self.workers, self.rounds, self.candidates // self.rounds)
        choice = self._combined(problem, options, hunt.candidates)
        rows = filled(options, hunt.candidates.network(choice.picked))
        architecture = supernet.architecture(options.subnet(rows))
        notes = {**hunt.notes(choice), "weights": np.asarray(judge.weights).tolist()}
        return Proposal(architecture, notes, self.hand_on.of(supernet, calibration, problem))

    def _combined(self, problem: Problem, options: Options, candidates: Candidates) -> Choice:
        """The combination, within the budget as a whole network too.

        What a stage adds to the size of a file depends on the others, by some digits of the header: where a combination
        is over a limit by so much, it must leave so much room.
        """
        table = candidates.table()
        while True:
            choice = self.combination.combine(table, problem.evidence.seed)
            cost = problem.costs.cost_of(*options.network(candidates.network(choice.picked)))
            over = {field: getattr(cost, field) - limit for field, limit in problem.limits.items()}
            tighter = {
                field: min(choice.cost[field] - excess, math.nextafter(choice.cost[field], 0))
                for field, excess in over.items()
                if excess > 0
            }
            if not tighter:
                return choice
            table = replace(table, limits={**table.limits, **tighter})

    def _settings(self, problem: Problem) -> Mapping[str, str]:
        """Where candidates are judged and how they are combined may change when a search goes on."""
        same = replace(self, workers=InProcess(), combination=Exact())
        return {
            "strategy": describe(same),
            "budget": str(problem.budget),
            "space": repr(problem.space),
            "seed": str(problem.evidence.seed),
            "model": digest(problem.evidence.model),
        }
