"""Networks that several cells of the study begin with: trained once, measured, and kept on disk."""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors.torch
import torch
from torch import Tensor, nn

from benchmarks.study.plan import Family, Study, Taught
from secateur._files import atomic_file
from secateur.data import ImageData, Split
from secateur.distill import (
    MeanOverTaps,
    Objective,
    Taps,
    Term,
    hint_loss,
    make_adaptors,
    paired_stages,
    select_features,
)
from secateur.graph import trace
from secateur.models import load_model
from secateur.prune import Sparsify
from secateur.train import RunSettings, Silent, TrainConfig, evaluate, fabric_precision, fit

if TYPE_CHECKING:
    from lightning_fabric import Fabric

TEMPERATURE = 4.0
UNFINISHED = "unfinished"
"""The folder inside a study for checkpoints."""


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
            return train(Objective(temperature=TEMPERATURE), teacher=teacher, teacher_cache=memory)
        taps = self._taps_of(family)
        adaptors = make_adaptors(model, teacher, taps, self._example[:1], seed=schedule.seed)
        hint = Term(
            "hint",
            MeanOverTaps(hint_loss, dict(adaptors.items())),
            inputs=select_features,
            weight=self._study.hint_weight,
            taps=taps,
        )
        return train(Objective(temperature=TEMPERATURE, terms=(hint,)), teacher=teacher)

    def accuracy(self, model: nn.Module) -> float:
        """On the test images of the study, a fraction."""
        precision, device = fabric_precision(self._fabric), self._fabric.device
        return evaluate(model, self._test, batch_size=500, precision=precision, device=device).value

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
        teacher_cache: Path | None = None,
    ) -> nn.Module:
        return fit(
            model,
            images,
            train=schedule,
            objective=objective,
            teacher=teacher,
            augment=self._data.augment,
            sparsify=sparsify,
            teacher_cache=teacher_cache,
            run=RunSettings(checkpoint, callbacks=Silent(), fabric=self._fabric),
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
