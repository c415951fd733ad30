"""The command that trains a network on labels by a recipe."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from secateur.cli import options
from secateur.cli.options import (
    AUGMENT_NAMES,
    TRAIN,
    ImageFlags,
    OptimizerName,
    PrecisionName,
    RunFlags,
    choice,
    flag,
    number,
    whole_number,
)
from secateur.cli.output import command_line, handle_errors_together, logged, resumable
from secateur.cli.parsing import MAX_CHANNELS
from secateur.errors import TrainingError

if TYPE_CHECKING:
    from secateur.cli.tasks import NamedTask
    from secateur.data.dataset import ImageData
    from secateur.data.loaders import OwnData
    from secateur.train.base_recipes import TrainRecipe
    from secateur.train.device import Execution

RecipeName = Literal["cifar-resnet", "cifar-strong", "tas", "imagenet-resnet", "finetune", "adamw"]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class RecipeFlags:
    """How a network is trained; what is not given is that of the recipe."""

    recipe: Annotated[
        RecipeName | None, choice("cifar-resnet, cifar-strong, tas, imagenet-resnet, finetune or adamw.", TRAIN)
    ] = None
    epochs: Annotated[int | None, whole_number("Epochs; of the recipe by default, like all below.", TRAIN)] = None
    batch_size: Annotated[int | None, whole_number("Images per step.", TRAIN, most=MAX_CHANNELS)] = None
    learning_rate: Annotated[float | None, number("Peak learning rate.", TRAIN, name="--lr")] = None
    optimizer: Annotated[OptimizerName | None, choice("Optimizer: sgd or adamw.", TRAIN)] = None
    precision: Annotated[PrecisionName, choice("Number formats: auto, 32 or bf16.", TRAIN)] = "auto"
    warmup: Annotated[float | None, number("Fraction of steps with a rising rate.", least=0, most=1)] = None
    weight_decay: Annotated[float | None, number("Weight decay.", least=0)] = None
    ema: Annotated[float | None, number("Decay of an average of the weights; 0 is off.", least=0)] = None
    accumulate: Annotated[int | None, whole_number("Compute each batch in N parts, with less memory.")] = None
    clip_norm: Annotated[float | None, number("Clip the L2 norm of gradients; 0 is off.", least=0)] = None
    auto_augment: Annotated[
        str | None,
        flag("Augment as timm does: rand-m9-mstd0.5-inc1, original, ..., none.", name=AUGMENT_NAMES, value="POLICY"),
    ] = None
    erase: Annotated[float | None, number("Probability of erasing a part of an image.")] = None
    mixup: Annotated[float | None, number("Mix pairs of images with this alpha; 0 is off.")] = None
    cutmix: Annotated[float | None, number("Paste parts of images with this alpha; 0 is off.")] = None
    label_smoothing: Annotated[float | None, number("Share of each label spread over all classes.")] = None
    compiled: Annotated[bool, flag("Use torch.compile: slow to start, then often faster.", name="--compile")] = False

    def name(self, named: "NamedTask | None" = None) -> RecipeName:
        """Return the name of the recipe: the usual one of a task if no flag says it."""
        usual: RecipeName = "cifar-resnet" if named is None or named.classifies else "adamw"
        return self.recipe or usual

    def check_task(self, named: "NamedTask") -> None:
        """Refuse a task that cannot be learned from data, and flags that have no effect on a task.

        Raises:
            TrainingError: With the way out.
        """
        if not named.labeled:
            raise TrainingError(
                f"`--task` must have labels to learn from; got {named.name}. Train on labels, and compress with it."
            )
        if named.classifies:
            return
        only = {**self._augment, "label_smoothing": self.label_smoothing}
        for name, value in only.items():
            if value and value != "none":
                raise TrainingError(
                    f"`--{name.replace('_', '-')}` must go with --task classification; got {named.name}. Leave it out."
                )

    def to_recipe(self, named: "NamedTask | None" = None) -> "TrainRecipe":
        """Build the recipe that the flags describe; refuse numbers that cannot be."""
        from secateur.cli.parsing import optimizer, precision
        from secateur.distill.objective import Objective
        from secateur.train.base_recipes import RECIPES

        base = RECIPES[self.name(named)]
        train = base.train
        given: dict[str, Any] = {
            name: getattr(self, name)
            for name in ("epochs", "batch_size", "learning_rate", "accumulate")
            if getattr(self, name) is not None
        }
        if self.warmup is not None:
            given["warmup_fraction"] = self.warmup
        for name, value in (("ema_decay", self.ema), ("clip_norm", self.clip_norm)):
            if value is not None:
                given[name] = value or None  # 0 takes away what the recipe has.
        if self.optimizer is not None:
            given["optimizer"] = optimizer(self.optimizer, self.weight_decay)
        elif self.weight_decay is not None:
            given["optimizer"] = replace(train.optimizer, weight_decay=self.weight_decay)
        smoothing = base.label_smoothing if self.label_smoothing is None else self.label_smoothing
        if named is not None and not named.classifies:
            smoothing = 0.0  # That of a recipe for classifiers.
        Objective.of_labels(label_smoothing=smoothing)
        return replace(
            base,
            train=replace(train, precision=precision(self.precision), **given),
            label_smoothing=smoothing,
        )

    def check_augment(self) -> None:
        """Refuse augmentations that cannot be, before anything is loaded."""
        from secateur.data.transforms import Augment

        Augment(**self._augment)

    def augment(self, images: "ImageData | OwnData") -> "ImageData | OwnData":
        """Return the same images with the augmentation of the recipe and the flags, if they have any."""
        from secateur.train.base_recipes import RECIPES

        if images.augment is None:
            return images
        policy = {"auto_augment": RECIPES[self.name()].auto_augment}
        return replace(images, augment=replace(images.augment, **{**policy, **self._augment}))

    @property
    def _augment(self) -> dict[str, Any]:
        given = {name: getattr(self, name) for name in ("auto_augment", "erase", "mixup", "cutmix")}
        found = {name: value for name, value in given.items() if value is not None}
        return {**found, "auto_augment": None} if self.auto_augment == "none" else found

    @property
    def execution(self) -> "Execution":
        """How the network is run."""
        from secateur.train.device import Compiled, Eager

        return Compiled() if self.compiled else Eager()


@handle_errors_together
@resumable
def train_command(
    *,
    model: options.Model,
    weights: options.WeightsFile = None,
    data: options.Data,
    out_folder: options.Out,
    images: ImageFlags = ImageFlags(),
    recipe: RecipeFlags = RecipeFlags(),
    run: RunFlags = RunFlags(),
    debug: options.Debug = False,
) -> None:
    """Train a network on labels by a recipe: train, verify, export, report.

    Example: secateur train --model cifar_resnet20 --data cifar10 --recipe cifar-resnet --out base
    """
    from secateur._runtime import is_main_process
    from secateur.cli.messages import Checks
    from secateur.cli.parsing import Inputs, formats
    from secateur.cli.tables import show
    from secateur.pipeline.distill import ModelSpec
    from secateur.pipeline.train import train_model
    from secateur.pipeline.workspace import check_output, check_unfinished

    # Whatever can be refused without loading anything is, and all of it at once.
    checks, inputs = Checks(), Inputs(model, weights, data, images, run.seed)
    inputs.check(checks)
    run_config, exported = checks.add(run.to_config), checks.add(lambda: formats(run.export))
    checks.add(lambda: check_output(out_folder))
    if is_main_process():  # The others of several begin when the first one may have made its folder already.
        checks.add(lambda: check_unfinished(out_folder, run_config().on_existing))
    configured = checks.add(lambda: recipe.to_recipe(inputs.named))
    checks.add(recipe.check_augment)
    checks.add(lambda: recipe.check_task(inputs.named))
    checks.settle()
    taken, loaded = configured(), inputs.loaded
    with run.fabric(taken.train) as fabric, logged(quiet=run.quiet, as_json=run.as_json):
        result = train_model(
            ModelSpec(loaded.model, loaded.name, loaded.source, loaded.architecture),
            data=recipe.augment(inputs.images),
            train=taken.train,
            recipe=recipe.name(inputs.named),
            task=inputs.named.task,
            label_smoothing=taken.label_smoothing,
            execution=recipe.execution,
            out=out_folder,
            export=exported(),
            run=replace(run_config(), fabric=fabric, command=command_line()),
        )
    if fabric.is_global_zero:
        show(result, quiet=run.quiet, as_json=run.as_json)
