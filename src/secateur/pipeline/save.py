"""Save what was cut by hand: `save` makes of a cut model the artifact that `compress` makes of a whole run."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from secateur._batches import call_model, float_tensors
from secateur._caller_state import in_default_state
from secateur._files import atomic_folder
from secateur._provenance import Provenance
from secateur._runtime import copy_model, run_isolated
from secateur.cost.macs import CostModel, count_macs, count_params
from secateur.errors import ArtifactError
from secateur.export.artifact import FACTORY_KIND, refuse_foreign, replaceable_files, save_artifact
from secateur.export.manifest import Edit, Manifest, Recipe, held_value
from secateur.graph.graph import ChannelGraph
from secateur.models.source import ModelSource
from secateur.models.weights import diverged_tensors
from secateur.pipeline.config import CompressResult
from secateur.pipeline.finalize import probe_json, same_bits
from secateur.pipeline.load import load
from secateur.prune.cut import Cut
from secateur.prune.cut_record import CutRecord


@in_default_state
def save(
    cut: Cut | CompressResult,
    folder: Path | str,
    *,
    model: nn.Module | None = None,
    source: ModelSource | str | None = None,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    classes: Sequence[str] = (),
) -> Manifest:
    """Write a model that was cut by hand as an artifact, which `secateur.load` reads back bit for bit.

    The model may have been trained since, and it may have been cut, trained and cut again: the artifact holds the
    result of all cuts. An older artifact at ``folder`` is replaced as a whole.

    Args:
        cut: What `secateur.cut` returned, of the last cut if there were several; or the result of `compress`.
        folder: A missing or empty folder, or an older artifact.
        model: The model to save, if the training returned another object than ``cut.model``: a copy of it with other
            weights.
        source: How the model before the first cut is built: a `ModelSource`, or words such as ``"timm:resnet18"`` or
            ``"python:package.module:function"``. Without it only ``secateur.load(folder, factory=...)`` can load the
            artifact, and a warning says so.
        mean: Mean of each input channel, for images scaled to 0..1; empty if inputs come normalized.
        std: Standard deviation of each input channel; empty as ``mean``.
        classes: Class names in the order of the logits.

    Returns:
        The content of secateur.json.

    Raises:
        ArtifactError: If ``model`` was not cut, has other tensors than ``cut.model`` or weights that are not finite, if
            ``source`` builds another model, or if ``folder`` cannot be written.
        ModelError: If ``source`` cannot be built.
    """
    folder = Path(folder).absolute()
    refuse_foreign(folder)
    student = copy_model(cut.model if model is None else model).eval().cpu()
    record = _record_of(student, cut.model)
    where = ModelSource.parse(source) if isinstance(source, str) else source
    example = tree_map_only(Tensor, lambda tensor: tensor.detach().cpu(), cut.graph.example)
    name = type(student).__qualname__
    recipe = Recipe(
        source={"kind": FACTORY_KIND, "name": name} if where is None else where.to_json(),
        architecture=record.architecture,
        input_shape=_input_shape(example),
        edits=_edits(student, record),
        mean=tuple(mean),
        std=tuple(std),
        classes=tuple(classes),
        cost_before=_cost_before(cut.graph, record, where, example),
        cost_after={"macs": count_macs(student, example), "params": count_params(student)},
        verification=_probed(student, example),
        provenance=Provenance.here(""),
    )
    with atomic_folder(folder, replaceable=replaceable_files) as draft:
        manifest = save_artifact(draft, student, recipe)
        if where is not None:
            _check_source(where, student, draft, example)
    if where is None:
        warnings.warn(
            f"`source` was not given, so only secateur.load({str(folder)!r}, factory=...) can load this artifact, with "
            f"a function that builds the {name} before its first cut. On the command line it goes beside --model "
            "python:package.module:function.",
            stacklevel=3,  # The caller of the decorated function.
        )
    return manifest


def _check_source(source: ModelSource, student: nn.Module, draft: Path, example: tuple[object, ...]) -> None:
    """Refuse a source from which the artifact does not become the model again."""
    name = f"{source.kind}:{source.name}"
    try:
        loaded = load(draft, factory=lambda: source.build(trust_source=True)).model
    except ArtifactError as error:
        raise ArtifactError(
            f"`source` must build the model as it was before its first cut; {name} builds another one, of which {error}"
        ) from error
    if not same_bits(student, loaded, example):
        raise ArtifactError(
            f"`source` must build the model as it was before its first cut; with the saved weights, {name} computes "
            "something else than the model in memory. Name what built it."
        )


def _record_of(student: nn.Module, cut_model: nn.Module) -> CutRecord:
    """Return the record of a model that is to be saved, after checking that it is the cut model with other weights."""
    record, wanted = CutRecord.of(student), CutRecord.of(cut_model)
    if record is None or record != wanted:
        raise ArtifactError(
            f"`model` must be the cut model or a copy of it; got a {type(student).__name__} that was not cut this way. "
            "Pass the module that came out of the cut, without what a trainer has wrapped around it."
        )
    shapes, theirs = ({name: tuple(t.shape) for name, t in m.state_dict().items()} for m in (student, cut_model))
    other = sorted(name for name in {*shapes, *theirs} if shapes.get(name) != theirs.get(name))
    if other:
        raise ArtifactError(
            f"`model` must have the tensors of the cut model; got others: {other[:5]}. Pass the module that came out "
            "of the cut, with other weights only."
        )
    broken = diverged_tensors(student, student.state_dict())
    if broken:
        raise ArtifactError(
            f"`model` must have finite weights; got NaN or infinity in {len(broken)} tensor(s): {broken[:5]}. The "
            "training diverged: go back to a state before that."
        )
    return record


def _edits(student: nn.Module, record: CutRecord) -> tuple[Edit, ...]:
    edits = (Edit(*place, 0) for place in record.places)
    return tuple(Edit(e.module, e.attribute, e.item, held_value(student, e)) for e in edits)


def _input_shape(example: tuple[object, ...]) -> tuple[int, ...]:
    tensor = next(leaf for leaf in tree_leaves(example) if isinstance(leaf, Tensor))
    # A list holds single images; everything else has a batch dimension.
    return tuple(tensor.shape) if isinstance(example[0], list) else tuple(tensor.shape[1:])


def _cost_before(
    graph: ChannelGraph, record: CutRecord, source: ModelSource | None, example: tuple[object, ...]
) -> dict[str, object]:
    """Return the costs of the model before its first cut, as far as it is there to be counted."""
    if source is not None:
        pristine = source.build(trust_source=True)
        return {"macs": count_macs(pristine, example), "params": count_params(pristine)}
    return dict(CostModel(graph).original.to_json()) if record.cuts == 1 else {}


def _probed(student: nn.Module, example: tuple[object, ...]) -> dict[str, object]:
    """Return outputs for a seeded image, if the model takes one tensor and returns one for the whole batch."""
    if len(example) != 1 or not isinstance(example[0], Tensor):
        return {}
    images = torch.cat([example[0], example[0]])
    with run_isolated(student), torch.no_grad():
        outputs = call_model(student, images)
    if not all(len(tensor) == 2 for tensor in float_tensors(outputs) if tensor.ndim):
        return {}
    probe = probe_json(student, tuple(images.shape[1:]))
    return {} if probe is None else {"probe": probe}
