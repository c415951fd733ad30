"""What is compared: the cells of the study, as plain data.

The workbench of the study: networks that several cells begin with, trained once and kept on disk.

From the cells to a table, a page, and the answer in numbers.

Run the study cell by cell; each finished cell is a file, and what is finished is never done again."""

import json
import math
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import safetensors.torch
import torch
from torch import Tensor, nn

from secateur._files import atomic_file, disk_errors, locked
from secateur._provenance import Provenance
from secateur.cost.budget import Budget
from secateur.cost.macs import counted_macs, counted_params
from secateur.data.dataset import ImageData, Split
from secateur.distill.feature_losses import hint_loss
from secateur.distill.objective import Objective, PerTap, Term, features
from secateur.distill.taps import Taps, adaptors_of, paired_stages
from secateur.errors import ArtifactError, TrainingError
from secateur.export.artifact import weights_bytes
from secateur.graph.trace import trace
from secateur.models.source import load_model
from secateur.pipeline.compress import silent
from secateur.pipeline.search_and_cut import with_zeros
from secateur.prune.cut import cut
from secateur.prune.masks import nonzero_params
from secateur.prune.weight_pruning import Cubic, Sparsify, WeightPruning
from secateur.report.html import Page, PageTable, write_page
from secateur.report.run import performance_efficiency
from secateur.search.base import search_architecture
from secateur.search.importance import L1
from secateur.search.ranking import Uniform
from secateur.train.callbacks import Silent
from secateur.train.config import TrainConfig
from secateur.train.device import open_fabric, precision_of
from secateur.train.evaluate import evaluate
from secateur.train.fit import fit

if TYPE_CHECKING:
    from lightning_fabric import Fabric


class Pruned(StrEnum):
    """What is removed."""

    WEIGHTS = "weights"
    """Single weights, by magnitude over all layers, gradually while the student recovers."""
    CHANNELS = "channels"
    """Whole channels, by magnitude, the same part of every layer, before it recovers."""


class Taught(StrEnum):
    """What a student learns from."""

    LABELS = "none"
    """The labels alone."""
    KD = "kd"
    """The teacher's softened probabilities, and a little of the labels."""
    KD_AND_HINTS = "kd+hints"
    """The same, and the teacher's features at the last module of each resolution."""


class Order(StrEnum):
    """When the teacher teaches."""

    DISTILL_THEN_PRUNE = "distill, prune"
    """Before pruning; the recovery is from labels."""
    PRUNE_THEN_DISTILL = "prune, distill"
    """In the recovery; before pruning there are labels."""
    BOTH = "both"
    """Before and after."""


@dataclass(frozen=True)
class Family:
    """Two networks of one kind.

    Attributes:
        name: Of the family.
        teacher: The larger one, a name for `secateur.models.load_model`.
        student: The smaller one.
    """

    name: str
    teacher: str
    student: str


FAMILIES = (
    Family("resnet", "cifar_resnet32", "cifar_resnet20"),
    Family("densenet", "cifar_densenet52", "cifar_densenet40"),
    Family("efficientnet", "cifar_efficientnet_150", "cifar_efficientnet"),
    Family("mobilenet", "cifar_mobilenetv2_150", "cifar_mobilenetv2"),
)
"""Students of 135 to 270 thousand parameters."""


@dataclass(frozen=True)
class Cell:
    """One student: pruned in one way to one size, taught in one way, from one seed."""

    family: Family
    pruned: Pruned
    kept: float
    taught: Taught
    order: Order
    seed: int

    @property
    def before(self) -> Taught:
        """What it learns from before pruning."""
        return Taught.LABELS if self.order is Order.PRUNE_THEN_DISTILL else self.taught

    @property
    def after(self) -> Taught:
        """What it learns from after pruning."""
        return Taught.LABELS if self.order is Order.DISTILL_THEN_PRUNE else self.taught

    @property
    def name(self) -> str:
        """Of its file."""
        words = (self.family.name, self.pruned, f"{self.kept:g}", self.taught, self.order, f"seed{self.seed}")
        return "-".join(word.replace(", ", "-").replace("+", "-") for word in words)


