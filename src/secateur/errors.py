"""The errors a user can cause, each with a way out in its message.

The command line prints them without a traceback and exits with code 2. Everything else that escapes is a bug
and keeps its traceback.
"""


class SecateurError(Exception):
    """Base class: what was wrong, with which value, and what to do about it."""


class BudgetError(SecateurError, ValueError):
    """A budget that cannot be read or cannot be met."""


class TraceError(SecateurError):
    """A model that could not be traced with the example it was given."""


class SelectionError(SecateurError, ValueError):
    """A choice about a graph that names nothing in it, or leaves nothing to cut."""


class SurgeryError(SecateurError, ValueError):
    """An architecture that does not fit the graph, or a cut that could not be made correct."""


class DataError(SecateurError, ValueError):
    """Images or labels that cannot be used."""


class ModelError(SecateurError, ValueError):
    """A model name, factory or weights file that cannot be used."""


class SparsityError(SecateurError, ValueError):
    """Scores, budgets or masks of single weights that do not fit the model or each other."""


class ArtifactError(SecateurError, ValueError):
    """An artifact folder that is damaged, foreign, or from the future."""


class TrainingError(SecateurError, ValueError):
    """Training settings or values (NaN) that cannot lead to a result."""


class WorkerError(SecateurError):
    """Work handed to other processes that was not done."""


class ExportError(SecateurError):
    """An exported file that could not be made or does not agree with the model."""
