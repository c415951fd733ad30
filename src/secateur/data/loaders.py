"""Data of your own: a Dataset, a DataLoader or a list of batches, as the splits that training and searches read.

Everything that is random in a pass follows from (seed, epoch), so that a resumed run reads the batches that an
uninterrupted one reads. Items of a map-style dataset are seeded one by one: what augmentation draws for an item depends
neither on the workers nor on the items before it, and batches that were read before an interruption are not read again.
"""

import random
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler, Subset

from secateur._batches import batch_length, move, split_batch
from secateur.data.preprocessing import Preprocessing
from secateur.errors import DataError

USUAL_BATCH = 32
"""Items of a batch of a Dataset, for which nobody has said a number."""


@dataclass(frozen=True, eq=False)
class ItemSplit:
    """Items of a map-style dataset in random access, with the workers and the collate function of a user's loader.

    Attributes:
        items: The dataset.
        batch_size: The batch size of the user's loader; None if there is none.
        collate: Makes a batch of a list of items; None takes torch's.
        workers: Processes that read items.
        pinned: Whether batches lie in pinned memory.
        split: Returns inputs and targets of a batch.
    """

    items: Dataset[Any]
    batch_size: int | None = None
    collate: Callable[[list[Any]], Any] | None = None
    workers: int = 0
    pinned: bool = False
    split: Callable[[Any], tuple[Any, Any]] = split_batch

    def __len__(self) -> int:
        return len(cast(Sized, self.items))

    def subset(self, index: Sequence[int]) -> "ItemSplit":
        """Return the items at some positions, in that order."""
        return ItemSplit(
            Subset(self.items, list(index)), self.batch_size, self.collate, self.workers, self.pinned, self.split
        )

    def batches(
        self,
        batch_size: int,
        *,
        device: torch.device | str = "cpu",
        seed: int | None = None,
        epoch: int = 0,
        augment: Any = None,
        drop_last: bool = False,
        start: int = 0,
    ) -> Iterator[tuple[Any, Any]]:
        """Yield inputs and targets, as `secateur.data.Split.batches` does; ``augment`` must be None.

        Raises:
            DataError: If the items cannot be made a batch.
        """
        _check_augment(augment)
        order = np.arange(len(self)) if seed is None else np.random.default_rng((seed, epoch)).permutation(len(self))
        groups = [order[at : at + batch_size].tolist() for at in range(0, len(order), batch_size)]
        if drop_last and groups and len(groups[-1]) < batch_size:
            groups.pop()
        settings: dict[str, Any] = {} if self.collate is None else {"collate_fn": self.collate}
        loader: DataLoader[Any] = DataLoader(
            _SeededItems(self.items, 0 if seed is None else seed, epoch),
            batch_sampler=groups[start:],  # pyright: ignore[reportArgumentType] - any iterable of lists
            num_workers=self.workers,
            pin_memory=self.pinned,
            # A generator of its own, because a loader draws from the global one when it starts.
            generator=torch.Generator().manual_seed(0 if seed is None else seed),
            **settings,
        )
        for batch in _readable(loader):
            yield move(self.split(batch), torch.device(device))


class _SeededItems(Dataset[Any]):
    """Items whose random numbers follow from (seed, epoch, position); the process' own states stay as they are."""

    def __init__(self, items: Dataset[Any], seed: int, epoch: int) -> None:
        self._items, self._seed, self._epoch = items, seed, epoch

    def __len__(self) -> int:
        return len(cast(Sized, self._items))

    def __getitem__(self, index: int) -> Any:
        words = np.random.SeedSequence((self._seed, self._epoch, index)).generate_state(2)
        with OwnRandomStates(int(words[0])).active():
            return self._items[index]


