"""`compress` and `distill_model` with the fields of their configuration objects as plain keyword arguments.

Tests vary one field at a time, and most of them share the others.
"""

import logging
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from dataclasses import fields, replace
from typing import Any

from pretend import Pretend
from torch import nn

from secateur.data import ImageData
from secateur.pipeline import (
    DEFAULT_REPAIRS,
    CompressResult,
    CutConfig,
    KeepWeights,
    ModelSpec,
    RecoveryConfig,
    RunConfig,
    TrainResult,
    compress,
    distill_model,
)
from secateur.search import Knapsack, SearchSpace

Hear = Callable[[str], object]


class _Hears(logging.Handler):
    def __init__(self, hear: Hear) -> None:
        super().__init__()
        self.hear = hear

    def emit(self, record: logging.LogRecord) -> None:
        self.hear(record.getMessage())


@contextmanager
def log_heard(hear: Hear) -> Generator[None]:
    """Call a function with every sentence that Secateur logs."""
    logger, handler = logging.getLogger("secateur"), _Hears(hear)
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def run_compress(model: nn.Module, data: ImageData, *, hear: Hear | None = None, **settings: Any) -> CompressResult:
    """Run `compress`; ``hear`` is called with every sentence that it logs.

    Unless the settings say something else (``strategy=None`` leaves it open), nothing is chosen by measuring, which
    takes long and never repeats exactly: `Knapsack` searches, with a divisor of 1, and times are pretended. Repairs are
    those in closed form.
    """
    settings = {"init": KeepWeights(repairs=DEFAULT_REPAIRS), **settings}
    if "latency" not in str(settings["budget"]) and settings.get("strategy", True) is not None:
        space = settings.get("space", SearchSpace())
        pinned = replace(space, divisor=1) if space.divisor is None else space
        settings = {"strategy": Knapsack(), "target": Pretend(), **settings, "space": pinned}
    kinds = {"cut": CutConfig, "recovery": RecoveryConfig, "run": RunConfig}
    with nullcontext() if hear is None else log_heard(hear):
        return compress(model, data, **_grouped(settings, kinds))


def run_distill(student: ModelSpec, *, hear: Hear | None = None, **settings: Any) -> TrainResult:
    """Run `distill_model`, as above."""
    with nullcontext() if hear is None else log_heard(hear):
        return distill_model(student, **_grouped(settings, {"run": RunConfig}))


def _grouped(settings: dict[str, Any], kinds: dict[str, type[Any]]) -> dict[str, Any]:
    """Put the fields of each configuration object into one."""
    left, found = dict(settings), dict[str, Any]()
    for name, kind in kinds.items():
        own = {field.name: left.pop(field.name) for field in fields(kind) if field.name in left}
        if own:
            found[name] = kind(**own)
    return {**left, **found}
