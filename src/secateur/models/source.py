"""Models by name: `ModelSource` is plain data that can build a model again, and `load_model` also loads weights."""

import contextlib
import os
import traceback
from collections.abc import Callable, Generator, Mapping
from dataclasses import field
from difflib import get_close_matches
from importlib import import_module
from inspect import signature
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, cast, get_args

from torch import nn

from secateur._caller_state import in_default_state
from secateur._kinds import settings
from secateur._runtime import check_hashable, seeded_initialization
from secateur.errors import ModelError
from secateur.models import zoo
from secateur.models.weights import load_weights_

Kind = Literal["timm", "torchvision", "secateur", "python"]
BUILTIN_MODELS: Mapping[str, Callable[..., nn.Module]] = {
    factory.__name__: factory
    for factory in (
        zoo.cifar_resnet20,
        zoo.cifar_resnet32,
        zoo.cifar_resnet44,
        zoo.cifar_resnet56,
        zoo.cifar_resnet110,
        zoo.digits_resnet,
        zoo.digits_resnet_wide,
        zoo.cifar_densenet40,
        zoo.cifar_densenet52,
        zoo.cifar_efficientnet,
        zoo.cifar_efficientnet_150,
        zoo.cifar_mobilenetv2,
        zoo.cifar_mobilenetv2_150,
    )
}
"""The models of Secateur itself, by name."""
_MAX_ARGUMENTS = {"num_classes": 2**17, "in_channels": 2**12}
"""The largest arguments: six times the classes of ImageNet-21k, and more channels than satellites have bands. Without
a limit, an untrusted artifact could ask for terabytes of weights."""
_MAX_NAME_LENGTH = 500
_TIMM_ARGUMENTS = {"num_classes": "num_classes", "in_channels": "in_chans"}
_SUGGESTED = 3


@settings
class ModelSource:
    """How to build a model with fresh weights.

    Attributes:
        kind: The library that has the model.
        name: The model's name in the library; for "python", ``package.module:factory``.
        arguments: ``num_classes`` and ``in_channels`` if they differ from the model's defaults; positive integers.
    """

    kind: Kind
    name: str
    arguments: Mapping[str, int] = field(default_factory=dict[str, int], hash=False)

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ModelError(f"`kind` must be one of {list(get_args(Kind))}; got {repr(self.kind)[:_MAX_NAME_LENGTH]}.")
        if type(self.name) is not str or not 0 < len(self.name) <= _MAX_NAME_LENGTH:  # pyright: ignore[reportUnnecessaryComparison]
            raise ModelError(f"`name` must be the name of a model; got {repr(self.name)[:_MAX_NAME_LENGTH]}.")
        for key, value in self.arguments.items():
            if key not in _MAX_ARGUMENTS or type(value) is not int or value < 1:  # pyright: ignore[reportUnnecessaryComparison]
                raise ModelError(
                    f"`arguments` must be positive integers among {sorted(_MAX_ARGUMENTS)}; got {key}={value!r} "
                    f"({self.kind}:{self.name})."
                )
            if value > _MAX_ARGUMENTS[key]:
                raise ModelError(
                    f"`{key}` must be at most {_MAX_ARGUMENTS[key]}; got {value} ({self.kind}:{self.name})."
                )
        object.__setattr__(self, "arguments", dict(self.arguments))

    @classmethod
    def parse(cls, spec: str, *, num_classes: int | None = None, in_channels: int | None = None) -> "ModelSource":
        """Read ``timm:NAME``, ``torchvision:NAME``, ``python:package.module:factory`` or a built-in name.

        Raises:
            ModelError: If it is none of these.
        """
        prefix, colon, name = spec.partition(":")
        kind, name = (prefix, name) if colon else ("secateur", spec)
        if kind not in get_args(Kind) or not name:
            raise ModelError(
                f"`model` must be timm:NAME, torchvision:NAME, python:package.module:factory or one of "
                f"{', '.join(BUILTIN_MODELS)}; got {spec!r}."
            )
        given = {"num_classes": num_classes, "in_channels": in_channels}
        return cls(cast(Kind, kind), name, {key: value for key, value in given.items() if value is not None})

    def to_json(self) -> dict[str, object]:
        """Return a JSON object with ``kind``, ``name`` and ``arguments``."""
        return {"kind": self.kind, "name": self.name, "arguments": dict(self.arguments)}

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> "ModelSource":
        """Read what `to_json` returned.

        Raises:
            ModelError: If the object has other keys or values.
        """
        if set(data) != {"kind", "name", "arguments"} or not isinstance(data["arguments"], Mapping):
            got = repr(dict(data))[:_MAX_NAME_LENGTH]
            raise ModelError(f"a model source must have `kind`, `name` and `arguments`; got {got}.")
        return cls(cast(Kind, data["kind"]), cast(str, data["name"]), cast(Mapping[str, int], data["arguments"]))

    def build(self, *, trust_source: bool = False, seed: int = 0) -> nn.Module:
        """Build the model with fresh weights, in evaluation mode; nothing is downloaded.

        Args:
            trust_source: Allow a "python" source to import and run the code that it names.
            seed: Seed of the weights; the global random state is restored.

        Raises:
            ModelError: If the name is unknown, the arguments do not fit, or user code fails or is not trusted.
        """
        make = {
            "timm": _build_timm,
            "torchvision": _build_torchvision,
            "secateur": _build_builtin,
            "python": _build_python,
        }[self.kind]
        if self.kind == "python":
            _check_trusted(f"python:{self.name}", trust_source)
        with seeded_initialization(seed):
            return make(self).eval()


