"""The tables that commands print: plain numbers with their units."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean

from rich import box
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from secateur.cli.output import end_with_error, out, print_json, relative_path
from secateur.cost.budget import Cost, format_cost, format_count
from secateur.cost.measure import Latency
from secateur.graph.graph import Block, ChannelAxis, ChannelGraph
from secateur.pipeline.config import CompressResult, TrainResult
from secateur.pipeline.inspect import ModelReport
from secateur.report.comparison import Comparison
from secateur.report.graph_layers import GraphLayer, frozen_sentence, layers_of_block, list_layers
from secateur.report.html import headline
from secateur.report.run import Check, RunReport

_SHOWN_NAMES = 4
_WIDE = 4096
"""Characters; a tree that goes to a file is never wrapped."""
_ELLIPSIS = "…"


def show(result: CompressResult | TrainResult, *, quiet: bool = False, as_json: bool = False) -> None:
    """Print the tables of a finished run, one line of it, or JSON; end with an error if a check failed."""
    if as_json:
        print_json("result", _fields(result))
    elif quiet:
        page = next((path for path in result.files if path.name == "report.html"), None)
        where = "" if page is None else f" {relative_path(page)}"
        out().print(Text(headline(result.report).replace("\N{NO-BREAK SPACE}", " ") + where), soft_wrap=True)
    else:
        _show_tables(result)
    if result.failed:
        raise end_with_error("; ".join(result.failed))


def _fields(result: CompressResult | TrainResult) -> dict[str, object]:
    """The numbers of a finished run by name."""
    report = result.report
    return {
        "model": report.model,
        "budget": report.budget,
        "before": asdict(report.before),
        "after": asdict(report.after),
        "latency": [asdict(each) for each in report.latency],
        "steps": [{"name": step.name, "score": step.score.value, "n": step.score.n} for step in report.steps],
        "checks": [asdict(check) for check in report.checks],
        "warnings": list(report.warnings),
        "files": [str(path) for path in result.files],
    }


def _show_tables(result: CompressResult | TrainResult) -> None:
    print_before_after(result.report)
    print_steps(result.report)
    print_exports(result.report)
    print_checks(result.report.checks)
    print_written(result.files)


def print_before_after(report: RunReport) -> None:
    """Print accuracy, MACs, parameters, file size and latency of the original and the compressed model."""
    title = ", ".join(filter(None, (report.model, report.budget)))
    table = plain_table(title, ("", "before", "after", "change"), numbers=3)
    before, after = report.before, report.after
    if before.score is not None and after.score is not None:
        change = after.score.metric.change(before.score.value, after.score.value)
        name = f"test {after.score.metric.words} (n = {after.score.n})"
        table.add_row(name, before.score.text, after.score.text, change)
    for name, old, new in (("MACs", before.macs, after.macs), ("parameters", before.params, after.params)):
        table.add_row(name, format_count(old), format_count(new), _relative(old, new))
    if after.weights != after.params:
        counts = format_count(before.weights), format_count(after.weights)
        table.add_row("non-zero parameters", *counts, _relative(before.weights, after.weights))
    if before.size_bytes is not None and after.size_bytes is not None:
        sizes = f"{format_count(before.size_bytes)}B", f"{format_count(after.size_bytes)}B"
        table.add_row("weights file", *sizes, _relative(before.size_bytes, after.size_bytes))
    for record in report.latency:
        name = f"latency, {record.runtime}, {record.threads} thread, batch {record.batch_size}"
        times = f"{1e3 * record.before[1]:.3g} ms", f"{1e3 * record.after[1]:.3g} ms"
        table.add_row(name, *times, _speed(record.speedup[1]))
    if report.efficiency is not None:
        efficiency = [f"{value:.2f}" for value in report.efficiency]
        table.add_row("accuracy kept / non-zero parameters kept (Performance Efficiency)", "1.00", efficiency[0], "")
        table.add_row("accuracy kept / MACs kept", "1.00", efficiency[1], "")
    out().print(table)


def _speed(speedup: float) -> str:
    return f"{speedup:.2f} x the speed" if speedup >= 1 else f"{100 * (1 / speedup - 1):.0f} % slower"


def print_speed(report: RunReport) -> None:
    """Print what became of the MACs and of the time, in one sentence."""
    if report.latency:
        first, left = report.latency[0], 100 * report.after.macs / max(report.before.macs, 1)
        said = f"With {left:.0f} % of the MACs, it takes {1e3 * first.after[1]:.3g} ms instead of "
        said += f"{1e3 * first.before[1]:.3g} ms in {first.runtime}: {_speed(first.speedup[1])}."
        out().print(Text(said), soft_wrap=True)


def print_steps(report: RunReport) -> None:
    """Print the score after every step."""
    way = " -> ".join(f"{step.name} {step.score.text}" for step in report.steps)
    out().print(Text(f"Test {report.metric.words}: {way}"), soft_wrap=True)


def print_exports(report: RunReport) -> None:
    """Print the files for other runtimes: sizes, and for 8-bit integers accuracy and time beside the float file."""
    if not report.exports:
        return
    columns = ("file", "size", "difference", "accuracy", "in float", "same answer", "time", "float file's")
    rows: list[tuple[str, ...]] = []
    for file in report.exports:
        accuracies = (file.accuracy, file.float_accuracy)
        shares = [None if each is None else each.value for each in accuracies] + [file.agreement]
        times = (None, None) if file.latency is None else (file.latency.after[1], file.latency.before[1])
        row = (
            file.name,
            f"{format_count(file.size_bytes)}B",
            "" if file.difference is None else f"{file.difference:.1e}",
            *("" if share is None else f"{100 * share:.2f} %" for share in shares),
            *("" if seconds is None else f"{1e3 * seconds:.3g} ms" for seconds in times),
        )
        rows.append(row)
    # Columns that no file has anything for are left out.
    shown = [at for at in range(len(columns)) if any(row[at] for row in rows)]
    table = plain_table("Files for other runtimes", tuple(columns[at] for at in shown), numbers=len(shown) - 1)
    for row in rows:
        table.add_row(*(row[at] for at in shown))
    out().print(table)


def print_checks(checks: Iterable[Check]) -> None:
    """Print what was verified."""
    table = plain_table("Checks", ("check", "", "largest difference", "detail"), numbers=0)
    for check in checks:
        difference = ""
        if check.max_rel is not None and check.tolerance is not None:
            difference = f"{check.max_rel:.1e} (at most {check.tolerance:.0e})"
        table.add_row(
            check.name, "passed" if check.passed else Text("FAILED", style="bold red"), difference, check.detail
        )
    out().print(table)


def print_written(paths: Iterable[Path]) -> None:
    """Print what was written, with sizes."""
    for path in paths:
        out().print(Text(f"Wrote {relative_path(path)} ({format_count(path.stat().st_size)}B)"), soft_wrap=True)


def print_report(report: ModelReport, name: str) -> None:
    """Print the axes of a model, what is frozen and why, and what a budget can ask for."""
    table = plain_table(f"Channel axes of {name}", ("axis", "channels", "may keep", "sites", "seen in"), numbers=0)
    for axis in report.graph.prunable:
        row = (axis.name, str(axis.size), _widths(report, axis), str(len(axis.sites)), _few(_modules(axis)))
        table.add_row(*row)
    out().print(table)
    frozen = [axis for axis in report.graph.axes if axis.frozen_because is not None]
    if frozen:
        table = plain_table("Frozen: stays whole", ("reason", "axes"), numbers=0)
        for reason, names in _grouped(frozen):
            table.add_row(reason, _few(names))
        out().print(table)
    if report.graph.blocks:
        _print_blocks(report)
    if len(report.stages) > 1:
        _print_stages(report)
    for line in _summary(report):
        out().print(Text(line), soft_wrap=True)
    if report.denormals.counts:
        out().print(Text(f"{report.denormals}. compress --flush-denormals makes them 0."), soft_wrap=True)


def _print_blocks(report: ModelReport) -> None:
    layers, macs = list_layers(report.graph), max(report.original.macs, 1)
    title = "Residual blocks: branches that can be removed whole"
    table = plain_table(title, ("block", "layers", "params", "of the MACs", "stays because"), numbers=0)
    for block in report.graph.blocks:
        mine = layers_of_block(block, layers)
        params, share = sum(place.params for place in mine), sum(place.macs for place in mine) / macs
        row = (block.name, _few([place.module for place in mine if place.macs]), format_count(params))
        table.add_row(*row, f"{100 * share:.1f} %", block.kept_because or "")
    out().print(table)


def _print_stages(report: ModelReport) -> None:
    macs = max(sum(stage.macs for stage in report.stages), 1)
    title = "Stages: each hands on a single tensor"
    table = plain_table(title, ("stage", "ends at", "axes", "blocks", "of the MACs"), numbers=0)
    for stage in report.stages:
        row = (stage.name, stage.cut or "the output", str(len(stage.axes)), str(len(stage.blocks)))
        table.add_row(*row, f"{100 * stage.macs / macs:.1f} %")
    out().print(table)


def print_tree(report: ModelReport, name: str) -> None:
    """Print the modules of a model: parameters and share of the MACs, and for each layer its channels."""
    graph, root = report.graph, _Node(name)
    for place in list_layers(graph):
        root.at(place.module).place = place
    for block in graph.blocks:
        root.at(block.name).block = block
    console = out()
    if not console.is_terminal:
        console.width = _WIDE
    console.print(_branch(root, graph, max(root.macs, 1)))


@dataclass
class _Node:
    """A module and its submodules."""

    name: str
    place: GraphLayer | None = None
    block: Block | None = None
    children: dict[str, "_Node"] = field(default_factory=dict[str, "_Node"])

    def at(self, module: str) -> "_Node":
        """Return the node of a module inside this one; it is made if it is absent."""
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


def _channels(place: GraphLayer, graph: ChannelGraph) -> Iterable[tuple[str, str]]:
    """Describe the axes of a layer's outputs, each with a style."""
    for name in place.makes or place.carries:
        axis = graph.by_name[name]
        if axis.frozen_because is None:
            yield f"{name} ({axis.size})", "green"
        else:
            yield f"{name} ({axis.size}){f'. {frozen_sentence(axis)}' if place.makes else ', whole'}", "yellow"


