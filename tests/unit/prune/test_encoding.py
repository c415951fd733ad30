"""The encoding of sparse arrays restores the same bits, and refuses damaged data."""

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from secateur.errors import SparsityError
from secateur.prune import decode_sparse, encode_sparse


def sparse(shape: tuple[int, ...], zeros: float, dtype: str = "float32") -> np.ndarray:
    rng = np.random.default_rng(0)
    values = (100 * rng.standard_normal(shape)).astype(dtype)
    flat = values.reshape(-1)
    flat[rng.permutation(flat.size)[: round(zeros * flat.size)]] = 0
    return values


def identical(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    """Bit for bit, with types and shapes."""
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and a[n].tobytes() == b[n].tobytes() for n in a
    )


def test_a_bitmap_and_the_values_that_are_not_zero() -> None:
    array = np.array([[0, 3, 0, 0, 0, 0], [0, 0, 0, -1, 0, 0]], dtype=np.float64)
    encoded = encode_sparse({"layer.weight": array})
    assert {name: value.tolist() for name, value in encoded.items()} == {
        "layer.weight/bits": [0b01000000, 0b01000000],
        "layer.weight/values": [3.0, -1.0],
        "layer.weight/shape": [2, 6],
    }


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_at_nine_zeros_in_ten_at_most_a_quarter_of_the_dense_bytes(dtype: str) -> None:
    tensors = {"conv": sparse((64, 32, 3, 3), 0.9, dtype), "fc": sparse((10, 64), 0.9, dtype)}
    encoded = encode_sparse(tensors)
    dense, small = len(safetensors.numpy.save(tensors)), len(safetensors.numpy.save(encoded))
    assert small <= 0.25 * dense
    if dtype == "float32":
        assert sum(a.nbytes for a in encoded.values()) == pytest.approx(
            (1 / 32 + 0.1) * sum(a.nbytes for a in tensors.values()), rel=0.01
        )


def test_round_trip_through_a_file_is_bit_for_bit() -> None:
    tensors = {
        "a.weight": sparse((16, 9, 3), 0.8),
        "dense": sparse((5, 7), 0.0),
        "scalar": np.array(0.0, dtype=np.float32),
        "empty": np.zeros((0, 3), dtype=np.float32),
        "zeros": np.zeros((100, 10), dtype=np.float16),
        "odd": np.array([0.0, -0.0, np.nan, np.inf, 0.0, 1e-40] + [0.0] * 90, dtype=np.float32),
        "counts": np.array([0] * 50 + [7], dtype=np.int64),
        "flags": np.array([True] + [False] * 200),
        "strided": np.asfortranarray(sparse((12, 8), 0.9)),
        "cut": sparse((40, 40), 0.9)[::2, 1:30],
    }
    encoded = encode_sparse(tensors)
    loaded = safetensors.numpy.load(safetensors.numpy.save(encoded))
    assert identical(
        decode_sparse(loaded), {name: np.ascontiguousarray(a).reshape(a.shape) for name, a in tensors.items()}
    )
    assert "dense/dense" in encoded


@given(st.lists(st.sampled_from([0.0, 0.0, 0.0, 1.5, -2.0]), max_size=60), st.integers(1, 3))
def test_any_array_comes_back_and_is_never_larger(values: list[float], rows: int) -> None:
    array = np.array(values * rows, dtype=np.float32).reshape(rows, -1) if values else np.zeros((rows, 0), np.float32)
    encoded = encode_sparse({"x": array})
    assert identical(decode_sparse(encoded), {"x": array})
    assert sum(part.nbytes for part in encoded.values()) <= array.nbytes


def test_other_things_than_numbers_are_refused() -> None:
    with pytest.raises(SparsityError, match="`tensors` must hold numbers; got object in 'x'"):
        encode_sparse({"x": np.array([None])})
    with pytest.raises(SparsityError, match="got complex64 in 'x'"):
        encode_sparse({"x": np.zeros(3, dtype=np.complex64)})


def test_damaged_parts_are_refused() -> None:
    encoded = encode_sparse({"x": sparse((20, 20), 0.9)})
    for part in ("values", "shape"):
        missing = {name: a for name, a in encoded.items() if name != f"x/{part}"}
        with pytest.raises(SparsityError, match=f"'x' has no {part}"):
            decode_sparse(missing)
    with pytest.raises(SparsityError, match="got the array 'x/values' without its bits"):
        decode_sparse({name: a for name, a in encoded.items() if name != "x/bits"})
    with pytest.raises(SparsityError, match="got the array 'y' without its bits"):
        decode_sparse(encoded | {"y": np.zeros(3)})
    for part, damaged in (
        ("values", encoded["x/values"][:-1]),
        ("bits", encoded["x/bits"][:-1]),
        ("bits", encoded["x/bits"].astype(np.int64)),
        ("shape", np.array([20, 21])),
        ("shape", np.array([-20, -20])),
    ):
        with pytest.raises(SparsityError, match=r"the parts of 'x' do not fit each other.*The file is damaged"):
            decode_sparse(encoded | {f"x/{part}": damaged})