@dataclass(frozen=True)
class Study:
    """The whole of it. The defaults are for one core of a CPU and about an hour: short training, on few images.

    Attributes:
        families: Which networks.
        seeds: Of the students: weights, order of images, augmentation. The teacher of a family has the first of them.
        weights_kept: Kept fractions of the weights that may be pruned.
        macs_kept: Kept fractions of the MACs, by cut channels.
        teaching: Training of the teachers, on labels.
        learning: Training of the students before pruning.
        recovery: Training after pruning.
        recovery_images: How many of the training images the recovery is shown per epoch; None shows all.
        test_images: How many test images decide; None takes all.
        hint_weight: Of the hints, beside 0.9 kd and 0.1 labels.
    """

    families: tuple[Family, ...] = FAMILIES
    seeds: tuple[int, ...] = (0, 1)
    weights_kept: tuple[float, ...] = (0.5, 0.3, 0.1)
    macs_kept: tuple[float, ...] = (0.7, 0.5)
    teaching: TrainConfig = TrainConfig(epochs=4, batch_size=64, learning_rate=0.1, warmup_fraction=0.1)  # noqa: RUF009
    learning: TrainConfig = TrainConfig(epochs=3, batch_size=64, learning_rate=0.1, warmup_fraction=0.1)  # noqa: RUF009
    recovery: TrainConfig = TrainConfig(epochs=1, batch_size=64, learning_rate=0.02, warmup_fraction=0.1)  # noqa: RUF009
    recovery_images: int | None = 2048
    test_images: int | None = 2000
    hint_weight: float = 1.0

    def __post_init__(self) -> None:
        names = [family.name for family in self.families]
        for name, values in (("families", names), ("seeds", self.seeds)):
            if not values or len(set(values)) < len(values):
                raise TrainingError(f"`{name}` must be one or more, each once; got {list(values)}.")
        for name, kept in (("weights_kept", self.weights_kept), ("macs_kept", self.macs_kept)):
            if not all(math.isfinite(value) and 0 < value < 1 for value in kept) or len(set(kept)) < len(kept):
                raise TrainingError(
                    f"`{name}` must be kept fractions between 0 and 1, each once; got {list(kept)}. "
                    "0.1 is a sparsity of 90 %."
                )
        if not self.weights_kept and not self.macs_kept:
            raise TrainingError("`weights_kept` or `macs_kept` must have a fraction; got none in either.")

    def cells(self) -> Iterator[Cell]:
        """Every cell once; without a teacher there is only one order."""
        for family in self.families:
            for seed in self.seeds:
                for pruned, fractions in ((Pruned.WEIGHTS, self.weights_kept), (Pruned.CHANNELS, self.macs_kept)):
                    for kept in fractions:
                        yield Cell(family, pruned, kept, Taught.LABELS, Order.BOTH, seed)
                        for taught in (Taught.KD, Taught.KD_AND_HINTS):
                            for order in Order:
                                yield Cell(family, pruned, kept, taught, order, seed)


TEMPERATURE = 4.0
UNFINISHED = "unfinished"
"""The folder of a study for checkpoints."""


@dataclass(frozen=True, eq=False)
class Network:
    """A trained network.

    Attributes:
        model: In eval mode, on the CPU.
        accuracy: On the test images, a fraction.
    """

    model: nn.Module
    accuracy: float


