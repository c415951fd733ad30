"""The Python blocks of docs/rules.md run, one after the other, on a model that has such an operation."""

import re
from pathlib import Path

import torch
from torch import Tensor, nn

PAGE = Path(__file__).resolve().parents[2] / "docs" / "rules.md"


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
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert [axis.size for axis in names["graph"].prunable] == [4]
    assert names["made"].model.before.out_features == 6