def _summary(report: ModelReport) -> tuple[str, ...]:
    small, whole, space = report.smallest, report.original, report.space
    elsewhere = " unless a rule says otherwise" if space.rules else ""
    removable, blocks = len(report.graph.removable), len(report.graph.blocks)
    return (
        f"Prunable: {len(report.graph.prunable)} of {len(report.graph.axes)} axes; "
        f"{100 * report.prunable_share:.1f} % of the parameters lie in tensors with a prunable dimension, "
        f"{100 * report.prunable_macs_share:.1f} % of the MACs in operations with one."
        + (f" Removable: {removable} of {blocks} residual blocks." if blocks else ""),
        f"Reachable: macs {format_count(small.macs)} ({_share(small.macs, whole.macs)}) to {format_count(whole.macs)}; "
        f"params {format_count(small.params)} ({_share(small.params, whole.params)}) to {format_count(whole.params)}. "
        f"Every axis keeps at least {100 * space.min_kept_fraction:.0f} % (--min-kept){elsewhere}."
        + (f" With every removable block gone, down to {_both(report.shallowest, whole)}." if removable else ""),
        *_never_ran(report.graph),
        *filter(None, (report.graph.uncounted_text,)),
    )


def _never_ran(graph: ChannelGraph) -> tuple[str, ...]:
    """Name parameters that no run touched: they stay, and may not fit a cut model that runs them after all."""
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
    """Group axes by reason; reasons that differ only in the names of layers count as one."""
    groups: dict[str, list[ChannelAxis]] = {}
    for axis in frozen:
        groups.setdefault(_without_names(axis), []).append(axis)
    same = {reason: len({axis.frozen_because for axis in axes}) == 1 for reason, axes in groups.items()}
    return [
        (axes[0].frozen_because or "" if same[reason] else reason, [axis.name for axis in axes])
        for reason, axes in groups.items()
    ]


