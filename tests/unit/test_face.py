"""The package as its users see it: quick to import, complete, and verbs that are not shadowed by rooms."""

import ast
import importlib
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


def test_verbs_keep_their_names_when_their_rooms_are_imported():
    room = importlib.import_module("secateur.search")
    importlib.import_module("secateur.distill")
    assert secateur.search is room.search
    assert secateur.distill is importlib.import_module("secateur.train").distill


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'prune'"):
        secateur.prune  # noqa: B018


def test_names_for_type_checkers_are_those_at_run_time():
    tree = ast.parse(Path(secateur.__file__).read_text(encoding="utf-8"))
    guarded = next(node for node in tree.body if isinstance(node, ast.If))
    said = {(node.module, name.name) for node in guarded.body for name in node.names}
    assert said == {(f"secateur.{home}", name) for home, names in secateur._HOMES.items() for name in names}


def test_import_and_help_do_not_wait_for_torch():
    code = "import sys, secateur, secateur.cli; assert secateur.__version__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
