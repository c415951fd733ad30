"""Interactive figures for pages: plain data that plotly draws, and the script that draws it, packed once into a page.

A figure is a mapping with ``data`` and ``layout``, as `plotly.graph_objects.Figure` takes it, so that it can also be
written as PNG or SVG, by `Figure.write_image` in Python and by the camera button on a page. Colors are words such as
``@after``: the page replaces them with those of its style sheet, for light, dark and print alike. Without the package
plotly pages have their tables, and no script.
"""

import base64
import gzip
import importlib.util
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from secateur._files import write_atomic
from secateur._provenance import sha256_of
from secateur._text import PAGE, html_text, visible
from secateur.errors import ExportError
from secateur.report import units
from secateur.report.comparison import ComparedRun, Comparison, unbeaten_runs
from secateur.report.run import LayerCost, LayerWidth, RunReport, TrainedEpoch
from secateur.tasks.base import Metric
from secateur.tasks.outcomes import ClassChange

COSTS = (
    ("macs", "MACs", units.count),
    ("params", "Parameters", units.count),
    ("latency_s", "Latency", units.duration),
    ("size_bytes", "File size", units.size),
)
"""Field of `ComparedRun`, name, and how it is shown."""
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "x", "star-triangle-up")
_COLORS = 8
_MOST_LAYERS = 14
"""Layers in a hover text; more do not fit on a screen."""


@dataclass(frozen=True)
class Figure:
    """A figure of a page.

    Attributes:
        name: Its identifier on the page.
        label: What it shows, in a sentence, for those who do not see it.
        data: The traces.
        layout: Axes, legend, shapes.
        height: Pixels.
    """

    name: str
    label: str
    data: tuple[Mapping[str, Any], ...]
    layout: Mapping[str, Any]
    height: int = 340

    def to_plotly(self) -> dict[str, Any]:
        """Return what ``plotly.graph_objects.Figure`` takes, with the colors of the light style."""
        return _colored({"data": list(self.data), "layout": dict(self.layout)})

    def write_image(self, path: Path | str, *, width: int = 900) -> Path:
        """Write the figure as a picture, with the colors of the light style.

        Args:
            path: Where, ending in ``.png`` or ``.svg``; replaced atomically.
            width: Pixels of an SVG; a PNG has twice as many, for sharp print. The height is that of the figure.

        Returns:
            The absolute path of the file.

        Raises:
            ImportError: If the packages plotly and kaleido are not installed.
            ExportError: If the path ends in something else, or kaleido finds no browser to draw with.
        """
        path = Path(path).absolute()
        if path.suffix.lower() not in _PICTURES:
            raise ExportError(f"`path` must end in {' or '.join(_PICTURES)}; got {path.name!r}. Rename it.")
        missing = [name for name in ("plotly", "kaleido") if importlib.util.find_spec(name) is None]
        if missing:
            raise ImportError(
                f"`write_image` needs {' and '.join(missing)}, which is not installed. Run: pip install "
                "'secateur[figures]'. The camera button above a figure of report.html writes an SVG without it."
            )
        import plotly.io

        figure = self.to_plotly()
        paper = {"paper_bgcolor": _LIGHT["@card"], "plot_bgcolor": _LIGHT["@card"], "font": {"color": _LIGHT["@ink"]}}
        grid = {"gridcolor": _LIGHT["@line"], "linecolor": _LIGHT["@line"], "zerolinecolor": _LIGHT["@soft"]}
        axes = {
            name: {**grid, "automargin": True, **axis}
            for name, axis in figure["layout"].items()
            if name[1:].startswith("axis")
        }
        figure["layout"] = {**figure["layout"], **paper, **axes, "margin": {"l": 60, "r": 30, "t": 40, "b": 60}}
        kind = path.suffix.lower().removeprefix(".")
        scale = 2 if kind == "png" else 1
        try:
            content = plotly.io.to_image(figure, format=kind, width=width, height=self.height, scale=scale)
        except Exception as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ExportError(
                f"kaleido must find Chrome or Chromium to draw with; it stopped with: {first} Install one "
                "(plotly_get_chrome, or your system's package chromium), or use the camera button of report.html."
            ) from error
        write_atomic(path, content)
        return path

    @property
    def json(self) -> str:
        """The figure as JSON that is safe inside of a page."""
        return script_json({"data": list(self.data), "layout": dict(self.layout)})


