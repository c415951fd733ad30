"""Teacher's logits on disk, so that a big teacher sees every augmented image once, whoever learns from it."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from secateur.errors import TrainingError
from secateur.train._files import write_whole

_SETTINGS = "teacher.json"


class RememberedLogits:
    """The logits of one teacher for the batches of training runs with one seed, a file for each epoch.

    Augmentation is a function of seed and epoch, so a second run sees the same images. A digest of every batch is kept
    beside its logits: what is given back was computed from exactly these images, or there is an error.

    Args:
        folder: Where; made if it is not there. Runs with several seeds may share it.
        seed: Of order and augmentation of the images.
        settings: What the logits depend on beside the images: the teacher and its number formats.

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
        """Open an epoch, from 0: find what is there of it.

        Raises:
            TrainingError: If its file is damaged.
        """
        self._epoch = epoch
        self._stored, self._made, self._digests = None, [], []
        if self._path.is_file():
            self._stored, self._digests = self._read()

    def find(self, step: int, images: Tensor) -> Tensor | None:
        """The logits for a batch of the epoch, or None if they were never kept.

        Raises:
            TrainingError: If what is kept for the step belongs to other images.
        """
        if self._stored is None:
            return None
        if step >= len(self._stored) or self._digests[step] != _digest(images):
            raise TrainingError(
                f"`remember` must hold logits for these images; those of step {step + 1} in {self._path} belong to "
                "others (other data, augmentation, seed or batch size). Name another folder, or delete this one."
            )
        return self._stored[step].to(images.device)

    def keep(self, images: Tensor, logits: Tensor) -> None:
        """Take note of a batch of the epoch."""
        self._digests.append(_digest(images))
        self._made.append(logits.detach().cpu().contiguous())

    def end(self) -> None:
        """Close the epoch: write what was noted, in one step.

        Raises:
            TrainingError: If the file cannot be written.
        """
        from safetensors.torch import save

        if noted := self.noted():
            _write(self._path, save(noted))

    def noted(self) -> dict[str, Tensor]:
        """What was kept so far of an epoch that no file holds yet; empty if there is nothing."""
        if self._stored is not None or not self._made:
            return {}
        return {
            "logits": torch.cat(self._made),
            "sizes": torch.tensor([len(logits) for logits in self._made]),
            "digests": torch.frombuffer(bytearray(b"".join(self._digests)), dtype=torch.uint8),
        }

    def take_up(self, noted: Mapping[str, Tensor]) -> None:
        """Inverse of `noted`, after `begin`; nothing where another run has finished the epoch meanwhile."""
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
        if then != settings:
            raise TrainingError(
                f"`remember` must be a folder for one teacher in one precision; got {self._folder}, which holds the "
                f"logits of {then}, now it is {settings}. Name another folder."
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
    """Logits and digests, batch by batch."""
    digests = bytes(tensors["digests"].tolist())
    parts = [digests[at : at + _DIGEST_BYTES] for at in range(0, len(digests), _DIGEST_BYTES)]
    return tensors["logits"].split(tensors["sizes"].tolist()), parts


def _digest(images: Tensor) -> bytes:
    flat = images.detach().cpu().permute(0, *range(2, images.ndim), 1).contiguous().reshape(-1)
    return hashlib.blake2b(flat.view(torch.uint8).numpy().tobytes(), digest_size=_DIGEST_BYTES).digest()


def _write(path: Path, content: bytes) -> None:
    try:
        write_whole(path, content)
    except OSError as error:
        raise TrainingError(
            f"`remember` must be a folder that can be written; got {path.parent} ({error}). Make room, or leave it out."
        ) from error
