"""Reading and writing JSON: what it cannot hold becomes null instead of ending a run."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur._json import finite
from secateur.architecture import Architecture
from secateur.cost import Budget, Cost
from secateur.report import Measured, RunReport
from secateur.search import Proposal, SearchResult
from secateur.tasks import Score
from secateur.tasks.classification import TOP1

LEAVES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text())
DATA = st.dictionaries(
    st.text(), st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20)
)


@given(DATA)
def test_any_plain_data_can_be_written_and_finite_numbers_stay(data: dict[str, object]) -> None:
    found = finite(data)
    read = json.loads(json.dumps(found, allow_nan=False))
    assert read == found
    assert finite(found) == found


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float32("nan"), np.float64("-inf")])
def test_what_is_not_finite_becomes_null_at_any_depth(value: float) -> None:
    assert finite({"a": value, "b": [1.5, {"c": (value, 2)}]}) == {"a": None, "b": [1.5, {"c": (None, 2)}]}


def test_numbers_of_numpy_and_torch_become_those_of_python() -> None:
    data = {"i": np.int64(3), "a": np.array([1.0, np.inf]), "t": torch.tensor([2.0, math.nan]), "o": Architecture}
    found = finite(data)
    assert found == {"i": 3, "a": [1.0, None], "t": [2.0, None], "o": str(Architecture)}
    assert type(found["i"]) is int


@pytest.mark.parametrize("value", [-math.inf, math.nan])
def test_notes_of_searches_are_checked_when_they_are_made(value: float) -> None:
    """A knapsack whose budget has room for every channel has the threshold -inf, which ended the run after all work."""
    notes = {"threshold": value, "distance": {"0": value, "1": 0.5}}
    cost = Cost(1, 1, 1)
    kept = SearchResult(Architecture(), cost, cost, Budget.parse("macs=50%"), "mine", dict(notes))
    for found in (Proposal(Architecture(), notes), kept):
        assert found.notes == {"threshold": None, "distance": {"0": None, "1": 0.5}}
    assert SearchResult.from_json(json.loads(json.dumps(kept.to_json(), allow_nan=False))) == kept


def test_efficiency_of_an_original_that_is_never_right_is_left_out() -> None:
    never, once = Score(0.0, None, 10, TOP1), Score(0.1, None, 10, TOP1)
    report = RunReport("net", Measured(10, 10, score=never), Measured(5, 5, score=once))
    assert report.efficiency is None
