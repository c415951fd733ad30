"""Pin what short runs of the command line produce, to the last bit, and check that it is still the same.

The script knows only the command line and public file formats, so that it survives any restructuring of the source:

    PYTHONPATH=src python tools/pins.py write FILE   run everything and store what came out
    PYTHONPATH=src python tools/pins.py check FILE   run everything again; exit code 1 and a list if anything differs

``--only NAME`` (repeatable) restricts either to some cases and what they depend on, ``--keep FOLDER`` keeps the output
folders. Bits depend on the processor and on the versions of the libraries: compare files of one machine only.

Every case stores the exit code and, where there is an artifact, the SHA-256 of ``model.safetensors``, the contents of
``secateur.json`` and ``history.csv`` without times, and the SHA-256 of what exported files compute for a fixed input.
Not pinned: wording, ``report.html``, and budgets on latency, because these are met by measuring.
"""

import argparse
import csv
import fnmatch
import hashlib
import json
import os
import re
import runpy
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The commands, by case; {name} is the output folder of an earlier case. If a flag gets another name, change it here.

_DATA = "--data digits --threads 1 --limit 320 --batch-size 32 --quiet --checkpoint-steps 3"
_MODEL = "--model digits_resnet --weights {teacher}/model.safetensors --calibration 64"
_PRUNE = f"compress {_MODEL} {_DATA}"
_FINE = f"{_PRUNE} --divisor 1"
_COMPRESS = f"{_FINE} --lr 0.02 --export none"
_DISTILL = f"distill --teacher digits_resnet --student digits_resnet {_DATA} --export none"
_INSPECT = "inspect --json --model timm:"

RUNS = {
    "teacher": f"{_DISTILL} --epochs 3 --loss kd --label-weight 1 --lr 0.05",
    "knapsack": f"{_COMPRESS} --strategy knapsack --budget macs=50% --epochs 4",
    "pca": f"{_FINE} --strategy pca --budget params=40% --epochs 1 --ema 0.9 --lr 0.02 --export onnx,pt2,int8",
    "uniform": f"{_PRUNE} --strategy uniform --budget macs=50% --remove-blocks 1 --divisor 2 --epochs 1 --lr 0.002 "
    "--optimizer adamw --clip-norm 1 --accumulate 2 --label-smoothing 0.1 --seed 3 --export none",
    "global": f"{_COMPRESS} --strategy global --importance taylor --budget macs=70%,size=75% --exclude layer1.* "
    "--from-scratch --epochs 2",
    "tas": f"{_COMPRESS} --strategy tas --search-over both --search-epochs 2 --budget macs=50% --epochs 1",
    "swp": f"{_COMPRESS} --strategy swp --untied --search-epochs 1 --search-candidates 12 --budget macs=50% --epochs 1",
    "sparse": f"{_COMPRESS} --strategy knapsack --budget macs=60%,nonzero=20% --weight-allocation erk --epochs 2",
    "distill": f"{_DISTILL} --teacher-weights {{teacher}}/model.safetensors --epochs 2 --loss kd --loss attention=100 "
    "--hint-epochs 1 --rand-augment rand-m5-mstd0.5 --erase 0.2 --lr 0.02",
    "mixed": f"{_DISTILL} --teacher-weights {{teacher}}/model.safetensors --epochs 2 --mixup 0.2 --cutmix 1 --lr 0.02",
}
"""Runs that write an artifact; ``--out`` is added."""

STOPPED = {
    "knapsack killed": ("knapsack", signal.SIGKILL),
    "tas stopped": ("tas", signal.SIGTERM),
    "swp killed": ("swp", signal.SIGKILL),
    "distill stopped": ("distill", signal.SIGINT),
}
"""Runs that a signal ends at their first checkpoint and that are resumed; they must equal the uninterrupted run."""

RESUME = "--resume"

