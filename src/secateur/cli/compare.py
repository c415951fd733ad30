"""The command that compares strategies on a model of one's own."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from secateur.cli import options
from secateur.cli.options import CutFlags, ImageFlags, RecoveryFlags, TargetFlags, flag, whole_number
from secateur.cli.output import command_line, handle_errors, logged, out, relative_path, resumable
from secateur.errors import ArtifactError, SelectionError, TrainingError

if TYPE_CHECKING:
    from secateur.pipeline.compare import Race
    from secateur.pipeline.config import RunConfig
    from secateur.report.comparison import Comparison
    from secateur.search.base import Strategy

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}
_MAX_SEEDS = 1000


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class CompareFlags:
    """What is compared, and how the comparison runs."""

    strategy: Annotated[
        tuple[str, ...], flag("Repeatable: auto, knapsack, pca, uniform, tas, python:...", options.CUT, value="NAME")
    ] = ("knapsack", "pca", "uniform")
    seeds: Annotated[int, whole_number("Runs of each strategy at each budget.", options.RUN, most=_MAX_SEEDS)] = 2
    time: Annotated[
        str | None,
        flag("Wall-clock limit, such as 30m or 2h; better strategies get more epochs.", options.RUN, value="TIME"),
    ] = None
    ray: Annotated[str | None, flag("Make several runs at once on Ray: local, auto or HOST:PORT.", value="ADDRESS")] = (
        None
    )
    resume: Annotated[bool, flag("Continue an interrupted comparison.", options.RUN)] = False
    restart: Annotated[bool, flag("Remove an interrupted comparison and begin again.", options.RUN)] = False
    seed: options.Seed = 0
    device: options.Device = "auto"
    thread_count: options.Threads = None
    quiet: options.Quiet = False
    as_json: options.AsJson = False

    def to_race(self) -> "Race":
        """Build the `Race` of these flags."""
        from secateur.pipeline.compare import Race
        from secateur.workers import InProcess, OnRay

        seconds = None if self.time is None else parse_duration(self.time)
        return Race(self.seeds, seconds, InProcess() if self.ray is None else OnRay(self.ray))

    def to_run(self) -> "RunConfig":
        """Build the `RunConfig` of these flags."""
        from secateur.cli.parsing import device
        from secateur.pipeline.config import RunConfig
        from secateur.pipeline.workspace import OnExisting

        if self.resume and self.restart:
            raise ArtifactError("`--resume` continues an interrupted comparison and `--restart` removes it; give one.")
        existing = OnExisting.RESUME if self.resume else OnExisting.OVERWRITE if self.restart else OnExisting.ERROR
        return RunConfig(seed=self.seed, device=device(self.device), on_existing=existing, command=command_line())


def parse_duration(text: str) -> float:
    """Return the seconds of a text such as ``90s``, ``30m``, ``1.5h`` or ``1h30m``.

    Raises:
        TrainingError: If it cannot be read, or is not positive.
    """
    parts = re.findall(r"(\d+(?:\.\d+)?)([smh])", text)
    seconds = sum(float(number) * _UNITS[unit] for number, unit in parts)
    if "".join(number + unit for number, unit in parts) != text or not 0 < seconds < math.inf:
        raise TrainingError(f"`--time` must be a time such as 90s, 30m or 1h30m; got {text!r}.")
    return seconds


def named_strategies(names: tuple[str, ...], *, trust_source: bool) -> "Mapping[str, Strategy | None]":
    """Return the strategies of some names; ``auto`` is the default of compress.

    Raises:
        SelectionError: If a name is unknown or given twice.
    """
    from secateur.cli.options import SearchFlags
    from secateur.cli.parsing import strategy

    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if twice:
        raise SelectionError(f"`--strategy` must name each strategy once; got {', '.join(twice)} more than once.")
    return {name: strategy(SearchFlags(strategy=name), trust_source=trust_source) for name in names}


@handle_errors
@resumable
def compare_command(
    *,
    model: options.Model,
    weights: options.WeightsFile = None,
    data: options.Data,
    budget: Annotated[
        tuple[str, ...],
        flag("Upper bounds; repeat it for several: macs=50%, latency=4ms.", options.CUT, value="BOUNDS"),
    ],
    out_folder: options.Out,
    images: ImageFlags = ImageFlags(),
    compared: CompareFlags = CompareFlags(),
    cut: CutFlags = CutFlags(),
    recovery: RecoveryFlags = RecoveryFlags(),
    target: TargetFlags = TargetFlags(),
    debug: options.Debug = False,
) -> None:
    """Compare strategies on your model: every strategy, budget and seed with equal compute, and a page of the results.

    Example: secateur compare --model timm:resnet18 --data images --budget macs=50% --budget macs=30% --out compared
    """
    from secateur._runtime import torch_threads
    from secateur.cli.messages import Checks
    from secateur.cli.parsing import Inputs
    from secateur.cost.budget import Budget
    from secateur.pipeline.compare import compare
    from secateur.pipeline.workspace import check_unfinished

    checks, inputs = Checks(), Inputs(model, weights, data, images, compared.seed)
    inputs.check(checks)
    checks.add(inputs.check_classifies)
    limits = checks.add(lambda: [Budget.parse(each) for each in budget])
    strategies = checks.add(lambda: named_strategies(compared.strategy, trust_source=images.trust_source))
    race, run = checks.add(compared.to_race), checks.add(compared.to_run)
    checks.add(lambda: check_unfinished(out_folder, run().on_existing))
    timed_on, cut_config = checks.add(target.to_target), checks.add(cut.to_config)
    recovery_config = checks.add(lambda: recovery.to_config(compared.seed))
    checks.add(recovery.train.check_augment)
    checks.settle()
    with logged(quiet=compared.quiet or compared.as_json), torch_threads(compared.thread_count):
        inputs.warn_of_random_weights()
        found = compare(
            inputs.loaded.model,
            recovery.train.augment(inputs.images),
            limits(),
            strategies(),
            out=out_folder,
            race=race(),
            cut=cut_config(),
            recovery=recovery_config(),
            target=timed_on(),
            source=inputs.loaded.source,
            run=replace(run(), name=inputs.loaded.name),
        )
    _show(found, as_json=compared.as_json, quiet=compared.quiet)


def _show(found: "Comparison", *, as_json: bool, quiet: bool) -> None:
    """Print the winners: as JSON lines, as one line, or as tables."""
    import json

    from rich.text import Text

    from secateur.cli.tables import print_comparison
    from secateur.report.figures import packed_plotly

    if as_json:
        for run in found.runs:
            out().print(Text(json.dumps({"kind": "run", **run.to_json()})), soft_wrap=True)
        for winner in found.winners:
            out().print(Text(json.dumps({"kind": "winner", **winner.to_json()})), soft_wrap=True)
        return
    if quiet:
        best = "; ".join(f"{winner.budget}: {winner.strategy or 'none'}" for winner in found.winners)
        out().print(Text(f"{found.model}: {best}. {relative_path(found.files[0])}"), soft_wrap=True)
        return
    print_comparison(found)
    if not packed_plotly():
        out().print(Text("The page has no figures: pip install 'secateur[report]' adds them."), soft_wrap=True)
