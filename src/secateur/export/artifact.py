"""Save a compressed model as a folder and load it again, bit for bit, without pickle and without tracing."""

import contextlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import nn

from secateur._caller_state import in_default_state
from secateur._files import atomic_folder, read_bytes, write_atomic
from secateur._json import brief, parse
from secateur._provenance import sha256_of
from secateur._runtime import copy_model
from secateur.errors import ArtifactError, SurgeryError
from secateur.export.formats import Format
from secateur.export.manifest import FORMAT, Manifest, Recipe, held_value, set_edits
from secateur.export.tensors import check_capacity, deserialize, install, serialize, tensor_records
from secateur.prune.masks import get_masks, make_permanent_, nonzero_params
from secateur.prune.narrow_branches import expand_branches_, find_expansions
from secateur.prune.slice import find_replacements, replace_modules_, update_declared_sizes_

MANIFEST_NAME = "secateur.json"
WEIGHTS_NAME = "model.safetensors"
OWN_FILES = (
    *(MANIFEST_NAME, WEIGHTS_NAME, "report.html", "history.csv", "model.onnx.data"),
    *(name for form in Format for name in form.exporter.files),
)
"""Every file that may be in an artifact; other files in its folder are the user's, and never removed."""

TRUSTED_KINDS = ("timm", "torchvision", "secateur")
"""Kinds of model source that run only the code of installed, known packages."""

FACTORY_KIND = "factory"
"""The kind of source of a model that only a function of the user's can build."""

_LONGEST_NAME, _LONGEST_PATH = 200, 3_800
"""Bytes. File systems take 255 and 4,096; folders beside, and files inside, have longer names than the folder."""
_MAX_MANIFEST_BYTES = 16 * 2**20

Build = Callable[[Mapping[str, object]], nn.Module]
"""Builds the original model from its recorded source."""


@dataclass(frozen=True, eq=False)
class Artifact:
    """A compressed model, read from a folder.

    Attributes:
        model: The compressed model, in eval mode, on the CPU.
        manifest: What the artifact says about it.
    """

    model: nn.Module
    manifest: Manifest

    def __repr__(self) -> str:
        return f"Artifact({type(self.model).__name__}, {self.manifest!r})"


@in_default_state
def save_artifact(folder: Path | str, model: nn.Module, recipe: Recipe) -> Manifest:
    """Write an artifact: ``secateur.json`` and ``model.safetensors``.

    The folder appears completely or not at all: after a full disk or a kill, nothing half-written is at ``folder``, and
    an older artifact there survives. To add exports before the folder appears, save into a draft:

        with atomic_folder("runs/small") as draft:
            save_artifact(draft, model, recipe)
            export_onnx(model, images, draft / "model.onnx")

    Args:
        folder: A missing or empty folder, or an older artifact, which is replaced as a whole.
        model: The compressed model, on any device; not changed. Masks are not saved, but the zeros that they make are.
            A tensor with many zeros is stored sparsely.
        recipe: How the model was made, and what is known of it.

    Returns:
        The content of secateur.json.

    Raises:
        ArtifactError: If the folder holds something else, the model something that is not numbers, the recipe something
            that is not JSON or does not fit the model, or if the disk is full.
    """
    folder = Path(folder).absolute()
    refuse_foreign(folder)
    model = _unmasked(model)
    for edit in recipe.edits:
        if held_value(model, edit) != edit.value:
            raise ArtifactError(
                f"`recipe.edits` must say what `model` holds; got {edit} = {edit.value}, the model has "
                f"{held_value(model, edit)}. Record them with edits_between(original, model)."
            )
    records = tensor_records(model)
    weights = serialize(model, records)
    digest, built = sha256_of(weights), (find_replacements(model), find_expansions(model))
    manifest = Manifest(recipe, records, digest, len(weights), *built, nonzero_params(model))
    text = _text_of(manifest)
    try:
        with atomic_folder(folder, replaceable=replaceable_files) as part:
            (part / WEIGHTS_NAME).write_bytes(weights)
            (part / MANIFEST_NAME).write_bytes(text)
    except OSError as error:
        raise ArtifactError(
            f"The artifact could not be written to {folder}: {error.strerror}. Nothing there was changed; "
            "make room or choose another folder."
        ) from error
    return Manifest.from_bytes(text)


