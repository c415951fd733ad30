"""The Python blocks of docs/rules.md run, and every row of its table of operations can be made again."""

import importlib.util
import re
import sys
from pathlib import Path

import operation_nets as nets
import pytest
import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "rules.md"
TEXT = PAGE.read_text(encoding="utf-8")

spec = importlib.util.spec_from_file_location("rules_table", ROOT / "tools" / "rules_table.py")
assert spec is not None
assert spec.loader is not None
rules_table = importlib.util.module_from_spec(spec)
with pytest.MonkeyPatch.context() as patch:
    # dataclasses look their module up by name.
    patch.setitem(sys.modules, "rules_table", rules_table)
    spec.loader.exec_module(rules_table)

EVERY = [(library, name) for library, cases in nets.CASES.items() for name in cases]
SAME_VERSIONS = rules_table.version() in TEXT


@torch.library.custom_op("my_lib::swap_halves", mutates_args=())
def swap_halves(x: Tensor) -> Tensor:
    first, second = x.chunk(2, 1)
    return torch.cat([second, first], 1)


class Swapping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(swap_halves(self.before(x)).relu())


def test_the_rules_page_runs():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        names = {"model": Swapping().eval(), "example": torch.randn(2, 3)}
    blocks = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert [axis.size for axis in names["graph"].prunable] == [4]
    assert names["made"].model.before.out_features == 6


@pytest.mark.skipif(not SAME_VERSIONS, reason="the table was made with other versions of PyTorch")
@pytest.mark.parametrize(("library", "name"), EVERY, ids=lambda part: part)
def test_a_row_of_the_table(library: str, name: str):
    section = TEXT.partition(f"### {library}\n")[2].partition("\n### ")[0]
    assert str(rules_table.measure(name, nets.CASES[library][name])) in section.splitlines()


def test_the_table_has_every_public_name_and_nothing_is_counted_wrong():
    for library, cases in nets.CASES.items():
        section = TEXT.partition(f"### {library}\n")[2].partition("\n### ")[0]
        rows = re.findall(r"^\| `(\w+)` \| (.*?) \|", section, flags=re.MULTILINE)
        assert [name for name, _ in rows] == sorted(cases)
        followed = sum(channels.startswith("followed") for _, channels in rows)
        assert followed >= 0.95 * len(rows)
        assert f"{followed} of {len(rows)} with channels are followed" in section
        left_out = re.findall(r"`(\w+)`", section.partition("Left out:")[2])
        assert sorted(left_out) == sorted(nets.LEFT_OUT[library])
        if SAME_VERSIONS:
            assert {name for name, _ in rows} | set(left_out) == nets.public_names(library)
    assert "**wrong**" not in TEXT