_PICTURES = (".png", ".svg")
_LIGHT = {
    "@ink": "#1b211c",
    "@soft": "#58625a",
    "@line": "#dfe4dd",
    "@card": "#ffffff",
    "@page": "#f6f7f4",
    "@after": "#1d7f4e",
    "@before": "#c3cbc2",
    "@bad": "#b3261e",
    "@warn": "#9a5b00",
    **dict(
        zip(
            (f"@c{number}" for number in range(_COLORS)),
            ("#1d7f4e", "#2563b8", "#b45309", "#8b3fa8", "#0e7490", "#be185d", "#4d5b00", "#5b5bd6"),
            strict=True,
        )
    ),
}


def _colored(thing: Any) -> Any:
    if isinstance(thing, Mapping):
        return {name: _colored(value) for name, value in thing.items()}
    if isinstance(thing, list | tuple):
        return [_colored(value) for value in thing]
    return _LIGHT.get(thing, thing) if isinstance(thing, str) else thing


def script_json(data: Any) -> str:
    """Return JSON without characters that could end a script or a comment of a page."""
    text = json.dumps(_finite(data), separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _finite(thing: Any) -> Any:
    if isinstance(thing, Mapping):
        return {name: _finite(value) for name, value in thing.items()}
    if isinstance(thing, list | tuple):
        return [_finite(value) for value in thing]
    return None if isinstance(thing, float) and not math.isfinite(thing) else thing


@cache
def packed_plotly() -> str:
    """Return plotly's script, compressed, as text for a page; empty if the package plotly is not installed.

    The page unpacks it. As it is, it would be larger than everything else together.
    """
    found = importlib.util.find_spec("plotly")
    places = list(found.submodule_search_locations or ()) if found else []
    for place in places:
        script = Path(place) / "package_data" / "plotly.min.js"
        if script.is_file():
            return base64.b64encode(gzip.compress(script.read_bytes(), 9, mtime=0)).decode()
    return ""


@dataclass(frozen=True)
class PageScript:
    """The scripts of a page: plotly, packed, and ours; and the word that allows them to run and nothing else."""

    plotly: str
    ours: str
    nonce: str


def page_script() -> PageScript | None:
    """Return the scripts of a page with figures; None if the package plotly is not installed."""
    packed = packed_plotly()
    if not packed:
        return None
    ours = (files("secateur.report") / "figures.js").read_text(encoding="utf-8")
    return PageScript(packed, ours, sha256_of(packed + ours)[:24])


def report_figures(run: RunReport) -> dict[str, Figure]:
    """Return the figures of the report of a run by name: those of the page, whether or not plotly is installed.

    They are ``kept``, ``layer-macs``, ``layer-seconds``, ``training``, ``classes`` and ``sensitivity``, as far as the
    run has their numbers.
    """
    found = (
        width_figure(run.widths) if run.widths else None,
        layer_macs_figure(run.layers),
        layer_seconds_figure(run.layers, run.other_seconds),
        training_figure(run.training, run.original_validation_score, run.metric),
        class_figure(run.classes),
        sensitivity_figure(run.sensitivity),
    )
    return {figure.name: figure for figure in found if figure is not None}


def pareto_figure(comparison: Comparison) -> Figure:
    """Draw accuracy against a cost, all four costs in one figure: the page switches between them.

    ``layout.meta`` holds, for each cost, the values of each trace and the title of its axis.
    """
    metric, runs = comparison.metric, comparison.runs
    strategies = list(dict.fromkeys(run.strategy for run in runs if run.ok))
    budgets = list(dict.fromkeys(run.budget for run in runs))
    groups = [[at for at, run in enumerate(runs) if run.ok and run.strategy == name] for name in strategies]
    costs = [cost for cost in COSTS if any(run.ok and getattr(run, cost[0]) is not None for run in runs)]
    switch: list[dict[str, Any]] = []
    for field, title, words in costs:
        front = unbeaten_runs(runs, field, metric)
        values = [[getattr(runs[at], field) for at in group] for group in groups]
        values += [[getattr(runs[at], field) for at in front], [getattr(comparison.original, field)]]
        heights = [[_shown(metric, runs[at].score) for at in front]]
        switch.append({"title": _axis_title(title, words), "x": values, "front": heights[0]})
    first = switch[0] if switch else {"x": [[] for _ in range(len(groups) + 2)], "title": "", "front": []}
    traces: list[dict[str, Any]] = []
    for number, (name, group) in enumerate(zip(strategies, groups, strict=True)):
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": html_text(name),
                "x": first["x"][number],
                "y": [_shown(metric, runs[at].score) for at in group],
                "text": [hover_text(runs[at], metric) for at in group],
                "customdata": group,
                "hovertemplate": "%{text}<extra></extra>",
                "marker": {
                    "size": 11,
                    "color": f"@c{number % _COLORS}",
                    "symbol": [_SYMBOLS[budgets.index(runs[at].budget) % len(_SYMBOLS)] for at in group],
                    "line": {"width": 1, "color": "@card"},
                },
            }
        )
    traces.append(
        {
            "type": "scatter",
            "mode": "lines",
            "name": "not beaten",
            "x": first["x"][len(groups)],
            "y": first["front"],
            "line": {"shape": "hv", "color": "@soft", "width": 1.5, "dash": "dot"},
            "hoverinfo": "skip",
        }
    )
    original = comparison.original
    traces.append(
        {
            "type": "scatter",
            "mode": "markers",
            "name": "original",
            "x": first["x"][len(groups) + 1],
            "y": [_shown(metric, original.score)],
            "text": [hover_text(original, metric)],
            "hovertemplate": "%{text}<extra></extra>",
            "marker": {"size": 14, "symbol": "star", "color": "@ink"},
        }
    )
    layout = {
        "xaxis": {"title": {"text": first["title"]}, "rangemode": "tozero", "tickformat": "~s"},
        "yaxis": {"title": {"text": _score_title("Validation", metric)}},
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        "hovermode": "closest",
        "meta": {"switch": switch, "original": len(groups) + 1, "front": len(groups)},
    }
    label = (
        f"Validation {metric.words} of {sum(map(len, groups))} runs against their cost, one color for each strategy "
        "and one shape for each budget; the table of runs has the numbers."
    )
    return Figure("pareto", label, tuple(traces), layout, 480)


