"""Write docs/results.md from the records in benchmarks/results: the accuracies that this project states, with origins.

    python -m benchmarks.results_page

Nothing is measured. A test writes the page again and fails if it differs, and if a table of README.md or of docs has a
number that no record has.
"""

import argparse
import json
import statistics
import sys
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

if not __package__:  # started as `python benchmarks/results_page.py`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks._record import RESULTS, table
from benchmarks.study.results import equal_size_table

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "results.md"
Record = Mapping[str, Any]


def records(folder: str) -> list[Record]:
    """Return all records of a folder, in the order of their names."""
    return [json.loads(path.read_text()) for path in sorted((RESULTS / folder).glob("*.json"))]


def percents(values: Iterable[float]) -> str:
    """Return values in percent, separated by commas."""
    return ", ".join(f"{100 * value:.2f}" for value in values)


def mean(values: Sequence[float]) -> str:
    """Return the mean in percent, with the standard deviation of two values or more, and how many there are."""
    spread = f" ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"**{100 * statistics.fmean(values):.2f}**{spread} (n = {len(values)})"


def grouped(found: Iterable[Record], *names: str) -> dict[tuple[Any, ...], list[Record]]:
    """Return records by the values of some of their fields, in order."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in found:
        groups.setdefault(tuple(record[name] for name in names), []).append(record)
    return dict(sorted(groups.items(), key=lambda pair: str(pair[0])))


def origin(found: Sequence[Record], place: str) -> str:
    """Say where numbers come from: records, commands, commits, machines, versions, days."""
    around = [record.get("surroundings", record) for record in found]

    def each(name: str) -> str:
        return ", ".join(f"`{value}`" for value in sorted({str(one[name]) for one in around if name in one}))

    days = sorted({one["date"][:10] for one in around if "date" in one})
    versions = sorted({f"torch {one['versions']['torch']}" for one in around if "versions" in one})
    machines = sorted({f"{one['cpu']}, {one['threads']} of {one['cores']} cores" for one in around if "cpu" in one})
    return (
        f"Records: [{place}](../benchmarks/results/{place}), {len(found)} of them; they are the only log that was "
        f"kept. Commands: {each('command')}. Commits: {each('commit')}. Machine: {'; '.join(machines)}. "
        f"{', '.join(versions)}. {days[0]} to {days[-1]}."
    )


def recover() -> str:
    """Return the short recoveries of ResNets at half of the MACs."""
    found, rows = records("recover"), list[list[str]]()
    for (model, epochs, method, rate), runs in grouped(found, "model", "epochs", "method", "learning_rate").items():
        before = [run["test_before_training"] for run in runs]
        seconds = statistics.fmean(sum(run["seconds_per_epoch"]) for run in runs)
        length = f"{epochs} epoch{'s' if epochs > 1 else ''}"
        rows.append([
            f"{model}, {length}", method, f"{rate:g}", f"{100 * runs[0]['kept_macs']:.1f} %",
            f"{100 * statistics.fmean(before):.2f}", percents(run["test"] for run in runs),
            mean([run["test"] for run in runs]), f"{seconds:.0f}",
        ])  # fmt: skip
    header = ["run", "method", "rate", "MACs kept", "before training", "test % per seed", "test %", "s"]
    return section(
        "Recovery at half of the MACs, CIFAR-10",
        "`ours` is `compress` with its knapsack, `peer-kd` and `peer-ce` Torch-Pruning 1.6.1 with and without "
        "distillation by the same loop, `ours-kd` and `ours-ce` ours without aligned features, and on labels alone. "
        "The pretrained networks have seen the images that chose the epochs; all methods share the rate of a row.",
        table(header, rows), origin(found, "recover"),
    )  # fmt: skip


def searches(folder: str, title: str, text: str) -> str:
    """Return one comparison of searches."""
    found, rows = records(folder), list[list[str]]()
    for (method,), runs in grouped(found, "method").items():
        spent = [run["cpu_seconds_of_search"] + run["cpu_seconds_of_recovery"] for run in runs]
        rows.append([
            method, f"{100 * statistics.fmean(run['kept_macs'] for run in runs):.1f} %",
            percents(run["test"] for run in runs), mean([run["test"] for run in runs]),
            f"{statistics.fmean(spent):.0f}",
        ])  # fmt: skip
    header = ["method", "MACs kept", "test % per seed", "test %", "CPU s in all"]
    return section(title, text, table(header, rows), origin(found, folder))


def losses(folder: str, title: str, text: str) -> str:
    """Return what each loss adds to labels alone, with the seeds that were not used for choosing."""
    found = [record for record in records(folder) if "loss" in record]
    tests = grouped((record for record in found if "test" in record), "loss")
    base = {run["seed"]: run["test"] for run in tests[("labels",)]}
    rows: list[list[str]] = []
    for (name,), runs in sorted(tests.items(), key=lambda pair: -statistics.fmean(run["test"] for run in pair[1])):
        gains = [run["test"] - base[run["seed"]] for run in runs if run["seed"] in base]
        error = f" ± {100 * statistics.stdev(gains) / len(gains) ** 0.5:.2f}" if len(gains) > 1 else ""
        chosen = runs[0]
        weight = f", x{chosen['weight_factor']:g}" if "weight_factor" in chosen else ""
        rows.append([
            name, f"{chosen['learning_rate']:g}{weight}", percents(run["test"] for run in runs),
            mean([run["test"] for run in runs]), f"{100 * statistics.fmean(gains):+.2f}{error}",
            f"{statistics.median(run['cpu_s'] for run in runs):.0f}",
        ])  # fmt: skip
    header = ["loss", "rate taken", "test % per seed", "test %", "gain over labels", "CPU s"]
    return section(title, text, table(header, rows), origin(found, folder))


def rank() -> str:
    """Return how well supernets rank networks; the numbers are those of rank.md, which the script writes."""
    text = (RESULTS / "rank.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("|")]
    found = records("rank")
    return section(
        "Supernets as judges",
        "Kendall's tau between the score of 24 networks of ResNet-20 at half of the MACs and their accuracy after "
        "retraining; one supernet of each kind. **What does not reproduce**: the paper says that stage-wise training "
        "makes the proxy rank well. Here the untrained proxy (the original's weights) ranks as well as SWP's, and "
        "the supernet without stages better; the intervals overlap widely. **What does**: without the sandwich rule, "
        "channels are trained unevenly (fairness 0.10 instead of 0.30) and the weighted proxy ranks worst. Why: our "
        "supernet starts from a trained network, which judges well before any training, and learns for one epoch; "
        "the paper's schedule is not known. Weights of the proxies are not all of one version (rank.md), and one "
        "seed of the supernet is no spread.",
        "\n".join(lines) + "\n", origin(found, "rank"),
    )  # fmt: skip


def study() -> str:
    """Return the study's comparison at equal size."""
    rows = pq.read_table(RESULTS / "study" / "results.parquet").to_pylist()
    each = equal_size_table(rows)
    return section(
        "Weight or channel pruning with distillation",
        "Short training: teachers with 67 to 71 %, students after one epoch, two seeds. At an equal number of "
        "non-zero parameters weight pruning is ahead in all four families, which is the paper's first claim; that "
        "it adapts better to distillation, the second, is not seen. The two kinds have different protocols: weights "
        f"are pruned step by step and not repaired, channels are cut at once and repaired. {each.text}",
        table([*each.columns], [[*row] for row in each.rows]),
        "Records: [study](../benchmarks/results/study), [all tables](../benchmarks/results/study/study.md), "
        f"{len(rows)} cells of one run; their file has no commit.",
    )  # fmt: skip


