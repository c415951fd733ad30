"""The errors that a user can cause. Every message says what was wrong, with which value, and what to do.

The command line prints them without a traceback and exits with code 2. Any other exception that escapes is a bug and
keeps its traceback.
"""

from secateur._text import visible


class SecateurError(Exception):
    """The base class of all errors that a user can cause. Values of strangers in a message cannot steer a terminal."""

    def __str__(self) -> str:
        return visible(super().__str__())


class KindError(SecateurError, TypeError):
    """An argument or a setting of the wrong type."""


class BudgetError(SecateurError, ValueError):
    """A budget that cannot be parsed or cannot be met."""


class TraceError(SecateurError):
    """A model that could not be traced with the example it was given."""


class SelectionError(SecateurError, ValueError):
    """A selection of layers that matches nothing in the graph, or leaves nothing to cut."""


class SurgeryError(SecateurError, ValueError):
    """An architecture that does not fit the graph, or a cut that could not be made correct."""


class DataError(SecateurError, ValueError):
    """Images or labels that cannot be used."""


class ModelError(SecateurError, ValueError):
    """A model name, factory or weights file that cannot be used."""


class SparsityError(SecateurError, ValueError):
    """Scores, densities or masks of single weights that do not fit the model or each other."""


class ArtifactError(SecateurError, ValueError):
    """An artifact folder that is damaged, was not written by Secateur, or was written by a later version."""


class TrainingError(SecateurError, ValueError):
    """Training settings that are invalid, or a training run that produced NaN or infinity."""


class WorkerError(SecateurError):
    """Work that other processes were given and did not complete."""


class ExportError(SecateurError):
    """An exported file that could not be written or does not agree with the model."""