def hover_text(run: ComparedRun, metric: Metric) -> str:
    """Describe a run and its architecture, in plotly's lines."""
    lines = [f"<b>{html_text(run.name if run.budget else run.strategy)}</b>", metric.text(run.score) + " validation"]
    if math.isfinite(run.test_score):
        lines[-1] += f", {metric.text(run.test_score)} test"
    shown = [f"{words(getattr(run, field))} {name}" for field, name, words in COSTS if getattr(run, field) is not None]
    lines.append(", ".join(shown))
    layers = [(name, old, new) for name, (old, new) in run.widths.items() if new != old]
    lines += [f"{html_text(name)}: {new} of {old}" for name, old, new in layers[:_MOST_LAYERS]]
    if len(layers) > _MOST_LAYERS:
        lines.append(f"and {len(layers) - _MOST_LAYERS} more; a click pins them all")
    if run.removed_blocks:
        lines.append(f"without {html_text(', '.join(run.removed_blocks))}")
    return "<br>".join(lines)


def compared_widths(comparison: Comparison, runs: Sequence[ComparedRun]) -> Figure | None:
    """Draw the kept part of every layer of some runs, each layer on a scale of its own."""
    names = list(dict.fromkeys(name for run in runs for name in run.widths))
    if not names or not runs:
        return None
    rows = [html_text(f"{run.strategy}, {run.budget}") for run in runs]
    kept: list[list[float | None]] = []
    words: list[list[str]] = []
    for run in runs:
        widths = [run.widths.get(name) for name in names]
        kept.append([None if pair is None else 100 * pair[1] / max(pair[0], 1) for pair in widths])
        texts = ["not there" if pair is None else f"{pair[1]} of {pair[0]} channels" for pair in widths]
        words.append([f"{html_text(name)}<br>{text}" for name, text in zip(names, texts, strict=True)])
    heat = {
        "type": "heatmap",
        "x": list(range(1, len(names) + 1)),
        "y": list(range(len(rows))),
        "z": kept,
        "text": words,
        "hovertemplate": "%{text}, %{z:.0f} %<extra></extra>",
        "zmin": 0,
        "zmax": 100,
        "xgap": 1,
        "ygap": 2,
        "colorscale": [[0, "@card"], [1, "@after"]],
        "colorbar": {"title": {"text": "kept, %"}, "thickness": 12, "outlinewidth": 0},
    }
    layout = {
        "xaxis": {"title": {"text": "Layers in order of execution"}, "showgrid": False},
        "yaxis": {
            "tickmode": "array",
            "tickvals": list(range(len(rows))),
            "ticktext": rows,
            "autorange": "reversed",
            "automargin": True,
            "showgrid": False,
        },
    }
    label = f"Kept part of the channels of {len(names)} layers in {len(rows)} networks; pinned runs have the numbers."
    return Figure("widths", label, (heat,), layout, 130 + 34 * len(rows))


