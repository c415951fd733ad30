"""The page about training loops of one's own runs."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "own-training.md").read_text()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_page_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secateur.pipeline.finalize.latency_on", lambda *_: ((), ()))
    names: dict[str, object] = {"__name__": "page"}
    for block in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL):
        exec(compile(block, "own-training.md", "exec"), names)
    assert names["pruned"].architecture == names["found"].architecture


def test_the_page_names_every_example() -> None:
    named = set(re.findall(r"\(\.\./examples/(recover_\w+\.py)\)", PAGE))
    assert named == {path.name for path in (ROOT / "examples").glob("recover_*.py")}