class Bench:
    """Trains, measures and keeps networks.

    Args:
        study: What is compared.
        data: The images.
        folder: Of the study.
        fabric: Device and precision.
        tell: Receives one sentence per network.
    """

    def __init__(
        self, study: Study, data: ImageData, folder: Path, *, fabric: "Fabric", tell: Callable[[str], None]
    ) -> None:
        self._study, self._data, self._folder, self._fabric, self._tell = study, data, folder, fabric, tell
        count = study.test_images
        self._test = data.test if count is None else data.test.subset(torch.arange(min(count, len(data.test))))
        self._example = next(iter(data.train.batches(2, device="cpu")))[0]
        self._held: dict[str, Network] = {}
        self._taps: dict[Family, Taps] = {}

    def teacher(self, family: Family) -> Network:
        """The teacher of a family, from labels."""
        return self._kept(
            f"{family.name}-teacher",
            family.teacher,
            self._study.seeds[0],
            lambda fresh, unfinished: self._train(
                fresh, self._data.train, self._study.teaching, Objective.of_labels(), checkpoint=unfinished
            ),
        )

    def student(self, family: Family, taught: Taught, seed: int) -> Network:
        """A student before pruning."""

        name = f"{family.name}-{taught.replace('+', '-')}-seed{seed}"

        def learn(fresh: nn.Module, unfinished: Path) -> nn.Module:
            schedule = replace(self._study.learning, seed=seed)
            return self.taught(fresh, family, taught, schedule=schedule, images=self._data.train, checkpoint=unfinished)

        return self._kept(name, family.student, seed, learn)

    def taught(
        self,
        model: nn.Module,
        family: Family,
        taught: Taught,
        *,
        schedule: TrainConfig,
        images: Split,
        checkpoint: Path,
        sparsify: Sparsify | None = None,
    ) -> nn.Module:
        """A network after a training in one of the ways, or after the rest of one that was interrupted."""
        train = partial(self._train, model, images, schedule, checkpoint=checkpoint, sparsify=sparsify)
        if taught is Taught.LABELS:
            return train(Objective.of_labels())
        teacher = self.teacher(family).model
        if taught is Taught.KD:
            # The batches of a seed are the same in all cells: the teacher runs over them once.
            memory = self._folder / "logits" / f"{family.name}-{len(images)}-{schedule.batch_size}"
            return train(Objective(temperature=TEMPERATURE), teacher=teacher, remember=memory)
        taps = self._taps_of(family)
        adaptors = adaptors_of(model, teacher, taps, self._example[:1], seed=schedule.seed)
        hint = Term(
            "hint", PerTap(hint_loss, dict(adaptors.items())), of=features, weight=self._study.hint_weight, taps=taps
        )
        return train(Objective(temperature=TEMPERATURE, terms=(hint,)), teacher=teacher)

    def accuracy(self, model: nn.Module) -> float:
        """On the test images of the study, a fraction."""
        precision, device = precision_of(self._fabric), self._fabric.device
        return evaluate(model, self._test, batch_size=500, precision=precision, device=device).top1

    @property
    def recovery_images(self) -> Split:
        """What a recovery is shown: the same images for all cells."""
        count, train = self._study.recovery_images, self._data.train
        if count is None or count >= len(train):
            return train
        chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:count]
        return train.subset(chosen.sort().values)

    @property
    def example(self) -> Tensor:
        """Two images on the CPU."""
        return self._example

    def _taps_of(self, family: Family) -> Taps:
        if family not in self._taps:
            classes, channels = len(self._data.classes), self._data.size[0]
            student, _ = load_model(family.student, num_classes=classes, in_channels=channels)
            graphs = trace(student, self._example), trace(self.teacher(family).model, self._example)
            self._taps[family] = paired_stages(*graphs)
        return self._taps[family]

    def _train(
        self,
        model: nn.Module,
        images: Split,
        schedule: TrainConfig,
        objective: Objective,
        *,
        checkpoint: Path,
        teacher: nn.Module | None = None,
        sparsify: Sparsify | None = None,
        remember: Path | None = None,
    ) -> nn.Module:
        return fit(
            model,
            images,
            schedule=schedule,
            objective=objective,
            teacher=teacher,
            augment=self._data.augment,
            sparsify=sparsify,
            remember=remember,
            checkpoint=checkpoint,
            progress=Silent(),
            fabric=self._fabric,
        ).model

    def unfinished(self, name: str) -> Path:
        """The folder for checkpoints of a network or cell, until it is finished."""
        return self._folder / UNFINISHED / name

    def _kept(self, name: str, spec: str, seed: int, train: Callable[[nn.Module, Path], nn.Module]) -> Network:
        """From memory, from disk, or trained now and kept there."""
        if name in self._held:
            return self._held[name]
        fresh, _ = load_model(spec, num_classes=len(self._data.classes), in_channels=self._data.size[0], seed=seed)
        weights, numbers = (self._folder / "models" / f"{name}.{end}" for end in ("safetensors", "json"))
        if numbers.is_file():
            fresh.load_state_dict(safetensors.torch.load(weights.read_bytes()))
            self._held[name] = Network(fresh.eval(), float(json.loads(numbers.read_text())["accuracy"]))
            return self._held[name]
        began = time.process_time()
        model = train(fresh, self.unfinished(name))
        accuracy = self.accuracy(model)
        tensors = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in model.state_dict().items()}
        with atomic_file(weights) as part:
            part.write_bytes(safetensors.torch.save(tensors))
        with atomic_file(numbers) as part:  # Last: where it is, the weights are.
            part.write_text(json.dumps({"accuracy": accuracy, "cpu_s": time.process_time() - began}))
        shutil.rmtree(self.unfinished(name), ignore_errors=True)
        self._tell(f"Trained {name}: {100 * accuracy:.2f} % on the test images.")
        self._held[name] = Network(model, accuracy)
        return self._held[name]


