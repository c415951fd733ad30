"""Write small image sets to disk in the layouts that users have."""

import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

CLASSES = ("cat", "dog", "owl")


def encode(pixels: np.ndarray) -> bytes:
    """A lossless PNG of (h, w) or (h, w, 3) bytes."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def random_pixels(n: int, height: int = 8, width: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, height, width, 3), dtype=np.uint8)


def save_table(
    path: Path,
    images: Sequence[bytes | None],
    labels: Sequence[object],
    *,
    names: Sequence[str] | None = CLASSES,
    image_column: str = "img",
    label_column: str = "label",
    struct: bool = True,
) -> None:
    """Write one parquet file as the datasets library does."""
    fields = [{"bytes": image, "path": None} for image in images] if struct else list(images)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())]) if struct else pa.binary()
    table = pa.table({image_column: pa.array(fields, kind), label_column: pa.array(list(labels))})
    if names is not None:
        features = {label_column: {"names": list(names), "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
