"""Load models: artifacts, and models by the names that `secateur.models` knows.

A model from an artifact of unknown origin is first run within a bound on memory.
"""

import contextlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from secateur._caller_state import in_default_state
from secateur._kinds import checked
from secateur.architecture import Architecture
from secateur.data.preprocessing import Interpolation, Preprocessing, ResizeMode
from secateur.errors import ArtifactError, ModelError
from secateur.export import artifact
from secateur.export.artifact import MANIFEST_NAME, Artifact
from secateur.export.manifest import Manifest
from secateur.models.source import ModelSource, check_source, load_model

MAX_TRIAL_BYTES = 4 * 2**30
"""Upper bound on one tensor that a layer makes, in bytes."""


def check_runs(model: nn.Module, size: Sequence[int]) -> bool:
    """Refuse a model that cannot run on one image, or would make a tensor of more than `MAX_TRIAL_BYTES`.

    Before an operation runs, its shapes alone do (on the meta device), so that nothing is allocated to find out.

    Args:
        model: In eval mode, on the CPU.
        size: Channels, height, width.

    Returns:
        Whether it takes a list of images, as detectors do, and no batch.

    Raises:
        ArtifactError: If it does not run, or does not give numbers for one image.
    """
    try:
        _try_run(model, torch.zeros(1, *size))
    except Exception as error:
        # What is wrong is said of the batch, which most models take.
        with contextlib.suppress(Exception):
            _try_run(model, [torch.zeros(*size)])
            return True
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ArtifactError(
            f"The model must run on an image of `input.shape`, {'x'.join(map(str, size))}, as secateur.json says; it "
            f"stopped with: {reason}. The artifact is damaged: copy it again, or make it again."
        ) from error
    return False


def _try_run(model: nn.Module, inputs: object) -> None:
    with torch.random.fork_rng(devices=[]), torch.no_grad(), _Bounded():
        model(inputs)


class _Bounded(TorchDispatchMode):
    """Refuses an operation before it makes a tensor that is too large."""

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        settings = dict(kwargs or {})
        for tensor in _shapes_of(func, args, settings):
            if math.prod(tensor.shape) * tensor.element_size() > MAX_TRIAL_BYTES:
                raise ValueError(f"{func} would make a tensor of shape {tuple(tensor.shape)}")
        return func(*args, **settings)


