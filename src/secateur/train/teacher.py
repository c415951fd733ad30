"""Run a teacher: compute or read its logits for every batch, and check that it has something to teach."""

import hashlib
import json
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur._files import write_atomic
from secateur._provenance import changed_settings
from secateur.errors import TrainingError
from secateur.tasks.classification import check_logits, count_correct

_SETTINGS = "teacher.json"


class TeacherCache:
    """The logits of one teacher for the batches of training runs with one seed, a file for each epoch.

    Augmentation is a function of seed and epoch, so another run sees the same images. A digest of every batch is stored
    with its logits: what is read was computed from exactly these images, or there is an error.

    Args:
        folder: The folder of the files, created if it is missing. Runs with several seeds may share it.
        seed: Seed of order and augmentation of the images.
        settings: What the logits depend on besides the images: the teacher and its number formats.

    Raises:
        TrainingError: If the folder holds the logits of another teacher, or cannot be written.
    """

    def __init__(self, folder: Path, seed: int, settings: Mapping[str, str]) -> None:
        self._folder, self._seed = folder, seed
        self._epoch = 0
        self._stored: tuple[Tensor, ...] | None = None
        self._digests: list[bytes] = []
        self._made: list[Tensor] = []
        self._meet(dict(settings))

    def begin(self, epoch: int) -> None:
        """Begin an epoch, from 0, and read its file if there is one.

        Raises:
            TrainingError: If its file is damaged.
        """
        self._epoch = epoch
        self._stored, self._made, self._digests = None, [], []
        if self._path.is_file():
            self._stored, self._digests = self._read()

    def find(self, step: int, images: Tensor) -> Tensor | None:
        """Return the stored logits for a batch of the epoch, or None if there are none.

        Raises:
            TrainingError: If what is kept for the step belongs to other images.
        """
        if self._stored is None:
            return None
        if step >= len(self._stored) or self._digests[step] != _digest(images):
            raise TrainingError(
                f"`teacher_cache` must hold logits for these images; those of step {step + 1} in {self._path} belong "
                "to others (other data, augmentation, seed or batch size). Name another folder, or delete this one."
            )
        return self._stored[step].to(images.device)

    def keep(self, images: Tensor, logits: Tensor) -> None:
        """Keep the logits of a batch until the end of the epoch."""
        self._digests.append(_digest(images))
        self._made.append(logits.detach().cpu().contiguous())

    def end(self) -> None:
        """End the epoch: write its logits in one step.

        Raises:
            TrainingError: If the file cannot be written.
        """
        from safetensors.torch import save

        if noted := self.noted():
            _write(self._path, save(noted))

    def noted(self) -> dict[str, Tensor]:
        """Return the logits so far of an epoch that has no file yet, for a checkpoint; empty if there are none."""
        if self._stored is not None or not self._made:
            return {}
        return {
            "logits": torch.cat(self._made),
            "sizes": torch.tensor([len(logits) for logits in self._made]),
            # A bytearray, because torch warns of memory that it cannot write to.
            "digests": torch.frombuffer(bytearray(b"".join(self._digests)), dtype=torch.uint8),
        }

    def take_up(self, noted: Mapping[str, Tensor]) -> None:
        """Inverse of `noted`, after `begin`; does nothing if another run has written the file meanwhile."""
        if self._stored is None and "logits" in noted:
            made, self._digests = _parted(noted)
            self._made = list(made)

    @property
    def _path(self) -> Path:
        return self._folder / f"seed-{self._seed}-epoch-{self._epoch:06d}.safetensors"

    def _meet(self, settings: dict[str, str]) -> None:
        path = self._folder / _SETTINGS
        if not path.is_file():
            _write(path, json.dumps(settings, indent=1).encode())
            return
        try:
            then = json.loads(path.read_text())
        except ValueError as error:
            raise TrainingError(f"{path} is damaged ({error}). Delete its folder; the teacher runs again.") from error
        if changes := changed_settings(then, settings):
            raise TrainingError(
                f"`teacher_cache` must be a folder for one teacher in one precision; got {self._folder}, which holds "
                f"the logits of another one ({changes}). Name another folder."
            )

    def _read(self) -> tuple[tuple[Tensor, ...], list[bytes]]:
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            return _parted(load(self._path.read_bytes()))
        except (OSError, SafetensorError, KeyError, RuntimeError) as error:
            raise TrainingError(f"{self._path} is damaged ({error}). Delete it; the teacher runs again.") from error


_DIGEST_BYTES = 16


def _parted(tensors: Mapping[str, Tensor]) -> tuple[tuple[Tensor, ...], list[bytes]]:
    """Return logits and digests, batch by batch."""
    digests = bytes(tensors["digests"].tolist())
    parts = [digests[at : at + _DIGEST_BYTES] for at in range(0, len(digests), _DIGEST_BYTES)]
    return tensors["logits"].split(tensors["sizes"].tolist()), parts


