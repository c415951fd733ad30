"""Costs counted by running the model: independent of the channel graph, to check it against."""

import torch
from torch import Tensor, nn

from secateur.graph import shadow_of


def counted_macs(model: nn.Module, example: Tensor | tuple[Tensor, ...]) -> int:
    """Multiply-accumulates of one forward pass in evaluation mode at batch 1, counted operator by operator.

    Half of what torch's ``FlopCounterMode`` counts (convolutions, matrix products, attention). A copy of the model
    runs, so modes, buffers and the global random state stay as they were.

    Args:
        model: Any module.
        example: Its input, or several; only the first sample of each (dimension 0) is used.
    """
    # Imported here: it brings Triton along, a quarter of a second that only counting needs.
    from torch.utils.flop_counter import FlopCounterMode

    inputs = example if isinstance(example, tuple) else (example,)
    running = _without_gradients(shadow_of(model))
    fast_path = torch.backends.mha.get_fastpath_enabled()
    devices = sorted({tensor.device.index or 0 for tensor in inputs if tensor.is_cuda})
    with torch.random.fork_rng(devices=devices), torch.no_grad(), FlopCounterMode(display=False) as counter:
        try:
            # The fast path runs a whole attention layer as one operator that the counter does not know.
            torch.backends.mha.set_fastpath_enabled(False)
            running(*(tensor[:1] for tensor in inputs))
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)
    return counter.get_total_flops() // 2


def _without_gradients(shadow: nn.Module) -> nn.Module:
    """The shadow with parameters that share their numbers with the model's but require no gradient.

    The counter looks for the gradient function of every tensor that requires one, and fails where there is none.
    """
    frozen: dict[int, nn.Parameter] = {}
    for module in shadow.modules():
        for name, parameter in [*module.named_parameters(recurse=False)]:
            plain = frozen.setdefault(id(parameter), nn.Parameter(parameter.detach(), requires_grad=False))
            setattr(module, name, plain)
    return shadow


def counted_params(model: nn.Module) -> int:
    """Number of parameters; a shared one counts once."""
    return sum(parameter.numel() for parameter in model.parameters())
