"""An ONNX file that may come from a stranger: opened only if all it does is compute, once, from what it holds."""

from pathlib import Path
from typing import Any

import torch

from secateur.artifact import read_bytes
from secateur.errors import ExportError
from secateur.export._onnx import open_session, session_runner
from secateur.export._parity import Runner

MOST_BYTES = 2**31
"""One ONNX file is one protobuf message, and those end there."""
_REPEATING = frozenset({"Loop", "Scan", "If", "SequenceMap"})
"""Operations that run others again and again, or by what they find. No export of ours has them."""
_DOMAINS = frozenset({"", "ai.onnx"})


def plain_onnx_runner(path: Path) -> Runner:
    """Open an ONNX file to run it.

    Raises:
        ArtifactError: If it is a link, a pipe or a device.
        ExportError: If it could run without end, or reads other files.
    """
    content = read_bytes(path, limit=MOST_BYTES)
    check_plain(content)
    return session_runner(open_session(content, threads=torch.get_num_threads()))


def check_plain(content: bytes) -> None:
    """Refuse a file that could run without end, or that has its numbers in other files.

    Raises:
        ExportError: If it is one.
    """
    import onnx

    model: Any = onnx.ModelProto()
    model.ParseFromString(content)
    nodes = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    for node in nodes:
        inner = any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute)
        if node.op_type in _REPEATING or inner:
            raise ExportError(f"it has the operation {node.op_type!r}, which can repeat others without end")
        held = [attribute.t for attribute in node.attribute if attribute.HasField("t")]
        if any(map(_is_elsewhere, held)):
            raise ExportError("it has its numbers in other files")
    own = {function.domain for function in model.functions}
    strange = sorted({node.domain for node in nodes} - _DOMAINS - own)
    if strange:
        raise ExportError(f"it needs operations that are not ONNX's: {strange[:5]}")
    if any(map(_is_elsewhere, model.graph.initializer)) or model.graph.sparse_initializer:
        raise ExportError("it has its numbers in other files")


def _is_elsewhere(tensor: Any) -> bool:
    return bool(tensor.external_data) or tensor.data_location != 0
