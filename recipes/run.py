"""Run one row of a paper's table: every command of a recipe, one after the other.

    python recipes/run.py recipes/tas/resnet56_cifar10.toml --data path/to/cifar10 --out runs/tas56
    python recipes/run.py recipes/tas/resnet56_cifar10.toml --data path/to/cifar10 --out runs/tas56 --print
    python recipes/run.py recipes/tas/resnet56_cifar10.toml --smoke --out /tmp/smoke

A recipe is a TOML file: ``title``, ``paper``, ``published`` (the numbers of the paper, with how they are known),
``gpu_hours`` (an estimate for one A100, not measured), ``notes``, ``commands``, and ``variants`` (more flags for the
last command, by name). A command is one of ``secateur``, or begins with ``study``. Finished commands are not repeated;
an interrupted one is resumed. ``--smoke`` runs the same commands and flags with a tiny network on handwritten digits
for one epoch: it shows that they fit together, and nothing else.
"""

import argparse
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

_FIELDS = {"title", "paper", "published", "gpu_hours", "notes", "commands", "variants"}
_TINY = {"--model": "digits_resnet", "--teacher": "digits_resnet", "--student": "digits_resnet", "--data": "digits"}
_QUICK = "--limit 96 --epochs 1 --batch-size 32 --lr 0.01 --threads 1 --export ''"
SMOKE = {
    "train": _QUICK,
    "distill": _QUICK,
    "compress": f"{_QUICK} --calibration 64 --budget macs=70%",
    "study": "--limit 96 --family resnet --seeds 1 --weights-kept 0.5 --macs-kept 0.7 --teacher-epochs 1 "
    "--student-epochs 1 --recovery-epochs 1 --recovery-images 32 --test-images 40 --batch-size 32 --threads 1",
}  # fmt: skip
"""Flags of the smoke run by command; the last one of two equal flags counts."""
SEARCHES = {"tas": "--search-epochs 1", "swp": "--search-epochs 1 --search-candidates 8"}
"""More of them by strategy."""


@dataclass(frozen=True)
class Recipe:
    """One row of a published table; see the module for the fields."""

    title: str
    paper: str
    published: tuple[str, ...]
    gpu_hours: float
    notes: tuple[str, ...]
    commands: tuple[str, ...]
    variants: dict[str, str]

    @classmethod
    def read(cls, path: Path) -> "Recipe":
        """Read a file; raise a ValueError that says what is wrong with it."""
        found = tomllib.loads(path.read_text(encoding="utf-8"))
        if missing := _FIELDS - {"variants"} - set(found):
            raise ValueError(f"{path} must have {', '.join(sorted(missing))}; got none. See recipes/README.md.")
        if unknown := set(found) - _FIELDS:
            raise ValueError(f"{path} must have {', '.join(sorted(_FIELDS))} only; got {', '.join(sorted(unknown))}.")
        lists = {name: tuple(found[name]) for name in ("published", "notes", "commands")}
        return cls(**{**found, **lists, "variants": dict(found.get("variants", {}))})

    def words(self, data: str, out: Path, variant: str | None, *, smoke: bool) -> list[tuple[list[str], Path]]:
        """Return the words of every command after ``secateur``, and the folder that it makes."""
        if variant is not None and variant not in self.variants:
            raise ValueError(f"`--variant` must be one of {', '.join(self.variants) or 'none'}; got {variant!r}.")
        found: list[tuple[list[str], Path]] = []
        for number, command in enumerate(self.commands, 1):
            last = number == len(self.commands)
            more = self.variants[variant] if variant is not None and last else ""
            folder = out / (variant or "result") if last else out / f"step{number}"
            words = shlex.split(f"{command} {more}")
            if smoke:
                words = _made_small(words)
            places = {"{data}": data, "{out}": str(out)}
            words = [_filled(word, places) for word in words]
            found.append(([*words, "--out", str(folder)], folder))
        return found


def _filled(word: str, places: dict[str, str]) -> str:
    for place, value in places.items():
        word = word.replace(place, value)
    return word


def _made_small(words: list[str]) -> list[str]:
    small = list(words)
    for at, (flag, value) in enumerate(pairwise(words), 1):
        if flag in _TINY and "{out}" not in value:
            small[at] = _TINY[flag]
        if flag == "--image-size":
            small[at] = "8"
    # Pretrained weights and modules of another network would not fit.
    for gone in ("--teacher-weights", "--weights", "--stage-end"):
        while gone in small:
            del small[small.index(gone) : small.index(gone) + 2]
    strategy = words[words.index("--strategy") + 1] if "--strategy" in words else ""
    return [*small, *shlex.split(f"{SMOKE[words[0]]} {SEARCHES.get(strategy, '')}")]


def run(recipe: Recipe, data: str, out: Path, variant: str | None, *, smoke: bool) -> None:
    """Run what has not been run yet; end the process with the code of a command that fails."""
    for words, folder in recipe.words(data, out, variant, smoke=smoke):
        if (folder / "secateur.json").is_file() or (folder / "study.html").is_file():
            print(f"{folder} is there already.", flush=True)
            continue
        program = ["-m", "benchmarks.study", *words[1:]] if words[0] == "study" else ["-m", "secateur", *words]
        resumed = ["--resume"] if folder.with_name(f"{folder.name}.work").exists() else []
        print("$", shlex.join([words[0], *words[1:], *resumed]), flush=True)
        ended = subprocess.run([sys.executable, *program, *resumed], check=False, cwd=Path(__file__).parents[1])
        if ended.returncode:
            raise SystemExit(ended.returncode)


def main(words: Sequence[str] | None = None) -> None:
    """Read the command line, and run or print a recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, help="A TOML file of recipes/.")
    parser.add_argument("--data", default="digits", help="Images, as for `secateur compress`.")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="Folder of all results.")
    parser.add_argument("--variant", help="One of the variants of the recipe.")
    parser.add_argument("--smoke", action="store_true", help="Run a tiny size that shows nothing but that it runs.")
    parser.add_argument("--print", action="store_true", dest="only_print", help="Print the commands and numbers only.")
    asked = parser.parse_args(words)
    try:
        recipe = Recipe.read(asked.recipe)
        commands = recipe.words(asked.data, asked.out.absolute(), asked.variant, smoke=asked.smoke)
    except (OSError, ValueError) as error:
        print(f"Error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    if asked.only_print:
        print(f"{recipe.title} ({recipe.paper}), about {recipe.gpu_hours:g} GPU hours\n")
        print("\n".join((*(f"published: {each}" for each in recipe.published), *recipe.notes, "")))
        print("\n".join(shlex.join(["secateur" if c[0] != "study" else "", *c]).strip("' ") for c, _ in commands))
        print(f"variants: {', '.join(recipe.variants) or 'none'}")
        return
    if not asked.smoke and asked.data == "digits":
        print("Error: `--data` must name the images of the recipe; got none. Or run it with --smoke.", file=sys.stderr)
        raise SystemExit(2)
    run(recipe, asked.data, asked.out.absolute(), asked.variant, smoke=asked.smoke)


if __name__ == "__main__":
    main()
