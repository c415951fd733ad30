"""From the words of the command line to the objects of the Python interface."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from secateur.cli.tasks import CLASSIFICATION, TASKS, named_task, rule_of_run
from secateur.cli.words import MAX_CHANNELS, channels_of, image_size, made_by, numbers, resizing_of
from secateur.errors import (
    ArtifactError,
    BudgetError,
    DataError,
    SecateurError,
    SelectionError,
    TrainingError,
)

_LOGGER = logging.getLogger("secateur")

if TYPE_CHECKING:
    import torch

    from secateur.cli.messages import Checks
    from secateur.cli.options import ImageFlags, OptimizerName, PrecisionName, SearchFlags, SpaceFlags
    from secateur.cli.tasks import NamedTask
    from secateur.data.dataset import ImageData
    from secateur.data.loaders import OwnData
    from secateur.data.preprocessing import Preprocessing
    from secateur.export.formats import Format
    from secateur.graph.selection import Selection
    from secateur.nas.swp import SWP
    from secateur.nas.tas import TAS
    from secateur.pipeline.load import LoadedModel
    from secateur.search.base import Strategy
    from secateur.search.importance import Importance
    from secateur.search.space import AxisRule
    from secateur.train.callbacks import Callbacks
    from secateur.train.config import SGD, AdamW
    from secateur.train.device import Precision

Number = TypeVar("Number", int, float)
_DEVICES = ("cpu", "cuda", "mps")


@dataclass(frozen=True)
class Inputs:
    """A model and its images, loaded when they are first used.

    An artifact knows how its images are to be normalized and sized, so it is loaded before the data; another model is
    built with the data's classes and channels, so it is loaded after.

    Attributes:
        model: As ``--model`` has it.
        weights: A file of weights, the folder of an artifact whose original ``model`` names, or None.
        data: As ``--data`` has it, or None.
        flags: How the images are prepared, and whether code may run.
        seed: Seed of new weights, of splits and of example images.
        flag_names: The flags of ``model`` and ``weights``, for messages.
    """

    model: str
    weights: Path | None
    data: str | None
    flags: "ImageFlags"
    seed: int = 0
    flag_names: tuple[str, str] = ("--model", "--weights")

    @cached_property
    def named(self) -> "NamedTask":
        """The task."""
        return named_task(self.flags.task or CLASSIFICATION, void=self.flags.void, trust_source=self.flags.trust_source)

    def check_classifies(self) -> None:
        """Refuse another task than classification, for a command that knows no other.

        Raises:
            TrainingError: If another one is named.
        """
        if not self.named.classifies:
            raise TrainingError(f"`--task` must be classification here; got {self.named.name}. Leave it out.")

    def check(self, checks: "Checks") -> None:
        """Check what can be checked without loading anything: the name, the file of weights, the place of the data."""
        from secateur.models.weights import check_weights_file
        from secateur.pipeline.load import check_model_spec

        weights = self.weights
        flags: dict[str, str] = {"model": self.flag_names[0], "weights": self.flag_names[1]}
        trust = self.flags.trust_source
        checks.add(lambda: check_model_spec(self.model, weights=weights, trust_source=trust), flags)
        if weights is not None and not weights.is_dir():
            checks.add(lambda: check_weights_file(weights), flags)
        checks.add(lambda: (numbers(self.flags.mean, "--mean"), numbers(self.flags.std, "--std")))
        checks.add(lambda: image_size(self.flags.image_size))
        checks.add(lambda: resizing_of(self.flags.resize, None))
        checks.add(lambda: channels_of(self.flags.channels))
        checks.add(lambda: self.named)
        if self.data is not None:
            checks.add(self._check_data)

    def _check_data(self) -> None:
        from secateur.data.layouts import describe_annotations, find_layout
        from secateur.data.load import check_data

        assert self.data is not None
        try:
            named = self.named
        except SecateurError:
            return  # It is said already.
        if not named.classifies:
            find_layout(self.data, named.layouts, named.name)
            return
        check_data(self.data)
        if channels_of(self.flags.channels)[1]:
            raise DataError("`--channels` must be a number for classification; got bgr. Exchange the model's channels.")
        annotated = describe_annotations(Path(self.data))
        if annotated:
            raise DataError(
                f"`--task` must be given for {self.data}, which looks like {annotated}; got none, which means "
                f"classification. Name one of {TASKS}."
            )

    @cached_property
    def images(self) -> "ImageData | OwnData":
        """The image set."""
        assert self.data is not None
        self._check_data()
        return self.classified if self.named.classifies else self._annotated()

    @property
    def _stored(self) -> "Preprocessing | None":
        """The rule of the artifact that is used."""
        if self.artifact is None or self.loaded.manifest is None:
            return None
        return self.loaded.manifest.recipe.preprocessing

    @cached_property
    def _own_rule(self) -> "Preprocessing | None":
        """The rule that a named model was made with."""
        from secateur.pipeline.load import model_preprocessing

        if self.artifact is not None:
            return None
        own = self.model.startswith("python:")
        return model_preprocessing(self.model, self.loaded.model if own else None)

    @cached_property
    def classified(self) -> "ImageData":
        """The image set of a classifier."""
        from secateur.data.dataset import with_normalization
        from secateur.data.load import load_data

        assert self.data is not None
        flags, stored, own = self.flags, self._stored, self._own_rule
        mean, std = numbers(flags.mean, "--mean"), numbers(flags.std, "--std")
        rule = own if stored is None else stored
        size = image_size(flags.image_size) or (None if stored is None else stored.size)
        if self.artifact is not None and self.loaded.manifest is not None:
            recipe = self.loaded.manifest.recipe
            mean, std = mean or recipe.mean or None, std or recipe.std or None
            _, height, width = recipe.input_shape
            size = size or ((height, width) if height == width else None)  # Of an artifact of 0.1, without a rule.
        found = load_data(
            self.data,
            limit=flags.limit,
            validation_fraction=flags.validation_fraction,
            seed=self.seed,
            image_size=size,
            usual_size=None if own is None else own.size,
            resizing=resizing_of(flags.resize, None if rule is None else rule.resizing),
            channels=channels_of(flags.channels)[0]
            or (None if stored is None or stored.channels < 4 else stored.channels),
            mean=mean,
            std=std,
            skip_bad_images=flags.skip_bad_images,
        )
        if own is None or len(own.mean) != found.size[0] or (mean is not None and std is not None):
            return found
        return with_normalization(found, mean or own.mean, std or own.std)

    def _annotated(self) -> "OwnData":
        from secateur.data import layouts
        from secateur.data.layouts import find_layout, look_at

        assert self.data is not None
        named, flags, stored = self.named, self.flags, self._stored
        layout, folder = find_layout(self.data, named.layouts, named.name)
        channels = channels_of(flags.channels)[0] or (None if stored is None else stored.channels)
        found = look_at(layout, folder, channels=channels, void=flags.void, skip_bad_images=flags.skip_bad_images)
        rule = rule_of_run(named, flags, self._own_rule, stored, found.seen)
        return found.to_data(
            rule,
            labeled=named.labeled and layout.name != "images",
            lists=named.lists or (named.name.startswith("python:") and layout in layouts.BOXES),
            limit=flags.limit,
            held_out=flags.validation_fraction,
            seed=self.seed,
        )

    @cached_property
    def loaded(self) -> "LoadedModel":
        """The model."""
        by_itself = self.artifact is not None or self.model.startswith("python:")
        return self.load_for(self.images if self.data is not None and not by_itself else None)

    def warn_of_random_weights(self) -> None:
        """Say so if nothing gives a model of a library the weights of a training."""
        if self.weights is None and self.artifact is None and not self.model.startswith("python:"):
            _LOGGER.warning(f"{self.model} has random weights, as no --weights were given.")

    @property
    def artifact(self) -> Path | None:
        """The folder of the artifact that the model comes from, or None."""
        from secateur.export.artifact import is_artifact

        given = (Path(self.model), *([] if self.weights is None else [self.weights]))
        return next((folder for folder in given if is_artifact(folder)), None)

    def load_for(self, images: "ImageData | OwnData | None") -> "LoadedModel":
        """Load the model with the classes and channels of an image set, unless it is an artifact."""
        from secateur.data.loaders import OwnData
        from secateur.pipeline.load import load_any

        sized = None if self.artifact is not None else images
        classes = None
        if sized is not None:
            classes = sized.outputs if isinstance(sized, OwnData) else len(sized.classes)
        channels = channels_of(self.flags.channels)[0] if sized is None else sized.size[0]
        return load_any(
            self.model,
            weights=self.weights,
            weights_key=self.flags.weights_key if self.weights is not None else None,
            num_classes=self.flags.num_classes or classes,
            in_channels=channels,
            trust_source=self.flags.trust_source,
            seed=self.seed,
        )

    def example(self, n: int) -> Any:
        """Return a few images: real ones if there is data, else noise of the size that the model was made for."""
        import torch

        from secateur.data.dataset import draw_calibration
        from secateur.pipeline.load import default_size

        if self.data is not None:
            return draw_calibration(self.images.train, n, seed=self.seed)[0][0]
        channels, height, width = default_size(self.loaded)
        height, width = image_size(self.flags.image_size) or (height, width)
        if min(channels, height, width) < 1:
            raise DataError(f"`--image-size` must be positive; got {height} x {width}. Say --image-size 224.")
        noise = torch.randn(n, channels, height, width, generator=torch.Generator().manual_seed(self.seed))
        return list(noise) if self.named.lists else noise


def factory_of(model: str, folder: Path, trust_source: bool) -> "Callable[[], torch.nn.Module]":
    """Return what builds the original of an artifact.

    Args:
        model: As ``--model`` names it.
        folder: The artifact.
        trust_source: Whether code that ``python:`` names may run.

    Raises:
        ModelError: If it is the name of no model.
        ArtifactError: If it is a second artifact.
    """
    from secateur.export.artifact import is_artifact
    from secateur.models.source import ModelSource
    from secateur.pipeline.load import check_model_spec, named_source

    if is_artifact(model):
        raise ArtifactError(
            f"`verify` must be given one artifact folder; got {folder} and {model}. Say: secateur verify FOLDER."
        )
    check_model_spec(model, trust_source=trust_source)
    source: ModelSource = named_source(model, folder)
    return lambda: source.build(trust_source=trust_source)


_SEARCH_FLAGS: Mapping[str, tuple[str, ...]] = {
    "search_epochs": ("swp", "tas"),
    "search_over": ("swp", "tas"),
    "search_learning_rate": ("swp", "tas"),
    "search_candidates": ("swp",),
    "combine": ("swp",),
    "stage_end": ("swp",),
    "ray": ("swp",),
    "tas_preset": ("tas",),
    "swp_ablation": ("swp",),
    "pca": ("pca",),
    "rank_cap": ("pca",),
}
"""The strategies that a flag has an effect on."""


def strategy(flags: "SearchFlags", *, default_blocks: float = 0.0, trust_source: bool = False) -> "Strategy | None":
    """Build the strategy that the flags describe; None if they describe none, for the default.

    Args:
        flags: See `SearchFlags`.
        default_blocks: Largest fraction of blocks that built-in strategies for widths may remove if no flag says it;
            above 0 if the budget limits the latency.
        trust_source: Whether code that ``python:`` names may run.

    Raises:
        SelectionError: If a name is unknown, or a flag has no effect on the strategy.
        ModelError: If code of the user is not trusted, or does not give a strategy.
    """
    from secateur.search.base import Strategy
    from secateur.search.depth import RemoveBlocks

    name = None if flags.strategy == "auto" else flags.strategy
    for flag, strategies in _SEARCH_FLAGS.items():
        if getattr(flags, flag) not in (None, ()) and name not in strategies:
            raise SelectionError(
                f"`--{flag.replace('_', '-')}` must go with --strategy {' or '.join(strategies)}; got "
                f"{name or 'no strategy'}. Leave it out, or say another strategy."
            )
    if name is None:
        if flags.importance is None:
            return None if flags.remove_blocks is None else _default_without_blocks(flags.remove_blocks, default_blocks)
        name = "knapsack"
    if name in ("tas", "swp"):
        if flags.remove_blocks:
            raise SelectionError(
                f"`--remove-blocks` must be left out with --strategy {name}, which searches depths itself; got "
                f"{flags.remove_blocks:g}. Say --search-over depths, or both."
            )
        found = _supernet(flags)
        return found if flags.importance is None else replace(found, importance=importance(flags, trust_source))
    if name.startswith("python:"):
        if flags.importance is not None:
            raise SelectionError(
                f"`--importance` must go with a strategy of Secateur; got {name}. Choose it in your factory."
            )
        widths, default_blocks = made_by(name, Strategy, "--strategy", trust_source), 0.0
    else:
        widths = _widths(name, flags, trust_source)
    blocks = default_blocks if flags.remove_blocks is None else flags.remove_blocks
    return RemoveBlocks(widths, blocks) if blocks else widths


def _default_without_blocks(fraction: float, default_blocks: float) -> "Strategy":
    """Build the default strategy with another largest fraction of removed blocks."""
    from secateur.search.candidates import Fastest
    from secateur.search.depth import RemoveBlocks
    from secateur.search.ranking import Knapsack

    if fraction:
        # Not `Fastest`, which removes blocks only from networks that are within the budget by their widths.
        return RemoveBlocks(Knapsack(), fraction)
    return Knapsack() if default_blocks else Fastest(fewer_blocks=())


def _widths(name: str, flags: "SearchFlags", trust_source: bool) -> "Strategy":
    from secateur.search.pca import Activations, Correlation, FilterWeights, PCASlimming, RawWeights
    from secateur.search.ranking import GlobalImportance, Knapsack, Uniform

    stretched = flags.rank_cap != "literal"
    source = RawWeights(stretched=stretched) if flags.pca == "raw" else FilterWeights(stretched=stretched)
    if flags.pca == "correlation":
        source = FilterWeights(Correlation(), stretched)
    built_in: dict[str, Knapsack | PCASlimming | GlobalImportance | Uniform] = {
        "knapsack": Knapsack(),
        "pca": PCASlimming(source=source),
        "pca-activations": PCASlimming(source=Activations()),
        "global": GlobalImportance(),
        "uniform": Uniform(),
    }
    if name not in built_in:
        raise SelectionError(
            f"`--strategy` must be one of auto, {', '.join(built_in)}, tas, swp or python:PACKAGE.MODULE:NAME; "
            f"got {name!r}."
        )
    found = built_in[name]
    return found if flags.importance is None else replace(found, importance=importance(flags, trust_source))


def check_published(flags: "SearchFlags", space: "SpaceFlags") -> None:
    """Refuse the published search of TAS in a tied graph, in which residual branches have no widths of their own.

    Raises:
        SelectionError: If so.
    """
    if flags.tas_preset in ("paper-cifar", "paper-imagenet") and not space.untied:
        raise SelectionError(
            f"`--tas-preset` must go with --untied for {flags.tas_preset}, which searches every convolution's width. "
            "Add it, and --from-scratch with --epochs and --lr as published (recipes/tas)."
        )


def _supernet(flags: "SearchFlags") -> "TAS | SWP":
    """Build a strategy that trains a supernet."""
    from secateur.nas.common import Depths
    from secateur.nas.swp import SWP
    from secateur.nas.swp_evolution import Evolution
    from secateur.nas.swp_knapsack import ExactKnapsack
    from secateur.nas.tas import TAS
    from secateur.workers import InProcess, OnRay

    if flags.strategy == "tas":
        published = flags.tas_preset in ("paper-cifar", "paper-imagenet")
        default = TAS.paper(imagenet=flags.tas_preset == "paper-imagenet") if published else TAS()
    else:
        default, published = SWP(), False
    given: dict[str, Any] = {"epochs": flags.search_epochs, "learning_rate": flags.search_learning_rate}
    over = flags.search_over or ("both" if published else "widths")
    found = replace(
        default,
        widths=None if over == "depths" else default.widths,
        depths=None if over == "widths" else default.depths or Depths(),
        train=replace(default.train, **{name: value for name, value in given.items() if value is not None}),
    )
    if isinstance(found, TAS):
        return found
    found = replace(
        found,
        cuts=flags.stage_end or None,
        candidates=found.candidates if flags.search_candidates is None else flags.search_candidates,
        combination=Evolution() if flags.combine == "evolution" else ExactKnapsack(),
        workers=InProcess() if flags.ray is None else OnRay(flags.ray),
    )
    return replace(found, **_ablation(flags))


def _ablation(flags: "SearchFlags") -> dict[str, Any]:
    """Return what an ablation of SWP changes."""
    from secateur.nas.swp_train import Labels, RandomSampler, SoftLabels

    if flags.swp_ablation not in (None, "no-sandwich") and flags.stage_end:
        raise SelectionError(
            f"`--stage-end` must go without --swp-ablation {flags.swp_ablation}, which has one stage; got both."
        )
    return {
        None: {},
        "no-stages": {"cuts": ()},
        "no-sandwich": {"sampler": RandomSampler(3)},
        "no-in-place": {"cuts": (), "supervision": Labels()},
        "autoslim": {"cuts": (), "supervision": SoftLabels()},
    }[flags.swp_ablation]


def importance(flags: "SearchFlags", trust_source: bool = False) -> "Importance":
    """Build the importance that ``--importance`` names.

    Raises:
        SelectionError: If the name is unknown.
        ModelError: If code of the user is not trusted, or does not give an importance.
    """
    from secateur.search.importance import L1, L2, LAMP, BatchNormScale, GeometricMedian, Importance, RandomImportance
    from secateur.search.importance_data import Reconstruction, Taylor

    name = flags.importance or "reconstruction"
    if name.startswith("python:"):
        return made_by(name, Importance, "--importance", trust_source)
    built_in: dict[str, type[Importance]] = {
        "reconstruction": Reconstruction,
        "l1": L1,
        "l2": L2,
        "fpgm": GeometricMedian,
        "bn-scale": BatchNormScale,
        "taylor": Taylor,
        "lamp": LAMP,
        "random": RandomImportance,
    }
    if name not in built_in:
        raise SelectionError(
            f"`--importance` must be one of {', '.join(built_in)} or python:PACKAGE.MODULE:NAME; got {name!r}."
        )
    return built_in[name]()


def selection(include: Sequence[str], exclude: Sequence[str], keep_whole: Sequence[str]) -> "Selection":
    """Build the selection of the layers that may be cut.

    Raises:
        SelectionError: If a pattern is empty.
    """
    from secateur.graph.selection import Selection

    for name, patterns in (("--include", include), ("--exclude", exclude), ("--keep-whole", keep_whole)):
        if "" in patterns:
            raise SelectionError(f"`{name}` must be a name pattern, such as 'layer1.*'; got ''.")
    return Selection(tuple(include), tuple(exclude), tuple(keep_whole))


def axis_rules(divisors: Sequence[str], min_widths: Sequence[str], min_kept: Sequence[str]) -> "tuple[AxisRule, ...]":
    """Read other bounds for some axes, from "PATTERN=N" words.

    Raises:
        SelectionError: If a word is not of this form.
        BudgetError: If a number is out of range.
    """
    each = (
        ("--axis-divisor", "divisor", int, divisors),
        ("--axis-min-width", "min_width", int, min_widths),
        ("--axis-min-kept", "min_kept_fraction", float, min_kept),
    )
    return tuple(_axis_rule(word, flag, field, kind) for flag, field, kind, words in each for word in words)


def _axis_rule(word: str, flag: str, field: str, kind: Callable[[str], int | float]) -> "AxisRule":
    from secateur.cli.messages import in_flags
    from secateur.search.space import AxisRule

    pattern, number = _named_number(word, flag, kind)
    try:
        return AxisRule(pattern, **{field: number})  # pyright: ignore[reportArgumentType]
    except BudgetError as error:
        raise BudgetError(in_flags(str(error), {field: flag})) from error


def _named_number(word: str, flag: str, kind: Callable[[str], Number]) -> tuple[str, Number]:
    pattern, _, number = word.rpartition("=")
    try:
        if pattern and kind(number) <= MAX_CHANNELS:
            return pattern, kind(number)
    except (ValueError, OverflowError):
        pass
    what = "a whole number" if kind is int else "a number"
    raise SelectionError(f"`{flag}` must be a name pattern, = and {what}, such as 'layer1.*=8'; got {word!r}.")


def callbacks(quiet: bool, tensorboard: Path | None, *, as_json: bool = False) -> "Callbacks":
    """Choose how searches and trainings are shown.

    Raises:
        TrainingError: If the folder or the package for TensorBoard is missing.
    """
    from secateur.cli.output import JsonLines
    from secateur.train.callbacks import Silent, TensorBoard, TerminalProgress

    shown = Silent() if quiet else JsonLines() if as_json else TerminalProgress()
    return shown if tensorboard is None else TensorBoard(tensorboard, shown)


def optimizer(name: "OptimizerName", weight_decay: float | None) -> "SGD | AdamW":
    """Build an optimizer's settings, with its default weight decay unless another is given."""
    from secateur.train.config import SGD, AdamW

    kind = SGD if name == "sgd" else AdamW
    return kind() if weight_decay is None else kind(weight_decay=weight_decay)