class OwnRandomStates:
    """States of the generators of torch (CPU), numpy and Python that belong to somebody else than the caller.

    Inside of `active` the global generators have these states, and go on from where they were left.

    Args:
        seed: From 0 to 2^32 - 1.
    """

    def __init__(self, seed: int) -> None:
        self._seed: int | None = seed
        self._states: Any = None

    @contextmanager
    def active(self) -> Generator[None]:
        """Use these states, and restore the caller's at the end."""
        # numpy's and Python's global generators are what users' datasets draw from.
        callers = torch.get_rng_state(), np.random.get_state(), random.getstate()
        if self._seed is not None:
            torch.default_generator.manual_seed(self._seed)
            np.random.seed(self._seed)
            random.seed(self._seed)
            self._seed = None
        else:
            _set_states(self._states)
        try:
            yield
        finally:
            self._states = torch.get_rng_state(), np.random.get_state(), random.getstate()
            _set_states(callers)


def _set_states(states: Any) -> None:
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])


@dataclass(frozen=True, eq=False)
class BatchSplit:
    """Batches in the order in which an iterable gives them: a loader with a sampler of its own, or a list of batches.

    Before every pass the global generators, and a generator of the loader, are seeded from (seed, epoch), and
    ``set_epoch`` of its sampler is called, so that a loader that depends on nothing else gives the same pass again.

    Attributes:
        source: Can be iterated again and again; has a length.
        batch_size: Items of its first batch.
        split: Returns inputs and targets of a batch.
    """

    source: Any
    batch_size: int
    split: Callable[[Any], tuple[Any, Any]] = split_batch

    def __len__(self) -> int:
        return len(self.source) * self.batch_size

    def batches(
        self,
        batch_size: int,
        *,
        device: torch.device | str = "cpu",
        seed: int | None = None,
        epoch: int = 0,
        augment: Any = None,
        drop_last: bool = False,
        start: int = 0,
    ) -> Iterator[tuple[Any, Any]]:
        """Yield inputs and targets in batches of the source's own size, whatever ``batch_size`` says.

        The first ``start`` batches are read and left out. A last batch that is smaller is kept unless ``drop_last``.

        Raises:
            DataError: If the source gives fewer batches than its length promises.
        """
        del batch_size
        _check_augment(augment)
        words = np.random.SeedSequence((0 if seed is None else seed, epoch)).generate_state(2)
        sampler = getattr(self.source, "sampler", None)
        if hasattr(sampler, "set_epoch"):
            cast(Any, sampler).set_epoch(epoch)
        if isinstance(generator := getattr(self.source, "generator", None), torch.Generator):
            generator.manual_seed(int(words[1]))
        states = OwnRandomStates(int(words[0]))
        with states.active():
            batches = _readable(self.source)
        expected, count = len(self.source), 0
        while count < expected:
            with states.active():
                batch = next(batches, _END)
            if batch is _END:
                raise DataError(
                    f"`data` must give as many batches as its length says; got {count} of {expected}. Correct its "
                    "__len__, or pass a Dataset."
                )
            count += 1
            pair = self.split(batch)
            if count <= start or (drop_last and count > 1 and batch_length(pair[0]) < self.batch_size):
                continue
            yield move(pair, torch.device(device))


_END = object()


@dataclass(frozen=True, eq=False)
class OwnData:
    """A user's own splits, with the properties that a run reads of any data.

    Attributes:
        train: What a student learns from.
        validation: What epochs and settings are chosen on.
        test: What is reported, and nothing is chosen on.
        size: The shape of the first input without the batch dimension.
        name: Name of the data in reports.
        notes: Sentences that the reader of a report must know.
        classes: Class names; empty where nothing knows them.
        mean: Of pixels / 255, per channel; empty where inputs come normalized.
        std: The same.
        augment: None: a user's dataset does its own.
        skipped: Names of images that were left out.
        preprocessing: How an image file becomes an input; None for data that are no files.
        outputs: Numbers that a model gives, as ``num_classes`` counts them; None where the data do not say.
    """

    train: ItemSplit | BatchSplit
    validation: ItemSplit | BatchSplit
    test: ItemSplit | BatchSplit
    size: tuple[int, ...]
    name: str = "own data"
    notes: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    augment: None = None
    skipped: tuple[str, ...] = ()
    preprocessing: Preprocessing | None = None
    outputs: int | None = None


EVALUATION_BATCH = 250
"""Images of a batch where a classifier is measured."""


