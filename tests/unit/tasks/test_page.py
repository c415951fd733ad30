"""The page about tasks runs, and names every task."""

import re
from pathlib import Path

import pytest

from secateur import tasks

PAGE = Path(__file__).resolve().parents[3] / "docs" / "tasks.md"


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_page_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert len(blocks) == 3
    names: dict[str, object] = {"__name__": "page"}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert names["result"].report.steps[-1].score.n > 0


def test_the_page_names_every_task() -> None:
    own = {name for name in tasks.__all__ if isinstance(getattr(tasks, name), type)}
    built_in = {name for name in own if issubclass(getattr(tasks, name), tasks.Task)} - {"Task"}
    assert {name for name in built_in if f"| `{name}`" not in PAGE.read_text()} == set()