def width_figure(widths: Sequence[LayerWidth]) -> Figure:
    """Draw what every layer of one network keeps, in percent of its own channels."""
    names = [html_text(width.name) for width in widths]
    kept = [100 * width.after / max(width.before, 1) for width in widths]
    texts = [f"{name}<br>{w.after} of {w.before} channels" for name, w in zip(names, widths, strict=True)]
    places = list(range(1, len(names) + 1))
    bars = {
        "type": "bar",
        "x": places,
        "y": kept,
        "hovertext": texts,
        "hovertemplate": "%{hovertext}, %{y:.0f} %<extra></extra>",
        "marker": {"color": "@after"},
        "name": "kept",
    }
    gone = {
        "type": "bar",
        "x": places,
        "y": [100 - each for each in kept],
        "hoverinfo": "skip",
        "marker": {"color": "@before"},
        "name": "removed",
    }
    layout = {
        "barmode": "stack",
        "bargap": 0.25,
        "xaxis": {"title": {"text": "Layers in order of execution"}, "showgrid": False},
        "yaxis": {"title": {"text": "Channels kept, %"}, "range": [0, 100]},
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
    }
    return Figure("kept", "Kept channels of each layer in percent; the table has the numbers.", (bars, gone), layout)


_MOST_BARS = 40
"""Layers with bars of their own; the cheapest of more share one."""
_MOST_LETTERS = 24
_NOISE = 1.1
"""A time that grew by less may be chance."""


def layer_macs_figure(layers: Sequence[LayerCost]) -> Figure | None:
    """Draw the MACs of every layer before and after; None if none has any."""
    costly = _costly(layers)
    rows = [_Pair(layer_name(each), *each.macs, own_bar=each in costly) for each in layers if any(each.macs)]
    if not rows:
        return None
    label = f"MACs of {len(rows)} layers before and after; the table has the numbers."
    return _paired("layer-macs", label, rows, title="MACs of one input", words=units.count, scale=1.0)


def layer_seconds_figure(layers: Sequence[LayerCost], other: tuple[float, float] | None) -> Figure | None:
    """Draw the milliseconds of every layer before and after, the rest as one more; None if none was measured."""
    costly = _costly(layers)
    rows = [
        _Pair(layer_name(each), *each.seconds, own_bar=each in costly)
        for each in layers
        if each.seconds is not None and any(each.seconds)
    ]
    if not rows:
        return None
    label = f"Milliseconds of {len(rows)} layers and of everything else before and after; the table has the numbers."
    rest = () if other is None else (_Pair("other", *other),)
    title = "Milliseconds of one pass"
    return _paired("layer-seconds", label, rows, title=title, words=units.duration, scale=1000.0, rest=rest)


def layer_name(layer: LayerCost) -> str:
    """Return the name of a layer in words."""
    return layer.name or "the model itself"


@dataclass(frozen=True)
class _Pair:
    """A cost before and after; ``own_bar`` is whether it is drawn by itself."""

    name: str
    before: float
    after: float
    own_bar: bool = True


def _costly(layers: Sequence[LayerCost]) -> set[LayerCost]:
    """The layers with the largest parts of all MACs or of all time: the same ones in both figures."""
    macs = sum(layer.macs[0] for layer in layers) or 1
    spent = math.fsum(layer.seconds[0] for layer in layers if layer.seconds is not None) or 1.0

    def share(layer: LayerCost) -> float:
        return max(max(layer.macs) / macs, max(layer.seconds or (0.0,)) / spent)

    return set(sorted(layers, key=share, reverse=True)[:_MOST_BARS])


