"""Different numbers and rows as numpy finds them, and connected components as a search finds them."""

import subprocess
import sys

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from secateur._arrays import connected_components, run_starts, unique_rows, unique_values

SMALL = st.integers(-3, 5)


@given(st.lists(SMALL))
def test_distinct_is_what_numpy_finds(values: list[int]) -> None:
    vector = np.array(values, dtype=np.int64)
    assert unique_values(vector).tolist() == np.unique(vector).tolist()


@given(st.integers(1, 4).flatmap(lambda n: st.lists(st.lists(SMALL, min_size=n, max_size=n), min_size=1)))
def test_distinct_rows_are_what_numpy_finds(rows: list[list[int]]) -> None:
    matrix = np.array(rows, dtype=np.int64)
    assert unique_rows(matrix).tolist() == np.unique(matrix, axis=0).tolist()


@given(st.lists(SMALL))
def test_runs_start_where_the_number_before_differs(values: list[int]) -> None:
    want = [place for place, value in enumerate(values) if not place or values[place - 1] != value]
    assert run_starts(np.array(values, dtype=np.int64)).tolist() == want


@given(st.integers(1, 12).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.tuples(*[st.integers(0, n - 1)] * 2)))))
def test_components_are_what_a_search_finds(graph: tuple[int, list[tuple[int, int]]]) -> None:
    count, ties = graph
    smallest = list(range(count))
    for _ in range(count):
        for first, second in ties:
            smallest[first] = smallest[second] = min(smallest[first], smallest[second])
    found = connected_components(count, [(np.array([first]), np.array([second])) for first, second in ties])
    assert found.tolist() == smallest


def test_a_trace_does_not_import_masked_arrays() -> None:
    """`numpy.unique` would, when it is first called: longer than a small network takes to trace."""
    program = (
        "import sys, torch, secateur\n"
        "before = 'numpy.ma' in sys.modules\n"
        "net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 2, 3))\n"
        "secateur.trace(net, torch.rand(1, 3, 8, 8))\n"
        "print(before, 'numpy.ma' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    before, after = done.stdout.split()
    assert before == after