def _without_names(axis: ChannelAxis) -> str:
    own = {name for module in (*_modules(axis), axis.name) for name in (module, module.rpartition(".")[0]) if name}
    words = (axis.frozen_because or "").split(" ")
    return " ".join(_ELLIPSIS if word in own else word for word in words)


def _widths(report: ModelReport, axis: ChannelAxis) -> str:
    widths = report.space.widths(axis).tolist()
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


def print_latencies(names: Sequence[str], shapes: Sequence[Sequence[int]], found: Sequence[Latency]) -> None:
    """Print the latency of each model, and its speed beside the first."""
    first = found[0]
    columns = ("model", "input", "median", "quartiles", "spread", "speed of the first")
    table = plain_table(f"Latency of one pass, {first.runtime}", columns, numbers=4)
    for name, shape, latency in zip(names, shapes, found, strict=True):
        times = latency.seconds
        lower, median, upper = (format_cost("latency_s", each) for each in (times.lower, times.median, times.upper))
        row = (name, "x".join(map(str, shape)), median, f"{lower} to {upper}", f"{100 * times.spread:.1f} %")
        table.add_row(*row, f"{first.seconds.median / times.median:.2f} x")
    out().print(table)
    load = "unknown" if first.load is None else f"{first.load[0]:g} before, {first.load[1]:g} after (this run included)"
    threads = f"{first.threads} thread{'s' if first.threads > 1 else ''}"
    how = f"Batch {first.batch_size}, {threads}, {first.rounds} rounds in turns, {first.clock}."
    where = f"Load average {load}; {first.machine['cores']} cores, {first.machine['cpu']}."
    out().print(Text(f"{how} {where}"), soft_wrap=True)


