"""Which weights the student is cut from."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from secateur.errors import DataError
from secateur.search._problem import Problem
from secateur.supernet import Supernet, calibrated
from secateur.train import tensors_of, write_tensors_


@dataclass(frozen=True)
class OriginalWeights:
    """Those of the model as it was: a short search leaves weights that are worse than these, cut and healed."""

    def check(self, problem: Problem) -> None:
        """Nothing is needed."""

    def of(self, supernet: Supernet, calibration: Sequence[Tensor], problem: Problem) -> None:
        """None: the model's own."""


@dataclass(frozen=True)
class SearchedWeights:
    """Those that the search has trained: for long searches, and for models that come without trained weights."""

    def check(self, problem: Problem) -> None:
        """Refuse a search that could not hand on its weights, before it begins.

        Raises:
            DataError: If there are batch norms and no images to measure them on.
        """
        evidence = problem.evidence
        norms = any(isinstance(getattr(module, "running_var", None), Tensor) for module in evidence.model.modules())
        if norms and not evidence.batches:
            raise DataError(
                "`batches` must hold training images for SearchedWeights, which measures batch norms on them; got none."
                " Pass some, or use hand_on=OriginalWeights()."
            )

    def of(self, supernet: Supernet, calibration: Sequence[Tensor], problem: Problem) -> Mapping[str, Tensor]:
        """The whole model's ``state_dict``, in its own order of channels, with batch-norm statistics of its own."""
        statistics = calibrated(supernet, supernet.full, calibration)
        write_tensors_(supernet.model, {**tensors_of(supernet.model), **statistics})
        trained = copy.deepcopy(problem.evidence.model)
        write_tensors_(trained, tensors_of(supernet.in_original_order()))
        return {name: tensor.detach() for name, tensor in trained.state_dict().items()}
