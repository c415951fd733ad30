"""What an artifact says about itself: secateur.json as frozen dataclasses. Every field is checked when it is read.

Weights imply most of a cut model's sizes, but not all: ``groups``, the pad amounts of an option-A shortcut, the sizes
of a ``split``. Each is recorded as an `Edit` (module, attribute, item, value) and set when the model is rebuilt.
"""

import json
import math
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeGuard, cast

from torch import nn

from secateur._json import MAX_DIMENSIONS, MAX_TENSORS, Fields, brief, parse, wrong
from secateur._provenance import Provenance, sha256_of_json
from secateur.architecture import Architecture
from secateur.errors import ArtifactError, SurgeryError
from secateur.graph._size_ints import steps_of
from secateur.graph._size_records import held_numbers, set_number
from secateur.graph.graph import Replacement, SizeItem, StandIn
from secateur.prune.narrow_branches import ChannelExpansion, original_names
from secateur.prune.slice import find_replacements

SCHEMA = 4
"""The version of secateur.json that this code writes, and the newest that it reads. Older ones are read too:

1 has no removed blocks: no ``replacements``, and ``architecture`` is what is now its field ``kept``.
2 has no branches that are narrower than the stream they are added into: no ``widenings``.
3 has no tensors stored sparsely: no ``sparse`` in their records, and no ``nonzero`` in ``weights``.
"""

FORMAT = "secateur-artifact"
_LONGEST_SOURCE = 64 * 2**10
"""Characters of the JSON that says how the original is built."""
_LONGEST_TUPLE = 64
_LONGEST_PATH = 8
_MAX_CHANNELS = 2**20
_LARGEST_DIMENSION = 2**40
_LARGEST_INPUT = 2**26
"""Largest number of elements of one input: 8192 x 8192 pixels of one channel."""


def _nothing() -> dict[str, object]:
    return {}


@dataclass(frozen=True, order=True)
class Edit:
    """One int held by a module.

    Attributes:
        module: Qualified module name ("" is the model itself).
        attribute: Attribute name.
        item: Position inside a tuple or list attribute, or None for a plain int; see `SizeEdit` for other places.
        value: The value it must have.
    """

    module: str
    attribute: str
    item: SizeItem
    value: int

    def __str__(self) -> str:
        place = brief(f"{self.module}.{self.attribute}" if self.module else self.attribute)
        return place + "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps_of(self.item))


