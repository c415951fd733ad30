"""How long the command line and the import take, how large the pages are, and when a browser shows their first figure.

    OMP_NUM_THREADS=1 python benchmarks/pages.py [--rounds 15] [REPORT.html ...]

Processes are started in turns, so that what else runs on the machine slows all of them. Seconds of the processor are
those of a whole process, children included; seconds of the clock depend on that load. Pages are opened in headless
Chromium (the package playwright, and a chromium on the PATH). The time of the first figure is the browser's own, from
the start of the navigation. Without REPORT.html the page of one run is that of a short run on digits.
"""

import argparse
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from _record import RESULTS, surroundings, table, write_record

RUNS, LAYERS = 200, 60
"""Of the comparison."""
OPENED = 5
"""How often each page is opened, in turns."""
LIMITS = {"help_s": 0.4, "import_s": 0.15, "report_bytes": 4e6, "comparison_bytes": 8e6, "first_figure_s": 2.0}
STARTS = {
    "python": ("-c", "pass"),
    "import secateur": ("-c", "import secateur"),
    "import torch": ("-c", "import torch"),
    "import torch, secateur": ("-c", "import torch, secateur"),
    "secateur --help": ("-m", "secateur", "--help"),
}


def main() -> None:
    """Measure everything, and write the record and its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reports", nargs="*", type=Path, help="Pages of runs to measure, instead of one on digits.")
    parser.add_argument("--rounds", type=int, default=15, help="How often each process is started.")
    given = parser.parse_args()
    starts = start_times(given.rounds)
    with tempfile.TemporaryDirectory() as folder:
        reports = given.reports or [short_run(Path(folder))]
        pages = {f"report of {path.resolve().parent.name}": path for path in reports}
        pages[f"comparison of {RUNS} runs, {LAYERS} layers"] = comparison_page(Path(folder))
        drawn = opened(pages)
    record = {
        "surroundings": surroundings(),
        "rounds": given.rounds,
        "limits": LIMITS,
        "starts": starts,
        "pages": drawn,
    }
    write_record("pages", record)
    (RESULTS / "pages.md").write_text(as_text(record))


def start_times(rounds: int) -> dict[str, dict[str, float]]:
    """Return medians of the seconds of the clock and of the processor, by process."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in STARTS}
    for number in range(rounds + 1):
        for name, arguments in STARTS.items():
            measured = _seconds([sys.executable, *arguments])
            if number:  # The first round fills the caches of files and of bytecode.
                found[name].append(measured)
    return {
        name: {"clock_s": statistics.median(one[0] for one in each), "cpu_s": statistics.median(one[1] for one in each)}
        for name, each in found.items()
    }


def _seconds(command: Sequence[str]) -> tuple[float, float]:
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with code {process.returncode}")
    return seconds, usage.ru_utime + usage.ru_stime


def short_run(folder: Path) -> Path:
    """Compress a small network; return its report."""
    from secateur import Uniform, compress, load_data, load_model
    from secateur.pipeline import CutConfig, RecoveryConfig, RunConfig
    from secateur.train import Silent, TrainConfig

    model, source = load_model("digits_resnet")
    out = folder / "digits"
    compress(
        model,
        load_data("digits"),
        "macs=50%",
        strategy=Uniform(),
        source=source,
        out=out,
        cut=CutConfig(calibration_images=128),
        recovery=RecoveryConfig(TrainConfig(epochs=2)),
        run=RunConfig(callbacks=Silent()),
    )
    return out / "report.html"


