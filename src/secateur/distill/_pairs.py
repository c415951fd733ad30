"""Which modules of two unlike networks belong together."""

from secateur.errors import TrainingError
from secateur.graph import ChannelGraph


def paired_stages(student: ChannelGraph, teacher: ChannelGraph) -> dict[str, str]:
    """The last modules at each resolution of the student, each with the teacher's at the same resolution.

    Where no resolution is common, the last stages are paired, as many as both have.

    Args:
        student: Traced with images of one size.
        teacher: Traced with images of the same size.

    Returns:
        Taps: module names of the student, each with the teacher's, in order of execution.

    Raises:
        TrainingError: If a network has no stage.
    """
    here, there = _resolutions(student), _resolutions(teacher)
    if not here or not there:
        raise TrainingError(
            f"`{'teacher' if here else 'student'}` must have modules with traced channels to listen to; got none. "
            "Name the pairs of modules yourself."
        )
    by_size = {size: name for name, size in there.items()}
    common = {name: by_size[size] for name, size in here.items() if size in by_size}
    if common:
        return common
    count = min(len(here), len(there))
    return dict(zip(list(here)[-count:], list(there)[-count:], strict=True))


def _resolutions(graph: ChannelGraph) -> dict[str, tuple[int, ...]]:
    """Sizes of the stages' outputs without the batch and the channels; empty sizes are left out."""
    found: dict[str, tuple[int, ...]] = {}
    for name in graph.stages:
        activation = graph.activations[name]
        size = tuple(n for dim, n in enumerate(activation.shape) if dim not in (0, activation.dim))
        if len(size) == 2:
            found[name] = size
    return found