@in_default_state
def load_model(
    spec: str,
    *,
    weights: Path | str | None = None,
    weights_key: str | None = None,
    num_classes: int | None = None,
    in_channels: int | None = None,
    trust_source: bool = False,
    seed: int = 0,
) -> tuple[nn.Module, ModelSource]:
    """Build a model and load its weights; nothing is downloaded.

    Args:
        spec: One of

            - a model of Secateur, such as ``cifar_resnet20`` (32, 44, 56, 110) or ``digits_resnet``,
            - ``timm:NAME`` or ``torchvision:NAME``,
            - ``python:package.module:factory``: a function of yours that returns a model.

        weights: A ``.safetensors`` file, or a torch file without code; None keeps random weights.
        weights_key: Which of several sets of weights in the file to load, such as ``"ema"``, see `load_weights_`; None
            takes the one that fits.
        num_classes: Number of classes; None takes the model's default.
        in_channels: Channels of the images; None takes the model's default.
        trust_source: Allow ``python:`` to import and run the code that it names.
        seed: Seed of random weights.

    Returns:
        The model in evaluation mode on the CPU, and the source that builds it again.

    Raises:
        ModelError: If the name is unknown, code is not trusted or fails, or the weights do not fit.
    """
    source = ModelSource.parse(spec, num_classes=num_classes, in_channels=in_channels)
    model = source.build(trust_source=trust_source, seed=seed)
    if weights is not None:
        load_weights_(model, weights, weights_key)
    return model, source


def check_source(source: ModelSource, *, trust_source: bool = False) -> None:
    """Refuse a source that names no model, without building one.

    Raises:
        ModelError: If its name is unknown, or its code is not trusted or cannot be imported.
    """
    if source.kind == "python":
        load_factory(f"python:{source.name}", trust_source=trust_source)
    else:
        {"timm": _check_timm, "torchvision": _check_torchvision, "secateur": _check_builtin}[source.kind](source.name)


def _check_builtin(name: str) -> None:
    if name not in BUILTIN_MODELS:
        raise ModelError(f"`model` must be a known name; got {name!r}. {_suggest(name)}")


def _build_builtin(source: ModelSource) -> nn.Module:
    _check_builtin(source.name)
    return BUILTIN_MODELS[source.name](**source.arguments)


def _suggest(name: str) -> str:
    """Suggest built-in names like this one, and the same name in the libraries."""
    import timm

    close = get_close_matches(name, BUILTIN_MODELS, _SUGGESTED)
    close += [f"timm:{name}"] if timm.is_model(name) else []
    close += [f"torchvision:{name}"] if name in _torchvision_names() else []
    return f"Did you mean {' or '.join(close)}?" if close else f"Built in are {', '.join(BUILTIN_MODELS)}."


def _check_timm(name: str) -> None:
    import timm

    # A name with a scheme or a path ("hf-hub:", "local-dir:") would download or read a configuration.
    if not timm.is_model(name) or not set(name).isdisjoint(":/\\"):
        close = get_close_matches(name, timm.list_models(), _SUGGESTED)
        raise ModelError(f"`model` must be a name that timm knows; got {name!r}. {_did_you_mean(close, 'timm')}")


def _build_timm(source: ModelSource) -> nn.Module:
    import timm

    _check_timm(source.name)
    arguments: dict[str, Any] = {_TIMM_ARGUMENTS[key]: value for key, value in source.arguments.items()}
    try:
        return timm.create_model(source.name, pretrained=False, **arguments)
    except Exception as error:
        raise ModelError(f"timm could not build {source.name} with {arguments}; got: {error}.") from error


def _torchvision_names() -> dict[str, bool]:
    """Models of torchvision for images, and whether each has a backbone with weights of its own."""
    from torchvision import models

    places = ((models, False), (models.segmentation, True), (models.detection, True))
    return {name: has for module, has in places for name in models.list_models(module=module)}