Row = Mapping[str, Any]

_WAYS = tuple((taught, order) for taught in (Taught.KD, Taught.KD_AND_HINTS) for order in Order)


def write_parquet(path: Path, rows: Sequence[Row]) -> Path:
    """One row per cell, a column for each number."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with atomic_file(path) as part:
        pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), part)
    return path


def gains(rows: Iterable[Row], pruned: Pruned, taught: Taught, order: Order) -> list[float]:
    """How much better a way is than labels alone, for each family, size and seed of one kind of pruning; fractions."""
    found = {_key(row): float(row["accuracy"]) for row in rows if row["pruned"] == pruned}
    places = sorted({key[:3] for key in found})
    pairs = (
        (found.get((*place, taught.value, order.value)), found.get((*place, Taught.LABELS.value, Order.BOTH.value)))
        for place in places
    )
    return [one - other for one, other in pairs if one is not None and other is not None]


def page_of(rows: Sequence[Row], facts: tuple[tuple[str, str], ...], provenance: Provenance) -> Page:
    """The page of a study."""
    machine = ", ".join(f"{name} {value}" for name, value in provenance.machine.items())
    cpu = sum(float(row["cpu_s"]) for row in rows)
    return Page(
        title="Pruning and distillation: which kinds suit each other?",
        facts=(*facts, ("machine", machine), ("date", provenance.date), ("CPU time of the cells", f"{cpu:.0f} s")),
        notes=(
            "Short training on few images, if the settings above say so: compare ways with each other, not with "
            "published numbers.",
            "Weights are set to zero in place: MACs and latency stay. Cut channels are really gone.",
            "Performance Efficiency is our definition: (accuracy / teacher's accuracy) / (size / teacher's size).",
        ),
        tables=(
            _gain_table(rows),
            _size_table(rows),
            *(_family_table(rows, family) for family in _distinct(rows, "family")),
        ),
        command=provenance.command,
    )


def _gain_table(rows: Sequence[Row]) -> PageTable:
    lines: list[tuple[str, ...]] = []
    for taught, order in _WAYS:
        cells = [gains(rows, pruned, taught, order) for pruned in Pruned]
        lines.append((f"{taught.value}: {order.value}", *map(_points, cells), _difference(*cells)))
    return PageTable(
        "What distillation adds to labels alone",
        ("way", "weights pruned", "channels cut", "weights minus channels"),
        tuple(lines),
        "Points of test accuracy, mean and standard error over families, sizes and seeds. A positive last column says "
        "that weight pruning gains more from the teacher.",
    )


def _size_table(rows: Sequence[Row]) -> PageTable:
    """A mean over sizes hides networks that nothing could save: what they gain is 0, whatever taught them."""
    sizes = _sizes(rows)
    lines: list[tuple[str, ...]] = []
    for taught, order in _WAYS:
        parts = ([row for row in rows if (row["pruned"], row["kept"]) == size] for size in sizes)
        found = (gains(part, Pruned(kind), taught, order) for part, (kind, _) in zip(parts, sizes, strict=True))
        lines.append((f"{taught.value}: {order.value}", *map(_points, found)))
    return PageTable(
        "The same for every size",
        ("way", *map(_column, sizes)),
        tuple(lines),
        "Points of test accuracy, mean and standard error over families and seeds.",
    )


def _family_table(rows: Sequence[Row], family: object) -> PageTable:
    own = [row for row in rows if row["family"] == family]
    sizes = _sizes(own)
    ways = [(Taught.LABELS, Order.BOTH), *_WAYS]
    lines: list[tuple[str, ...]] = []
    for taught, order in ways:
        name = "labels alone" if taught is Taught.LABELS else f"{taught.value}: {order.value}"
        chosen = [row for row in own if (row["taught"], row["order"]) == (taught.value, order.value)]
        lines.append((name, *(_accuracy_of(chosen, size) for size in sizes)))
    first = own[0]
    return PageTable(
        str(family),
        ("way", *map(_column, sizes)),
        tuple(lines),
        f"Test accuracy, mean and spread (half the range) over the seeds, then Performance Efficiency over non-zero "
        f"parameters. Teacher: {100 * float(first['teacher_accuracy']):.2f} %.",
    )


def _sizes(rows: Sequence[Row]) -> list[tuple[str, float]]:
    """What was pruned, and how much of it stayed; the most first."""
    return sorted({(str(row["pruned"]), float(row["kept"])) for row in rows}, key=lambda pair: (pair[0], -pair[1]))


def _column(size: tuple[str, float]) -> str:
    kind, kept = size
    return f"{'macs' if kind == Pruned.CHANNELS else 'weights'} {100 * kept:g} %"


def _accuracy_of(rows: Sequence[Row], size: tuple[str, float]) -> str:
    chosen = [row for row in rows if (row["pruned"], row["kept"]) == size]
    if not chosen:
        return "none"
    accuracies = [100 * float(row["accuracy"]) for row in chosen]
    efficiency = statistics.fmean(float(row["efficiency_params"]) for row in chosen)
    half = (max(accuracies) - min(accuracies)) / 2
    return f"{statistics.fmean(accuracies):.2f} ± {half:.2f} % (PE {efficiency:.2f})"


def _points(values: Sequence[float]) -> str:
    if not values:
        return "none"
    return f"{100 * statistics.fmean(values):+.2f} ± {100 * _error(values):.2f} (n = {len(values)})"


def _difference(weights: Sequence[float], channels: Sequence[float]) -> str:
    if not weights or not channels:
        return "none"
    error = (_error(weights) ** 2 + _error(channels) ** 2) ** 0.5
    return f"{100 * (statistics.fmean(weights) - statistics.fmean(channels)):+.2f} ± {100 * error:.2f}"


def _error(values: Sequence[float]) -> float:
    """Standard error of the mean; 0 of a single value."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def _key(row: Row) -> tuple[object, ...]:
    return row["family"], row["kept"], row["seed"], row["taught"], row["order"]


