"""Devices by name."""

from typing import TYPE_CHECKING

from secateur.errors import TrainingError

if TYPE_CHECKING:
    import torch

_KINDS = ("cpu", "cuda", "mps")


def check_device(flag: str, text: str, *, instead: str = "cpu") -> "torch.device":
    """The device of a name.

    Args:
        flag: That the name was given with, for the message.
        text: Such as cpu or cuda:1.
        instead: What to say instead, for the message.

    Raises:
        TrainingError: If this machine has no such device.
    """
    import torch

    reason = f"one of {', '.join(_KINDS)} is wanted"
    try:
        device = torch.device(text)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).strip().splitlines() or ["unknown"])[0]
    else:
        if device.type in _KINDS:
            return device
    raise TrainingError(
        f"`{flag}` must be a device that this machine has: cpu, cuda, cuda:N or mps; got {text!r} ({reason}). "
        f"Say {instead}."
    )
