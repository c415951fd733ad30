"""Architectures: equality, JSON, display, and invalid ones."""

import json

import pytest

from secateur.architecture import Architecture
from secateur.errors import SurgeryError


def test_it_is_the_same_however_it_is_put_together():
    made = Architecture.of({"b": [2, 0], "a": (1,)}, ["y", "x", "y"])
    assert made == Architecture((("a", (1,)), ("b", (0, 2))), ("x", "y"))
    assert hash(made) == hash(Architecture.of({"a": [1], "b": [0, 2]}, {"x", "y"}))
    assert made != Architecture.of({"a": [1], "b": [0, 2]})
    assert made.widths == {"a": 1, "b": 2}


@pytest.mark.parametrize("blocks", [[], ["layer1.0", "layer2.1"]])
def test_round_trip_through_json(blocks):
    made = Architecture.of({"stem": [0, 3], "removed_blocks": [1]}, blocks)
    assert Architecture.from_json(json.loads(json.dumps(made.to_json()))) == made


def test_the_form_before_there_were_blocks_is_read():
    assert Architecture.from_json({"stem": [0, 3], "kept": [1]}) == Architecture.of({"stem": [0, 3], "kept": [1]})
    assert Architecture.from_json({}) == Architecture()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"stem": "all"}, "kept channels of 'stem' must be a list of integers; got 'all'"),
        ({"stem": [True]}, "must be a list of integers"),
        ({"kept": {"stem": [0.5]}, "removed_blocks": []}, "kept channels of 'stem' must be"),
        ({"kept": {"stem": []}, "removed_blocks": []}, "must be non-empty, strictly increasing"),
        ({"kept": {}, "removed_blocks": "layer1"}, "`removed_blocks` must be a list of block names; got 'layer1'"),
        ({"kept": {}, "removed_blocks": [1]}, "must be a list of block names"),
        ({"kept": {}}, "must have the fields 'kept' and 'removed_blocks'; got .'kept'."),
        ({"kept": {}, "removed_blocks": [], "depth": 3}, "must have the fields"),
    ],
)
def test_damaged_json_is_refused(data, message):
    with pytest.raises(SurgeryError, match=message):
        Architecture.from_json(data)


@pytest.mark.parametrize("blocks", [("b", "a"), ("a", "a")])
def test_block_names_in_disorder_are_refused(blocks):
    with pytest.raises(SurgeryError, match="`removed_blocks` must name each block once, in sorted order"):
        Architecture((), blocks)


def test_its_text_is_short():
    made = Architecture.of({"stem": range(40), "head": [2, 5]}, ["layer1.0"])
    assert repr(made) == (
        "Architecture(2 axes, 1 blocks removed)\n"
        "  head: 2 channels, [2, 5]\n"
        "  stem: 40 channels, [0, 1, 2, ..., 39]\n"
        "  removed blocks: layer1.0"
    )
    large = Architecture.of({f"axis{n}": [0] for n in range(300)}, [f"block{n}" for n in range(300)])
    assert len(repr(large).splitlines()) <= 20
    assert "... and 284 more axes" in repr(large)