def evaluation_batch(data: Any, trained_with: int) -> int:
    """Return how many items are measured at once: of one's own data as many as are trained with."""
    return trained_with if isinstance(data, OwnData) else EVALUATION_BATCH


def run_data(data: Any, seed: int) -> Any:
    """Return data that a run can use: those of `secateur.load_data` as they are, anything else by `own_data`."""
    return data if isinstance(data, OwnData) or hasattr(data, "train") else own_data(data, seed=seed)


HELD_OUT = 0.1
"""The fraction of the training items that is held out where no validation split is given."""


def own_data(
    source: Any,
    *,
    split: Callable[[Any], tuple[Any, Any]] = split_batch,
    seed: int = 0,
    name: str = "own data",
) -> OwnData:
    """Make splits of a user's data.

    Args:
        source: A map-style Dataset, a DataLoader, or a list of batches; or (train, validation) or (train, validation,
            test) of these. Without a validation split a tenth of the training items is held out, and without a test
            split the report shows the validation split, and says so.
        split: Returns inputs and targets of a batch; see `split_batch` for the default.
        seed: Seed of the held-out items.
        name: Name of the data in reports.

    Raises:
        DataError: If something else is given, or a split is empty or has no length.
    """
    parts = tuple(source) if isinstance(source, tuple) and len(cast(tuple[Any, ...], source)) in (2, 3) else (source,)
    names = ("train", "validation", "test")
    splits = [own_split(part, split=split, name=which) for part, which in zip(parts, names, strict=False)]
    notes: list[str] = []
    if len(splits) == 1:
        kept, held = _hold_out(splits[0], seed)
        splits = [kept, held]
        notes.append(f"Every tenth training item on average was held out for validation ({len(held)} items).")
    if len(splits) == 2:
        splits.append(splits[1])
        notes.append(
            "No test split was given: the reported scores are those of the validation split, on which the best epoch "
            "was chosen, and are a little too good."
        )
    for each in splits[:1]:
        if not _same_twice(each):
            notes.append(
                "The data give other batches when they are read again with the same seed: a resumed run ends well, "
                "but not bit for bit as an uninterrupted one would."
            )
            warnings.warn(notes[-1], stacklevel=2)
    return OwnData(splits[0], splits[1], splits[2], _input_size(splits[0]), name, tuple(notes))


def own_split(
    source: Any, *, split: Callable[[Any], tuple[Any, Any]] = split_batch, name: str = "data"
) -> ItemSplit | BatchSplit:
    """Make one split of a Dataset, a DataLoader, or a list of batches.

    A loader of a map-style dataset in plain or shuffled order is read in random access: by items. Any other
    is read as it comes.

    Args:
        source: The data.
        split: Returns inputs and targets of a batch.
        name: What the source is called in messages.

    Raises:
        DataError: If it is something else, is empty, or has no length.
    """
    made: ItemSplit | BatchSplit
    if isinstance(source, ItemSplit | BatchSplit):
        made = source
    elif isinstance(source, DataLoader):
        made = _of_loader(cast("DataLoader[Any]", source), split, name)
    elif hasattr(source, "__getitem__") and hasattr(source, "__len__") and not _is_batches(source):
        made = ItemSplit(cast("Dataset[Any]", source), split=split)
    elif isinstance(source, Iterable) and hasattr(source, "__len__"):
        made = _of_batches(source, split, name)
    else:
        what = "an iterator, which can be read only once" if isinstance(source, Iterator) else type(source).__name__
        raise DataError(
            f"`{name}` must be a Dataset, a DataLoader or a list of batches, with a length; got {what}. Give it a "
            "__len__ that returns the number of its batches, or put the batches into a list."
        )
    if len(made) == 0:
        raise DataError(f"`{name}` must hold at least one item; got none.")
    return made


def _is_batches(source: Any) -> bool:
    """Whether a list or tuple holds batches: what it gives has a batch dimension already."""
    if not isinstance(source, list | tuple) or not source:
        return False
    inputs, _ = split_batch(source[0])
    return any(isinstance(leaf, Tensor) and leaf.ndim in (2, 4, 5) for leaf in tree_leaves(inputs))