def seen() -> str:
    """Return how well the pretrained networks know the images that choices are made on."""
    record = json.loads((RESULTS / "seen_images.json").read_text())
    rows = [[row["model"], *(f"{100 * row[split]:.2f}" for split in ("validation", "test"))] for row in record["rows"]]
    return section(
        "What the pretrained networks have seen",
        f"They were trained on all training images, so that the {record['n'][0]:,} that are held out for choices are "
        "not new to them. Every choice in the tables of this page was made on such images. Two design choices were "
        "made on test images: the refit in place of the fold, and a quarter of the calibration images as judges of "
        "repairs (the first 4,000, docs/decisions.md). Bases of `secateur train` leave a tenth of the images out.",
        table(["network", "images held out, %", "test %"], rows), origin([record], "seen_images.json"),
    )  # fmt: skip


def published() -> str:
    """Return the numbers of the papers, marked as such."""
    rows: list[list[str]] = []
    for path in sorted((ROOT / "recipes").glob("*/*.toml")):
        recipe = tomllib.loads(path.read_text())
        name = f"{path.parent.name}/{path.stem}"
        numbers, link = "; ".join(recipe["published"]), f"[{name}](../recipes/{name}.toml)"
        rows.append([recipe["title"], numbers, "not run at full length", link])
    return section(
        "Published numbers",
        "**These are the papers', not ours.** In parentheses stands how each is known: text, notes and recounted are "
        "read or computed from what the authors released; memory is recalled and not verified.",
        table(["row", "published", "ours", "recipe"], rows), "Records: none of ours. The recipes hold the commands.",
    )  # fmt: skip


