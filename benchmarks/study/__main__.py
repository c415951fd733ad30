"""The command line of the study.

    OMP_NUM_THREADS=1 python -m benchmarks.study --data ../shared/data/cifar10 --limit 20000 \\
        --teacher-epochs 5 --student-epochs 1 --threads 1 --out runs/study
    cp runs/study/results.parquet runs/study/study.html runs/study/study.json benchmarks/results/study
    python -m benchmarks.study --tables

The first command takes about 90 minutes of one core; the same command continues an interrupted study. The last one
writes the tables of the page as text, to results/study/study.md.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import get_args

from rich.text import Text

if not __package__:  # started as `python benchmarks/study`
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from benchmarks.study.plan import FAMILIES, Study
from benchmarks.study.results import write_tables
from benchmarks.study.run import run_study, silent
from secateur._runtime import torch_threads
from secateur.cli import parsing
from secateur.cli.options import PrecisionName
from secateur.cli.output import err, handle_errors, out, resumable
from secateur.cli.tables import plain_table, print_written
from secateur.data import load_data
from secateur.report import Page

PROGRAM = "python -m benchmarks.study"
_NAMES = tuple(family.name for family in FAMILIES)


def _at_least(smallest: int):
    def number(text: str) -> int:
        if (value := int(text)) < smallest:
            raise argparse.ArgumentTypeError(f"must be at least {smallest}; got {value}")
        return value

    return number


def parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    made = argparse.ArgumentParser(PROGRAM, description="Run the study, or continue it.")
    add = made.add_argument
    add("--study", choices=["pruning-x-distillation"], default="pruning-x-distillation", help="What is compared.")
    add("--data", help="Images, as for `secateur compress`.")
    add("--out", dest="out_folder", type=Path, help="Folder of the study.")
    add("--limit", type=_at_least(1), help="Use only the first N training images.")
    add("--image-size", type=_at_least(1), help="Resize images to squares of this side, in pixels.")
    add("--mean", help="Mean of each channel of pixels / 255, such as 0.485,0.456,0.406.")
    add("--std", help="Standard deviation of each channel of pixels / 255.")
    add("--validation-fraction", type=float, default=0.1, help="Fraction of training images held out.")
    add("--family", action="append", choices=_NAMES, help="Networks; all by default. Repeatable.")
    add("--seeds", type=_at_least(1), default=2, help="Number of students of each kind.")
    add("--weights-kept", default="0.5,0.3,0.1", help="Kept fractions of the weights.")
    add("--macs-kept", default="0.7,0.5", help="Kept fractions of the MACs when channels are cut.")
    add("--teacher-epochs", type=_at_least(0), default=4, help="Epochs that train the teachers.")
    add("--student-epochs", type=_at_least(0), default=3, help="Epochs that train the students before pruning.")
    add("--recovery-epochs", type=_at_least(0), default=1, help="Epochs after pruning.")
    add("--recovery-images", type=_at_least(0), default=2048, help="Images of a recovery epoch; 0 for all.")
    add("--test-images", type=_at_least(0), default=2000, help="Number of first test images used; 0 for all.")
    add("--batch-size", type=_at_least(1), default=64, help="Images per step.")
    add("--lr", dest="learning_rate", type=float, default=0.1, help="Peak learning rate.")
    add("--precision", choices=get_args(PrecisionName), default="auto", help="Number formats.")
    add("--seed", type=_at_least(0), default=0, help="First random seed.")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps.")
    add("--threads", type=_at_least(1), help="CPU threads of PyTorch; all by default.")
    add("--resume", action="store_true", help="Continue an interrupted study, which happens by default too.")
    add("--quiet", action="store_true", help="Print only the results.")
    add("--debug", action="store_true", help="Show the traceback of an error.")
    add("--tables", action="store_true", help="Write the text tables of benchmarks/results/study and stop.")
    return made


def study_of(given: argparse.Namespace) -> Study:
    """Build the study that the flags describe."""
    default, wanted = Study(), set(given.family or _NAMES)
    shared = {"batch_size": given.batch_size, "precision": parsing.precision(given.precision)}
    rate = given.learning_rate
    return Study(
        families=tuple(family for family in FAMILIES if family.name in wanted),
        seeds=tuple(range(given.seed, given.seed + given.seeds)),
        weights_kept=parsing.numbers(given.weights_kept or None, "--weights-kept") or (),
        macs_kept=parsing.numbers(given.macs_kept or None, "--macs-kept") or (),
        teaching=replace(default.teaching, epochs=given.teacher_epochs, learning_rate=rate, **shared),
        learning=replace(default.learning, epochs=given.student_epochs, learning_rate=rate, **shared),
        recovery=replace(default.recovery, epochs=given.recovery_epochs, learning_rate=rate / 5, **shared),
        recovery_images=given.recovery_images or None,
        test_images=given.test_images or None,
    )


def _work(out_folder: Path) -> Path | None:
    return out_folder if (out_folder / "study.json").is_file() else None


@handle_errors
@partial(resumable, work=_work, program=PROGRAM)
def compare(*, given: argparse.Namespace, command: str, out_folder: Path, debug: bool) -> None:
    """Run a study: which kind of pruning suits distillation?"""
    study = study_of(given)
    images = load_data(
        given.data,
        limit=given.limit,
        validation_fraction=given.validation_fraction,
        seed=given.seed,
        image_size=given.image_size,
        mean=parsing.numbers(given.mean, "--mean"),
        std=parsing.numbers(given.std, "--std"),
    )
    with torch_threads(given.threads):
        result = run_study(
            study,
            images,
            out=out_folder,
            device=parsing.device(given.device),
            tell=silent if given.quiet else err().print,
            command=command,
        )
    print_page(result.content)
    print_written([result.table, result.page])


def print_page(page: Page) -> None:
    """Print the tables of a page."""
    for shown in page.tables:
        table = plain_table(shown.title, shown.columns, numbers=len(shown.columns) - 1)
        for row in shown.rows:
            table.add_row(*row)
        out().print(table)
    for note in page.notes:
        out().print(Text(note), soft_wrap=True)


def main(words: Sequence[str] | None = None) -> None:
    """Run the command line of the study."""
    words = sys.argv[1:] if words is None else words
    given = parser().parse_args(words)
    if given.tables:
        print_written([write_tables()])
        return
    if given.data is None or given.out_folder is None:
        parser().error("the following arguments are required: --data, --out")
    command = f"{PROGRAM} {shlex.join(words)}"
    compare(given=given, command=command, out_folder=given.out_folder, debug=given.debug)


if __name__ == "__main__":
    main()