def _distinct(rows: Sequence[Row], name: str) -> list[object]:
    return list(dict.fromkeys(row[name] for row in rows))


_SETTINGS, _CELLS = "study.json", "cells"
_EVERY = 4
"""Steps between two changes of masks: recoveries are short."""


@dataclass(frozen=True)
class StudyResult:
    """A finished study.

    Attributes:
        rows: One mapping per cell, see the columns of ``results.parquet``.
        table: ``results.parquet``.
        page: ``study.html``.
        content: What the page shows.
    """

    rows: tuple[Mapping[str, Any], ...]
    table: Path
    page: Path
    content: Page


def run_study(
    study: Study,
    data: ImageData,
    *,
    out: Path,
    device: torch.device | None = None,
    tell: Callable[[str], None] = silent,
    command: str = "",
) -> StudyResult:
    """Prune and distill in all ways, and write the table and the page.

    Every network and every cell is a file of its own in ``out``. An interrupted study, killed at any moment, goes on
    when it is started again with the same settings, in the middle of a training too; one process at a time.

    Args:
        study: What is compared.
        data: The images.
        out: Folder of the study; made if it is not there.
        device: Where to compute; None means the accelerator if there is one.
        tell: Receives one sentence per network and cell.
        command: The exact command or call, for the record.

    Raises:
        ArtifactError: If the folder belongs to another study, or cannot be written.
        SecateurError: If a network cannot be traced, cut or trained.
    """
    fabric = open_fabric(study.teaching.precision, device=device)
    settings = _settings(study, data, precision_of(fabric).name)
    with disk_errors(out), ExitStack() as stack:
        _meet(out, settings)
        stack.enter_context(locked(out))
        bench = Bench(study, data, out, fabric=fabric, tell=tell)
        cells = list(study.cells())
        rows: list[Mapping[str, Any]] = []
        for number, cell in enumerate(cells, 1):
            path = out / _CELLS / f"{cell.name}.json"
            if not path.is_file():
                row = _measured(bench, study, cell)
                with atomic_file(path) as part:
                    part.write_text(json.dumps(row, indent=1))
                shutil.rmtree(bench.unfinished(cell.name), ignore_errors=True)
                tell(f"Cell {number} of {len(cells)}, {cell.name}: {100 * row['accuracy']:.2f} %.")
            rows.append(cast("Mapping[str, Any]", json.loads(path.read_text())))
        table = write_parquet(out / "results.parquet", rows)
        facts = tuple((name.replace("_", " "), text) for name, text in settings.items())
        provenance = Provenance.here(command, study.seeds[0])
        content = page_of(rows, facts, provenance)
        page = write_page(out / "study.html", content)
        shutil.rmtree(out / UNFINISHED, ignore_errors=True)
    return StudyResult(tuple(rows), table, page, content)