def comparison_page(folder: Path) -> Path:
    """Write the page of many runs of a network with many layers."""
    from secateur.report.comparison import ComparedRun, Comparison, find_winner
    from secateur.report.comparison_page import write_comparison
    from secateur.tasks.classification import TOP1

    images, strategies, budgets = 1000, 5, 4

    def run(strategy: str, budget: str, seed: int, score: float, kept: Mapping[str, tuple[int, int]]) -> ComparedRun:
        right = round(images * score)
        macs = 10_000_000 + 137_000 * round(1000 * score)
        numbers: dict[str, Any] = {"score": right / images, "n": images, "test_score": score, "test_n": images}
        costs: dict[str, Any] = {"macs": macs, "params": macs // 90, "size_bytes": macs // 20, "latency_s": macs / 1e10}
        return ComparedRun(
            strategy,
            budget,
            seed,
            round=0,
            epochs=2,
            search_epochs=0,
            seconds=3.0,
            train_seconds=2.0,
            speedup=1.5,
            verified=True,
            widths=kept,
            right="1" * right + "0" * (images - right),
            **numbers,
            **costs,
        )

    runs = [
        run(
            f"strategy {number % strategies}",
            f"macs<={20 + 10 * (number // strategies % budgets)}%",
            number // (strategies * budgets),
            0.8 + 0.15 * math.sin(number) ** 2,
            {f"layer{at // 4}.{at % 4}.conv": (512, 96 + (97 * number + 31 * at) % 416) for at in range(LAYERS)},
        )
        for number in range(RUNS)
    ]
    names = list(dict.fromkeys(one.budget for one in runs))
    winners = tuple(find_winner(name, [one for one in runs if one.budget == name], TOP1) for name in names)
    found = Comparison("network", "images", TOP1, run("original", "", 0, 0.97, {}), tuple(runs), winners)
    return write_comparison(folder / "compare.html", found)


def opened(pages: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """Open each page several times in a new context; return its size, times in seconds, and what went wrong."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in pages}
    said: dict[str, list[str]] = {name: [] for name in pages}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        name_and_version = f"Chromium {browser.version}"
        for number in range(OPENED + 1):
            for name, path in pages.items():
                measured = _opened_once(browser, path, said[name])
                if number:
                    found[name].append(measured)
        browser.close()
    return {
        name: {
            "bytes": path.stat().st_size,
            "browser": name_and_version,
            "first_paint_s": statistics.median(one[0] for one in found[name]),
            "first_figure_s": statistics.median(one[1] for one in found[name]),
            "cpu_s": statistics.median(one[2] for one in found[name]),
            "messages": said[name],
        }
        for name, path in pages.items()
    }


def _opened_once(browser: Any, path: Path, said: list[str]) -> tuple[float, float, float]:
    """Seconds until text is painted and until the first figure is drawn, and seconds of the page's processor."""
    context = browser.new_context(viewport={"width": 1400, "height": 900}, offline=True)
    page = context.new_page()
    page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    session = context.new_cdp_session(page)
    session.send("Performance.enable")
    # The moment at which the first figure is in the page, by the clock of the page.
    page.add_init_script(
        "new MutationObserver((_, me) => { if (document.querySelector('.main-svg')) {"
        " window.firstFigure = performance.now(); me.disconnect(); } })"
        ".observe(document, {childList: true, subtree: true});"
    )
    page.goto(path.resolve().as_uri())
    page.wait_for_function("window.firstFigure !== undefined", timeout=60_000)
    page.wait_for_selector("html[data-drawn]", timeout=60_000)
    paint = page.evaluate("performance.getEntriesByName('first-contentful-paint').map(one => one.startTime)[0] ?? NaN")
    figure = page.evaluate("window.firstFigure")
    metrics = {one["name"]: one["value"] for one in session.send("Performance.getMetrics")["metrics"]}
    context.close()
    return paint / 1000, figure / 1000, metrics.get("ProcessTime", math.nan)


def as_text(record: Mapping[str, Any]) -> str:
    """The record as Markdown."""
    starts, pages, limits = record["starts"], record["pages"], record["limits"]
    around, browser = record["surroundings"], next(iter(pages.values()))["browser"]

    def row(name: str, limit: float, seconds: Mapping[str, float]) -> list[str]:
        return [name, f"{seconds['cpu_s']:.3f}", f"{seconds['clock_s']:.3f}", f"{limit:g}"]

    both, alone = starts["import torch, secateur"], starts["import torch"]
    beyond = {each: both[each] - alone[each] for each in ("cpu_s", "clock_s")}
    light = {each: starts["import secateur"][each] - starts["python"][each] for each in ("cpu_s", "clock_s")}
    rows = [
        row("secateur --help", limits["help_s"], starts["secateur --help"]),
        row("import torch, secateur, beyond import torch", limits["import_s"], beyond),
        row("import secateur, which loads no torch, beyond python", limits["import_s"], light),
    ]
    rows += [
        [name, f"{starts[name]['cpu_s']:.3f}", f"{starts[name]['clock_s']:.3f}", ""]
        for name in ("python", "import torch")
    ]
    opening = [
        [
            name,
            f"{page['bytes'] / 1e6:.2f}",
            f"{limits['comparison_bytes' if name.startswith('comparison') else 'report_bytes'] / 1e6:g}",
            f"{page['first_paint_s']:.2f}",
            f"{page['first_figure_s']:.2f}",
            f"{limits['first_figure_s']:g}",
            f"{page['cpu_s']:.2f}",
        ]
        for name, page in pages.items()
    ]
    return "\n".join(
        (
            f"# Start of the command line, and pages\n\nMedians of {record['rounds']} starts, in turns, with the files"
            f" in the cache; load average {around['load_average']} on {around['cores']} cores. Processor"
            " seconds depend less on what else runs than seconds of the clock.\n",
            table(["process", "processor s", "clock s", "at most"], rows),
            f"Medians of {OPENED} openings, headless {browser}, 1400 x 900 pixels, offline."
            " The first figure is drawn at this time after the start of the navigation; all figures are drawn"
            " within the processor time of the page.\n",
            table(["page", "MB", "at most", "text s", "first figure s", "at most", "processor s"], opening),
        )
    )


if __name__ == "__main__":
    main()