def _of_loader(loader: "DataLoader[Any]", split: Any, name: str) -> ItemSplit | BatchSplit:
    plain = isinstance(loader.sampler, RandomSampler | SequentialSampler) and type(loader) is DataLoader
    if isinstance(loader.dataset, IterableDataset) or not plain or loader.batch_size is None:
        return _of_batches(loader, split, name)
    return ItemSplit(loader.dataset, loader.batch_size, loader.collate_fn, loader.num_workers, loader.pin_memory, split)


def _of_batches(source: Any, split: Any, name: str) -> BatchSplit:
    try:
        count = len(source)
    except TypeError as error:
        raise DataError(
            f"`{name}` must say its length; got {type(source).__name__} without one ({error}). Give its dataset a "
            "__len__, so that the length of an epoch is known."
        ) from error
    states = OwnRandomStates(0)
    with states.active():
        first = next(_readable(source), _END) if count else _END
    if first is _END:
        raise DataError(f"`{name}` must hold at least one batch; got none.")
    return BatchSplit(source, batch_length(split(first)[0]), split)


def _hold_out(split: ItemSplit | BatchSplit, seed: int) -> tuple[ItemSplit | BatchSplit, ItemSplit | BatchSplit]:
    count = len(split) if isinstance(split, ItemSplit) else len(split.source)
    held = max(1, round(HELD_OUT * count))
    if held >= count:
        raise DataError(
            f"`data` must hold enough to validate on; got {count} item(s). Pass (train, validation) instead."
        )
    order = np.random.default_rng(seed).permutation(count)
    if isinstance(split, ItemSplit):
        return split.subset(sorted(order[held:].tolist())), split.subset(sorted(order[:held].tolist()))
    if not isinstance(split.source, list | tuple):
        raise DataError(
            "`data` must have a validation split of its own, because single items of this loader cannot be held out; "
            "got one loader. Pass (train, validation)."
        )
    chosen = set(order[:held].tolist())
    batches = cast(Sequence[Any], split.source)
    kept = [batch for place, batch in enumerate(batches) if place not in chosen]
    return (
        BatchSplit(kept, split.batch_size, split.split),
        BatchSplit([batches[place] for place in sorted(chosen)], split.batch_size, split.split),
    )


def _same_twice(split: ItemSplit | BatchSplit) -> bool:
    """Whether the first batch is the same when it is read again with the same seed."""
    size = min(split.batch_size or USUAL_BATCH, 4 if isinstance(split, ItemSplit) else len(split))
    pairs = [next(iter(split.batches(size, seed=0, epoch=0))) for _ in range(2)]
    first, second = (tree_leaves(pair) for pair in pairs)
    return len(first) == len(second) and all(_equal(one, two) for one, two in zip(first, second, strict=True))


def _equal(one: Any, two: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        return one.shape == two.shape and bool(torch.equal(one, two) or torch.allclose(one, two, 0, 0, equal_nan=True))
    return bool(one == two)


def _input_size(split: ItemSplit | BatchSplit) -> tuple[int, ...]:
    size = min(split.batch_size or USUAL_BATCH, 2) if isinstance(split, ItemSplit) else split.batch_size
    inputs, _ = next(iter(split.batches(size)))
    tensor = next((leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)), None)
    if tensor is None:
        raise DataError(
            f"`data` must give tensors as inputs; got {type(inputs).__name__}. Let the Dataset convert its images, "
            "such as by torchvision.transforms.v2.ToImage and ToDtype."
        )
    # A list holds single items; everything else has a batch dimension.
    return tuple(tensor.shape) if isinstance(inputs, list) else tuple(tensor.shape[1:])


def _readable(source: Any) -> Iterator[Any]:
    """Iterate, with a message that names the data where reading them fails."""
    try:
        yield from source
    except (TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"`data` could not be read as batches: {reason}. Let the Dataset return tensors of one shape, or pass a "
            "DataLoader with a `collate_fn`."
        ) from error


def _check_augment(augment: Any) -> None:
    if augment is not None:
        raise DataError(
            f"`augment` must be None for data of your own; got {augment!r}. Let the Dataset vary its items."
        )
