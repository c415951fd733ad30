"""A copy of a model that shares the memory of its parameters until the copy writes to them."""

import weakref
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from secateur._runtime import add_run_context_, copy_model


def shadow_copy(model: nn.Module) -> nn.Module:
    """Return a copy in eval mode that shares the memory of the parameters: running it leaves the model as it was.

    A forward pass that writes to a parameter, such as a codebook that follows its inputs, changes that of the copy.
    """
    shared = {id(parameter): _alias(parameter) for parameter in model.parameters()}
    shadow = copy_model(model, dict(shared))
    storages = {twin.untyped_storage()._cdata for twin in shared.values() if _has_storage(twin)}  # pyright: ignore[reportPrivateUsage]
    # A weak reference, because a cycle would keep the memory of every copy until garbage is collected.
    own = weakref.ref(shadow)
    add_run_context_(shadow, lambda _: CopyOnWriteMode(own(), storages))
    # `eval()` visits every module, which takes longer than the copy; it is needed only if it would change something.
    in_eval = all(
        not module.training and type(module).train is nn.Module.train and type(module).eval is nn.Module.eval
        for module in model.modules()
    )
    return shadow if in_eval else shadow.eval()


def _alias(parameter: nn.Parameter) -> nn.Parameter:
    """Return a parameter on the same memory, whose gradient, flags and assigned data are its own."""
    if parameter.is_inference():
        # No recorder sees what is computed with such a tensor.
        with torch.inference_mode(mode=False):
            return nn.Parameter(parameter.clone(), parameter.requires_grad)
    if type(parameter) is not nn.Parameter:
        return parameter
    # Unlike `detach()`, `data` has a version counter of its own.
    twin = nn.Parameter(parameter.data, parameter.requires_grad)
    vars(twin).update(vars(parameter))
    return twin


def _has_storage(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and type(tensor) is nn.Parameter


class CopyOnWriteMode(TorchDispatchMode):
    """A mode in which one run of a copy does not change the memory that it shares.

    Before the first write into shared memory its values are saved. After the run, the parameters of the copy get memory
    of their own, with the new values, and the saved values return to the shared memory. So views of a parameter, which
    the model may have made before it writes, see the new values during the run.

    Args:
        shadow: The copy.
        storages: The addresses of the shared storages.
    """

    def __init__(self, shadow: nn.Module | None, storages: set[int]) -> None:
        super().__init__()
        self._shadow, self._storages = shadow, storages
        self._saved: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for position, name in written_arguments(func):
            tensors = kwargs.get(name) if name in kwargs or position >= len(args) else args[position]
            for tensor in tensors if isinstance(tensors, list | tuple) else (tensors,):
                if isinstance(tensor, Tensor) and tensor.layout == torch.strided:
                    self._save(tensor.untyped_storage())
        return func(*args, **kwargs)

    def _save(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata  # pyright: ignore[reportPrivateUsage]
        if key in self._storages and key not in self._saved:
            self._saved[key] = storage, storage.clone()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if self._shadow is None or not self._saved:
            return
        for parameter in self._shadow.parameters():
            if _has_storage(parameter) and parameter.untyped_storage()._cdata in self._saved:  # pyright: ignore[reportPrivateUsage]
                parameter.data = parameter.data.clone()
        for storage, before in self._saved.values():
            storage.copy_(before)
        self._saved.clear()


@lru_cache(4096)
def written_arguments(func: Any) -> tuple[tuple[int, str], ...]:
    """Return the position and name of the arguments that an ATen call writes to."""
    if not func._schema.is_mutable:
        return ()
    arguments = enumerate(func._schema.arguments)
    return tuple((n, a.name) for n, a in arguments if a.alias_info is not None and a.alias_info.is_write)
