"""Groups of flags: classes whose fields typer sees as flags of the command itself."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """Let typer see the fields of every parameter that is a dataclass, in its place, as parameters of the command.

    So flags that commands share are written once, with their usual values, and reach the command as one object.
    """
    parameters = inspect.signature(command).parameters
    groups: dict[str, Any] = {name: p.annotation for name, p in parameters.items() if is_dataclass(p.annotation)}
    flat = [
        flag
        for name, parameter in parameters.items()
        for flag in (inspect.signature(groups[name]).parameters.values() if name in groups else [parameter])
    ]

    @functools.wraps(command)
    def run(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in fields(group)})
        command(**given)

    run.__signature__ = inspect.Signature(flat)  # type: ignore[attr-defined]
    run.__annotations__ = {flag.name: flag.annotation for flag in flat}
    return run
