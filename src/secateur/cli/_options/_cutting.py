"""Budget, search, and what may be cut."""

from typing import Annotated

import typer

from secateur.cli._options._names import (
    AllocationName,
    AttentionName,
    CombinationName,
    ImportanceName,
    SearchedName,
    StrategyName,
    WeightScheduleName,
    WeightScoreName,
)

_CUT = "Search and cut"
_WIDEST, _MANY = 2**20, 2**31
"""Largest numbers that have a meaning; above them come those that no tensor can hold."""

BudgetText = Annotated[
    str,
    typer.Option(
        help="Upper bounds, such as macs=50%, latency=4ms or 'macs<=20M, latency=60%, size<=2MB'; nonzero=20% prunes "
        "single weights.",
        rich_help_panel=_CUT,
        show_default=False,
    ),
]
Strategy = Annotated[StrategyName, typer.Option(help="How widths are found.", rich_help_panel=_CUT)]
Importance = Annotated[
    ImportanceName | None,
    typer.Option(help="Which channels stay; the strategy's usual one if left out.", rich_help_panel=_CUT),
]
Divisor = Annotated[
    int, typer.Option(help="Widths are multiples of it; 8 or 16 for speed.", min=1, max=_WIDEST, rich_help_panel=_CUT)
]
MinWidth = Annotated[int, typer.Option(help="Fewest channels of an axis.", min=1, max=_WIDEST, rich_help_panel=_CUT)]
MinKept = Annotated[
    float, typer.Option(help="Smallest part of an axis that stays, 0 to 1.", min=0, max=1, rich_help_panel=_CUT)
]
Include = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATTERN",
        help="Cut only what matches: axes, modules or stages by name, such as 'layer2' or '*.conv1'; repeatable.",
        rich_help_panel=_CUT,
    ),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="Do not cut the channels of what matches; repeatable.", rich_help_panel=_CUT),
]
KeepWhole = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATTERN",
        help="Take no weight from the layers that match, not even for channels they read; repeatable.",
        rich_help_panel=_CUT,
    ),
]
Attention = Annotated[
    AttentionName,
    typer.Option(
        help="Cut whole heads, or the same dimensions of every head where the attention's scale allows it.",
        rich_help_panel=_CUT,
    ),
]
AxisDivisor = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN=N", help="--divisor for the axes that match; repeatable.", rich_help_panel=_CUT),
]
AxisMinWidth = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN=N", help="--min-width for the axes that match; repeatable.", rich_help_panel=_CUT),
]
AxisMinKept = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN=X", help="--min-kept for the axes that match; repeatable.", rich_help_panel=_CUT),
]
RemoveBlocks = Annotated[
    float | None,
    typer.Option(
        help="Largest part of the residual blocks that may be removed whole, 0 to 1; 0 cuts channels only. 1 if the "
        "budget limits the latency, else 0.",
        metavar="FRACTION",
        min=0,
        max=1,
        rich_help_panel=_CUT,
    ),
]
Untied = Annotated[
    bool,
    typer.Option(
        "--untied", help="Branches of a residual stream may keep fewer channels than it.", rich_help_panel=_CUT
    ),
]
SearchEpochs = Annotated[
    int | None,
    typer.Option(help="Of --strategy tas or swp; its usual number if left out.", min=1, rich_help_panel=_CUT),
]
SearchOver = Annotated[
    SearchedName | None,
    typer.Option(help="What --strategy tas or swp searches; widths if left out.", rich_help_panel=_CUT),
]
SearchLearningRate = Annotated[
    float | None,
    typer.Option(
        "--search-learning-rate", help="Highest of the weights in --strategy tas or swp.", rich_help_panel=_CUT
    ),
]
SearchCandidates = Annotated[
    int | None,
    typer.Option(
        help="Judged in every stage by --strategy swp; its usual number if left out.", max=_WIDEST, rich_help_panel=_CUT
    ),
]
Combine = Annotated[
    CombinationName | None,
    typer.Option(
        help="How --strategy swp chooses one candidate of every stage; exact if left out.", rich_help_panel=_CUT
    ),
]
StageEnd = Annotated[
    list[str] | None,
    typer.Option(
        metavar="MODULE",
        help="Ends a stage in --strategy swp; repeatable. Found if left out: see inspect.",
        rich_help_panel=_CUT,
    ),
]
Ray = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        help="Judge candidates of --strategy swp on Ray: local, auto (this machine's cluster), or HOST:PORT.",
        rich_help_panel=_CUT,
    ),
]
Calibration = Annotated[
    int, typer.Option(help="Training images for search and healing.", min=1, max=_MANY, rich_help_panel=_CUT)
]
WeightScore = Annotated[
    WeightScoreName | None,
    typer.Option(help="With a bound on nonzero: what single weights are worth.", rich_help_panel=_CUT),
]
WeightAllocation = Annotated[
    AllocationName | None,
    typer.Option(help="The same: which layers lose them.", rich_help_panel=_CUT),
]
WeightSchedule = Annotated[
    WeightScheduleName | None,
    typer.Option(help="The same: when they go in the recovery.", rich_help_panel=_CUT),
]
Dense = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="The same: layers that lose none, by name; repeatable.", rich_help_panel=_CUT),
]