def print_comparison(found: Comparison) -> None:
    """Print the winners of a comparison, the mean of each strategy at each budget, and what was written."""
    metric = found.metric
    columns = ("budget", "strategy", "seeds", f"validation {metric.words}", "test", "MACs", "latency", "s")
    table = plain_table(f"Strategies on {found.model}, means over the seeds", columns, numbers=6)
    best = {(winner.budget, winner.strategy) for winner in found.winners}
    for budget, strategy in dict.fromkeys((run.budget, run.strategy) for run in found.runs):
        mine = [run for run in found.runs if (run.budget, run.strategy) == (budget, strategy)]
        mine = [run for run in mine if run.round == max(each.round for each in mine)]
        good = [run for run in mine if run.ok]
        if not good:
            table.add_row(budget, strategy, f"0 of {len(mine)}", Text("failed", style="bold red"), "", "", "", "")
            continue
        times = [run.latency_s for run in good if run.latency_s is not None]
        table.add_row(
            budget,
            Text(strategy, style="bold green" if (budget, strategy) in best else ""),
            f"{len(good)} of {len(mine)}" if len(good) < len(mine) else str(len(good)),
            metric.text(mean(run.score for run in good)),
            metric.text(mean(run.test_score for run in good)),
            format_count(mean(run.macs for run in good)),
            format_cost("latency_s", mean(times)) if times else "",
            f"{mean(run.seconds for run in good):.0f}",
        )
    out().print(table)
    for winner in found.winners:
        out().print(Text(winner.sentence(metric)), soft_wrap=True)
    for note in found.notes:
        out().print(Text(f"Note: {note}", style="yellow"), soft_wrap=True)
    for path in found.files:
        out().print(Text(f"Wrote {path}"), soft_wrap=True)


def plain_table(title: str, columns: tuple[str, ...], *, numbers: int) -> Table:
    """Return an empty table; the last ``numbers`` columns are aligned to the right."""
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD)
    for place, column in enumerate(columns):
        right = place >= len(columns) - numbers
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    return table


def _relative(before: float, after: float) -> str:
    return f"{100 * (after / before - 1):+.1f} %" if before else ""
