"""The whole way from a trained network and a budget to a verified artifact with a report."""

from secateur.pipeline.compress import compress
from secateur.pipeline.config import (
    ALIGNED,
    GENTLE,
    HEAL,
    SPACE,
    STRATEGY,
    Branches,
    CompressResult,
    FromScratch,
    Inherit,
    Start,
    usual_blocks,
)
from secateur.pipeline.demo import Demo, demo
from secateur.pipeline.distill import Distilled, Hinting, Pupil, distill_into
from secateur.pipeline.exports import export_files
from secateur.pipeline.inspect import Survey, survey
from secateur.pipeline.load import Opened, load, open_model, usual_size
from secateur.pipeline.verify import Verified, verify
from secateur.pipeline.workspace import Leftover, check_belongs, check_output

__all__ = [
    "ALIGNED",
    "GENTLE",
    "HEAL",
    "SPACE",
    "STRATEGY",
    "Branches",
    "CompressResult",
    "Demo",
    "Distilled",
    "FromScratch",
    "Hinting",
    "Inherit",
    "Leftover",
    "Opened",
    "Pupil",
    "Start",
    "Survey",
    "Verified",
    "check_belongs",
    "check_output",
    "compress",
    "demo",
    "distill_into",
    "export_files",
    "load",
    "open_model",
    "survey",
    "usual_blocks",
    "usual_size",
    "verify",
]
