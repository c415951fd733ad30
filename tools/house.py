"""Print the numbers that say how easily a newcomer finds the way in the source, and check their bounds.

    make house                                     the table, and the places behind each number
    PYTHONPATH=src python tools/house.py --check   the same; exit code 1 if a bound does not hold

The source is the ``src`` folder beside this script. Most numbers are read from the syntax trees; "files touched" and
"functions from compress to the scores" are measured by running the two functions at the top of this file.
`tests/unit/test_house.py` asserts the bounds that need no run.
"""

import argparse
import ast
import importlib
import inspect
import io
import sys
import tempfile
import threading
import tokenize
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SRC = ROOT / "src"
TESTS = ROOT / "tests"
PACKAGE = "secateur"

# The two measured calls. If public names change, change them here.

ENTRY = "compress"  # the function from which calls are counted
SCORES = ("scores", "importance")  # the method that computes scores, and a part of the path of its file


def trace_rank_cut() -> Callable[[], object]:
    """Prepare to trace, rank and cut a ResNet-20; return the call that is measured."""
    import torch

    import secateur

    model, _ = secateur.load_model("cifar_resnet20")
    example = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def run() -> object:
        graph = secateur.trace(model, example)
        found = secateur.search_architecture(model, graph, secateur.Uniform(), budget="macs=50%")
        return secateur.cut(model, graph, found.architecture)

    return run


def compress_tiny(folder: Path) -> Callable[[], object]:
    """Prepare a short ``compress`` with the default strategy, files and report included; return the call."""
    import secateur
    from secateur.train import Silent

    data = secateur.load_data("digits", limit=320)
    model, source = secateur.load_model("digits_resnet")
    recovery = secateur.RecoveryConfig(secateur.TrainConfig(epochs=1, batch_size=64, learning_rate=0.01))
    settings = secateur.RunConfig(callbacks=Silent())

    def run() -> object:
        return secateur.compress(
            model, data, "macs=50%", recovery=recovery, out=folder / "small", source=source, run=settings
        )

    return run


@dataclass(frozen=True)
class Row:
    """One line of the table. A bound reads ``<= 12`` or is empty; ``detail`` lists where the number comes from."""

    name: str
    value: float
    asked: str = ""
    detail: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        """Whether the number is within its bound."""
        sign, bound = (self.asked or "<= inf").split()
        return self.value <= float(bound) if sign == "<=" else self.value >= float(bound)


@dataclass(frozen=True)
class Module:
    """One file. The name of an ``__init__.py`` is that of its package."""

    path: Path
    name: str
    text: str
    tree: ast.Module

    @classmethod
    def read(cls, path: Path, root: Path) -> "Module":
        """Read a file below ``root``."""
        parts = path.relative_to(root).with_suffix("").parts
        text = path.read_text(encoding="utf-8")
        return cls(path, ".".join(part for part in parts if part != "__init__"), text, ast.parse(text))

    @property
    def lines(self) -> int:
        """The number of lines."""
        return self.text.count("\n")

    @property
    def package(self) -> str:
        """The package that contains it: ``graph``, or ``graph.channel_rules``."""
        return _package(self.path)


def static_rows() -> list[Row]:
    """All numbers that are read from the source without running it."""
    modules = [Module.read(path, SRC) for path in sorted((SRC / PACKAGE).rglob("*.py"))]
    about_source = (size_rows, name_rows, parameter_rows, nesting_rows, import_rows, comment_rows)
    return [*(row for rows in about_source for row in rows(modules)), *test_rows()]


def size_rows(modules: list[Module]) -> Iterator[Row]:
    """Count files and lines."""
    lines = sorted(module.lines for module in modules)
    yield Row("files in src", len(modules), "<= 199")
    yield Row("lines per file, median", median(lines), ">= 200")
    yield Row("files under 60 lines, %", round(100 * sum(each < 60 for each in lines) / len(lines), 1), "<= 8")
    largest = sorted(modules, key=lambda module: -module.lines)[:5]
    yield Row("lines of the largest file", lines[-1], "<= 650", tuple(f"{m.lines} {m.name}" for m in largest))
    # The reorganization aimed at 34,000 and 140 files. It ended at 38,300: comments doubled, and no further duplication
    # was found. What came after it (rules, tasks, checks) is new, so both bounds grow with it, knowingly.
    yield Row("lines of src", sum(lines), "<= 58510")
    files = Counter(module.package for module in modules if module.path.name != "__init__.py")
    yield Row("files in the largest package", max(files.values()), "<= 17", (_listed(files),))


