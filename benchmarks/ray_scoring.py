"""Measure the scoring of candidates on Ray: two workers against one, one thread each, and against this process.

    python benchmarks/ray_scoring.py

The work is chunks of eight networks of a ResNet-20, as a search scores them (`held_out_losses`), on images of
CIFAR-10. Each pool does an uncounted round first, in which workers start and unpack the supernet. Then they take
turns. Times are wall seconds, medians of rounds, so nothing else should run. The script checks that the losses are
the same to the last bit. Writes results/ray_scoring.json.
"""

import argparse
import statistics
import time
from contextlib import ExitStack
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from _record import CIFAR10, WEIGHTS, surroundings, table, write_record

from secateur.cost import Budget, CostModel
from secateur.data import draw_calibration, load_data
from secateur.graph import find_stages, trace
from secateur.models import load_model
from secateur.nas import InPlace, Subnet, Supernet, Widths, order_by_score
from secateur.nas.common import set_aside
from secateur.nas.swp import CandidateScorer, held_out_losses
from secateur.nas.swp_candidates import CandidateSpace
from secateur.search import L2, ScoringInputs, SearchContext, SearchSpace
from secateur.train import Precision, copy_to_device, open_fabric
from secateur.workers import InProcess, OnRay, Pool, Workers

CHUNK = 8
WAYS: dict[str, Workers] = {
    "in process": InProcess(),
    "1 worker": OnRay(workers=1, threads_each=1),
    "2 workers": OnRay(workers=2, threads_each=1),
}


def prepared(images: int, chunks: int) -> tuple[CandidateScorer, list[list[Subnet]]]:
    """Prepare a scorer, and networks to score."""
    cpu = torch.device("cpu")
    model, _ = load_model("cifar_resnet20", weights=WEIGHTS / "cifar10_resnet20.safetensors")
    data = load_data(str(CIFAR10), limit=images + 1000, seed=0)
    learned, judged = set_aside(data.train, images, 0)
    batches = draw_calibration(learned, images // 4, device=cpu, seed=0, batch_size=250)
    graph = trace(model.eval(), batches[0][0][:1])
    inputs = ScoringInputs(model, graph, batches)
    space = SearchSpace(min_kept_fraction=0)
    problem = SearchContext(inputs, CostModel(graph), Budget(macs="50%"), space, lambda *_: None)
    options = CandidateSpace.of(problem, find_stages(model, graph), Widths(), None)
    supernet = copy_to_device(Supernet(model, graph, order_by_score(L2().scores(inputs))), cpu)
    judge = CandidateScorer.of(
        supernet,
        stages=options.stages,
        supervision=InPlace(),
        calibration=[images for images, _ in batches],
        images=judged,
        fabric=open_fabric(Precision.FLOAT32, device=cpu),
    )
    draw = np.random.default_rng(0)
    return judge, [[options.subnet(options.sample(draw)) for _ in range(CHUNK)] for _ in range(chunks)]


def judged(pool: Pool[list[Subnet], Any], chunks: list[list[Subnet]]) -> np.ndarray:
    """Return the losses (networks, stages), in the order of the networks."""
    found = dict(pool.map(chunks))
    return np.concatenate([found[number] for number in range(len(chunks))])


def measure(judge: CandidateScorer, chunks: list[list[Subnet]], rounds: int) -> dict[str, Any]:
    """Measure all pools in turns."""
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    started: dict[str, float] = {}
    pools: dict[str, Pool[list[Subnet], Any]] = {}
    expected: np.ndarray | None = None
    with ExitStack() as stack:
        for way, workers in WAYS.items():
            began = time.perf_counter()
            pools[way] = stack.enter_context(workers.running(held_out_losses, judge))
            judged(pools[way], chunks[: pools[way].size])
            started[way] = time.perf_counter() - began
        for _ in range(rounds):
            for way, pool in pools.items():
                began = time.perf_counter()
                found = judged(pool, chunks)
                seconds[way].append(time.perf_counter() - began)
                expected = found if expected is None else expected
                assert np.array_equal(found, expected), f"other losses: {way}"
    medians = {way: statistics.median(found) for way, found in seconds.items()}
    return {
        "networks": CHUNK * len(chunks),
        "stages": len(judge.stages),
        "first_round_s": started,
        "seconds": seconds,
        "networks_per_second": {way: CHUNK * len(chunks) / median for way, median in medians.items()},
        "two_against_one": medians["1 worker"] / medians["2 workers"],
        "two_against_in_process": medians["in process"] / medians["2 workers"],
    }


def main() -> None:
    """Measure, print and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--chunks", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    judge, chunks = prepared(arguments.images, arguments.chunks)
    record = measure(judge, chunks, arguments.rounds)
    cells = [[way, f"{record['networks_per_second'][way]:.1f}", f"{record['first_round_s'][way]:.0f}"] for way in WAYS]
    print(table(["workers, one thread each", "networks/s", "start and first chunk, s"], cells))
    print(
        f"two against one: {record['two_against_one']:.2f}, against in process {record['two_against_in_process']:.2f}"
    )
    ray = {"ray": version("ray"), "images": arguments.images, "model": "cifar_resnet20"}
    print(write_record("ray_scoring", {"surroundings": surroundings(), **ray, **record}))


if __name__ == "__main__":
    main()
