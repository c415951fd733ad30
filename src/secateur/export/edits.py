"""The integers that surgery changed in a model's modules, as data.

Weights say most of a cut model's sizes, but not all: ``groups``, the pad amounts of an option-A shortcut, the sizes of
a ``split``. Those are recorded as (module, attribute, item, value) and set again when the model is rebuilt.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeGuard, cast

from torch import nn

from secateur._json import brief
from secateur.errors import ArtifactError
from secateur.prune.residual import original_names
from secateur.prune.slice import find_replacements


@dataclass(frozen=True, order=True)
class Edit:
    """One int held by a module.

    Attributes:
        module: Qualified module name ("" is the model itself).
        attribute: Attribute name.
        item: Position inside a tuple or list attribute, or None for a plain int.
        value: The value it must have.
    """

    module: str
    attribute: str
    item: int | None
    value: int

    def __str__(self) -> str:
        place = brief(f"{self.module}.{self.attribute}" if self.module else self.attribute)
        return place if self.item is None else f"{place}[{self.item}]"


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
    return tuple(edit for name, old, module in pairs for edit in _differences(name, old, module))


def _differences(name: str, original: nn.Module, module: nn.Module) -> Iterator[Edit]:
    before = vars(original)
    for attribute, value in vars(module).items():
        old = before.get(attribute)
        if _is_int(value) and _is_int(old) and value != old:
            yield Edit(name, attribute, None, value)
        elif _is_ints(value) and _is_ints(old):
            if len(value) != len(old):
                raise ArtifactError(
                    f"{Edit(name, attribute, None, 0)} must keep its length to be recorded; got {old} and {value}. "
                    "Hold a fixed number of sizes in the module."
                )
            pairs = enumerate(zip(old, value, strict=True))
            yield from (Edit(name, attribute, item, new) for item, (was, new) in pairs if was != new)


def set_edits(model: nn.Module, edits: Sequence[Edit]) -> None:
    """Set recorded ints on a model as its source builds it, in place.

    Surgery only sets numbers of channels and of padded channels. So an int must not be larger than the one it
    replaces, or than the largest dimension of a tensor of the model.

    Raises:
        ArtifactError: If the model has no such int, or the new value is too large.
    """
    largest = max((size for tensor in (*model.parameters(), *model.buffers()) for size in tensor.shape), default=0)
    for edit in edits:
        _set_edit(model, edit, largest)


def _set_edit(model: nn.Module, edit: Edit, largest: int) -> None:
    module, current = _find(model, edit)
    held = cast(int, current) if edit.item is None else cast(Sequence[int], current)[edit.item]
    if abs(edit.value) > max(abs(held), largest):
        raise ArtifactError(
            f"{edit} must be a size of the model, at most {max(abs(held), largest)}; got {edit.value} (secateur.json). "
            "The file is damaged: save the artifact again."
        )
    if edit.item is None:
        setattr(module, edit.attribute, edit.value)
        return
    values = list(cast(Sequence[int], current))
    values[edit.item] = edit.value
    setattr(module, edit.attribute, values if isinstance(current, list) else tuple(values))


def held_value(model: nn.Module, edit: Edit) -> int:
    """Return the value that a model holds where an edit points.

    Raises:
        ArtifactError: If the model has no such int.
    """
    _, current = _find(model, edit)
    return cast(int, current) if edit.item is None else cast(Sequence[int], current)[edit.item]


def _find(model: nn.Module, edit: Edit) -> tuple[nn.Module, object]:
    try:
        module = model.get_submodule(edit.module)
    except AttributeError as error:
        raise _no_such_int(edit, "no such module") from error
    if edit.attribute.startswith("__") or not hasattr(module, edit.attribute):
        raise _no_such_int(edit, "no such attribute")
    current = getattr(module, edit.attribute)
    if edit.item is None:
        if not _is_int(current):
            raise _no_such_int(edit, type(current).__name__)
    elif not (_is_ints(current) and 0 <= edit.item < len(current)):
        raise _no_such_int(edit, f"{type(current).__name__} without that int")
    return module, current


def _no_such_int(edit: Edit, got: str) -> ArtifactError:
    return ArtifactError(
        f"{edit} must be an int of the rebuilt model; got {got}. "
        "The source builds another model than the one that was saved: use the same version of its code."
    )


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_ints(value: object) -> TypeGuard[Sequence[int]]:
    return isinstance(value, (tuple, list)) and all(_is_int(item) for item in cast(Sequence[object], value))
