"""The Python blocks of docs/data.md run, one after the other, and its table names every field of `Augment`."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import torch
from command_line import secateur

from secateur.data import Augment, FolderSplit, ImageData, MemorySplit

PAGE = Path(__file__).resolve().parents[3] / "docs" / "data.md"


def test_the_page_runs(image_folder: Callable[..., Path]) -> None:
    names: dict[str, object] = {"folder": image_folder(size=lambda i: (240 + i, 250))}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 3
    with torch.random.fork_rng(devices=[]):
        for block in blocks:
            exec(compile(block, str(PAGE), "exec"), names)
    data, mixed = names["data"], names["mixed"]
    assert isinstance(data, ImageData)
    assert isinstance(data.train, FolderSplit)
    assert isinstance(mixed, torch.Tensor)
    assert (mixed.shape, mixed.dtype) == ((8, 3), torch.float32)
    assert isinstance(names["split"], MemorySplit)


def test_the_table_names_every_field_and_flags_that_there_are() -> None:
    rows = [line.split("|") for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    fields = {name for row in rows for name in re.findall(r"`(\w+)`", row[1])} - {"digits", "load_data"}
    assert fields == {field.name for field in dataclasses.fields(Augment)}
    flags = set(re.findall(r"--[a-z][a-z-]+", PAGE.read_text(encoding="utf-8"))) - {"--data"}
    shown = secateur("distill", "--help")
    assert flags
    assert all(flag in shown.output for flag in flags)
