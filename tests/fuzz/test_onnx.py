"""ONNX files from strangers: none reads another file, stalls, or ends in anything but one message."""

import sys
from pathlib import Path

import pytest
from hostile_onnx import (
    SECONDS,
    SPOILS,
    attempts,
    bomb,
    default_of_a_function,
    elsewhere,
    gone,
    honest,
    large,
    other_field,
    spoiled,
)  # fmt: skip

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="foreign reads are seen by Linux's inotify")

QUICK = (elsewhere, default_of_a_function, bomb, other_field, gone)
"""Those that cannot ask for much time."""


def test_an_honest_file_is_the_same(tmp_path: Path) -> None:
    (row,) = attempts(tmp_path, iter([("honest", honest().SerializeToString())]))
    assert row["said"] == "same"


@pytest.mark.parametrize("seed", range(3))
def test_spoiled_files_read_nothing_and_stall_nothing(tmp_path: Path, seed: int) -> None:
    rows = list(attempts(tmp_path, (spoiled(number, seed, QUICK) for number in range(100))))
    assert not [row for row in rows if row["read"] or row["seconds"] > SECONDS]
    assert sum("other files" in row["said"] for row in rows) >= 12
    assert all(row["said"] not in ("same",) for row in rows if row["kind"] == "default_of_a_function")


def test_every_kind_is_tried() -> None:
    assert {spoiled(number, 0)[0] for number in range(len(SPOILS) + 1)} == {s.__name__ for s in SPOILS} | {"bytes"}
    assert large in SPOILS


@pytest.mark.slow
def test_many_spoiled_files(tmp_path: Path) -> None:
    rows = list(attempts(tmp_path, (spoiled(number, 7) for number in range(1000))))
    assert not [row for row in rows if row["read"] or row["seconds"] > SECONDS]
