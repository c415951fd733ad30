"""Data of one's own are read in batches that depend on seed, epoch and position alone."""

import random
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, WeightedRandomSampler

from secateur._batches import batch_length, call_model, move, split_batch, take
from secateur.data.loaders import BatchSplit, ItemSplit, own_data, own_split
from secateur.errors import DataError


class Noisy(Dataset):
    """Draws from all three global generators, as augmentations do."""

    def __init__(self, n: int = 20) -> None:
        self.n, self.read = n, []

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.read.append(index)
        drawn = torch.rand(1) + float(np.random.rand()) + random.random()
        return torch.full((3, 4, 4), float(index)) + drawn, index % 5


def passes(split, **settings) -> list[tuple[Tensor, Tensor]]:
    return list(split.batches(4, **settings))


def equal(one, other) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True)
    )


def list_of_batches() -> list[tuple[Tensor, Tensor]]:
    return [(torch.full((4, 3, 4, 4), float(i)), torch.arange(4)) for i in range(5)]


SOURCES = {
    "dataset": Noisy,
    "shuffled loader": lambda: DataLoader(Noisy(), batch_size=4, shuffle=True),
    "two workers": lambda: DataLoader(Noisy(), batch_size=4, shuffle=True, num_workers=2),
    "sampler": lambda: DataLoader(Noisy(), batch_size=4, sampler=WeightedRandomSampler([1.0] * 20, 20)),
    "generator": lambda: DataLoader(
        Noisy(), batch_size=4, sampler=WeightedRandomSampler([1.0] * 20, 20), generator=torch.Generator()
    ),
    "list": list_of_batches,
}


@pytest.mark.parametrize("kind", SOURCES)
def test_a_pass_follows_from_seed_and_epoch_and_can_begin_in_its_middle(kind: str) -> None:
    split = own_split(SOURCES[kind]())
    whole = passes(split, seed=3, epoch=2)
    torch.manual_seed(99)
    random.seed(99)
    assert equal(whole, passes(split, seed=3, epoch=2))
    assert equal(whole[3:], passes(split, seed=3, epoch=2, start=3))
    if kind != "list":
        assert not equal(whole, passes(split, seed=3, epoch=1))
        assert not equal(whole, passes(split, seed=4, epoch=2))


@pytest.mark.parametrize("kind", SOURCES)
def test_the_callers_random_states_stay(kind: str) -> None:
    split = own_split(SOURCES[kind]())
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    for _ in split.batches(4, seed=0):
        assert torch.equal(torch.get_rng_state(), states[0])
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert random.getstate() == states[2]


def test_workers_change_nothing() -> None:
    alone, helped = (
        passes(own_split(DataLoader(Noisy(), batch_size=4, shuffle=True, num_workers=workers)), seed=1)
        for workers in (0, 2)
    )
    assert equal(alone, helped)


def test_batches_left_out_are_not_read() -> None:
    items = Noisy()
    list(own_split(items).batches(4, seed=0, start=4))
    assert len(items.read) == 4


def test_without_a_seed_the_order_is_the_stored_one() -> None:
    labels = torch.cat([labels for _, labels in passes(own_split(Noisy()))])
    assert labels.tolist() == [i % 5 for i in range(20)]


def test_a_last_smaller_batch_can_be_left_out() -> None:
    split = own_split(Noisy(10))
    assert [len(labels) for _, labels in passes(split)] == [4, 4, 2]
    assert [len(labels) for _, labels in passes(split, drop_last=True)] == [4, 4]


def test_loaders_keep_their_batch_size_collate_and_workers() -> None:
    def collate(items: list[tuple[Tensor, int]]) -> dict[str, Tensor]:
        return {"pixel_values": torch.stack([x for x, _ in items]), "labels": torch.tensor([y for _, y in items])}

    split = own_split(DataLoader(Noisy(), batch_size=5, collate_fn=collate, num_workers=1))
    assert isinstance(split, ItemSplit)
    assert (split.batch_size, split.workers) == (5, 1)
    inputs, labels = next(split.batches(5))
    assert list(inputs) == ["pixel_values"]
    assert labels.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_missing_splits_are_made_or_named(parts: int) -> None:
    source = Noisy(30) if parts == 1 else tuple(Noisy(30 + part) for part in range(parts))
    data = own_data(source)
    lengths = len(data.train), len(data.validation), len(data.test)
    assert lengths == {1: (27, 3, 3), 2: (30, 31, 31), 3: (30, 31, 32)}[parts]
    assert data.size == (3, 4, 4)
    assert any("held out" in note for note in data.notes) == (parts == 1)
    assert any("No test split" in note for note in data.notes) == (parts < 3)


