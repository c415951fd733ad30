"""Measure how the time of tracing grows with the model: CPU seconds against the number of operations.

    python benchmarks/growth.py

The models are ResNet-18/50/101/152 and EfficientNet-B0..B4 of torchvision, on images of 64 pixels. The plain forward
pass is measured for comparison: a trace does not do its arithmetic. Each time is the best of several rounds. Writes
results/growth.json and docs/growth.svg, with the straight line through the origin that fits best.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _record import surroundings, write_record
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from secateur.graph import trace

MODELS = (
    *(f"resnet{depth}" for depth in (18, 50, 101, 152)),
    *(f"efficientnet_b{size}" for size in range(5)),
)
PICTURE = Path(__file__).resolve().parents[1] / "docs" / "growth.svg"


class Counter(TorchDispatchMode):
    """Count ATen calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


def seconds(work: Callable[[], object]) -> float:
    """Return the CPU seconds of one run."""
    start = time.process_time()
    work()
    return time.process_time() - start


def measure(name: str, rounds: int) -> dict[str, Any]:
    """Return the operations, the best forward time and the best trace time of one model."""
    import torchvision

    model: nn.Module = torchvision.models.get_model(name, weights=None).eval()
    image = torch.zeros(1, 3, 64, 64)
    with torch.no_grad(), Counter() as counter:
        model(image)
    forwards, traces = [], []
    for _ in range(rounds):
        with torch.no_grad():
            forwards.append(seconds(lambda: model(image)))
        traces.append(seconds(lambda: trace(model, image)))
    return {"model": name, "operations": counter.calls, "forward_s": min(forwards), "trace_s": min(traces)}


def draw(rows: list[dict[str, Any]], slope: float) -> str:
    """Draw a scatter plot with the fitted line, as SVG that is readable on light and dark backgrounds."""
    width, height, margin = 640, 400, 56
    most = 1.1 * max(row["operations"] for row in rows)
    top = 1.15 * max(row["trace_s"] for row in rows)

    def at(operations: float, spent: float) -> tuple[float, float]:
        across = margin + operations / most * (width - 2 * margin)
        return across, height - margin - spent / top * (height - 2 * margin)

    (x0, y0), (x1, y1) = at(0, 0), at(most, min(slope * most, top))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<path d="M{x0},{margin} V{y0} H{width - margin}" fill="none" stroke="#555"/>',
        f'<path d="M{x0},{y0} L{x1:.1f},{y1:.1f}" stroke="#999" stroke-dasharray="4"/>',
        f'<text x="{width / 2}" y="{height - 16}" text-anchor="middle">operations of one forward pass</text>',
        f'<text x="{margin}" y="{margin - 16}">trace, CPU seconds</text>',
        f'<text x="{x1:.1f}" y="{y1 - 6:.1f}" text-anchor="end" fill="#777">{1e3 * slope:.2f} ms each</text>',
    ]
    for row in rows:
        x, y = at(row["operations"], row["trace_s"])
        color = "#3367a8" if row["model"].startswith("resnet") else "#b5542a"
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{color}"/>')
        parts.append(f'<text x="{x + 7:.1f}" y="{y + 12:.1f}">{row["model"]} ({row["trace_s"]:.2f})</text>')
    return "\n".join([*parts, "</svg>\n"])


def main() -> None:
    """Measure, fit, write the record and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measure(name, arguments.rounds) for name in MODELS]
    for row in rows:
        print(row, flush=True)
    operations, spent = (np.array([row[key] for row in rows], dtype=float) for key in ("operations", "trace_s"))
    slope = float(operations @ spent / (operations @ operations))
    power = float(np.polyfit(np.log(operations), np.log(spent), 1)[0])
    write_record(
        "growth",
        {"rows": rows, "seconds_per_operation": slope, "fitted_power": power, "surroundings": surroundings()},
    )
    PICTURE.write_text(draw(rows, slope))
    print(f"{1e3 * slope:.3f} ms per operation; the time grows with operations to the power {power:.2f}")


if __name__ == "__main__":
    main()
