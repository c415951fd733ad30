"""The package as its users see it: quick to import, complete, and without a name that is a module as well."""

import ast
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import secateur


@pytest.mark.parametrize("name", secateur.__all__)
def test_every_public_name_is_there_and_is_no_module(name: str):
    assert not isinstance(getattr(secateur, name), ModuleType)
    assert name in dir(secateur)


def test_no_public_name_is_also_a_package():
    packages = {path.parent.name for path in Path(secateur.__file__).parent.glob("*/__init__.py")}
    assert packages.isdisjoint(secateur.__all__)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'shears'"):
        secateur.shears  # noqa: B018


def test_names_for_type_checkers_are_those_at_run_time():
    tree = ast.parse(Path(secateur.__file__).read_text(encoding="utf-8"))
    guarded = next(node for node in tree.body if isinstance(node, ast.If))
    said = {(node.module, name.name) for node in guarded.body for name in node.names}
    assert said == {(f"secateur.{module}", name) for module, names in secateur._MODULES.items() for name in names}


def test_import_and_help_do_not_wait_for_torch():
    code = "import sys, secateur, secateur.cli; assert secateur.__version__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
