"""The command that measures: how long a pass of each of several models takes, in turns."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from secateur.cli import _options as options
from secateur.cli._boundary import out, told
from secateur.cli._targets import BenchBatch, BenchDevice, BenchTarget, BenchThreads, Rounds, TargetName

if TYPE_CHECKING:
    from secateur.latency import Latency


@told
def bench(
    *,
    models: Annotated[
        list[str], typer.Argument(help="Artifacts, or models as for --model; the first is compared with.")
    ],
    image_size: options.ImageSize = None,
    target: BenchTarget = TargetName.ORT,
    thread_count: BenchThreads = 1,
    batch: BenchBatch = 1,
    device: BenchDevice = "cpu",
    rounds: Rounds = 30,
    trust_source: options.TrustSource = False,
    as_json: options.AsJson = False,
    seed: options.Seed = 0,
    debug: options.Debug = False,
) -> None:
    """Measure the latency of models, in turns: warm-up, fixed threads, median and spread, and what else was running."""
    import json

    from secateur.cli._inputs import Inputs
    from secateur.cli._targets import target_of
    from secateur.latency import measure_each

    runtime = target_of(target, thread_count, batch, device, device_flag="--device")
    given = [Inputs(name, None, None, image_size=image_size, trust_source=trust_source, seed=seed) for name in models]
    found = measure_each([(each.opened.model, (each.example(batch),)) for each in given], runtime, rounds=rounds)
    names = [each.opened.name for each in given]
    if as_json:
        rows = [{"model": name, **latency.to_json()} for name, latency in zip(names, found, strict=True)]
        out().print(Text(json.dumps(rows, indent=1)), soft_wrap=True)
        return
    _show(names, [list(each.example(1).shape[1:]) for each in given], found)
    out().print(Text("Wrote nothing: bench only measures."))


def _show(names: list[str], shapes: list[list[int]], found: "list[Latency]") -> None:
    from secateur.cli._tables import plain_table
    from secateur.cost import format_cost

    first = found[0]
    columns = ("model", "input", "median", "quartiles", "spread", "speed of the first")
    table = plain_table(f"Latency of one pass, {first.runtime}", columns, numbers=4)
    for name, shape, latency in zip(names, shapes, found, strict=True):
        seconds = latency.seconds
        quartiles = f"{_time(seconds.lower)} to {_time(seconds.upper)}"
        speed = f"{first.seconds.median / seconds.median:.2f} x"
        table.add_row(
            name,
            "x".join(map(str, shape)),
            format_cost("latency_s", seconds.median),
            quartiles,
            f"{100 * seconds.spread:.1f} %",
            speed,
        )
    out().print(table)
    load = "unknown" if first.load is None else f"{first.load[0]:g} before, {first.load[1]:g} after (this run included)"
    out().print(
        Text(
            f"Batch {first.batch_size}, {first.threads} thread{'s' if first.threads > 1 else ''}, {first.rounds} "
            f"rounds in turns, {first.clock}. Load average {load}; "
            f"{first.machine['cores']} cores, {first.machine['cpu']}."
        ),
        soft_wrap=True,
    )


def _time(seconds: float) -> str:
    from secateur.cost import format_cost

    return format_cost("latency_s", seconds)
