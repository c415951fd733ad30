"""The source stays within the bounds that tools/house.py prints (sizes, names, parameters, nesting, cycles)."""

import importlib.util
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parents[2] / "tools" / "house.py"

spec = importlib.util.spec_from_file_location("house", PATH)
assert spec is not None
assert spec.loader is not None
house = importlib.util.module_from_spec(spec)
# dataclasses look their module up by name.
with pytest.MonkeyPatch.context() as patch:
    patch.setitem(sys.modules, "house", house)
    spec.loader.exec_module(house)

BOUNDED = [row for row in house.static_rows() if row.asked]


@pytest.mark.parametrize("row", BOUNDED, ids=lambda row: row.name)
def test_bound_holds(row) -> None:
    assert row.holds, f"{row.name} is {row.value:g}, must be {row.asked}:\n" + "\n".join(row.detail)


def test_what_is_bounded() -> None:
    assert {row.name for row in BOUNDED} == {
        "files in src",
        "lines per file, median",
        "files under 60 lines, %",
        "lines of the largest file",
        "lines of src",
        "files in the largest package",
        "public functions and classes defined twice",
        "parameters of a public function, most",
        "deepest nesting of control flow",
        "import cycles",
    }


def test_names_in_two_modules_and_nesting_are_found(tmp_path: Path) -> None:
    for name in ("one", "two"):
        text = "def same():\n    if 1:\n        pass\n    elif 2:\n        for _ in []:\n            pass\n"
        (tmp_path / f"{name}.py").write_text(text)
    modules = [house.Module.read(path, tmp_path) for path in sorted(tmp_path.glob("*.py"))]
    first, *_ = house.name_rows(modules)
    assert (first.value, first.detail, first.holds) == (1, ("same: one, two",), False)
    (nesting,) = house.nesting_rows(modules)
    assert nesting.value == 2
