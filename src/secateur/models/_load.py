"""From a short description to a model with its weights."""

from pathlib import Path

from torch import nn

from secateur.models._source import ModelSource
from secateur.models._weights import load_weights_


def load_model(
    spec: str,
    *,
    weights: Path | str | None = None,
    num_classes: int | None = None,
    in_channels: int | None = None,
    trust_source: bool = False,
    seed: int = 0,
) -> tuple[nn.Module, ModelSource]:
    """Build a model and load its weights; nothing is downloaded.

    Args:
        spec: One of

            - ``cifar_resnet20`` (32, 44, 56, 110) or ``digits_resnet``, which come with Secateur,
            - ``timm:NAME`` or ``torchvision:NAME`` (image classification),
            - ``python:package.module:factory``: a function of yours that returns a model.

        weights: A ``.safetensors`` file, or a torch file without code; None keeps fresh weights.
        num_classes: Outputs; None takes the model's default.
        in_channels: Of the images; None takes the model's default.
        trust_source: Allow ``python:`` to import and run code of that name.
        seed: Of fresh weights.

    Returns:
        The model in evaluation mode on the CPU, and the source that builds it again.

    Raises:
        ModelError: If the name is unknown, code is not trusted or fails, or the weights do not fit.
    """
    source = ModelSource.parse(spec, num_classes=num_classes, in_channels=in_channels)
    model = source.build(trust_source=trust_source, seed=seed)
    if weights is not None:
        load_weights_(model, weights)
    return model, source