def name_rows(modules: list[Module]) -> Iterator[Row]:
    """Find names that two modules define."""
    all_names, definitions = defaultdict[str, list[str]](list), defaultdict[str, list[str]](list)
    for module in modules:
        for name, is_definition in _bound(module.tree).items():
            for where in (all_names, definitions) if is_definition else (all_names,):
                where[name].append(module.name.removeprefix(f"{PACKAGE}."))
    for title, where, is_public, asked in (
        ("public functions and classes defined twice", definitions, True, "<= 0"),
        ("the same, with constants and aliases", all_names, True, ""),
        ("the same, with private names", all_names, False, ""),
    ):
        twice = {n: w for n, w in sorted(where.items()) if len(w) > 1 and not (is_public and n[0] == "_")}
        yield Row(title, len(twice), asked, tuple(f"{n}: {', '.join(w)}" for n, w in twice.items()) * is_public)


def parameter_rows(modules: list[Module]) -> Iterator[Row]:
    """Find the functions with the most parameters."""
    counts = [(_parameters(node), name, module) for module in modules for name, node in _public_functions(module.tree)]
    most = sorted(counts, key=lambda found: -found[0])[:5]
    detail = tuple(f"{count} {module.name}.{name}" for count, name, module in most)
    yield Row("parameters of a public function, most", most[0][0], "<= 12", detail)


def nesting_rows(modules: list[Module]) -> Iterator[Row]:
    """Find the functions with the deepest nesting."""
    functions = [(m, node) for m in modules for node in ast.walk(m.tree) if isinstance(node, ast.FunctionDef)]
    depths = sorted(((_nesting(node), m.name, node.name) for m, node in functions), reverse=True)[:5]
    yield Row("deepest nesting of control flow", depths[0][0], "<= 4", tuple(f"{d} {m}.{n}" for d, m, n in depths))


def import_rows(modules: list[Module]) -> Iterator[Row]:
    """Find modules that import each other. Imports inside functions count, imports for type checking do not."""
    names = {module.name for module in modules}
    edges = {module.name: {n for n in _imported(module.tree, names) if n != module.name} for module in modules}
    reached = {name: _reachable(name, edges) for name in names}
    cyclic = sorted(name for name in names if name in reached[name])
    groups = {tuple(other for other in cyclic if other in reached[name] and name in reached[other]) for name in cyclic}
    yield Row("import cycles", len(groups), "<= 0", tuple(" <-> ".join(group) for group in sorted(groups)))


def comment_rows(modules: list[Module]) -> Iterator[Row]:
    """Count comments, in all and per package."""
    comments, every, lines = Counter[str](), Counter[str](), Counter[str]()
    for module in modules:
        found = list(_comments(module.text))
        for counter, count in ((comments, sum(found)), (every, len(found)), (lines, module.lines)):
            counter[module.package] += count
    rates = ", ".join(f"{name} {100 * comments[name] / lines[name]:.1f}" for name in sorted(lines))
    yield Row("comments per 100 lines", round(100 * comments.total() / lines.total(), 2), "", (rates,))
    yield Row("the same, with directives to tools", round(100 * every.total() / lines.total(), 2))


def test_rows() -> Iterator[Row]:
    """Count private imports and assertions in the tests."""
    tests = [Module.read(path, ROOT) for path in sorted(TESTS.rglob("*.py"))]
    nodes = [node for module in tests for node in ast.walk(module.tree)]
    yield Row("private imports in tests", sum(map(_is_private_import, nodes)))
    asserts = Counter(kind for node in nodes if (kind := _assertion(node)))
    yield Row("assertions in tests", asserts.total(), "", (_listed(asserts),))


def run_rows(folder: Path) -> Iterator[Row]:
    """Measure which files two runs touch, and how many functions are between ``compress`` and the scores."""
    # Everything is imported first, so that code that runs at import is not counted.
    for path in sorted((SRC / PACKAGE).rglob("*.py")):
        if path.stem != "__main__":
            importlib.import_module(Module.read(path, SRC).name)
    touched, _ = _profile(trace_rank_cut())
    packages = _listed(Counter(map(_package, touched)))
    yield Row("files touched by trace + rank + cut of ResNet-20", len(touched), "<= 20", (packages,))
    touched, stack = _profile(compress_tiny(folder))
    packages = _listed(Counter(map(_package, touched)))
    yield Row("files touched by compress", len(touched), "<= 60", (packages,))
    names = [f"{Path(file).relative_to(SRC / PACKAGE)}:{name}" for file, name in stack]
    yield Row("functions from compress to the scores", len(stack), "<= 8", tuple(names))
    yield Row("files of these functions", len({file for file, _ in stack}), "<= 5")


