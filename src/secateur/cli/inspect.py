"""What ``inspect`` prints: axes, what stays whole and why, the reach of a budget, and the tree of modules.

The command that looks at a model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rich.text import Text
from rich.tree import Tree

from secateur.cli import options
from secateur.cli.options import AttentionName
from secateur.cli.output import handle_errors, out, plain_table
from secateur.cost.budget import format_count
from secateur.report.graph_drawing import inside, places, sentence_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from secateur.cost.budget import Cost
    from secateur.graph.graph import Block, ChannelAxis, ChannelGraph
    from secateur.pipeline.inspect import ModelReport
    from secateur.report.graph_drawing import Place


_SHOWN_NAMES = 4
_WIDE = 4096
"""Characters; a tree that goes to a file is never wrapped."""
_ELLIPSIS = "…"


def print_survey(survey: ModelReport, name: str) -> None:
    """The axes of a model, what is frozen and why, and what a budget can ask for."""
    table = plain_table(f"Channel axes of {name}", ("axis", "channels", "may keep", "sites", "seen in"), numbers=0)
    for axis in survey.graph.prunable:
        row = (axis.name, str(axis.size), _widths(survey, axis), str(len(axis.sites)), _few(_modules(axis)))
        table.add_row(*row)
    out().print(table)
    frozen = [axis for axis in survey.graph.axes if axis.frozen_because is not None]
    if frozen:
        table = plain_table("Frozen: stays whole", ("reason", "axes"), numbers=0)
        for reason, names in _grouped(frozen):
            table.add_row(reason, _few(names))
        out().print(table)
    if survey.graph.blocks:
        _print_blocks(survey)
    if len(survey.stages) > 1:
        _print_stages(survey)
    for line in _summary(survey):
        out().print(Text(line), soft_wrap=True)


def _print_blocks(survey: ModelReport) -> None:
    layers, macs = places(survey.graph), max(survey.original.macs, 1)
    title = "Residual blocks: branches that can be removed whole"
    table = plain_table(title, ("block", "layers", "params", "of the MACs", "stays because"), numbers=0)
    for block in survey.graph.blocks:
        mine = inside(block, layers)
        params, share = sum(place.params for place in mine), sum(place.macs for place in mine) / macs
        row = (block.name, _few([place.module for place in mine if place.macs]), format_count(params))
        table.add_row(*row, f"{100 * share:.1f} %", block.kept_because or "")
    out().print(table)


def _print_stages(survey: ModelReport) -> None:
    macs = max(sum(stage.macs for stage in survey.stages), 1)
    title = "Stages: each hands on a single tensor"
    table = plain_table(title, ("stage", "ends at", "axes", "blocks", "of the MACs"), numbers=0)
    for stage in survey.stages:
        row = (stage.name, stage.cut or "the output", str(len(stage.axes)), str(len(stage.blocks)))
        table.add_row(*row, f"{100 * stage.macs / macs:.1f} %")
    out().print(table)


def print_tree(survey: ModelReport, name: str) -> None:
    """The modules of a model: parameters and share of the MACs, and for each layer its channels."""
    graph, root = survey.graph, _Node(name)
    for place in places(graph):
        root.at(place.module).place = place
    for block in graph.blocks:
        root.at(block.name).block = block
    console = out()
    if not console.is_terminal:
        console.width = _WIDE
    console.print(_branch(root, graph, max(root.macs, 1)))


@dataclass
class _Node:
    """A module and what is inside of it."""

    name: str
    place: Place | None = None
    block: Block | None = None
    children: dict[str, _Node] = field(default_factory=dict[str, "_Node"])

    def at(self, module: str) -> _Node:
        """The node of a module inside of this one, made if it is not there."""
        node = self
        for part in module.split(".") if module else ():
            node = node.children.setdefault(part, _Node(part))
        return node

    @property
    def params(self) -> int:
        return (self.place.params if self.place else 0) + sum(child.params for child in self.children.values())

    @property
    def macs(self) -> int:
        return (self.place.macs if self.place else 0) + sum(child.macs for child in self.children.values())


def _branch(node: _Node, graph: ChannelGraph, all_macs: int) -> Tree:
    label = Text(node.name, style="bold")
    label.append(f"  {format_count(node.params)} params, {100 * node.macs / all_macs:.1f} % of MACs", style="dim")
    for words, style in _channels(node.place, graph) if node.place else ():
        label.append(f"  {words}", style=style)
    if node.block:
        label.append("  removable block" if node.block.kept_because is None else "  block, stays", style="cyan")
    tree = Tree(label)
    for child in node.children.values():
        tree.children.append(_branch(child, graph, all_macs))
    return tree


def _channels(place: Place, graph: ChannelGraph) -> Iterable[tuple[str, str]]:
    """The axes of a layer's outputs in words, with a style."""
    for name in place.makes or place.carries:
        axis = graph.by_name[name]
        if axis.frozen_because is None:
            yield f"{name} ({axis.size})", "green"
        else:
            yield f"{name} ({axis.size}){f'. {sentence_of(axis)}' if place.makes else ', whole'}", "yellow"