def _paired(
    name: str,
    label: str,
    rows: Sequence[_Pair],
    *,
    title: str,
    words: Callable[[float], str],
    scale: float,
    rest: tuple[_Pair, ...] = (),
) -> Figure:
    """Draw pairs of bars from top to bottom, then the sum of those without bars in words, then the rest."""
    shown = [*(row for row in rows if row.own_bar), *rest]
    more = [row for row in rows if not row.own_bar]
    noise = _NOISE if words is units.duration else 1.0
    groups = [
        ("original", "@before", "before", list(range(len(shown))), [row.before for row in shown]),
        ("compressed", "@after", "after", [at for at, row in enumerate(shown) if row.after <= noise * row.before], []),
        ("grew", "@warn", "after", [at for at, r in enumerate(shown) if r.after > noise * r.before], []),
    ]
    traces = [
        {
            "type": "bar",
            "orientation": "h",
            "name": legend,
            "x": [scale * value for value in (values or [shown[at].after for at in places])],
            "y": places,
            "offsetgroup": group,
            "hovertext": [
                f"{html_text(visible(shown[at].name, keep=PAGE))}: {words(shown[at].before)} → {words(shown[at].after)}"
                for at in places
            ],
            "hovertemplate": "%{hovertext}<extra></extra>",
            "marker": {"color": color},
        }
        for legend, color, group, places, values in groups
        if places
    ]
    names = [_tail(visible(row.name, keep=PAGE)) for row in shown] + [f"{len(more)} more"] * bool(more)
    layout: dict[str, Any] = {
        "barmode": "group",
        "bargap": 0.3,
        "xaxis": {"title": {"text": title}, "rangemode": "tozero", "tickformat": "~s" if scale == 1 else "~g"},
        "yaxis": {
            "tickmode": "array",
            "tickvals": list(range(len(names))),
            "ticktext": [html_text(each) for each in names],
            "range": [len(names) - 0.5, -0.5],
            "automargin": True,
            "showgrid": False,
            "zeroline": False,
        },
        "legend": {"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0},
    }
    if more:
        # As a bar, the sum of many would make all others short.
        sums = [words(math.fsum(getattr(row, when) for row in more)) for when in ("before", "after")]
        note = {"x": 0, "y": len(shown), "xanchor": "left", "showarrow": False, "font": {"color": "@soft"}}
        layout["annotations"] = [{**note, "text": "together " + " → ".join(sums)}]
    return Figure(name, label, tuple(traces), layout, 130 + 22 * len(names))


def _tail(name: str) -> str:
    """The end of a long name, which tells neighbors apart."""
    return name if len(name) <= _MOST_LETTERS else "…" + name[-_MOST_LETTERS + 1 :]


_MOST_TICKS = 10


def training_figure(epochs: Sequence[TrainedEpoch], original: float | None, metric: Metric) -> Figure | None:
    """Draw the validation score from epoch 0 on, and the training loss; None with fewer than two epochs."""
    scored = [e for e in epochs if e.score is not None and math.isfinite(e.score)]
    losses = [e for e in epochs if e.loss is not None and math.isfinite(e.loss)]
    if len(epochs) < 2 or not (scored or losses):
        return None
    traces: list[dict[str, Any]] = []
    if scored:
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": f"validation {metric.words}",
                "x": [e.epoch for e in scored],
                "y": [_shown(metric, e.score) for e in scored],
                "text": [metric.text(e.score) for e in scored if e.score is not None],
                "hovertemplate": "epoch %{x}: %{text}<extra></extra>",
                "line": {"color": "@after"},
            }
        )
    if losses:
        traces.append(
            {
                "type": "scatter",
                # A line through one point is not seen.
                "mode": "lines" if len(losses) > 1 else "markers",
                "name": "training loss",
                "x": [e.epoch for e in losses],
                "y": [e.loss for e in losses],
                "yaxis": "y2",
                "hovertemplate": "epoch %{x}: loss %{y:.4g}<extra></extra>",
                "line": {"color": "@soft", "dash": "dot"},
            }
        )
    # Without it, few epochs get ticks at fractions.
    whole = {"dtick": 1} if epochs[-1].epoch <= _MOST_TICKS else {}
    layout: dict[str, Any] = {
        "xaxis": {"title": {"text": "Epoch; 0 is before the training"}, "rangemode": "tozero", **whole},
        "yaxis": {"title": {"text": _score_title("Validation", metric)}},
        "yaxis2": {
            "title": {"text": "Loss"},
            "overlaying": "y",
            "side": "right",
            "showgrid": False,
            "tickformat": ".3~g",
        },
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
    }
    if original is not None and math.isfinite(original):
        at = _shown(metric, original)
        line = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": at, "y1": at}
        layout["shapes"] = [{**line, "line": {"color": "@ink", "width": 1, "dash": "dash"}}]
        note = {"xref": "paper", "x": 1, "y": at, "xanchor": "right", "yanchor": "bottom", "showarrow": False}
        layout["annotations"] = [{**note, "text": f"original {metric.text(original)}"}]
    return Figure("training", "Validation score and training loss by epoch; the table has the numbers.", tuple(traces),
                  layout)  # fmt: skip


