"""No duration, age or deadline follows the wall clock, which may go back."""

import ast
from pathlib import Path

import secateur

SOURCE = Path(secateur.__file__).parent
_WALL = {"time.time", "time.time_ns", "datetime.now", "datetime.utcnow", "datetime.today", "date.today"}
_ALLOWED = {"_provenance.py"}
"""It says when something was made, for readers."""


def _wall_clocks(path: Path) -> list[str]:
    tree = ast.parse(path.read_text())
    imported = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "time"
        for alias in node.names
        if alias.name in ("time", "time_ns")
    }
    called = (ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call))
    return [name for name in called if name in _WALL or name in imported]


def test_only_dates_for_readers_come_from_the_wall_clock() -> None:
    found = {path.name: _wall_clocks(path) for path in SOURCE.rglob("*.py")}
    assert {name for name, calls in found.items() if calls} <= _ALLOWED, found


def test_wall_clocks_are_found(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(
        "import time\nfrom time import time as now\nx = time.time(), now(), time.monotonic()\n"
    )
    assert _wall_clocks(tmp_path / "a.py") == ["time.time", "now"]