@dataclass(frozen=True)
class Recipe:
    """All that belongs to a compressed model beside its weights: how to build it, use it and reproduce it.

    Attributes:
        source: How the original model is built: ``ModelSource.to_json()``; its ``kind`` must be there.
        architecture: Which channels were kept, and which blocks were removed.
        edits: The ints that surgery changed in modules, see `edits_between`.
        input_shape: One input without the batch, (channels, height, width).
        mean: Mean that is subtracted from each input channel (images scaled to 0..1) before the model.
        std: Standard deviation that each input channel is divided by, after the mean is subtracted.
        classes: Class names in the order of the logits; empty if unknown.
        cost_before: Costs of the original, such as ``{"macs": ..., "params": ...}``.
        cost_after: Costs of the saved model.
        metrics: Accuracies and other results, any JSON.
        verification: The checks and their results, any JSON.
        provenance: How the model was made, see `Provenance`.
    """

    source: Mapping[str, object]
    architecture: Architecture
    input_shape: tuple[int, ...]
    edits: tuple[Edit, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    classes: tuple[str, ...] = ()
    cost_before: Mapping[str, object] = field(default_factory=_nothing)
    cost_after: Mapping[str, object] = field(default_factory=_nothing)
    metrics: Mapping[str, object] = field(default_factory=_nothing)
    verification: Mapping[str, object] = field(default_factory=_nothing)
    provenance: Provenance = field(default_factory=Provenance)

    def to_json(self) -> dict[str, object]:
        """Return a JSON object."""
        return {
            "source": dict(self.source),
            "architecture": self.architecture.to_json(),
            "edits": [[edit.module, edit.attribute, edit.item, edit.value] for edit in self.edits],
            "input": {"shape": list(self.input_shape), "mean": list(self.mean), "std": list(self.std)},
            "classes": list(self.classes),
            "cost": {"before": dict(self.cost_before), "after": dict(self.cost_after)},
            "metrics": dict(self.metrics),
            "verification": dict(self.verification),
            "provenance": self.provenance.to_json(),
        }


@dataclass(frozen=True)
class TensorRecord:
    """One parameter or buffer of the saved model.

    Attributes:
        name: Its qualified name in the model.
        dtype: Its dtype, such as ``float32``.
        shape: Its shape.
        layout: ``contiguous``, ``channels_last`` or ``channels_last_3d``: the memory format, which can decide the
            kernel and with it the last bit of a result.
        parameter: Whether it is a parameter (else a buffer).
        same_as: Name of the tensor that it shares (tied weights), or None.
        sparse: Whether the file holds one bit for each element and the elements that are not zero.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    layout: str
    parameter: bool
    same_as: str | None = None
    sparse: bool = False

    def to_json(self) -> dict[str, object]:
        """Return a JSON object without the fields that have their usual value."""
        data: dict[str, object] = {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}
        if self.layout != "contiguous":
            data["layout"] = self.layout
        if not self.parameter:
            data["buffer"] = True
        if self.same_as is not None:
            data["same_as"] = self.same_as
        if self.sparse:
            data["sparse"] = True
        return data

    @classmethod
    def from_json(cls, data: object, where: str) -> "TensorRecord":
        """Read and check what `to_json` wrote."""
        fields = Fields(data, where)
        plain = cast(Mapping[str, object], data)
        for flag in ("buffer", "sparse"):
            if plain.get(flag, False) not in (True, False):
                raise wrong(fields.path(flag), "true or false", plain[flag])
        shape = fields.integers("shape", least=0, limit=MAX_DIMENSIONS)
        if any(size > _LARGEST_DIMENSION for size in shape):
            raise wrong(fields.path("shape"), "a list of sizes below 2^40", list(shape))
        return cls(
            name=fields.name("name"),
            dtype=fields.name("dtype"),
            shape=shape,
            layout=fields.text("layout") if "layout" in plain else "contiguous",
            parameter=not plain.get("buffer", False),
            same_as=fields.name("same_as") if "same_as" in plain else None,
            sparse=bool(plain.get("sparse", False)),
        )


@dataclass(frozen=True)
class Manifest:
    """The content of secateur.json.

    Attributes:
        recipe: What the caller of `save_artifact` said.
        tensors: The tensors in model.safetensors.
        weights_sha256: SHA-256 of model.safetensors, hexadecimal.
        weights_bytes: Size of model.safetensors.
        replacements: The stand-ins for the modules of removed blocks.
        widenings: The modules that are narrower than the stream they are added into.
        nonzero: Number of parameters that are not zero; None in artifacts before schema 4.
        schema: Version of this file's layout.
    """

    recipe: Recipe
    tensors: tuple[TensorRecord, ...]
    weights_sha256: str
    weights_bytes: int
    replacements: tuple[Replacement, ...] = ()
    widenings: tuple[ChannelExpansion, ...] = ()
    nonzero: int | None = None
    schema: int = SCHEMA

    def __repr__(self) -> str:
        source, digest = brief(dict(self.recipe.source)), self.weights_sha256[:12]
        counts = f"{len(self.tensors)} tensors, {self.weights_bytes} bytes"
        return f"Manifest({source}, {counts}, sha256={digest}, schema={self.schema})"

    def to_bytes(self) -> bytes:
        """Return the text of secateur.json with one line for each top-level key, so that a diff shows what changed.

        Raises:
            ArtifactError: If the recipe holds something that JSON cannot.
        """
        weights = {
            "sha256": self.weights_sha256,
            "bytes": self.weights_bytes,
            "nonzero": self.nonzero,
            "tensors": [tensor.to_json() for tensor in self.tensors],
        }
        stand_ins = [[r.module, r.stand_in.value, r.items] for r in self.replacements]
        wide = [[w.module, w.dim, w.missing, list(w.order)] for w in self.widenings]
        data = {
            "format": FORMAT,
            "schema": self.schema,
            **self.recipe.to_json(),
            "replacements": stand_ins,
            "widenings": wide,
            "weights": weights,
        }
        try:
            data["sha256"] = manifest_sha256(data)
            lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in data.items()]
        except (TypeError, ValueError) as error:
            raise ArtifactError(
                f"`recipe` must hold plain JSON values; got something else ({error}). "
                "Turn arrays into lists, tensors into floats, and leave out what is NaN or infinite."
            ) from error
        return ("{\n" + ",\n".join(lines) + "\n}\n").encode()

    @classmethod
    def from_bytes(cls, text: bytes) -> "Manifest":
        """Read what `to_bytes` wrote and check every field.

        Raises:
            ArtifactError: If the text is not a manifest, or is one of a newer version.
        """
        data = parse(text, "secateur.json")
        fields = Fields(data, "")
        if data.get("format") != FORMAT:
            raise wrong("format", FORMAT, data.get("format"))
        schema = fields.integer("schema", least=1)
        if schema > SCHEMA:
            raise ArtifactError(
                f"`schema` must be at most {SCHEMA}; got {schema}: this artifact was written by a newer Secateur. "
                "Upgrade with `pip install --upgrade secateur`."
            )
        if fields.text("sha256") != manifest_sha256(data):
            raise ArtifactError(
                "secateur.json must have the SHA-256 that its last line says; got another. It is damaged or was "
                "changed by hand: copy the artifact again, or make it again."
            )
        weights = fields.fields("weights")
        records = enumerate(weights.items("tensors", MAX_TENSORS))
        tensors = tuple(TensorRecord.from_json(record, f"weights.tensors[{n}]") for n, record in records)
        check_once("weights.tensors", [tensor.name for tensor in tensors])
        return cls(
            recipe=_recipe(fields),
            tensors=tensors,
            weights_sha256=weights.text("sha256"),
            weights_bytes=weights.integer("bytes", least=0),
            replacements=() if schema < 2 else read_replacements(fields),
            widenings=() if schema < 3 else read_widenings(fields),
            nonzero=None if schema < 4 else weights.optional_integer("nonzero", least=0),
            schema=schema,
        )


def manifest_sha256(data: Mapping[str, object]) -> str:
    """Return the SHA-256 of a manifest without its own ``sha256``, whatever the spacing and order of its text.

    It finds accidents (a damaged disk, an edit by hand), but no forgery, which would have the right hash.
    """
    rest = {key: value for key, value in data.items() if key != "sha256"}
    return sha256_of_json(rest)


def _recipe(fields: Fields) -> Recipe:
    pixels, cost = fields.fields("input"), fields.fields("cost")
    try:
        architecture = Architecture.from_json(fields.mapping("architecture"))
    except SurgeryError as error:
        raise ArtifactError(
            f"`architecture` is damaged (secateur.json): {brief(error)} Save the artifact again."
        ) from error
    shape = pixels.integers("shape", least=1, limit=MAX_DIMENSIONS)
    if math.prod(shape) > _LARGEST_INPUT:
        raise wrong(pixels.path("shape"), f"a size of at most {_LARGEST_INPUT} numbers", list(shape))
    return Recipe(
        source=read_source(fields),
        architecture=architecture,
        edits=read_edits(fields),
        input_shape=shape,
        mean=pixels.numbers("mean"),
        std=pixels.numbers("std"),
        classes=fields.texts("classes"),
        cost_before=cost.mapping("before"),
        cost_after=cost.mapping("after"),
        metrics=fields.mapping("metrics"),
        verification=fields.mapping("verification"),
        provenance=Provenance.from_fields(fields.fields("provenance")),
    )


def read_source(fields: Fields) -> dict[str, object]:
    """Read how the original is built: an object with a ``kind``, whose other fields the builder checks."""
    source = fields.mapping("source")
    fields.fields("source").name("kind")
    if len(json.dumps(source)) > _LONGEST_SOURCE:
        raise wrong("source", f"at most {_LONGEST_SOURCE} characters", source)
    return source


def check_once(where: str, names: Sequence[Hashable]) -> None:
    """Refuse a list that names something twice."""
    if len(set(names)) != len(names):
        twice = next(name for name, times in Counter(names).items() if times > 1)
        raise wrong(where, "a list that names everything once", twice)


def _named(row: object, where: str, *names: str) -> Fields:
    """Return a row (a list) as fields with the given names."""
    if not isinstance(row, list) or len(cast(list[object], row)) != len(names):
        raise wrong(where, f"[{', '.join(names).replace('_', '-')}]", row)
    return Fields(dict(zip(names, cast(list[object], row), strict=True)), where)


def read_replacements(fields: Fields) -> tuple[Replacement, ...]:
    """Read the stand-ins of removed modules."""
    rows = enumerate(fields.items("replacements", MAX_TENSORS))
    found = tuple(_replacement(row, f"replacements[{n}]") for n, row in rows)
    check_once("replacements", [replacement.module for replacement in found])
    return found


def _replacement(row: object, where: str) -> Replacement:
    fields = _named(row, where, "module", "stand_in", "items")
    kind = fields.text("stand_in")
    if kind not in {stand_in.value for stand_in in StandIn}:
        raise wrong(fields.path("stand_in"), " or ".join(stand_in.value for stand_in in StandIn), kind)
    items = fields.optional_integer("items", least=1)
    if items is not None and items > _LONGEST_TUPLE:
        raise wrong(fields.path("items"), f"at most {_LONGEST_TUPLE}", items)
    return Replacement(fields.name("module"), StandIn(kind), items)


def read_widenings(fields: Fields) -> tuple[ChannelExpansion, ...]:
    """Read the modules that are narrower than the stream they are added into."""
    rows = enumerate(fields.items("widenings", MAX_TENSORS))
    found = tuple(_widening(row, f"widenings[{n}]") for n, row in rows)
    check_once("widenings", [widening.module for widening in found])
    return found


def _widening(row: object, where: str) -> ChannelExpansion:
    fields = _named(row, where, "module", "dim", "missing", "order")
    dim, missing = fields.integer("dim", least=0), fields.integer("missing", least=0)
    order = fields.integers("order", least=0, limit=_MAX_CHANNELS)
    for name, value, limit in (("dim", dim, MAX_DIMENSIONS), ("missing", missing, _MAX_CHANNELS)):
        if value >= limit:
            raise wrong(fields.path(name), f"below {limit}", value)
    if any(place > len(order) for place in order):
        raise wrong(fields.path("order"), "a list of places among the channels", max(order))
    return ChannelExpansion(fields.name("module"), dim, missing, order)


def read_edits(fields: Fields) -> tuple[Edit, ...]:
    """Read the ints that surgery changed."""
    found = tuple(_edit(row, f"edits[{n}]") for n, row in enumerate(fields.items("edits")))
    check_once("edits", [(edit.module, edit.attribute, edit.item) for edit in found])
    return found


def _edit(row: object, where: str) -> Edit:
    fields = _named(row, where, "module", "attribute", "item", "value")
    return Edit(
        fields.name("module"),
        fields.name("attribute"),
        fields.optional_place("item", longest=_LONGEST_PATH),
        fields.integer("value"),
    )


def edits_between(original: nn.Module, model: nn.Module) -> tuple[Edit, ...]:
    """Find every int of a module (plain, or in a tuple or list) that differs between two builds of one architecture.

    This finds all that surgery changed, whether or not it shows in the weights: ``out_channels``, ``groups``, pads.

    Args:
        original: The model as its source builds it.
        model: The same architecture after surgery: the same module names without those of removed blocks, some of them
            inside of modules that expand a narrow branch.

    Returns:
        The values of ``model`` where they differ, in the order of its modules.

    Raises:
        ArtifactError: If the two do not have the same modules, or a list changed its length.
    """
    removed = tuple(f"{replacement.module}." for replacement in find_replacements(model))
    theirs = {name: module for name, module in original.named_modules() if not name.startswith(removed)}
    ours, names = dict(model.named_modules()), original_names(model)
    if theirs.keys() != set(names.values()):
        different = sorted(theirs.keys() ^ set(names.values()))[:5]
        raise ArtifactError(
            f"`model` must have the modules of `original`; got different ones: {different}. "
            "Only channels and removed blocks may differ: build both from the same source."
        )
    pairs = ((name, theirs[origin], ours[name]) for name, origin in names.items())
    largest = _largest_size(original)
    return tuple(edit for name, old, module in pairs for edit in _differences(name, old, module, largest))


def _largest_size(model: nn.Module) -> int:
    return max((size for tensor in (*model.parameters(), *model.buffers()) for size in tensor.shape), default=0)


def _differences(name: str, original: nn.Module, module: nn.Module, largest: int) -> Iterator[Edit]:
    for attribute, value in vars(module).items():
        old = vars(original).get(attribute)
        if _is_ints(value) and _is_ints(old) and len(value) != len(old):
            raise ArtifactError(
                f"{Edit(name, attribute, None, 0)} must keep its length to be recorded; got {old} and {value}. "
                "Hold a fixed number of sizes in the module."
            )
    before = {(attribute, item): value for attribute, item, value in held_numbers(original)}
    for attribute, item, value in held_numbers(module):
        old = before.get((attribute, item), value)
        # Larger numbers, such as counters of steps in a dict, are no sizes, and loading would refuse them.
        if old != value and (item is None or abs(value) <= max(abs(old), largest)):
            yield Edit(name, attribute, item, value)


def set_edits(model: nn.Module, edits: Sequence[Edit]) -> None:
    """Set recorded ints on a model as its source builds it, in place.

    Surgery only sets numbers of channels and of padded channels. So an int must not be larger than the one it
    replaces, or than the largest dimension of a tensor of the model.

    Raises:
        ArtifactError: If the model has no such int, or the new value is too large.
    """
    largest = _largest_size(model)
    for edit in edits:
        _set_edit(model, edit, largest)


def _set_edit(model: nn.Module, edit: Edit, largest: int) -> None:
    held = held_value(model, edit)
    if abs(edit.value) > max(abs(held), largest):
        raise ArtifactError(
            f"{edit} must be a size of the model, at most {max(abs(held), largest)}; got {edit.value} (secateur.json). "
            "The file is damaged: save the artifact again."
        )
    set_number(model.get_submodule(edit.module), edit.attribute, edit.item, edit.value)


def held_value(model: nn.Module, edit: Edit) -> int:
    """Return the value that a model holds where an edit points.

    Raises:
        ArtifactError: If the model has no such int.
    """
    try:
        module = model.get_submodule(edit.module)
    except AttributeError as error:
        raise _no_such_int(edit, "no such module") from error
    # Only what `held_numbers` finds may be set: a damaged file cannot reach anything else.
    for attribute, item, value in held_numbers(module):
        if (attribute, item) == (edit.attribute, edit.item):
            return value
    if edit.attribute.startswith("__") or not hasattr(module, edit.attribute):
        raise _no_such_int(edit, "no such attribute")
    kind = type(getattr(module, edit.attribute)).__name__
    raise _no_such_int(edit, kind if edit.item is None else f"{kind} without that int")


def _no_such_int(edit: Edit, got: str) -> ArtifactError:
    return ArtifactError(
        f"{edit} must be an int of the rebuilt model; got {got}. "
        "The source builds another model than the one that was saved: use the same version of its code."
    )


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_ints(value: object) -> TypeGuard[Sequence[int]]:
    return isinstance(value, (tuple, list)) and all(_is_int(item) for item in cast(Sequence[object], value))
