"""Self-contained HTML pages: the report of one run, and tables of many. No network, light and dark.

Where the package plotly is installed, a report has figures that answer to the pointer; the pictures that are drawn
without a script stand in their places until then, and everywhere else.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from secateur._files import write_atomic
from secateur._text import PAGE, visible
from secateur.report import units
from secateur.report.charts import loss_plot, score_plot, search_plots, stage_plots, width_plot
from secateur.report.figures import PageScript, layer_name, page_script, report_figures
from secateur.report.run import ClassColor, RunReport
from secateur.report.verdict import change_tone, claims, cost_tone, deploy_snippets, without_settings


@dataclass(frozen=True)
class PageTable:
    """One table of a page.

    Attributes:
        title: The title above the table.
        columns: Names of the columns.
        rows: Cells as text; the first cell of a row names it.
        text: A sentence before the table.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    text: str = ""


@dataclass(frozen=True)
class Page:
    """A page of tables.

    Attributes:
        title: The title of the page.
        facts: (label, value) pairs under the title.
        notes: Sentences that the reader must know.
        tables: The tables, in order.
        command: The exact command or call.
    """

    title: str
    facts: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    tables: tuple[PageTable, ...] = ()
    command: str = ""


def write_page(path: Path | str, page: Page) -> Path:
    """Write tables as one self-contained HTML file.

    Args:
        path: The file; replaced atomically.
        page: What to show. All of it is escaped.

    Returns:
        The absolute path of the file.

    Raises:
        OSError: If the file cannot be written.
    """
    return write_html(path, render_template("page.html", page=page))


def render_template(template: str, **values: object) -> str:
    """Fill in a template with the style sheet and values, all of which are escaped."""
    import jinja2
    import markupsafe

    here = files("secateur.report")
    style = markupsafe.Markup((here / "report.css").read_text(encoding="utf-8"))
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, finalize=_shown)
    return environment.from_string((here / template).read_text(encoding="utf-8")).render(style=style, **values)


def _shown(value: object) -> object:
    """Show what cannot be seen in a text; what is no text, and markup, stays as it is."""
    return visible(value, keep=PAGE) if type(value) is str else value


def write_html(path: Path | str, page: str) -> Path:
    """Write a page atomically; return the absolute path of its file."""
    path = Path(path).absolute()
    write_atomic(path, page.encode("utf-8", "backslashreplace"))
    return path


_FACTS = ("data", "strategy", "budget", "choices")
"""Fields of `RunReport` under the headline; empty ones are left out."""
_NOTABLE = 0.02
"""A speedup nearer to 1 than this, or with quartiles on both sides of 1, is not called faster or slower."""


@dataclass(frozen=True)
class Tile:
    """A number at the top of the page; ``percent_left`` is the part of the original, if that has a meaning."""

    label: str
    value: str
    origin: str
    percent_left: float | None = None
    tone: str = ""


def write_report(path: Path | str, run: RunReport) -> Path:
    """Write the report of a run as one self-contained HTML file for any screen.

    Args:
        path: The file; replaced atomically.
        run: What to show. All of it is escaped.

    Returns:
        The absolute path of the file.

    Raises:
        OSError: If the file cannot be written.
    """
    return write_html(path, render(run, page_script()))


def render(run: RunReport, script: PageScript | None = None) -> str:
    """Return the report of a run as HTML, with figures if there is a script that draws them."""
    curves = (loss_plot(run.training), score_plot(run.training, run.original_validation_score, run.metric))
    return render_template(
        "report.html",
        run=run,
        script=script,
        figures=report_figures(run) if script is not None else {},
        claims=claims(run),
        details=[note for note in run.notes if note not in run.warnings],
        deploy=deploy_snippets([file.name for file in run.exports], run.input_size, run.loading) if run.exports else (),
        tones={"score": change_tone(run), "cost": cost_tone},
        nbsp="\u00a0",
        headline=headline(run),
        facts=[(name, without_settings(value)) for name in _FACTS if (value := getattr(run, name))],
        tiles=tiles(run),
        images=_images(run),
        metric_words=run.metric.words,
        metric_name=_capitalized(run.metric.words),
        widths=width_plot(run.widths) if run.widths else None,
        layers=[layer for layer in run.layers if any(layer.macs) or any(layer.seconds or ())],
        layer_name=layer_name,
        kept_sentence=_kept_sentence(run),
        curves=[curve for curve in curves if curve is not None],
        search=search_plots(run.search, run.macs_limit),
        stages=stage_plots(run.stages),
        origin=_origin(run),
        legend=_legend(run),
        zeros=_has_zeros(run),
        unmeasured=max(0, sum(width.after < width.before for width in run.widths) - len(run.sensitivity)),
        **_words(),
    )