def _summary(survey: ModelReport) -> tuple[str, ...]:
    small, whole, space = survey.smallest, survey.original, survey.space
    elsewhere = " unless a rule says otherwise" if space.rules else ""
    removable, blocks = len(survey.graph.removable), len(survey.graph.blocks)
    return (
        f"Prunable: {len(survey.graph.prunable)} of {len(survey.graph.axes)} axes; "
        f"{100 * survey.prunable_share:.1f} % of the parameters lie in tensors with a prunable dimension, "
        f"{100 * survey.prunable_macs_share:.1f} % of the MACs in operations with one."
        + (f" Removable: {removable} of {blocks} residual blocks." if blocks else ""),
        f"Reachable: macs {format_count(small.macs)} ({_share(small.macs, whole.macs)}) to {format_count(whole.macs)}; "
        f"params {format_count(small.params)} ({_share(small.params, whole.params)}) to {format_count(whole.params)}. "
        f"Every axis keeps at least {100 * space.min_kept_fraction:.0f} % (--min-kept){elsewhere}."
        + (f" With every removable block gone, down to {_both(survey.shallowest, whole)}." if removable else ""),
        *_never_ran(survey.graph),
    )


def _never_ran(graph: ChannelGraph) -> tuple[str, ...]:
    """Parameters that no run touched: they stay, and may not fit a cut model that takes another way."""
    if not graph.unseen:
        return ()
    modules = list(dict.fromkeys(name.rpartition(".")[0] or name for name in graph.unseen))
    return (
        f"Never ran on this input, in evaluation or in training: {_few(modules)}. They are left as they are; if "
        "another input makes the model run them, keep the channels that they read whole (--keep-whole).",
    )


def _both(cost: Cost, whole: Cost) -> str:
    return (
        f"macs {format_count(cost.macs)} ({_share(cost.macs, whole.macs)}), "
        f"params {format_count(cost.params)} ({_share(cost.params, whole.params)}) (--remove-blocks)"
    )


def _grouped(frozen: Sequence[ChannelAxis]) -> list[tuple[str, list[str]]]:
    """Reasons with the names of their axes; reasons that differ only in the names of layers count as one."""
    groups: dict[str, list[ChannelAxis]] = {}
    for axis in frozen:
        groups.setdefault(_without_names(axis), []).append(axis)
    return [
        (
            reason if len({axis.frozen_because for axis in axes}) > 1 else axes[0].frozen_because or "",
            [a.name for a in axes],
        )
        for reason, axes in groups.items()
    ]


def _without_names(axis: ChannelAxis) -> str:
    own = {name for module in (*_modules(axis), axis.name) for name in (module, module.rpartition(".")[0]) if name}
    words = (axis.frozen_because or "").split(" ")
    return " ".join(_ELLIPSIS if word in own else word for word in words)


def _widths(survey: ModelReport, axis: ChannelAxis) -> str:
    widths = survey.space.widths(axis).tolist()
    if len(widths) == 1:
        return f"all {widths[0]}"
    step = widths[1] - widths[0]
    return f"{widths[0]} to {widths[-1]}" + (f" by {step}" if step > 1 and len(widths) > 2 else "")


def _modules(axis: ChannelAxis) -> list[str]:
    return list(dict.fromkeys(site.tensor.rpartition(".")[0] or site.tensor for site in axis.sites))


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
    return ", ".join(names[:_SHOWN_NAMES]) + more


def _share(part: float, whole: float) -> str:
    return f"{100 * part / max(whole, 1):.1f} %"


@handle_errors
def inspect(
    *,
    model: options.Model,
    weights: options.Weights = None,
    data: options.MaybeData = None,
    image_size: options.ImageSize = None,
    divisor: options.Divisor = 1,
    min_width: options.MinWidth = 1,
    min_kept: options.MinKept = 0.25,
    include: options.Include = None,
    exclude: options.Exclude = None,
    keep_whole: options.KeepWhole = None,
    axis_divisor: options.AxisDivisor = None,
    axis_min_width: options.AxisMinWidth = None,
    axis_min_kept: options.AxisMinKept = None,
    attention: options.Attention = AttentionName.DIMENSIONS,
    untied: options.Untied = False,
    tree: options.ShowTree = False,
    draw: options.Draw = None,
    as_json: options.AsJson = False,
    trust_source: options.TrustSource = False,
    seed: options.Seed = 0,
    debug: options.Debug = False,
) -> None:
    """Show what could be cut: the channel axes, what is frozen and why, and the reachable costs."""
    import json

    from secateur.cli import _words as _choices
    from secateur.cli.output import print_written
    from secateur.cli.shared import Inputs
    from secateur.pipeline.inspect import inspect_model
    from secateur.report.graph_drawing import check_drawing, write_drawing
    from secateur.search.space import SearchSpace

    if draw is not None:
        check_drawing(draw)
    choices = _choices.choices_of(include, exclude, keep_whole)
    space = SearchSpace(min_width, divisor, min_kept, _choices.rules_of(axis_divisor, axis_min_width, axis_min_kept))
    inputs = Inputs(model, weights, data, image_size=image_size, trust_source=trust_source, seed=seed)
    heads = _choices.heads_of(attention)
    branches = _choices.branches_of(untied)
    found = inspect_model(
        inputs.opened.model, inputs.example(1), choices=choices, heads=heads, branches=branches, space=space
    )
    name = inputs.opened.name
    if as_json:
        out().print(Text(json.dumps({"model": name, **found.to_json()}, indent=1)), soft_wrap=True)
    elif tree:
        print_tree(found, name)
    else:
        print_survey(found, name)
    if draw is not None:
        write_drawing(draw, found.graph, name)
    if not as_json:
        print_written([draw] if draw is not None else [])
    if draw is None and not as_json:
        out().print(Text("Wrote nothing: inspect only looks."))
