"""The whole way: from a trained network and a budget to a verified artifact with a report."""

from secateur.pipeline._compress import compress
from secateur.pipeline._demo import Demo, demo
from secateur.pipeline._export import export_files
from secateur.pipeline._foreign import distill_into
from secateur.pipeline._formats import Format, check_formats
from secateur.pipeline._open import Opened, load, open_model, usual_size
from secateur.pipeline._outset import check_belongs, check_output
from secateur.pipeline._plan import ALIGNED, GENTLE, SPACE, STRATEGY, usual_blocks
from secateur.pipeline._pupil import Distilled, Hinting, Pupil
from secateur.pipeline._result import CompressResult
from secateur.pipeline._start import HEAL, FromScratch, Inherit, Start
from secateur.pipeline._study import FAMILIES, Family, Study, StudyResult, run_study
from secateur.pipeline._survey import Survey, survey
from secateur.pipeline._traced import Branches
from secateur.pipeline._verify import Verified, verify
from secateur.pipeline._work import Leftover

__all__ = [
    "ALIGNED",
    "FAMILIES",
    "GENTLE",
    "HEAL",
    "SPACE",
    "STRATEGY",
    "Branches",
    "CompressResult",
    "Demo",
    "Distilled",
    "Family",
    "Format",
    "FromScratch",
    "Hinting",
    "Inherit",
    "Leftover",
    "Opened",
    "Pupil",
    "Start",
    "Study",
    "StudyResult",
    "Survey",
    "Verified",
    "check_belongs",
    "check_formats",
    "check_output",
    "compress",
    "demo",
    "distill_into",
    "export_files",
    "load",
    "open_model",
    "run_study",
    "survey",
    "usual_blocks",
    "usual_size",
    "verify",
]
