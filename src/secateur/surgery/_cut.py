"""`cut`: slice, verify, freeze what cannot be cut right, heal."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import nn

from secateur.architecture import Architecture
from secateur.errors import SurgeryError
from secateur.graph import ChannelGraph
from secateur.surgery._slice import apply_architecture, check_architecture
from secateur.surgery._verify import Mismatch, Verification, compare


@dataclass(frozen=True, eq=False)
class Wound:
    """What a healing step works on.

    Attributes:
        original: The full model; never modified.
        graph: Its channel graph.
        architecture: What was kept.
        images: Calibration batches, normalised, on the model's device.
    """

    original: nn.Module
    graph: ChannelGraph
    architecture: Architecture
    images: tuple[torch.Tensor, ...]


class Healer(Protocol):
    """A closed-form repair of a freshly cut model."""

    def heal_(self, small: nn.Module, wound: Wound) -> None:
        """Change the weights or statistics of ``small`` in place."""
        ...


@dataclass(frozen=True, eq=False)
class Cut:
    """A cut model and the proof that the cut is right.

    Attributes:
        model: The smaller model, in eval mode.
        graph: The graph it was cut by; axes that could not be cut right are frozen in it.
        architecture: What was kept; whole on axes that had to be frozen.
        verification: Sliced against masked, before healing.
    """

    model: nn.Module
    graph: ChannelGraph
    architecture: Architecture
    verification: Verification


def cut(
    model: nn.Module,
    graph: ChannelGraph,
    architecture: Architecture,
    *,
    calibration: Sequence[torch.Tensor] = (),
    heal: Sequence[Healer] = (),
) -> Cut:
    """Cut a model to an architecture, prove it, and heal it.

    The sliced model must equal the original with the removed channels zeroed. Where it does not, the module in which
    they first differ is found, its channels are frozen with a reason, and the cut is made again: a wrong model is
    never returned, at worst a larger one.

    Args:
        model: The traced model; not modified.
        graph: Its channel graph.
        architecture: Channels to keep.
        calibration: Batches of normalised images for the healers.
        heal: Repairs to apply in order, such as ``Fold()`` and ``RecalibrateBatchNorm()``; each needs calibration.

    Raises:
        SurgeryError: If the architecture does not fit, a healer has no images, or no correct cut is found.
    """
    if heal and not calibration:
        raise SurgeryError("`heal` needs `calibration` images; got none. Pass some training images, or heal=().")
    check_architecture(graph, architecture)
    frozen: tuple[tuple[str, str], ...] = ()
    while True:
        small = apply_architecture(model, graph, architecture).eval()
        result = compare(model, small, graph, architecture)
        if isinstance(result, Verification):
            break
        reasons = _blame(result, graph, architecture)
        frozen += tuple(sorted(reasons.items()))
        graph = graph.with_frozen(reasons)
        architecture = Architecture.of({n: c for n, c in architecture.kept if n not in reasons})
    wound = Wound(model, graph, architecture, tuple(calibration))
    for healer in heal:
        healer.heal_(small, wound)
    return Cut(small, graph, architecture, replace(result, frozen=frozen))


def _blame(mismatch: Mismatch, graph: ChannelGraph, architecture: Architecture) -> dict[str, str]:
    """The cut axes to freeze: those the guilty module touches, else those of the module around it, and so on."""
    cut_axes = {n for n, channels in architecture.kept if len(channels) < graph.by_name[n].size}
    module = mismatch.module
    while True:
        inside = {m for m in graph.touching if m == module or m.startswith(module + ".") or not module}
        guilty = cut_axes & {name for m in inside for name in graph.touching[m]}
        if guilty:
            reason = f"cutting {module or 'the model'} was not exact: {mismatch.what}"
            return dict.fromkeys(sorted(guilty), reason)
        if not module:
            raise SurgeryError(f"the model could not be cut correctly: {mismatch.what}. Please report this model.")
        module = module.rpartition(".")[0]