SHOWN = {
    "inspect resnet18": f"{_INSPECT}resnet18",
    "inspect mobilenetv3": f"{_INSPECT}mobilenetv3_small_100 --attention heads",
    "inspect vit": f"{_INSPECT}vit_tiny_patch16_224",
    "inspect densenet": f"{_INSPECT}densenet121 --include features.denseblock1 --axis-divisor *=8",
    "evaluate": "evaluate --model {knapsack} --data digits --threads 1",
    "verify": "verify {sparse} --threads 1",
    "refuse budget": f"{_COMPRESS} --budget macs=banana --out {{nowhere}}",
    "refuse pattern": f"{_COMPRESS} --budget macs=50% --exclude nothing --out {{nowhere}}",
    "refuse model": f"compress --model digits_resent {_DATA} --budget macs=50% --out {{nowhere}}",
    "refuse flag": "compress --no-such-flag",
    "refuse folder": "verify {nowhere}",
}
"""Commands that print: of JSON every top-level value is pinned, of other output the numbers; of refusals the code."""

VOLATILE = ("seconds", "images_per_s", "date", "command", "machine", "versions", "latency", "performance_efficiency")
"""Keys and columns that differ between two runs of the same code."""

WORDS = (
    "*.search.strategy",
    "*.healing.*.healer",
    "*.checks.*.name",
    "*.checks.*.detail",
    "*.step",
    "inspect *.reasons",
)
"""Paths of text that is only for readers. A difference is shown and does not fail, unless ``--strict``."""


@dataclass(frozen=True)
class Difference:
    """One value that is not what it was.

    Attributes:
        path: Where it is: the case, the file, the keys.
        before: The stored value.
        after: The value now.
    """

    path: str
    before: object
    after: object

    @property
    def is_wording(self) -> bool:
        """Whether only text for readers changed."""
        if not (isinstance(self.before, str) and isinstance(self.after, str)):
            return False
        return any(fnmatch.fnmatchcase(self.path, pattern) for pattern in WORDS)

    def __str__(self) -> str:
        return f"{self.path}\n    before: {_short(self.before)}\n    after:  {_short(self.after)}"


