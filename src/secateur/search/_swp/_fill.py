"""What a combination leaves of the budget: wider still, as far as it goes."""

import numpy as np

from secateur.search._fit import FULL_ENOUGH
from secateur.search._problem import FloatArray
from secateur.search._space import IntArray
from secateur.search._swp._options import Options, Rows


def filled(options: Options, rows: Rows) -> Rows:
    """Take single steps up, to the next width or depth, while one fits and the budget is less than 99.5 % full.

    Few candidates are coarser than the widths there are: the best combination of them may leave room that costs nothing
    to use. Of the steps that fit, the one is taken whose choice is the furthest below its whole; of equal ones the
    first. Nothing gets narrower.

    Args:
        options: The choices.
        rows: Candidates within the budget.

    Returns:
        Candidates within the budget; no step fits, or it is full.
    """
    sizes = [len(stage.tops) for stage in options.of_stage]
    tops = np.concatenate([stage.tops for stage in options.of_stage])
    now = np.concatenate(rows)
    while True:
        ups = now + np.eye(len(now), dtype=np.int64)[now < tops]
        if not len(ups) or _fullness(options, now[None], sizes)[0] >= FULL_ENOUGH:
            return _by_stage(now, sizes)
        fits = _fullness(options, ups, sizes) <= 1
        if not fits.any():
            return _by_stage(now, sizes)
        below = (now / np.maximum(tops, 1))[now < tops]
        now = ups[int(np.where(fits, below, np.inf).argmin())]


def _by_stage(row: IntArray, sizes: list[int]) -> Rows:
    return tuple(np.split(row, np.cumsum(sizes)[:-1]))


def _fullness(options: Options, networks: IntArray, sizes: list[int]) -> FloatArray:
    """(networks,) the largest cost / limit of each; within the budget up to 1."""
    both = [options.network(_by_stage(row, sizes)) for row in networks]
    widths, blocks = np.stack([widths for widths, _ in both]), np.stack([blocks for _, blocks in both])
    limits = options.problem.limits
    found = options.problem.costs.fields(limits, widths, blocks)
    return np.max([found[name] / max(limit, 1e-300) for name, limit in limits.items()], axis=0)