def headline(run: RunReport) -> str:
    """Say the result in one sentence."""
    cheaper = 1 - run.after.macs / run.before.macs if run.before.macs else 0.0
    said = [f"{units.percent(cheaper)} fewer MACs" if cheaper > 0 else "no fewer MACs"] if run.compresses else []
    if run.latency and run.compresses:
        said.append(_speed(run.latency[0].speedup))
    before, after = run.before.score, run.after.score
    if before and after:
        said.append(f"{after.text} {after.metric.words} instead of {before.text}")
    return f"{run.model}: {', '.join(said or ['trained'])}."


def tiles(run: RunReport) -> list[Tile]:
    """Return the numbers at the top of the page."""
    before, after = run.before, run.after
    found: list[Tile] = []
    if before.score and after.score:
        name = _capitalized(after.score.metric.words)
        left = 100 * after.score.value if after.score.metric.unit == "%" else None
        found.append(Tile(name, after.score.text, f"from {before.score.text}", left, _bad(change_tone(run))))
    costs = [
        ("MACs", before.macs, after.macs, units.count),
        ("Parameters", before.params, after.params, units.count),
    ]
    if _has_zeros(run):
        costs.append(("Non-zero parameters", before.weights, after.weights, units.count))
    if before.size_bytes is not None and after.size_bytes is not None:
        costs.append(("File size", before.size_bytes, after.size_bytes, units.size))
    for what, old, new, words in costs:
        left = min(100.0, 100 * new / old) if old else 100.0
        tone = _bad(cost_tone(old, new))
        found.append(Tile(what, units.change(old, new), f"{words(old)} → {words(new)}", left, tone))
    if run.latency:
        first = run.latency[0]
        times = f"{units.duration(first.before[1])} → {units.duration(first.after[1])}"
        tone = _bad(cost_tone(1 + _NOTABLE, 1 / first.speedup[1]))
        speed = units.factor(first.speedup[1])
        found.append(Tile("CPU speed", speed, times, min(100.0, 100 / first.speedup[1]), tone))
    return found


def _has_zeros(run: RunReport) -> bool:
    """Whether so many weights are zero that it shows in the three digits of the page."""
    return any(units.count(each.weights) != units.count(each.params) for each in (run.before, run.after))


def _bad(tone: str) -> str:
    """The tone of a tile, which has a color of its own only where a number got worse."""
    return "" if tone == "better" else tone


def _capitalized(words: str) -> str:
    first = words.split(" ", maxsplit=1)[0]
    # Names such as mIoU and mAP@0.5 are written as they are.
    return words[:1].upper() + words[1:] if first == first.lower() else words


def _speed(speedup: tuple[float, float, float]) -> str:
    lower, median, upper = speedup
    if lower < 1 < upper or abs(median - 1) < _NOTABLE:
        return "about as fast as before"
    return f"{units.factor(median)}\u00a0as\u00a0fast" if median > 1 else f"{units.percent(1 / median - 1, 0)} slower"


def _images(run: RunReport) -> str:
    counts = sorted({accuracy.n for accuracy in (run.before.score, run.after.score) if accuracy})
    return " and ".join(f"n = {n:,}" for n in counts)


def _kept_sentence(run: RunReport) -> str:
    kept, all_channels = sum(width.after for width in run.widths), sum(width.before for width in run.widths)
    return f"{kept:,} of {all_channels:,} channels are kept." if all_channels else ""


def _legend(run: RunReport) -> list[ClassColor]:
    """The classes that any picture shows, each once; pixels that do not count come last."""
    found = {one.index: one for row in run.pictures for one in row.classes}
    return [found[index] for index in sorted(found, key=lambda index: (index < 0, index))]


def _origin(run: RunReport) -> list[tuple[str, str]]:
    seed = "none" if run.seed is None else str(run.seed)
    rows = [
        ("Seed", seed),
        ("Date", units.moment(run.date)),
        ("Machine", _joined(run.machine)),
        ("Versions", _joined(run.versions)),
    ]
    return [(label, value) for label, value in rows if value]


def _joined(entries: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in entries.items())


def _words() -> dict[str, object]:
    names = ("count", "size", "duration", "percent", "change", "points", "error", "factor", "moment")
    return {"plain": without_settings, **{name: getattr(units, name) for name in names}}
