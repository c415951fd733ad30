"""What a whole run gives back."""

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from secateur.architecture import Architecture
from secateur.graph import ChannelGraph
from secateur.report import RunReport
from secateur.search import Found
from secateur.surgery import Healing, Verification
from secateur.train import Trained


@dataclass(frozen=True, eq=False)
class Halfway:
    """A cut and healed student, before any training.

    Attributes:
        original: The uncut model in eval mode, on the device of the run; ours, not the caller's.
        student: The cut and healed one.
        graph: The graph it was cut by.
        found: What the search found.
        verification: Sliced against masked.
        healing: What each repair did.
    """

    original: nn.Module
    student: nn.Module
    graph: ChannelGraph
    found: Found
    verification: Verification
    healing: tuple[Healing, ...]


@dataclass(frozen=True, eq=False)
class CompressResult:
    """A compressed model, how it came about and what was checked.

    Attributes:
        model: The compressed model in eval mode, on the device of the model that was given.
        graph: The channel graph of the original.
        found: What the search found: architecture, costs, budget.
        verification: The proof that the sliced model equals the masked original.
        trained: The recovery, or None if there were no epochs; its model is masked if single weights were pruned.
        report: Every number: before and after, accuracy on the way, widths, checks, latency, provenance.
        folder: The artifact, or None if none was asked for.
        files: Everything that was written.
    """

    model: nn.Module
    graph: ChannelGraph
    found: Found
    verification: Verification
    trained: Trained | None
    report: RunReport
    folder: Path | None = None
    files: tuple[Path, ...] = ()

    @property
    def architecture(self) -> Architecture:
        """The kept channels of each axis."""
        return self.found.architecture

    @property
    def nonzero(self) -> int:
        """Parameters of the model that are not zero."""
        return self.report.after.weights

    @property
    def failed(self) -> tuple[str, ...]:
        """What did not hold, in words; empty if everything did."""
        return tuple(f"{check.name}: {check.detail}" for check in self.report.checks if not check.passed)
