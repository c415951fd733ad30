"""The tensors of modules and optimisers by name, and the moving average of weights."""

import copy
import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim.swa_utils import get_ema_multi_avg_fn

Tensors = Mapping[str, Tensor]


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer once, also the buffers a state_dict leaves out. The tensors themselves, no copies."""
    return {
        **{name: parameter.detach() for name, parameter in model.named_parameters()},
        **dict(model.named_buffers()),
    }


def copied(tensors: Tensors) -> dict[str, Tensor]:
    """Copies on the same devices."""
    return {name: tensor.clone() for name, tensor in tensors.items()}


def write_tensors_(model: nn.Module, tensors: Tensors) -> None:
    """Copy values into the model's own tensors, which keep device, type and memory order."""
    with torch.no_grad():
        for name, tensor in tensors_of(model).items():
            tensor.copy_(tensors[name])


def optimiser_tensors(optimiser: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimiser's running tensors, named "<state name>/<parameter name>"."""
    return {
        f"{key}/{name}": value
        for name, parameter in model.named_parameters()
        for key, value in optimiser.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def write_optimiser_(optimiser: torch.optim.Optimizer, model: nn.Module, tensors: Tensors) -> None:
    """Inverse of `optimiser_tensors`."""
    parameters = dict(model.named_parameters())
    for key, value in tensors.items():
        kind, name = key.split("/", 1)
        parameter = parameters[name]
        # Running means lie beside their parameter; Adam's step count is a scalar on the CPU, as torch makes it.
        beside = torch.empty_like(value if kind == "step" else parameter, requires_grad=False)
        optimiser.state[parameter][kind] = beside.copy_(value)


def digest(model: nn.Module) -> str:
    """SHA-256 over names, shapes, types and values of all tensors: equal for equal models only."""
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors_of(model).items()):
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        sha.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        sha.update(flat.view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def finite(model: nn.Module) -> bool:
    """Whether every parameter is finite; reads one number from the device."""
    return bool(get_total_norm([p.detach() for p in model.parameters()]).isfinite())


def average_decay(decay: float, update: int) -> float:
    """Decay of a moving average at its n-th update, n from 0: min(decay, (1 + n) / (10 + n)).

    The lower decay at first keeps the untrained start from weighing on the average.

    References:
        The rule of ``tf.train.ExponentialMovingAverage(num_updates=n)``.
    """
    return min(decay, (1 + update) / (10 + update))


class MovingAverage:
    """An exponential moving average of a model's parameters and floating buffers; other buffers are copied.

    Attributes:
        model: The average, in eval mode.
        decay: Per update, before the rule of `average_decay`.
        updates: Number of updates so far.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(requires_grad=False)
        self.decay = decay
        self.updates = 0
        tensors = tensors_of(self.model)
        self._floating = [name for name, tensor in tensors.items() if tensor.is_floating_point()]
        self._others = [name for name, tensor in tensors.items() if not tensor.is_floating_point()]

    def update(self, model: nn.Module) -> None:
        """Every floating tensor a becomes decay * a + (1 - decay) * x."""
        mine, theirs = tensors_of(self.model), tensors_of(model)
        average_ = get_ema_multi_avg_fn(average_decay(self.decay, self.updates))
        with torch.no_grad():
            average_([mine[n] for n in self._floating], [theirs[n] for n in self._floating], None)
            for name in self._others:
                mine[name].copy_(theirs[name])
        self.updates += 1
