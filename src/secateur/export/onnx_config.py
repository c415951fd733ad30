"""How an ONNX file is written: its opset, free image sizes, 16-bit floats, chosen outputs."""

import difflib
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, cast

from torch import nn

from secateur._kinds import settings
from secateur.errors import ExportError

OLDEST_OPSET = 18
"""torch's exporter writes no older one."""


@settings
class OnnxConfig:
    """How an ONNX file is written. Inputs and outputs stay float32 in any case.

    Attributes:
        opset: The version of ONNX's operations, from 18 on; None means that of torch's exporter.
        free_size: Whether height and width of images are free, beside the batch size. The model must take images of
            other sizes itself.
        half: Whether the file holds and computes with float16. A model whose weights are float16 is always written so.
        outputs: The modules whose outputs the file returns instead of those of the model, by their names, such as the
            raw heads of a detector; empty means those of the model.
    """

    opset: int | None = None
    free_size: bool = False
    half: bool = False
    outputs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.opset is not None:
            import onnx

            newest = onnx.defs.onnx_opset_version()
            if not OLDEST_OPSET <= self.opset <= newest:
                raise ExportError(
                    f"`opset` must be from {OLDEST_OPSET}, the oldest that torch writes, to {newest}, the newest that "
                    f"the installed onnx knows; got {self.opset}."
                )
        twice = sorted({name for name in self.outputs if self.outputs.count(name) > 1})
        if twice or not all(self.outputs):
            got = f"{twice[0]!r} twice" if twice else "an empty name"
            raise ExportError(f"`outputs` must name modules of the model, each once; got {got}.")

    def check(self, model: nn.Module) -> None:
        """Refuse outputs that a model does not have.

        Raises:
            ExportError: With names that are near.
        """
        known = [name for name, _ in model.named_modules() if name]
        for name in self.outputs:
            if name not in known:
                near = difflib.get_close_matches(name, known, 4, 0.4) or known[:4]
                raise ExportError(
                    f"`outputs` must name modules of the model; got {name!r}. It has {', '.join(near)}, among others."
                )

    def to_json(self) -> dict[str, object]:
        """Return a JSON object."""
        return {**asdict(self), "outputs": list(self.outputs)}

    @classmethod
    def from_json(cls, data: object) -> "OnnxConfig":
        """Read what `to_json` gives.

        Raises:
            ExportError: If it is anything else.
        """
        if not isinstance(data, Mapping):
            return cls()
        found = cast(Mapping[str, Any], data)
        opset, outputs = found.get("opset"), found.get("outputs", [])
        flags = [found.get(name, False) for name in ("free_size", "half")]
        listed = isinstance(outputs, list) and all(isinstance(name, str) for name in cast(list[object], outputs))
        if not (opset is None or type(opset) is int) or not listed or not all(type(each) is bool for each in flags):
            raise ExportError("secateur.json does not say how the ONNX file was written. Export it again.")
        return cls(opset, flags[0], flags[1], tuple(outputs))