class Runner:
    """Runs commands in forked processes that have already imported the libraries, but nothing of Secateur.

    Args:
        folder: Holds the output folders and the logs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        _import_libraries()

    def words(self, command: str, *more: str) -> list[str]:
        """The words of a command, with the folders filled in. ``none`` stands for the empty word."""
        names = {name: self.folder / _slug(name) for name in [*RUNS, "nowhere"]}
        return ["" if word == "none" else word.format(**names) for word in [*command.split(), *more]]

    def start(self, name: str, command: str, *more: str) -> int:
        """Start a command; return the process id. What it prints goes to ``NAME.log`` and ``NAME.err``."""
        words = self.words(command, *more)
        child = os.fork()
        if child:
            return child
        for number, ending in ((1, "log"), (2, "err")):
            log = self.folder / f"{_slug(name)}.{ending}"
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os._exit(_exit_code(words))

    def run(self, name: str, command: str, *more: str) -> int:
        """Run a command to its end; return its exit code, negative for a signal."""
        return _wait(self.start(name, command, *more))

    def artifact(self, name: str) -> dict[str, Any]:
        """What a run left in its output folder."""
        folder = self.folder / _slug(name)
        if not folder.is_dir():
            return {"error": (self.folder / f"{_slug(name)}.err").read_text()[-500:]}
        with (folder / "history.csv").open(newline="") as file:
            history = [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]
        manifest = json.loads((folder / "secateur.json").read_text())
        manifest.pop("sha256", None)  # of the whole file, times included
        manifest["weights"].pop("tensors")
        return {
            "files": sorted(path.name for path in folder.iterdir()),
            "model.safetensors": _sha256((folder / "model.safetensors").read_bytes()),
            "secateur.json": _steady(manifest),
            "history.csv": _steady(history),
        } | _exported(folder, manifest["input"]["shape"])

    def resumed(self, name: str, whole: str, number: signal.Signals) -> dict[str, Any]:
        """Run a command that a signal ends at its first checkpoint, then resume it."""
        out = self.folder / _slug(name)
        child = self.start(name, RUNS[whole], "--out", str(out))
        # Checkpoints lie in folders epoch-*, beside the output folder in one whose name begins with that of the output.
        while not any(path.parent.name.startswith("epoch-") for path in self.folder.glob(f"{out.name}?*/**/*.json")):
            if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                break
            time.sleep(0.002)
        os.kill(child, number)
        code = _wait(child)
        refused = self.run(name, RUNS[whole], "--out", str(out))
        again = self.run(name, RUNS[whole], "--out", str(out), RESUME)
        return {"exit codes": [code, refused, again], "differs from uninterrupted": self._against(name, whole)}

    def shown(self, name: str, command: str) -> dict[str, Any]:
        """The exit code of a command that prints, and digests of what it printed."""
        found: dict[str, Any] = {"exit code": self.run(name, command)}
        text = (self.folder / f"{_slug(name)}.log").read_text()
        if "--json" in command and found["exit code"] == 0:
            reasons: set[str] = set()
            values = _without_reasons(json.loads(text), reasons)
            found |= {key: value if _is_small(value) else _digest(value) for key, value in values.items()}
            return found | {"reasons": " | ".join(sorted(reasons))}
        if found["exit code"] == 0:
            found["numbers"] = re.findall(r"(?<![\w.])\d+\.\d+(?:e-?\d+)?", text)
        return found

    def _against(self, name: str, whole: str) -> list[str]:
        return [str(found) for found in compare(self.artifact(whole), self.artifact(name))]


def collect(folder: Path, only: list[str], say: Callable[[str], None]) -> dict[str, Any]:
    """Run all cases, or some and what they depend on; return what is to be pinned, by case."""
    runner, found, needed = Runner(folder), {}, _needed(only)
    for name, command in RUNS.items():
        if name in needed:
            began = time.monotonic()
            code = runner.run(name, command, "--out", str(folder / name))
            found[name] = {"exit code": code} | runner.artifact(name)
            say(f"{name}: exit code {code}, {time.monotonic() - began:.0f} s")
    for name, (whole, number) in STOPPED.items():
        if name in needed:
            began = time.monotonic()
            found[name] = runner.resumed(name, whole, number)
            say(f"{name}: exit codes {found[name]['exit codes']}, {time.monotonic() - began:.0f} s")
    for name, command in SHOWN.items():
        if name in needed:
            began = time.monotonic()
            found[name] = runner.shown(name, command)
            say(f"{name}: exit code {found[name]['exit code']}, {time.monotonic() - began:.0f} s")
    return found


def compare(before: object, after: object, path: str = "") -> list[Difference]:
    """Compare two JSON values; return their differences, with a path for each."""
    if isinstance(before, dict) and isinstance(after, dict):
        keys = [*before, *(key for key in after if key not in before)]
        pairs = [(key, before.get(key, "(absent)"), after.get(key, "(absent)")) for key in keys]
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        pairs = [(str(number), one, other) for number, (one, other) in enumerate(zip(before, after, strict=True))]
    else:
        return [] if before == after and type(before) is type(after) else [Difference(path, before, after)]
    return [found for key, one, other in pairs for found in compare(one, other, f"{path}.{key}".lstrip("."))]


def main() -> int:
    """Run the script; return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("write", "check"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--only", action="append", default=[], choices=[*RUNS, *STOPPED, *SHOWN], metavar="NAME")
    parser.add_argument("--keep", type=Path, help="Keep the output folders here.")
    parser.add_argument("--strict", action="store_true", help="Fail for changed wording too.")
    given = parser.parse_args()
    stored = json.loads(given.file.read_text()) if given.action == "check" else {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = (given.keep or Path(scratch)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        found = json.loads(json.dumps(collect(folder, given.only, lambda text: print(text, flush=True))))
    broken = [
        f"{name}.{line}" for name in STOPPED for line in found.get(name, {}).get("differs from uninterrupted", [])
    ]
    for line in broken:
        print(f"Resumed is not uninterrupted: {line}")
    if given.action == "write":
        given.file.write_text(json.dumps(found, indent=1) + "\n")
        print(f"Wrote {given.file}: {len(found)} cases, digest {_digest(found)[:16]}")
        return int(bool(broken))
    differences = compare({name: stored.get(name) for name in found}, found)
    wording = [each for each in differences if each.is_wording and not given.strict]
    failures = [each for each in differences if each not in wording]
    for title, some in (("Changed wording, which is allowed", wording), ("DIFFERENT", failures)):
        if some:
            print(f"\n{title}:", *(f"  {each}" for each in some), sep="\n")
    print(f"\n{len(found)} cases: {len(failures)} differences, {len(wording)} changes of wording")
    return int(bool(failures or broken))


def _needed(only: list[str]) -> set[str]:
    if not only:
        return {*RUNS, *STOPPED, *SHOWN}
    needed, waiting = set(), list(only)
    while waiting:
        name = waiting.pop()
        needed.add(name)
        command = RUNS.get(name) or SHOWN.get(name) or RUNS[STOPPED[name][0]]
        waiting += [STOPPED[name][0]] if name in STOPPED else []
        waiting += [other for other in RUNS if f"{{{other}}}" in command and other not in needed]
    return needed


def _import_libraries() -> None:
    """Import what every command imports, so that a forked process need not; a second thread would forbid forking."""
    import lightning_fabric  # noqa: F401
    import scipy.optimize  # noqa: F401
    import sklearn.datasets  # noqa: F401
    import timm  # noqa: F401
    import torch

    torch.set_num_threads(1)
    if len(list(Path("/proc/self/task").iterdir())) != 1:
        raise RuntimeError("a process with several threads must not fork")


def _exit_code(words: list[str]) -> int:
    """Run ``python -m secateur`` in this process."""
    sys.argv = ["secateur", *words]
    try:
        runpy.run_module("secateur", run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 98
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _exported(folder: Path, shape: list[int]) -> dict[str, str]:
    """Digests of what the exported files compute for the same two inputs. Their own bytes hold names and paths."""
    return {path.name: _outputs(path, shape) for path in sorted(folder.iterdir()) if path.suffix in (".onnx", ".pt2")}


def _outputs(path: Path, shape: list[int]) -> str:
    """Computed in a process of its own: runtimes start threads."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(writer, _computed(path, shape).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        digest = pipe.read()
    _wait(child)
    return digest


def _computed(path: Path, shape: list[int]) -> str:
    import numpy as np

    inputs = np.random.default_rng(0).standard_normal((2, *shape), dtype=np.float32)
    if path.suffix == ".pt2":
        import torch

        return _sha256(torch.export.load(path).module()(torch.from_numpy(inputs)).detach().numpy().tobytes())
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return _sha256(session.run(None, {session.get_inputs()[0].name: inputs})[0].tobytes())


def _steady(value: Any) -> Any:
    """The same JSON without what differs between two runs of the same code."""
    if isinstance(value, dict):
        return {key: _steady(each) for key, each in value.items() if key not in VOLATILE}
    if isinstance(value, list):
        return [_steady(each) for each in value if not _is_timing(each)]
    return value


def _without_reasons(value: Any, reasons: set[str]) -> Any:
    """The same JSON with True in place of every reason; the reasons are added to the set."""
    if isinstance(value, list):
        return [_without_reasons(each, reasons) for each in value]
    if not isinstance(value, dict):
        return value
    given = {key for key, each in value.items() if key.endswith("_because") and each is not None}
    reasons |= {value[key] for key in given}
    return {key: True if key in given else _without_reasons(each, reasons) for key, each in value.items()}


def _is_timing(value: Any) -> bool:
    return isinstance(value, dict) and str(value.get("name", "")).startswith("Latency")


def _is_small(value: object) -> bool:
    return len(json.dumps(value)) < 200


def _digest(value: object) -> str:
    return _sha256(json.dumps(value, sort_keys=True).encode())


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _slug(name: str) -> str:
    return name.replace(" ", "-")


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 300 else f"{text[:297]}..."


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.exit(main())
