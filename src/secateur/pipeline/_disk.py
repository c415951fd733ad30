"""A disk that cannot be written, said in words."""

import contextlib
from collections.abc import Generator
from pathlib import Path

from secateur.errors import ArtifactError


@contextlib.contextmanager
def told_of_disk(folder: Path) -> Generator[None]:
    """A disk that cannot be written is said in words.

    Raises:
        ArtifactError: For any OSError inside.
    """
    try:
        yield
    except OSError as error:
        raise ArtifactError(
            f"{folder} could not be written: {error.strerror or error}. Nothing half-written is left there; make room "
            "or choose another folder, then go on with --resume."
        ) from error