def _text_of(manifest: Manifest) -> bytes:
    """Return the text of a manifest, after checking that it can be read again."""
    text = manifest.to_bytes()
    if len(text) > _MAX_MANIFEST_BYTES:
        raise ArtifactError(
            f"`recipe` must take at most {_MAX_MANIFEST_BYTES} bytes of JSON; got {len(text)}. "
            "Leave out long lists of metrics; keep them in a file of their own."
        )
    Manifest.from_bytes(text)
    return text


def weights_bytes(model: nn.Module) -> int:
    """Return the size in bytes of the weights file that `save_artifact` writes for a model.

    Raises:
        ArtifactError: If the model holds something that is not numbers.
    """
    model = _unmasked(model)
    return len(serialize(model, tensor_records(model)))


def _unmasked(model: nn.Module) -> nn.Module:
    return make_permanent_(copy_model(model)) if get_masks(model) else model


def load_artifact(
    folder: Path | str,
    *,
    build: Build,
    factory: Callable[[], nn.Module] | None = None,
    trust_source: bool = False,
) -> Artifact:
    """Read an artifact; its model computes what the saved one computed, bit for bit.

    The original model is built from its source. It then gets the stand-ins of removed blocks, the expansions of narrow
    branches, the recorded sizes, and the recorded tensors. Nothing is unpickled or traced, and nothing is used before
    it is checked: the hash in secateur.json covers every byte of the weights. Surgery only removes channels, so a file
    with more numbers than the original model is refused unread.

    Args:
        folder: What `save_artifact` wrote.
        build: Builds the original model from ``recipe.source``; called for sources of installed packages
            (``timm``, ``torchvision``, ``secateur``), and for others only with ``trust_source``.
        factory: Builds the original model, instead of ``build``; for a source that is your own code.
        trust_source: Allow ``build`` to import and run the code that the artifact names.

    Returns:
        The model in eval mode on the CPU, and the manifest. The global random state is not changed.

    Raises:
        ArtifactError: If the artifact is damaged, tampered with, of a newer version, or names untrusted code.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    kind = cast(str, manifest.recipe.source["kind"])
    if factory is None and kind == FACTORY_KIND:
        name = brief(manifest.recipe.source.get("name"))
        raise ArtifactError(
            f"`factory` must build the original of this artifact, which was made in a Python process from a model "
            f"({name}) that has no name to build it by; got none ({folder}). Pass factory=, a function that builds it "
            "(on the command line: --model python:package.module:function --trust-source, beside this folder)."
        )
    if factory is None and kind not in TRUSTED_KINDS and not trust_source:
        raise ArtifactError(
            f"`trust_source` must be True to run the code that this artifact names; got a source of kind "
            f"{brief(kind)} ({folder}): {brief(manifest.recipe.source, most=400)}. If you trust it, pass "
            "trust_source=True (--trust-source); else pass your own `factory`."
        )
    with torch.random.fork_rng(devices=[]):
        model = build(manifest.recipe.source) if factory is None else factory()
    _rebuild_(model, manifest)
    set_edits(model, manifest.recipe.edits)
    most = check_capacity(model, manifest.tensors)
    weights = read_bytes(folder / WEIGHTS_NAME, limit=min(manifest.weights_bytes, most))
    if sha256_of(weights) != manifest.weights_sha256:
        raise ArtifactError(
            f"{WEIGHTS_NAME} must have the SHA-256 that {MANIFEST_NAME} says; got another ({folder}). "
            "The file was cut short or changed: copy the artifact again, or make it again."
        )
    tensors = deserialize(weights, manifest.tensors)
    install(model, manifest.tensors, tensors)
    _check_after(model, manifest)
    update_declared_sizes_(model)
    return Artifact(model.eval(), manifest)


def _check_after(model: nn.Module, manifest: Manifest) -> None:
    """Compare the model with the counts in the manifest."""
    if manifest.nonzero not in (None, nonzero_params(model)):
        raise ArtifactError(
            f"`weights.nonzero` must be the number of parameters that are not zero; got {manifest.nonzero}, the file "
            f"has {nonzero_params(model)} (secateur.json). The file is damaged: save the artifact again."
        )
    if find_expansions(model) != manifest.widenings:
        raise ArtifactError(
            "`widenings` must say what the weights hold; got another order of channels (secateur.json). "
            "The file is damaged: save the artifact again."
        )


def _rebuild_(model: nn.Module, manifest: Manifest) -> None:
    try:
        replace_modules_(model, manifest.replacements)
        expand_branches_(model, manifest.widenings)
    except SurgeryError as error:
        raise ArtifactError(
            f"{error} The source builds another model than the one that was saved: use the same version of its code."
        ) from error


def read_manifest(folder: Path | str) -> Manifest:
    """Read and check secateur.json alone.

    Raises:
        ArtifactError: If it is missing, damaged, or of a newer version.
    """
    return Manifest.from_bytes(read_bytes(Path(folder) / MANIFEST_NAME, limit=_MAX_MANIFEST_BYTES))


def amend(
    folder: Path | str,
    *,
    metrics: Mapping[str, object] | None = None,
    verification: Mapping[str, object] | None = None,
) -> Manifest:
    """Add results that can only be known once the artifact exists (reload and export checks) to secateur.json.

    Args:
        folder: What `save_artifact` wrote.
        metrics: Entries to add or replace in ``recipe.metrics``.
        verification: Entries to add or replace in ``recipe.verification``.

    Returns:
        The new manifest; the file is replaced atomically.

    Raises:
        ArtifactError: If the artifact is damaged or a value is not JSON.
    """
    manifest = read_manifest(folder)
    recipe = replace(
        manifest.recipe,
        metrics={**manifest.recipe.metrics, **(metrics or {})},
        verification={**manifest.recipe.verification, **(verification or {})},
    )
    text = _text_of(replace(manifest, recipe=recipe))
    write_atomic(Path(folder) / MANIFEST_NAME, text)
    return Manifest.from_bytes(text)


def is_artifact(folder: Path | str) -> bool:
    """Whether a folder has a manifest that says so (the artifact may still be damaged or too new to load)."""
    try:
        text = read_bytes(Path(folder) / MANIFEST_NAME, limit=_MAX_MANIFEST_BYTES)
        return parse(text, MANIFEST_NAME).get("format") == FORMAT
    except ArtifactError:
        return False


def replaceable_files(folder: Path) -> tuple[str, ...]:
    """Return the names of the files in a folder that a new artifact replaces: those of an older one."""
    return OWN_FILES if is_artifact(folder) else ()


def refuse_no_folder(folder: Path, name: str = "folder") -> None:
    """Refuse a file or a link in the place of a folder, the current folder and those above it, and too long names.

    A folder is replaced as a whole, which would leave the program, and the shell that started it, in one that is gone.
    During a run, unfinished work and the older content are kept beside it under longer names.

    Raises:
        ArtifactError: If it is one.
    """
    with contextlib.suppress(OSError, RuntimeError):  # The current folder is gone, or links lead in a circle.
        here = Path.cwd()
        if folder.resolve() in (here, *here.parents):
            raise ArtifactError(
                f"`{name}` must not be the current folder or one above it, because it is replaced as a whole; got "
                f"{str(folder)!r}. Name a new folder, such as ./small."
            )
    last, whole = len(os.fsencode(folder.name)), len(os.fsencode(os.path.normpath(folder)))
    if last > _LONGEST_NAME or whole > _LONGEST_PATH:
        raise ArtifactError(
            f"`{name}` must be a path of at most {_LONGEST_PATH} bytes with a last name of at most {_LONGEST_NAME}; "
            f"got {whole} and {last}. Choose a shorter one."
        )
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ArtifactError(
            f"`{name}` must be a folder or a new path; got a file or link: {folder}. Choose another path."
        )


def refuse_foreign(folder: Path, name: str = "folder") -> None:
    """Refuse to replace anything but a missing folder, an empty one, or an artifact without other files.

    Args:
        folder: The folder that would be replaced.
        name: The name of the argument, for the message.

    Raises:
        ArtifactError: If it is a file or a link, or holds anything else.
    """
    refuse_no_folder(folder, name)
    files = sorted(entry.name for entry in folder.iterdir()) if folder.exists() else []
    if files and not is_artifact(folder):
        raise ArtifactError(
            f"`{name}` must be new, empty, or an older artifact; got {folder} with {files[:5]}. "
            "Choose another folder, or empty this one yourself."
        )
    foreign = [file for file in files if file not in OWN_FILES]
    if foreign:
        raise ArtifactError(
            f"`{name}` must hold nothing but the older artifact that is replaced; got {foreign[:5]} in {folder}. "
            "Move them elsewhere or choose another folder."
        )
