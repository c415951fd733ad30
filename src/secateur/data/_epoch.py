"""One pass over a split: everything that is drawn for it, before its first batch."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from secateur.data._augment import ORDER_STREAM, Augment, Draws
from secateur.data._finish import Finish
from secateur.data._normalise import Normalisation
from secateur.data._policy import Policy, policy_of
from secateur.errors import DataError


class Known(Protocol):
    """What must be known of a split to draw for it; see `secateur.data.Split`."""

    @property
    def size(self) -> tuple[int, int, int]: ...
    @property
    def normalisation(self) -> Normalisation: ...
    @property
    def classes(self) -> int: ...
    def __len__(self) -> int: ...


@dataclass(frozen=True, eq=False)
class Epoch:
    """One pass over a split.

    Attributes:
        order: (m,) positions, on the CPU, of the batches that are left.
        batch_size: Images per batch; the last holds the rest.
        device: Where the batches are made.
        draws: How each image is varied; None varies nothing.
        policy: How its colours and shapes are; None varies none.
        finish: The last steps.
        start: Batches left out before these.
    """

    order: Tensor
    batch_size: int
    device: torch.device
    draws: Draws | None
    policy: Policy | None
    finish: Finish
    start: int = 0

    @property
    def batches(self) -> Iterator[tuple[int, Tensor]]:
        """The number of each batch that is left, from 0 for the first of the pass, and its positions."""
        # Of no positions torch would make one batch.
        return enumerate(self.order.split(self.batch_size) if len(self.order) else (), self.start)

    @classmethod
    def of(
        cls,
        split: Known,
        batch_size: int,
        *,
        device: torch.device | str,
        seed: int | None,
        epoch: int,
        augment: Augment | None,
        drop_last: bool,
        start: int = 0,
    ) -> "Epoch":
        """Check the settings of `Split.batches` and draw."""
        n, device = len(split), torch.device(device)
        if start < 0:
            raise DataError(f"`start` must be the number of batches to leave out, 0 or more; got {start}.")
        order = _order(n, batch_size, seed=seed, epoch=epoch, augment=augment, drop_last=drop_last)
        left = order[start * batch_size :]
        if augment is None or seed is None:
            return cls(left, batch_size, device, None, None, Finish(split.normalisation), start)
        policy = None
        if augment.auto_augment is not None:
            policy = policy_of(augment.auto_augment, split.size, split.normalisation.mean)
        finish = Finish.of_epoch(
            split.normalisation,
            augment,
            images=n,
            size=split.size,
            classes=split.classes,
            batches=-(-len(order) // batch_size),
            device=device,
            seed=seed,
            epoch=epoch,
        )
        draws = Draws.of_epoch(augment, n, seed=seed, epoch=epoch)
        return cls(left, batch_size, device, draws, policy, finish, start)


def _order(
    n: int, batch_size: int, *, seed: int | None, epoch: int, augment: Augment | None, drop_last: bool
) -> Tensor:
    """The positions of one pass in order, after checking the settings of `Split.batches`."""
    if batch_size < 1:
        raise DataError(f"`batch_size` must be positive; got {batch_size}.")
    if epoch < 0 or (seed is not None and seed < 0):
        raise DataError(f"`seed` and `epoch` must not be negative; got {seed} and {epoch}.")
    if augment is not None and seed is None:
        raise DataError("`seed` must be given when `augment` is: augmentation is drawn from it. Pass seed=0, say.")
    if drop_last and batch_size > n:
        raise DataError(
            f"`batch_size` must be at most the {n} images of the split when `drop_last` is set; got {batch_size}."
        )
    order = np.arange(n) if seed is None else np.random.default_rng((seed, epoch, ORDER_STREAM)).permutation(n)
    return torch.from_numpy(order[: n - n % batch_size] if drop_last else order)
