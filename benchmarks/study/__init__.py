"""The study of pruning and distillation: which kind of pruning suits a student that learns from a teacher?"""

from benchmarks.study.plan import FAMILIES, Cell, Family, Order, Pruned, Study, Taught
from benchmarks.study.results import gains
from benchmarks.study.run import StudyResult, run_study

__all__ = ["FAMILIES", "Cell", "Family", "Order", "Pruned", "Study", "StudyResult", "Taught", "gains", "run_study"]