def _settings(study: Study, data: ImageData, precision: str) -> dict[str, str]:
    return {
        **{name: repr(getattr(study, name)) for name in asdict(study)},
        "data": f"{data.name}: {len(data.train)} training and {len(data.test)} test images of {data.size}",
        "normalization": f"{data.mean}, {data.std}",
        "precision": precision,
    }


def _meet(out: Path, settings: dict[str, str]) -> None:
    path = out / _SETTINGS
    if not path.exists():
        if out.exists() and (not out.is_dir() or any(not _ours(inside) for inside in out.iterdir())):
            raise ArtifactError(f"`out` must be a new folder, or that of a study; got {out}. Choose another path.")
        with atomic_file(path) as part:
            part.write_text(json.dumps(settings, indent=1))
        return
    try:
        then = cast("dict[str, str]", dict(json.loads(path.read_text())))
    except (ValueError, TypeError) as error:
        raise ArtifactError(f"{path} is damaged ({error}). Begin again in another folder.") from error
    different = [
        f"{name} was {then.get(name)}, now {settings.get(name)}"
        for name in sorted(then.keys() | settings.keys())
        if then.get(name) != settings.get(name)
    ]
    if different:
        raise ArtifactError(
            f"`out` must be continued with the settings that the study was begun with; {'; '.join(different)} ({out}). "
            "Use the old settings, or another folder."
        )


def _ours(path: Path) -> bool:
    """Whether a file is what is left of a study that was killed before anything else."""
    return path.name.startswith(f".{Path(_SETTINGS).stem}.") and path.name.endswith(f".part{Path(_SETTINGS).suffix}")


def _measured(bench: Bench, study: Study, cell: Cell) -> dict[str, Any]:
    began = time.process_time()
    teacher, student = bench.teacher(cell.family), bench.student(cell.family, cell.before, cell.seed)
    schedule = replace(study.recovery, seed=cell.seed)
    sparsify, begin = None, student.model
    if cell.pruned is Pruned.WEIGHTS:
        sparsify = Sparsify(cell.kept, WeightPruning(schedule=Cubic, every=_EVERY))
    else:
        begin = _cut(student.model, bench, cell.kept)
    trained = bench.taught(
        begin,
        cell.family,
        cell.after,
        schedule=schedule,
        images=bench.recovery_images,
        checkpoint=bench.unfinished(cell.name),
        sparsify=sparsify,
    )
    model = trained if sparsify is None else with_zeros(trained)
    accuracy, example = bench.accuracy(model), bench.example[:1]
    macs, nonzero = counted_macs(model, example), nonzero_params(model)
    teacher_macs, teacher_params = counted_macs(teacher.model, example), counted_params(teacher.model)
    efficiency = [
        performance_efficiency(accuracy=accuracy, original_accuracy=teacher.accuracy, size=size, original_size=original)
        for size, original in ((nonzero, teacher_params), (macs, teacher_macs))
    ]
    return {
        "family": cell.family.name,
        "pruned": cell.pruned.value,
        "kept": cell.kept,
        "taught": cell.taught.value,
        "order": cell.order.value,
        "seed": cell.seed,
        "accuracy": accuracy,
        "student_accuracy": student.accuracy,
        "teacher_accuracy": teacher.accuracy,
        "macs": macs,
        "params": counted_params(model),
        "nonzero": nonzero,
        "size_bytes": weights_bytes(model),
        "teacher_macs": teacher_macs,
        "teacher_params": teacher_params,
        "efficiency_params": efficiency[0],
        "efficiency_macs": efficiency[1],
        "cpu_s": time.process_time() - began,
    }


def _cut(student: nn.Module, bench: Bench, kept: float) -> nn.Module:
    """The same part of every layer, the channels of least magnitude gone; not repaired, as masks are not."""
    graph = trace(student, bench.example)
    budget = Budget(macs=f"{100 * kept:g}%")
    found = search_architecture(student, graph, Uniform(importance=L1()), budget=budget)
    return cut(student, graph, found.architecture).model