def precision(name: "PrecisionName") -> "Precision | None":
    """Return the number formats of a name; None for the best that the device has."""
    from secateur.train.device import Precision

    return {"auto": None, "32": Precision.FLOAT32, "bf16": Precision.BF16_MIXED}[name]


def formats(text: str) -> "tuple[Format, ...]":
    """Read export formats, such as "onnx,pt2".

    Raises:
        ExportError: If one is unknown, or its library is not installed.
    """
    from secateur.export.formats import check_formats, parse_formats

    found = parse_formats(text)
    check_formats(found)
    return found


def device(text: str) -> "torch.device | None":
    """Return the device of a name; None for the accelerator if there is one."""
    return None if text == "auto" else check_device("--device", text, instead="auto or cpu")


def check_device(flag: str, text: str, *, instead: str = "cpu") -> "torch.device":
    """Return the device of a name such as cpu or cuda:1; ``flag`` and ``instead`` are for the message.

    Raises:
        TrainingError: If this machine has no such device.
    """
    import torch

    reason = f"it must be one of {', '.join(_DEVICES)}"
    try:
        found = torch.device(text)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).strip().splitlines() or ["unknown"])[0]
    else:
        if found.type in _DEVICES:
            return found
    raise TrainingError(
        f"`{flag}` must be a device that this machine has: cpu, cuda, cuda:N or mps; got {text!r} ({reason}). "
        f"Say {instead}."
    )
