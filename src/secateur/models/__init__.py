"""Models by name, their source as plain data, and weights from files that cannot run code."""

from secateur.models.source import ModelSource, load_model
from secateur.models.weights import load_weights_, read_weights
from secateur.models.zoo import (
    CifarResNet,
    PaddedShortcut,
    ProjectionShortcut,
    cifar_densenet40,
    cifar_densenet52,
    cifar_efficientnet,
    cifar_efficientnet_150,
    cifar_mobilenetv2,
    cifar_mobilenetv2_150,
    cifar_resnet20,
    cifar_resnet32,
    cifar_resnet44,
    cifar_resnet56,
    cifar_resnet110,
    digits_resnet,
    digits_resnet_wide,
)

__all__ = [
    "CifarResNet",
    "ModelSource",
    "PaddedShortcut",
    "ProjectionShortcut",
    "cifar_densenet40",
    "cifar_densenet52",
    "cifar_efficientnet",
    "cifar_efficientnet_150",
    "cifar_mobilenetv2",
    "cifar_mobilenetv2_150",
    "cifar_resnet20",
    "cifar_resnet32",
    "cifar_resnet44",
    "cifar_resnet56",
    "cifar_resnet110",
    "digits_resnet",
    "digits_resnet_wide",
    "load_model",
    "load_weights_",
    "read_weights",
]