def class_figure(changes: Sequence[ClassChange], most: int = 40) -> Figure | None:
    """Draw the change of the accuracy of each class, those that lost most first; None without classes."""
    if len(changes) < 2:
        return None
    ranked = sorted(changes, key=lambda c: (c.after - c.before) / c.n)
    if len(ranked) > most:
        ranked = [*ranked[: most // 2], *ranked[-most // 2 :]]
    points = [100 * (each.after - each.before) / each.n for each in ranked]
    bars = {
        "type": "bar",
        "orientation": "h",
        "x": points,
        "y": list(range(len(ranked))),
        "hovertext": [
            f"{html_text(each.name)}: {each.before} → {each.after} of {each.n} images right" for each in ranked
        ],
        "hovertemplate": "%{hovertext}<extra></extra>",
        "marker": {"color": ["@bad" if p < -2 else "@warn" if p < 0 else "@after" for p in points]},
    }
    layout = {
        "xaxis": {"title": {"text": "Change, points"}, "zeroline": True},
        "yaxis": {
            "tickmode": "array",
            "tickvals": list(range(len(ranked))),
            "ticktext": [html_text(visible(each.name, keep=PAGE)[:40]) for each in ranked],
            "autorange": "reversed",
            "automargin": True,
            "showgrid": False,
            "zeroline": False,
        },
    }
    label = "Change of the accuracy of each class in points; the table has the numbers."
    return Figure("classes", label, (bars,), layout, 110 + 24 * len(ranked))


def sensitivity_figure(points: Sequence[tuple[str, float, float]]) -> Figure | None:
    """Draw (layer, kept fraction, distance of the outputs when only this layer is cut); None without points."""
    if not points:
        return None
    names = [html_text(name) for name, _, _ in points]
    bars = {
        "type": "bar",
        "x": list(range(1, len(points) + 1)),
        "y": [distance for _, _, distance in points],
        "hovertext": [f"{name}, {100 * kept:.0f} % kept" for name, (_, kept, _) in zip(names, points, strict=True)],
        "hovertemplate": "%{hovertext}: distance %{y:.3g}<extra></extra>",
        "marker": {"color": "@after"},
    }
    layout = {
        "xaxis": {
            "title": {"text": "Layers in order of execution"},
            "showgrid": False,
            **({"dtick": 1} if len(points) <= _MOST_TICKS else {}),
        },
        "yaxis": {"title": {"text": "Distance of the outputs"}, "rangemode": "tozero", "tickformat": ".2~g"},
    }
    label = "Distance of the outputs when one layer alone is cut as it was; the table has the numbers."
    return Figure("sensitivity", label, (bars,), layout)


def _shown(metric: Metric, score: float | None) -> float | None:
    if score is None:
        return None
    return 100 * score if metric.unit == "%" else score


def _score_title(split: str, metric: Metric) -> str:
    return f"{split} {metric.words}, {metric.unit}" if metric.unit else f"{split} {metric.words}"


def _axis_title(name: str, words: object) -> str:
    if words is units.duration:
        return f"{name}, s"
    return f"{name}, bytes" if words is units.size else name