def main() -> int:
    """Run the script; return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="Exit with 1 if a bound does not hold.")
    parser.add_argument("--no-runs", action="store_true", help="Leave out the numbers that are measured by running.")
    given = parser.parse_args()
    rows = static_rows()
    if not given.no_runs:
        with tempfile.TemporaryDirectory() as folder:
            rows += run_rows(Path(folder))
    for row in rows:
        print(f"{row.name:<52}{row.value:>10g}   {row.asked:<9}{'' if row.holds else ' FAILS'}")
    for row in (row for row in rows if row.detail):
        print(f"\n{row.name}:", *(f"    {line}" for line in row.detail), sep="\n")
    return int(given.check and not all(row.holds for row in rows))


def _package(path: Path | str) -> str:
    return ".".join(Path(path).relative_to(SRC / PACKAGE).parts[:-1]) or PACKAGE


def _bound(tree: ast.Module) -> dict[str, bool]:
    """Names that a module binds at its top level without importing; whether each is a function or a class."""
    found: dict[str, bool] = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found[node.name] = True
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = (n for target in targets for n in ast.walk(target) if isinstance(n, ast.Name))
            found |= {name.id: False for name in names if isinstance(name.ctx, ast.Store)}
    return {name: is_definition for name, is_definition in found.items() if not name.startswith("__")}


def _public_functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Functions and methods whose name has no private part."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node.name, node
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and (method.name == "__init__" or method.name[0] != "_"):
                    yield f"{node.name}.{method.name}", method


def _parameters(node: ast.FunctionDef) -> int:
    given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
    return sum(arg is not None and arg.arg not in ("self", "cls") for arg in given)


def _nesting(node: ast.AST, depth: int = 0) -> int:
    """The depth of the deepest block in a function without its inner functions; ``elif`` counts as ``if``."""
    blocks = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.TryStar, ast.Match, ast.AsyncFor, ast.AsyncWith)
    deepest = depth
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.ClassDef | ast.Lambda):
            continue
        is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and node.orelse == [child]
        deepest = max(deepest, _nesting(child, depth + (isinstance(child, blocks) and not is_elif)))
    return deepest


def _imported(tree: ast.AST, names: set[str]) -> Iterator[str]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in names)
        elif isinstance(node, ast.ImportFrom) and node.module in names:
            inner = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from (name if name in names else node.module for name in inner)
        else:
            yield from _imported(node, names)


def _reachable(start: str, edges: dict[str, set[str]]) -> set[str]:
    found, waiting = set[str](), [*edges[start]]
    while waiting:
        if (name := waiting.pop()) not in found:
            found.add(name)
            waiting += edges[name]
    return found


def _comments(text: str) -> Iterator[bool]:
    """For every comment, whether it is for people and not a directive to a tool."""
    directives = ("noqa", "type:", "pyright:", "fmt:", "pragma:", "ruff:")
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield not token.string.lstrip("# ").startswith(directives)


def _is_private_import(node: ast.AST) -> bool:
    if isinstance(node, ast.Import):
        return any(name.name.startswith(f"{PACKAGE}.") and "._" in name.name for name in node.names)
    if not isinstance(node, ast.ImportFrom) or (node.module or "").split(".")[0] != PACKAGE:
        return False
    return "._" in str(node.module) or any(name.name[0] == "_" and name.name[:2] != "__" for name in node.names)


def _assertion(node: ast.AST) -> str | None:
    if isinstance(node, ast.Assert):
        return "assert"
    name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
    if name in ("pytest.raises", "pytest.warns", "pytest.fail"):
        return name
    return name.removesuffix(f".{name.split('.')[-1]}") if name.split(".")[-1].startswith("assert_") else None


def _profile(run: Callable[[], object]) -> tuple[set[str], list[tuple[str, str]]]:
    """Run a function; return the files whose functions ran, and the (file, function) call stack at the scores."""
    touched, stack = set[str](), list[tuple[str, str]]()
    root = f"{SRC / PACKAGE}/"

    def note(frame: FrameType, event: str, _: Any) -> None:
        file = frame.f_code.co_filename
        # Bodies of modules and classes are not functions: their variables are not optimized.
        if event != "call" or not file.startswith(root) or not frame.f_code.co_flags & inspect.CO_OPTIMIZED:
            return
        touched.add(file)
        if not stack and frame.f_code.co_name == SCORES[0] and SCORES[1] in file:
            stack.extend(_stack_of(frame, root))

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    return touched, stack


def _stack_of(frame: FrameType | None, root: str) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    while frame is not None and (not found or found[0][1] != ENTRY):
        code, frame = frame.f_code, frame.f_back
        if code.co_filename.startswith(root) and not code.co_name.startswith("<"):
            found.insert(0, (code.co_filename, code.co_name))
    return found


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.most_common())


if __name__ == "__main__":
    sys.exit(main())