def test_held_out_items_are_not_trained_on() -> None:
    data = own_data(TensorDataset(torch.arange(40).float()[:, None], torch.arange(40)))
    seen = [torch.cat([labels for _, labels in passes(split)]).tolist() for split in (data.train, data.validation)]
    assert sorted(seen[0] + seen[1]) == list(range(40))


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(torch.zeros(3, 4, 4), 0)] * 8)


class SizedStream(Stream):
    def __len__(self) -> int:
        return 8


class Counter(IterableDataset):
    """Gives something else every time, as a stream from a network does."""

    def __init__(self) -> None:
        self.count = 0

    def __len__(self) -> int:
        return 8

    def __iter__(self):
        for _ in range(8):
            self.count += 1
            yield torch.full((3, 4, 4), float(self.count)), 0


def test_streams_with_a_length_are_read_as_they_come() -> None:
    split = own_split(DataLoader(SizedStream(), batch_size=4))
    assert isinstance(split, BatchSplit)
    assert len(split) == 8
    assert len(passes(split)) == 2


def test_data_that_cannot_be_read_again_are_named_before_the_run() -> None:
    loader = DataLoader(Counter(), batch_size=4)
    with pytest.warns(UserWarning, match="not bit for bit"):
        data = own_data((loader, list_of_batches()))
    assert any("not bit for bit" in note for note in data.notes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        own_data((Noisy(), list_of_batches()))


class Short:
    """Promises more batches than it has."""

    def __len__(self) -> int:
        return 9

    def __iter__(self):
        return iter(list_of_batches())


@pytest.mark.parametrize(
    ("source", "match"),
    [
        (iter(list_of_batches()), "an iterator, which can be read only once"),
        (DataLoader(Stream(), batch_size=4), "must say its length; got DataLoader"),
        (7, "a Dataset, a DataLoader or a list of batches, with a length; got int"),
        ([], "at least one"),
        (Noisy(1), "enough to validate on; got 1 item"),
        (DataLoader(SizedStream(), batch_size=4), r"Pass \(train, validation\)"),
    ],
)
def test_what_cannot_be_read_is_refused(source: object, match: str) -> None:
    with pytest.raises(DataError, match=match):
        own_data(source)


def test_a_source_that_ends_early_is_named() -> None:
    with pytest.raises(DataError, match="got 5 of 9"):
        list(own_split(Short()).batches(4))


def test_items_that_do_not_fit_into_one_tensor_are_explained() -> None:
    items = [(torch.zeros(3, 4, 4 + i), 0) for i in range(4)]
    with pytest.raises(DataError, match=r"could not be read as batches.*collate_fn"):
        own_data((items, items))


def test_inputs_that_are_no_tensors_are_explained() -> None:
    with pytest.raises(DataError, match=r"must give tensors as inputs; got (list|tuple)"):
        own_data(DataLoader([("text", 1)] * 20, batch_size=2))


def test_batches_of_any_kind() -> None:
    image, label = torch.zeros(4, 3), torch.arange(4)
    assert split_batch((image, label)) == (image, label)
    assert split_batch([image]) == (image, None)
    assert split_batch(image)[1] is None
    inputs, targets = split_batch({"pixels": image, "mask": label, "label": label})
    assert list(inputs) == ["pixels", "mask"]
    assert targets is label
    assert call_model(torch.nn.Identity(), (image,)) is image
    assert call_model(lambda pixels: pixels, {"pixels": image}) is image
    assert [batch_length(tree) for tree in (image, [image[0]] * 3, {"a": (image,)})] == [4, 3, 4]
    part = take({"a": image, "b": [1, 2, 3, 4], "c": (label, "word")}, slice(1, 3))
    assert part["a"].shape == (2, 3)
    assert part["b"] == [2, 3]
    assert part["c"][0].tolist() == [1, 2]
    assert isinstance(move([np.zeros(3)], torch.device("cpu"))[0], Tensor)
    with pytest.raises(DataError, match="must hold tensors with a batch dimension; got str"):
        batch_length("text")
