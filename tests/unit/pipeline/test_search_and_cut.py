"""What a run says about its repairs."""

import pytest

from secateur.pipeline.search_and_cut import describe_repair
from secateur.prune import RepairResult


@pytest.mark.parametrize(
    ("result", "said"),
    [
        (
            RepairResult("Refit()", 0.98, 0.45, True),
            "Refit(): distance from the uncut outputs on held-out images 0.980 -> 0.450.",
        ),
        (
            RepairResult("Refit()", 0.45, 0.59, False),
            "Refit(): distance from the uncut outputs on held-out images 0.450 -> 0.590; undone, because it made "
            "things worse.",
        ),
        (
            RepairResult("Refit()", 0.98, 0.45, True, held_out=False, skipped=(("a", "all is zero"), ("b", "x"))),
            "Refit(): distance from the uncut outputs on the images it was fitted to (too few to hold any out) 0.980 "
            "-> 0.450; a and 1 more left as cut, because all is zero.",
        ),
    ],
)
def test_a_repair_is_described_with_the_images_that_judged_it(result, said):
    assert describe_repair(result) == said
