"""The site of the documentation: every page is in its navigation, and the quickstart runs word by word."""

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    listed = re.findall(r"[\w/-]+\.md", navigation)
    assert sorted(listed) == sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


def test_names_of_the_reference_exist():
    names = re.findall(r"^::: (\S+)$", (DOCS / "reference.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(names) > 20
    for name in names:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name


def test_links_out_of_the_pages_become_names():
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "tools" / "docs_hooks.py")
    assert spec is not None
    assert spec.loader is not None
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)

    def shown(text: str, place: str) -> str:
        return hooks.on_page_markdown(text, SimpleNamespace(file=SimpleNamespace(src_uri=place)))

    assert shown("[a.md](../b/a.md#x), [table](../b/c.json)", "p.md") == "`b/a.md`, table (`b/c.json`)"
    assert shown("[a](../a.md)", "how-to/p.md") == "[a](../a.md)"
    assert shown("[a.py](../../a.py)", "how-to/p.md") == "`a.py`"


@pytest.mark.slow
def test_the_quickstart_runs_word_by_word(tmp_path: Path):
    page = (DOCS / "quickstart.md").read_text(encoding="utf-8")

    def run(*words: str) -> str:
        done = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    said = {}
    for name, lines in re.findall(r'```python title="(.*?)"\n(.*?)```', page, flags=re.DOTALL):
        (tmp_path / name).write_text(lines, encoding="utf-8")
        said[name] = run(name)
    assert list(said) == ["mine.py", "shrink.py", "use.py"]
    assert "CompressResult(" in said["shrink.py"]
    assert "tensor([0, 1, 2, 3, 4])" in said["use.py"]
    files = re.findall(r"^\| (`.*?) \|", page, flags=re.MULTILINE)
    promised = {name for row in files for name in re.findall(r"`(.*?)`", row)}
    assert {path.name for path in (tmp_path / "small").iterdir()} == promised

    commands = [block.replace("\\\n", " ") for block in re.findall(r"```console\n(.*?)```", page, flags=re.DOTALL)]
    ours = [line for block in commands if "mine:build" in block for line in block.splitlines()]
    assert [line.split()[:2] for line in ours] == [["secateur", "compress"], ["secateur", "verify"]]
    for line in ours:
        run("-P", "-m", *shlex.split(line))  # As `secateur` starts: the working folder is not on the path.


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="mkdocs is not installed (extra docs)")
def test_the_site_builds_without_warnings(tmp_path: Path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert (tmp_path / "site" / "quickstart.html").is_file()