def _check_torchvision(name: str) -> None:
    names = _torchvision_names()
    if name not in names:
        close = _did_you_mean(get_close_matches(name, names, _SUGGESTED), "torchvision")
        raise ModelError(
            f"`model` must be a model of torchvision for classification, segmentation or detection; got "
            f"{name!r}. {close}"
        )


def _build_torchvision(source: ModelSource) -> nn.Module:
    from torchvision import models

    _check_torchvision(source.name)
    if source.arguments.get("in_channels", 3) != 3:
        raise ModelError(
            f"`in_channels` must be 3 for torchvision models; got {source.arguments['in_channels']} "
            f"({source.name}). Models of timm take any number: timm:NAME."
        )
    arguments: dict[str, Any] = {key: value for key, value in source.arguments.items() if key != "in_channels"}
    if _torchvision_names()[source.name]:
        arguments["weights_backbone"] = None  # They would be downloaded.
    try:
        return models.get_model(source.name, weights=None, **arguments)
    except Exception as error:
        raise ModelError(f"torchvision could not build {source.name} with {arguments}; got: {error}.") from error


def _did_you_mean(close: list[str], kind: str) -> str:
    listing = {"timm": "timm.list_models()", "torchvision": "torchvision.models.list_models()"}[kind]
    return f"Did you mean {' or '.join(f'{kind}:{name}' for name in close)}?" if close else f"See {listing}."


def load_factory(spec: str, *, makes: str = "model", trust_source: bool = False) -> Callable[..., Any]:
    """Import the function or class that ``python:package.module:factory`` names.

    Args:
        spec: These words.
        makes: What it makes, for messages.
        trust_source: Allow to import and run code of that name.

    Raises:
        ModelError: If the words are not of this form, or the code is not trusted or cannot be imported.
    """
    _check_trusted(spec, trust_source)
    kind, _, name = spec.partition(":")
    module_name, _, factory_name = name.partition(":")
    if kind != "python" or not factory_name or not module_name:
        raise ModelError(f"`{makes}` must be python:package.module:factory; got {spec!r}.")
    return _factory(_import(module_name, spec), factory_name, spec, makes)


def _check_trusted(spec: str, trust_source: bool) -> None:
    if not trust_source:
        raise ModelError(
            f"{spec} imports and runs code; that needs your consent. Pass trust_source=True (--trust-source) if you "
            "know the code."
        )


def _build_python(source: ModelSource) -> nn.Module:
    spec = f"python:{source.name}"
    factory = load_factory(spec, trust_source=True)
    try:
        signature(factory).bind(**source.arguments)
    except TypeError as error:
        raise ModelError(f"{spec} must accept the arguments {dict(source.arguments)}; got: {error}.") from error
    except ValueError:
        pass  # A factory written in C has no signature; calling it shows whether the arguments fit.
    try:
        with _same_folder():
            model: object = factory(**source.arguments)
    except Exception as error:
        raise ModelError(f"{spec} failed: {_summarize(error)}.") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"{spec} must return a torch.nn.Module; got {type(model).__name__}.")
    check_hashable(model)
    return model


def _import(module_name: str, spec: str) -> ModuleType:
    try:
        with _same_folder():
            return import_module(module_name)
    except ModuleNotFoundError as error:
        way_out = "Install it, or name its folder in PYTHONPATH; commands find modules of the working folder too."
        raise ModelError(f"{spec} must name a module that can be imported; {error}. {way_out}") from error
    except Exception as error:
        raise ModelError(f"{spec} could not be imported: {_summarize(error)}.") from error


@contextlib.contextmanager
def _same_folder() -> Generator[None]:
    """Return to the working directory afterward: to the user, relative paths mean what they meant before the call."""
    try:
        here = Path.cwd()
    except FileNotFoundError:  # Somebody has removed it.
        yield
        return
    try:
        yield
    finally:
        os.chdir(here)


def _factory(module: ModuleType, name: str, spec: str, makes: str) -> Callable[..., Any]:
    factory = getattr(module, name, None)
    if factory is None:
        public = [key for key in vars(module) if not key.startswith("_")]
        close = get_close_matches(name, public, _SUGGESTED) or public[:_SUGGESTED]
        raise ModelError(f"{spec} must name a function of {module.__name__}; there is none. It has {', '.join(close)}.")
    if isinstance(factory, nn.Module) or not callable(factory):
        raise ModelError(f"{spec} must be a function or class that makes a {makes}; got a {type(factory).__name__}.")
    return factory


def _summarize(error: Exception) -> str:
    """Describe an error of the user's code and its place."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"