def _shapes_of(func: Callable[..., Any], args: tuple[Any, ...], settings: dict[str, Any]) -> list[Tensor]:
    """Return the results of an operation as meta tensors; none if their shapes depend on values."""
    found: list[Tensor] = []
    try:
        given, named = tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), (args, settings))
        if "device" in named:
            named["device"] = torch.device("meta")
        tree_map_only(torch.Tensor, found.append, func(*given, **named))
    except Exception:  # The operation itself will raise what is wrong with it.
        return []
    return found


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model with its origin.

    Attributes:
        model: In eval mode, on the CPU.
        source: How its original is built.
        name: For tables and reports.
        manifest: Of the artifact it was loaded from, or None.
    """

    model: nn.Module
    source: ModelSource
    name: str
    manifest: Manifest | None = None

    @property
    def architecture(self) -> Architecture:
        """The kept channels and blocks of the original, if it is a cut model."""
        return Architecture() if self.manifest is None else self.manifest.recipe.architecture


@in_default_state
def load(folder: Path | str, *, factory: Callable[[], nn.Module] | None = None, trust_source: bool = False) -> Artifact:
    """Read an artifact: the outputs of the model equal those of the saved one bit for bit.

    Args:
        folder: What `compress` or ``secateur compress`` wrote.
        factory: Builds the original model; needed if it was your own and is not importable by name.
        trust_source: Import and run the code that the artifact names, for sources of kind ``python``.

    Returns:
        The model in eval mode on the CPU, and what the artifact says about it.

    Raises:
        ArtifactError: If the artifact is damaged, tampered with, of a newer version, or names untrusted code.
        ModelError: If the original model cannot be built here.
    """

    def build(source: Mapping[str, object]) -> nn.Module:
        return ModelSource.from_json(source).build(trust_source=trust_source)

    return artifact.load_artifact(folder, build=build, factory=factory, trust_source=trust_source)


def check_model_spec(spec: str, *, weights: Path | None = None, trust_source: bool = False) -> None:
    """Refuse what `load_any` cannot load, as far as that can be told without building a model.

    Raises:
        ModelError: If the name is unknown, its code is not trusted or cannot be imported, or weights must not be given.
        ArtifactError: If a folder is not an artifact.
    """
    if _names_artifact(spec):
        artifact.read_manifest(Path(spec))
        if weights is not None:
            raise _own_weights(weights)
        return
    if weights is not None and weights.is_dir():
        artifact.read_manifest(weights)
    check_source(ModelSource.parse(spec), trust_source=trust_source)


def _names_artifact(spec: str) -> bool:
    return (Path(spec) / MANIFEST_NAME).exists() or (os.sep in spec and ":" not in spec)


def _own_weights(weights: Path) -> ModelError:
    return ModelError(f"`weights` must not be given with an artifact, which has its own; got {weights}.")


@checked
def load_any(
    spec: str,
    *,
    weights: Path | None = None,
    weights_key: str | None = None,
    num_classes: int | None = None,
    in_channels: int | None = None,
    trust_source: bool = False,
    seed: int = 0,
) -> LoadedModel:
    """Load a model by name or from an artifact folder.

    Args:
        spec: An artifact folder, or a name that `secateur.models.load_model` knows.
        weights: For a named model: a safetensors or ``weights_only`` torch file, or the folder of an artifact whose
            original the named model is.
        weights_key: See `secateur.models.load_model`.
        num_classes: Classes the model shall have; None means its own.
        in_channels: Image channels the model shall take; None means its own.
        trust_source: Allow ``python:`` models and artifacts of such.
        seed: For initial weights.

    Raises:
        ModelError: If the name or the weights cannot be used.
        ArtifactError: If the folder is not a good artifact.
    """
    folder = Path(spec)
    if _names_artifact(spec):
        if weights is not None:
            raise _own_weights(weights)
        loaded = load(folder, trust_source=trust_source)
        check_runs(loaded.model, image_size_of(loaded.manifest))
        source = ModelSource.from_json(loaded.manifest.recipe.source)
        return LoadedModel(loaded.model, source, f"{source.name} ({folder})", loaded.manifest)
    if weights is not None and weights.is_dir():
        return _artifact_of(spec, weights, trust_source=trust_source)
    own = spec.startswith("python:")  # a factory of the user's own knows its sizes itself
    model, source = load_model(
        spec,
        weights=weights,
        weights_key=weights_key,
        num_classes=None if own else num_classes,
        in_channels=None if own else in_channels,
        trust_source=trust_source,
        seed=seed,
    )
    return LoadedModel(model, source, source.name)


def _artifact_of(spec: str, folder: Path, *, trust_source: bool) -> LoadedModel:
    """Load an artifact whose original is built by name, whatever the artifact says of its source."""
    source = named_source(spec, folder)
    loaded = load(folder, factory=lambda: source.build(trust_source=trust_source))
    check_runs(loaded.model, image_size_of(loaded.manifest))
    return LoadedModel(loaded.model, source, f"{source.name} ({folder})", loaded.manifest)


def named_source(spec: str, folder: Path) -> ModelSource:
    """Return how the original of an artifact is built, by a name that `load_model` knows.

    Args:
        spec: The name. A model of a library gets as many classes as the artifact names.
        folder: The artifact.
    """
    source, classes = ModelSource.parse(spec), artifact.read_manifest(folder).recipe.classes
    if source.kind == "python" or not classes:
        return source
    return ModelSource(source.kind, source.name, {"num_classes": len(classes)})


def image_size_of(manifest: Manifest) -> tuple[int, int, int]:
    """Channels, height, width of the images that an artifact was made for.

    Raises:
        ArtifactError: If it was made for something else.
    """
    shape = manifest.recipe.input_shape
    if len(shape) != 3:
        raise ArtifactError(
            f"`input.shape` must be the channels, height and width of an image; got {list(shape)} (secateur.json). "
            "The file is damaged: save the artifact again."
        )
    channels, height, width = shape
    return channels, height, width


def default_size(opened: LoadedModel) -> tuple[int, int, int]:
    """Return the image size that a model was made for: channels, height, width.

    An artifact records it, timm's models have it in ``default_cfg``, Secateur's own models are for CIFAR or digits; for
    all others it is 3 x 224 x 224, the size of most classifiers.
    """
    if opened.manifest is not None:
        return image_size_of(opened.manifest)
    channels = opened.source.arguments.get("in_channels")
    if opened.source.kind == "secateur":
        digits = opened.source.name.startswith("digits")
        return (channels or 1, 8, 8) if digits else (channels or 3, 32, 32)
    configured: object = getattr(opened.model, "default_cfg", None)
    if isinstance(configured, Mapping):
        size = cast(Mapping[str, object], configured).get("input_size")
        if isinstance(size, tuple | list) and len(cast(Sequence[object], size)) == 3:
            timm_channels, height, width = (int(side) for side in cast(Sequence[int], size))
            return channels or timm_channels, height, width
    return channels or 3, 224, 224


def model_preprocessing(spec: str, model: nn.Module | None = None) -> Preprocessing | None:
    """Return the rule by which images became inputs when a named model was trained; None if nothing says it.

    Models of timm have it in ``pretrained_cfg``, and those of torchvision in the transforms of their newest weights. A
    model of one's own can say it by an attribute ``pretrained_cfg`` with timm's keys.

    Args:
        spec: See `load_any`.
        model: The model, where it is built already.
    """
    kind, _, name = spec.partition(":")
    if kind == "timm":
        import timm

        try:
            found = timm.get_pretrained_cfg(name)
        except (RuntimeError, KeyError, ValueError):  # An unknown name is refused where the model is built.
            found = None
        return None if found is None else _configured(found.to_dict())
    if kind == "torchvision":
        return _of_torchvision(name)
    configured = getattr(model, "pretrained_cfg", None)
    return _configured(cast(Mapping[str, Any], configured)) if isinstance(configured, Mapping) else None


def _configured(settings: Mapping[str, Any]) -> Preprocessing | None:
    """Read the keys of timm."""
    if not {"mean", "std", "input_size"} <= set(settings):
        return None
    modes = {"squash": ResizeMode.SQUASH, "border": ResizeMode.LETTERBOX}
    channels, height, width = (int(side) for side in settings["input_size"])
    mean, std = (tuple(map(float, settings[name])) for name in ("mean", "std"))
    return Preprocessing(
        (height, width),
        modes.get(str(settings.get("crop_mode")), ResizeMode.CROP),
        float(settings.get("crop_pct") or 0.875),
        _interpolation(str(settings.get("interpolation", "bilinear"))),
        mean if len(mean) == channels else (),
        std if len(std) == channels else (),
        channels,
    )


def _of_torchvision(name: str) -> Preprocessing | None:
    from torchvision import models

    try:
        weights: Any = next(iter(models.get_model_weights(name)))
        made = weights.DEFAULT.transforms() if hasattr(weights, "DEFAULT") else weights.transforms()
    except (ValueError, StopIteration):
        return None
    mean, std = (tuple(getattr(made, key, ()) or ()) for key in ("mean", "std"))
    crop, scaled = (tuple(getattr(made, key, ()) or ()) for key in ("crop_size", "resize_size"))
    if len(mean) != 3 or len(std) != 3:
        return None
    size = (int(crop[0]), int(crop[-1])) if crop else None
    fraction = min(1.0, crop[0] / scaled[0]) if crop and scaled else 1.0
    how = getattr(getattr(made, "interpolation", None), "value", "bilinear")
    return Preprocessing(size, ResizeMode.CROP, fraction, _interpolation(how), mean, std)


def _interpolation(name: str) -> Interpolation:
    known = {each.value: each for each in Interpolation}
    return known.get(name, Interpolation.BICUBIC if name in ("lanczos", "random") else Interpolation.BILINEAR)