def section(title: str, text: str, lines: str, where: str) -> str:
    """Return one section of the page."""
    return f"## {title}\n\n{text}\n\n{lines.rstrip()}\n\n{where}\n"


_FORMER_WEIGHTS = (
    "**Made with the former weights**, which were not the published ones: hints 1 instead of 200, DIST at T = 1, "
    "standardized logits 0.9 instead of 9, attention 500 on a mean. So the rows hint, dist, attention, sp, pkt and "
    "standardised say nothing about these losses, nor do kd and hint about hints. kd, dkd (without its warm-up), "
    "vid, crd, review (without its warm-up), labels and the aligned rows had the weights that they have now, except "
    "that vid is now summed over the taps. Rates were chosen on images that the pretrained network has seen."
)


def text() -> str:
    """Return the whole page."""
    parts = [
        "# Results\n\nThis page is written by `python -m benchmarks.results_page` from the records in "
        "`benchmarks/results`; do not edit it. `±` is the standard deviation over seeds, or the standard error where "
        "a gain is shown; n = 1 has none. Negative results stay. All networks and images are small, and all "
        "trainings short: [recipes](../recipes/README.md) are for those who have a GPU.\n",
        recover(),
        searches(
            "tas_cifar10",
            "Searches at 55 % of the MACs, ResNet-20",
            "**Time is not equal**, though an earlier version of this table said that it was. The knapsack is missing. "
            "`benchmarks/tas_cifar10.py` now gives every method the same processor seconds, and has not been run "
            "since.",
        ),
        searches(
            "swp_cifar10",
            "Searches at 50 % of the MACs, ResNet-20",
            "**Time is not equal**, though an earlier version of this table said that it was. The knapsack and "
            "random search are missing.",
        ),
        losses(
            "losses_searched",
            "Losses with rate and weight searched",
            "ResNet-20 at half of the MACs, repaired (82.7 %), one epoch of 10,000 images of CIFAR-10. Rate and "
            "weight were searched together on validation images, from the published weight on; the labels have their "
            "published weight. `x` is the weight over the published one. Only some losses have been run.",
        ),
        losses("losses", "Losses with the former weights", _FORMER_WEIGHTS),
        rank(),
        study(),
        seen(),
        published(),
    ]
    return "\n".join(parts)


def main() -> None:
    """Write the page."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    PAGE.write_text(text())
    print(f"Wrote {PAGE}.")


if __name__ == "__main__":
    main()
