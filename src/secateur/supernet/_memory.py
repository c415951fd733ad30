"""What modules remember from call to call, outside of parameters and buffers."""

import contextlib
from collections.abc import Generator
from typing import Any

from torch import Tensor, nn

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


class Memories:
    """Attributes in which modules may keep what they computed: tensors, nothing yet, or dictionaries.

    Attention biases that are looked up once, in the first call in evaluation mode, are those of the subnet that ran.

    Args:
        model: Whose modules.
    """

    def __init__(self, model: nn.Module):
        self._places = [
            (module, name)
            for module in model.modules()
            for name, value in vars(module).items()
            if name not in _OF_EVERY_MODULE and (value is None or isinstance(value, Tensor | dict))
        ]

    @contextlib.contextmanager
    def kept_out(self) -> Generator[None]:
        """Whatever is remembered meanwhile is forgotten afterwards."""
        before: list[tuple[dict[str, Any], str, Any]] = []
        for module, name in self._places:
            held = vars(module)
            before.append((held, name, held[name]))
            if isinstance(held[name], dict):
                held[name] = held[name].copy()
        try:
            yield
        finally:
            for held, name, value in before:
                held[name] = value
