"""Artifacts: a compressed model as a folder of numbers and plain facts, to be loaded anywhere, safely, bit for bit."""

from secateur.artifact._artifact import (
    MANIFEST_NAME,
    OWN_FILES,
    WEIGHTS_NAME,
    Build,
    Loaded,
    amend,
    is_artifact,
    load,
    read_manifest,
    refuse_foreign,
    save,
    weights_bytes,
)
from secateur.artifact._edits import Edit, edits_between
from secateur.artifact._files import atomic_file, atomic_folder, read_bytes
from secateur.artifact._manifest import SCHEMA, Manifest, Recipe, TensorRecord
from secateur.artifact._provenance import (
    Provenance,
    installed_versions,
    tested_window,
    this_machine,
    warn_outside_window,
)

__all__ = [
    "MANIFEST_NAME",
    "OWN_FILES",
    "SCHEMA",
    "WEIGHTS_NAME",
    "Build",
    "Edit",
    "Loaded",
    "Manifest",
    "Provenance",
    "Recipe",
    "TensorRecord",
    "amend",
    "atomic_file",
    "atomic_folder",
    "edits_between",
    "installed_versions",
    "is_artifact",
    "load",
    "read_bytes",
    "read_manifest",
    "refuse_foreign",
    "save",
    "tested_window",
    "this_machine",
    "warn_outside_window",
    "weights_bytes",
]
