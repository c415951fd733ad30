"""The processes that torchrun has started for one program. Nothing here loads torch."""

import os

from secateur.errors import TrainingError


def processes() -> int:
    """How many processes torchrun has started for this program; 1 without it.

    Raises:
        TrainingError: If its variables are no numbers.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return 1
    text = os.environ["WORLD_SIZE"] or "1"
    if not text.isdecimal() or int(text) < 1:
        raise TrainingError(f"WORLD_SIZE must be a number of processes, as torchrun sets it; got {text!r}. Unset it.")
    return int(text)


def is_first() -> bool:
    """Whether this process is the first of them, or alone: the one that speaks."""
    return os.environ.get("RANK", "0") in ("", "0")
