"""Write the table of operations into docs/rules.md: which are followed, which freeze channels, which are counted.

    PYTHONPATH=src python tools/rules_table.py

Every public module of torch.nn, function of torch.nn.functional and operation of torchvision.ops is put between two
layers (tests/operation_nets.py), traced, cut to half of its channels, verified and counted.
`tests/integration/test_rules_page.py` makes every row again and compares it.
"""

import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torchvision

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import operation_nets as nets  # noqa: E402 - after the path

from secateur.architecture import Architecture  # noqa: E402
from secateur.cost import CostModel, count_macs  # noqa: E402
from secateur.graph import ChannelGraph, trace  # noqa: E402
from secateur.prune import cut  # noqa: E402

PAGE = ROOT / "docs" / "rules.md"
BEGIN, END = "<!-- table of operations: made by tools/rules_table.py -->", "<!-- end of the table of operations -->"
_SIDE = ("used as places", "reads the model's input", "reaches the model's output")
"""Reasons of axes beside the path through the operation: offsets, the first input, the last output."""


@dataclass(frozen=True)
class Row:
    """What became of one operation.

    Attributes:
        name: Public name.
        channels: In words.
        arithmetic: In words.
        followed: Whether all channels on the path can be removed.
    """

    name: str
    channels: str
    arithmetic: str
    followed: bool

    def __str__(self) -> str:
        return f"| `{self.name}` | {self.channels} | {self.arithmetic} |"


def measure(name: str, case: nets.Case) -> Row:
    """Trace, cut, verify and count the net of an operation."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = nets.Between(case).eval()
        example = nets.example_of(case)
        graph = trace(model, example)
        # Half of the channels, and at least one.
        kept = {axis.name: range(0, axis.size, 2) for axis in graph.prunable}
        made = cut(model, graph, Architecture.of(kept))
        costs = CostModel(graph)
        exact = (costs.original.macs, costs.cost(made.architecture).macs) == (
            count_macs(model, example),
            count_macs(made.model, example),
        )
    reasons = [*_reasons(graph), *(f"the check: {reason}" for _, reason in made.verification.frozen)]
    arithmetic = _arithmetic(graph, case) if exact else "**wrong**"
    if reasons:
        return Row(name, f"frozen: {reasons[0]}", arithmetic, followed=False)
    inside = any(mixing.read for mixing in graph.mixings)
    return Row(name, "followed, over the kept ones" if inside else "followed", arithmetic, followed=True)


def _reasons(graph: ChannelGraph) -> list[str]:
    found: dict[str, None] = {}
    for axis in graph.axes:
        if axis.frozen_because and not any(reason in axis.frozen_because for reason in _SIDE):
            found.setdefault(re.sub(r" in (operation[.\w]*|the model itself)| \(if it .*\)$", "", axis.frozen_because))
    return [*found]


def _arithmetic(graph: ChannelGraph, case: nets.Case) -> str:
    if graph.uncounted:
        return "not counted: " + ", ".join(sorted({operation.kind for operation in graph.uncounted}))
    around = 1 if case.ids else 2  # The layers before and after the operation.
    return "counted" if len(graph.operations) > around else "none"


def rows_of(library: str) -> Iterator[Row]:
    """Make the rows of a library, in the order of the names."""
    for name, case in sorted(nets.CASES[library].items()):
        yield measure(name, case)


def table(library: str, rows: list[Row], left_out: Mapping[str, str]) -> str:
    """Return the section of a library."""
    followed = sum(row.followed for row in rows)
    reasons: dict[str, list[str]] = {}
    for name, reason in sorted(left_out.items()):
        reasons.setdefault(reason, []).append(f"`{name}`")
    lines = [
        f"### {library}",
        "",
        f"{followed} of {len(rows)} with channels are followed ({100 * followed / len(rows):.1f} %).",
        "",
        "| operation | its channels | multiply-accumulates |",
        "| --- | --- | --- |",
        *map(str, rows),
        "",
        "Left out:",
        "",
        *(f"- {', '.join(names)}: {reason}." for reason, names in sorted(reasons.items())),
    ]
    return "\n".join(lines)


def version() -> str:
    """Return the versions that the table depends on."""
    return f"torch {torch.__version__.split('+')[0]}, torchvision {torchvision.__version__.split('+')[0]}"


def document() -> str:
    """Return the whole table."""
    sections = [table(library, [*rows_of(library)], nets.LEFT_OUT[library]) for library in nets.CASES]
    head = (
        f"Made by `tools/rules_table.py` with {version()}. Each operation lies between two layers; half of all "
        "channels is cut, and the result is verified and counted. **Followed**: every channel before and after it can "
        "be removed. **Over the kept ones**: the operation combines channels, in a cut model those that are left. "
        "**None**: the operation has no multiply-accumulates, which are the products of matrices and convolutions."
    )
    return "\n\n".join([BEGIN, head, *sections, END])


def main() -> None:
    """Write the table."""
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(before + document() + after, encoding="utf-8")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