def _digest(images: Tensor) -> bytes:
    # Channels last, which is the memory order of the images: no copy is needed to read their bytes.
    flat = images.detach().cpu().permute(0, *range(2, images.ndim), 1).contiguous().reshape(-1)
    return hashlib.blake2b(flat.view(torch.uint8).numpy().tobytes(), digest_size=_DIGEST_BYTES).digest()


def _write(path: Path, content: bytes) -> None:
    try:
        write_atomic(path, content)
    except OSError as error:
        raise TrainingError(
            f"`teacher_cache` must be a folder that can be written; got {path.parent} ({error}). Free some space, or "
            "leave it out."
        ) from error


_DEVIATIONS = 2.0
"""Standard deviations above chance that the accuracy of a guessing teacher rarely reaches."""


class TeacherRunner:
    """Gives the logits of a teacher, from a cache where there is one, and checks that they are finite and useful.

    Args:
        teach: The teacher's forward.
        cache: Logits on disk; None computes all.
    """

    def __init__(self, teach: Callable[[Any], Any], cache: TeacherCache | None) -> None:
        self._teach, self._cache = teach, cache
        self._step = self._images = self._classes = 0
        self._sound: Tensor | None = None
        self._right: Tensor | None = None
        self._left: tuple[Mapping[str, int], Mapping[str, Tensor]] | None = None

    def begin(self, epoch: int) -> None:
        """Begin an epoch, from 0, or continue one after `resume_with`."""
        self._step = self._images = 0
        self._sound = self._right = None
        if self._cache is not None:
            self._cache.begin(epoch)
        if self._left is not None:
            self._go_on(*self._left)
            self._left = None

    def resume_with(self, numbers: Mapping[str, int], tensors: Mapping[str, Tensor]) -> None:
        """Let the next epoch continue where `numbers` and `tensors` were taken."""
        self._left = numbers, tensors

    def _go_on(self, numbers: Mapping[str, int], tensors: Mapping[str, Tensor]) -> None:
        self._step, self._images, self._classes = numbers["step"], numbers["images"], numbers["classes"]
        self._sound, self._right = tensors.get("sound"), tensors.get("right")
        if self._cache is not None:
            self._cache.take_up(tensors)

    def numbers(self) -> dict[str, int]:
        """Return how far the epoch has come, as a JSON object."""
        return {"step": self._step, "images": self._images, "classes": self._classes}

    def tensors(self) -> dict[str, Tensor]:
        """Return what was found so far in the epoch, and its logits for the cache."""
        found = {} if self._cache is None else self._cache.noted()
        counted = {"sound": self._sound, "right": self._right}
        return found | {name: tensor for name, tensor in counted.items() if tensor is not None}

    def logits(self, images: Any, labels: Any) -> Any:
        """Return the teacher's outputs for the next batch of the epoch, without gradients."""
        found = None if self._cache is None else self._cache.find(self._step, images)
        if found is None:
            with torch.no_grad():  # Not inference mode, whose tensors a loss could not save for backward.
                found = self._teach(images)
            if self._cache is not None:
                check_logits(found, len(images), "teacher")
                self._cache.keep(images, found)
        self._step += 1
        # Anything else is for other tasks and losses of the user's own, and refused for all others.
        if isinstance(found, Tensor) and found.ndim == 2 and isinstance(labels, Tensor):
            self._note(found, labels)
        return found

    def _note(self, found: Tensor, labels: Tensor) -> None:
        # On the device, without waiting for it.
        sound, right = found.isfinite().all(), count_correct(found, labels)
        # After a resume, the earlier values lie on the CPU.
        self._sound = sound if self._sound is None else self._sound.to(sound.device) & sound
        if right is not None:  # Labels of another kind are for losses of the user's own.
            self._right = right if self._right is None else self._right.to(right.device) + right
        self._images += len(labels)
        self._classes = found.shape[1]

    def check(self) -> None:
        """Refuse a teacher whose logits were not finite in this epoch; waits for the device.

        Raises:
            TrainingError: If so.
        """
        if self._sound is not None and not bool(self._sound):
            raise TrainingError(
                "`teacher` must give finite logits; got NaN or infinity for training images. Check its weights and "
                "the normalization of the images, and try Precision.FLOAT32."
            )

    def end(self) -> None:
        """End the epoch and write its logits to the cache.

        Raises:
            TrainingError: See `check`.
        """
        self.check()
        if self._cache is not None:
            self._cache.end()

    def warn_of_guessing(self) -> None:
        """Warn if the teacher was no better than chance in this epoch."""
        if self._right is None:
            return
        # Guesses are right in a binomial number of cases, with variance chance * (1 - chance) / images of their share.
        share, chance = int(self._right) / self._images, 1 / self._classes
        if share <= chance + _DEVIATIONS * math.sqrt(chance * (1 - chance) / self._images):
            warnings.warn(
                f"`teacher` is right on {100 * share:.1f} % of {self._images} training images, no better than chance "
                f"({100 * chance:.1f} %): check its weights, its classes and the normalization of the images",
                stacklevel=2,
            )
