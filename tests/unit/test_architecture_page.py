"""Every file and name on ARCHITECTURE.md exists, and its layers are those of the import contract."""

import ast
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SRC = ROOT / "src" / "secateur"
PAGE = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")


def _defined(path: Path) -> set[str]:
    """Names that a file binds at its top level, and methods and fields of its classes as `Class.name`."""
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        names = _bound(node)
        found |= names
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{name}" for inner in node.body for name in _bound(inner)}
    return found


def _bound(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    targets = [*getattr(node, "targets", []), *([node.target] if isinstance(node, ast.AnnAssign) else [])]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def _rows() -> list[list[str]]:
    return [line.split("|")[1:-1] for line in PAGE.splitlines() if line.startswith("| ") and "---" not in line]


def test_every_file_exists() -> None:
    files = set(re.findall(r"`([\w/]+\.py)`", PAGE))
    assert len(files) > 40
    for file in files:
        assert (SRC / file).is_file() or (ROOT / file).is_file(), file


def test_names_are_defined_in_the_files_beside_them() -> None:
    checked = 0
    for row in _rows():
        files = re.findall(r"`([\w/]+\.py)`", "|".join(row))
        names = re.findall(r"`([\w.]+)`", row[1] if "->" in row[-1] else row[-1])
        defined = {name for file in files for name in _defined(SRC / file)}
        for name in (name for name in names if not name.endswith(".py")):
            assert not files or name in defined, f"{name} is not in {', '.join(files)}"
            checked += bool(files)
    assert checked > 35
    everywhere = {name for path in SRC.rglob("*.py") for name in _defined(path)}
    for name in re.findall(r"`([\w.]+)`", PAGE):
        is_file, is_package = (ROOT / name).exists() or name.endswith(".py"), (SRC / name).is_dir()
        assert is_file or is_package or name.removeprefix("secateur.") in everywhere | {"src/secateur", "secateur"}, (
            name
        )


def test_layers_are_those_of_the_contract() -> None:
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    (layers,) = re.findall(r"```text\n(.*?)```", PAGE, flags=re.DOTALL)
    assert layers.splitlines() == contract["contracts"][0]["layers"]


def test_every_package_has_its_line() -> None:
    (table,) = re.findall(r"\| Package \| Topic \|\n(.*?)\n\n", PAGE, flags=re.DOTALL)
    named = {name for line in table.splitlines()[1:] for name in re.findall(r"`([\w.]+)`", line.split("|")[1])}
    packages = {path.parent.name for path in SRC.glob("*/__init__.py")}
    modules = {path.name for path in SRC.glob("*.py") if not path.name.startswith("__")}
    assert named == packages | modules
