"""The study: which kind of pruning suits distillation, over families, ratios, losses and orders."""

from secateur.pipeline._study._plan import FAMILIES, Cell, Family, Order, Pruned, Study, Taught
from secateur.pipeline._study._run import StudyResult, run_study

__all__ = ["FAMILIES", "Cell", "Family", "Order", "Pruned", "Study", "StudyResult", "Taught", "run_study"]
