"""Trace, cut to half, verify and train vision models of every kind, with Secateur and with Torch-Pruning 1.6.1.

    python benchmarks/coverage.py                  # models without a result, then docs/coverage.md
    python benchmarks/coverage.py --only 'vit_*'   # some models; --again repeats them
    python benchmarks/coverage.py --missing        # names without a result
    python benchmarks/coverage.py --summary        # the tables and the digest of failures; nothing is run

There is one process per model and side, with a limit of processor seconds and of resident memory, and one JSON line per
model in results/coverage/ours.jsonl and peer.jsonl (the last line of a model counts). Times are processor times of one
thread. Models have random weights that make every branch affect the output. Ultralytics (AGPL) is used only if
COVERAGE_ULTRALYTICS names a folder that contains it.
"""

import argparse
import contextlib
import json
import logging
import os
import resource
import signal
import tempfile
import time
import traceback
import warnings
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import _coverage_ours
import _coverage_peer
import torch
from _coverage_loud import message
from _coverage_models import NotInstalledError, Subject, subjects, write_listing
from _coverage_table import digest, document
from _record import RESULTS, surroundings

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "coverage.md"
SIDES = {"ours": _coverage_ours.measure, "peer": _coverage_peer.measure}
Rows = dict[str, dict[str, Any]]


def read(path: Path) -> Rows:
    """Read the last row of every model."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {row["model"]: row for row in map(json.loads, lines)}


def run(subject: Subject, side: str, limits: argparse.Namespace) -> dict[str, Any]:
    """Measure one model in a separate process.

    The child writes its row whenever a stage is done, so that finished stages survive a kill.
    """
    with tempfile.TemporaryFile("w+") as report:
        began = time.monotonic()
        child = os.fork()
        if child == 0:
            _child(subject, side, limits, report.fileno())
        killed = _watch(child, limits)
        report.seek(0)
        row = json.loads(report.read().splitlines()[-1])
    if killed:
        row["error"] = f"{killed} (in {row['stage']})"
    row["wall_s"] = round(time.monotonic() - began, 1)
    return row


class _Row(dict[str, Any]):
    """A row that reports itself at every new stage."""

    def __init__(self, writer: int, *args: Any, **known: Any) -> None:
        super().__init__(*args, **known)
        self.writer = writer

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, float(f"{value:.5g}") if isinstance(value, float) else value)
        if key == "stage":
            self.report()

    def report(self) -> None:
        """Append the row to the file that the parent reads."""
        os.write(self.writer, (json.dumps(self) + "\n").encode())


def _child(subject: Subject, side: str, limits: argparse.Namespace, writer: int) -> None:
    row = _Row(writer, model=subject.key, kind=subject.kind, family=subject.family, size=subject.size)
    row["stage"] = "start"
    resource.setrlimit(resource.RLIMIT_CPU, (limits.seconds, limits.seconds + 5))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    if not limits.verbose:
        os.dup2(quiet, 2)
    try:
        SIDES[side](subject, row)
    except NotInstalledError as error:
        row["error"], row["stage"] = str(error), "not installed"
    except Exception as error:
        if limits.verbose:
            traceback.print_exc()
        row["error"] = message(error)
        row["place"] = _place(error)
    row["cpu_s"] = time.process_time()
    row.report()
    os._exit(0)


def _place(error: BaseException) -> str:
    frames, trace = [], error.__traceback__
    while trace is not None:
        frames.append(f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}")
        trace = trace.tb_next
    return " > ".join(frames[-4:])


def _watch(child: int, limits: argparse.Namespace) -> str:
    """Wait for the child; kill it if it uses too much memory or time."""
    began, reason = time.monotonic(), ""
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            if os.WIFSIGNALED(status) and not reason:
                number = os.WTERMSIG(status)
                over = number in (signal.SIGXCPU, signal.SIGKILL)
                reason = f"over {limits.seconds} s" if over else f"signal {number}"
            return reason
        with contextlib.suppress(OSError, IndexError):
            pages = int(Path(f"/proc/{child}/statm").read_text().split()[1])
            if pages * resource.getpagesize() > limits.gigabytes * 2**30:
                reason = f"over {limits.gigabytes} GB"
        if time.monotonic() - began > 6 * limits.seconds:
            reason = f"over {limits.seconds} s"
        if reason:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.05)


def sweep(chosen: list[Subject], sides: list[str], arguments: argparse.Namespace) -> None:
    """Run the models without a result, one process at a time."""
    for number, subject in enumerate(chosen, 1):
        for side in sides:
            path = arguments.out / f"{side}.jsonl"
            if not arguments.again and subject.key in read(path):
                continue
            row = run(subject, side, arguments)
            row["commit"] = arguments.commit
            with path.open("a") as stream:
                stream.write(json.dumps(row) + "\n")
            said = row.get("error") or row.get("train", "")
            print(f"{number}/{len(chosen)} {side} {subject.key}: {row['stage']} {said[:150]}", flush=True)
            if number % 5 == 0:
                (arguments.out / "digest.txt").write_text(digest(read(arguments.out / "ours.jsonl")))


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "coverage")
    parser.add_argument("--only", action="append", default=[], help="a pattern of names, such as 'timm/vit_*'")
    parser.add_argument("--again", action="store_true", help="repeat models that have a result")
    parser.add_argument("--ours-only", action="store_true")
    parser.add_argument("--peer-only", action="store_true")
    parser.add_argument("--summary", action="store_true", help="write the tables only")
    parser.add_argument("--missing", action="store_true", help="print the names without a result")
    parser.add_argument("--list", action="store_true", help="select the models of timm again")
    parser.add_argument("--seconds", type=int, default=120, help="limit of processor seconds per model")
    parser.add_argument("--gigabytes", type=float, default=8.0, help="limit of resident memory per model")
    parser.add_argument("--verbose", action="store_true", help="print tracebacks")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if arguments.list:
        return write_listing()
    arguments.out.mkdir(parents=True, exist_ok=True)
    skipped = "peer" if arguments.ours_only else "ours" if arguments.peer_only else None
    sides = [s for s in SIDES if s != skipped]
    every = subjects()
    patterns = arguments.only or ["*"]
    chosen = [s for s in every if any(fnmatch(s.key, p) or fnmatch(s.name, p) for p in patterns)]
    if arguments.missing:
        for side in sides:
            done = read(arguments.out / f"{side}.jsonl")
            print(*(f"{side} {s.key}" for s in chosen if s.key not in done), sep="\n")
        return None
    here = surroundings()
    arguments.commit = here["commit"]
    if not arguments.summary:
        (arguments.out / "surroundings.json").write_text(json.dumps(here, indent=1) + "\n")
        _import_all()
        sweep(chosen, sides, arguments)
    ours, peer = (read(arguments.out / f"{side}.jsonl") for side in SIDES)
    known = json.loads((arguments.out / "surroundings.json").read_text())
    (arguments.out / "digest.txt").write_text(digest(ours))
    page = DOCUMENT if arguments.out == RESULTS / "coverage" else arguments.out / "coverage.md"
    page.write_text(document(every, ours, peer, known))
    return print(f"wrote {page} and {arguments.out / 'digest.txt'}")


def _import_all() -> None:
    """Import everything before forking, so that imports are not timed in every child."""
    with contextlib.suppress(ImportError):
        import torch_pruning  # type: ignore[import-not-found] # noqa: F401
    import timm  # noqa: F401
    import torchvision  # noqa: F401


if __name__ == "__main__":
    main()
