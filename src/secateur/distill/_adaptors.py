"""Adaptors: small layers that bring a student's feature to the shape of its teacher's."""

from torch import Tensor, nn
from torch.nn import functional as F

from secateur.distill._features import channel_dim
from secateur.distill._seeding import initialised
from secateur.distill._taps import Taps, tapped
from secateur.errors import TrainingError


class Resize(nn.Module):
    """Maps (batch, channels, height, width) in another resolution; has no parameters.

    Adaptive average pooling if neither side grows, else bilinear interpolation (``align_corners=False``).

    Attributes:
        size: (height, width) of the result.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def forward(self, feature: Tensor) -> Tensor:
        """The map in the other resolution."""
        if self.size[0] <= feature.shape[2] and self.size[1] <= feature.shape[3]:
            return F.adaptive_avg_pool2d(feature, self.size)
        return F.interpolate(feature, self.size, mode="bilinear", align_corners=False)

    def extra_repr(self) -> str:
        """The size."""
        return f"size={self.size}"


def adaptors_of(student: nn.Module, teacher: nn.Module, taps: Taps, example: Tensor, *, seed: int = 0) -> nn.ModuleDict:
    """The layers that bring the student's features to the shapes of the teacher's, read off one dry forward pass.

    Nothing (`torch.nn.Identity`) where the shapes are equal. Else:

    - maps (batch, channels, height, width): a 1x1 convolution where the channels differ, and `Resize` where the
      resolution differs, in the order that computes the convolution at the lower resolution;
    - vectors (batch, channels) and tokens (batch, tokens, channels): a linear layer.

    Maps with channels last, (batch, height, width, channels), cannot be told from others: write their adaptors by hand.

    Args:
        student: The model that learns.
        teacher: The model it learns from.
        taps: Module names of the student, each with the teacher's.
        example: An input that both take; one image is enough.
        seed: Of the initial weights (torch's defaults).

    Returns:
        An adaptor for each pair, in order, under the student's module name with "/" for ".": names in a ModuleDict
        have no dots. On the CPU, float32, in training mode.

    Raises:
        TrainingError: If a module is missing (with the names nearest to it), or no adaptor can join the shapes.
    """
    features = tapped(student, teacher, taps, example)
    with initialised(seed):
        return nn.ModuleDict(
            {
                name.replace(".", "/"): _adaptor(name, of_student, of_teacher)
                for name, of_student, of_teacher in zip(taps, *features, strict=True)
            }
        )


def _adaptor(name: str, student: Tensor, teacher: Tensor) -> nn.Module:
    here, there = tuple(student.shape), tuple(teacher.shape)
    if here == there:
        return nn.Identity()
    joinable = len(here) == len(there) and len(here) in {2, 3, 4} and here[0] == there[0]
    if not joinable or (len(here) == 3 and here[1] != there[1]):
        raise TrainingError(
            f"`taps` must pair features that an adaptor can join; got {here} and {there} at {name!r}. Pair two maps, "
            "two vectors, or tokens of one number; or give an adaptor of your own."
        )
    dim = channel_dim(student)
    if len(here) != 4:
        return nn.Linear(here[dim], there[dim])
    layers: list[nn.Module] = [nn.Conv2d(here[1], there[1], 1)] if here[1] != there[1] else []
    if here[2:] != there[2:]:
        smaller = there[2] * there[3] < here[2] * here[3]
        layers.insert(0 if smaller else len(layers), Resize((there[2], there[3])))
    return layers[0] if len(layers) == 1 else nn.Sequential(*layers)
