"""Run the study cell by cell: each finished cell is a file, and what is finished is never done again."""

import json
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from benchmarks.study.bench import UNFINISHED, Bench
from benchmarks.study.plan import Cell, Pruned, Study
from benchmarks.study.results import page_of, write_parquet
from secateur._files import disk_errors, locked, write_atomic
from secateur._provenance import Provenance, changed_settings
from secateur.cost import Budget, count_macs, count_params
from secateur.data import ImageData
from secateur.errors import ArtifactError
from secateur.export import weights_bytes
from secateur.graph import trace
from secateur.pipeline.search_and_cut import with_zeros
from secateur.prune import Cubic, Sparsify, WeightPruning, cut, nonzero_params
from secateur.report import Page, performance_efficiency, write_page
from secateur.search import L1, SearchSpace, Uniform, search_architecture
from secateur.train import fabric_precision, open_fabric

_SETTINGS, _CELLS = "study.json", "cells"
_EVERY = 4
"""Steps between two changes of masks: recoveries are short."""


def silent(message: str) -> None:
    """Say nothing."""
    del message


@dataclass(frozen=True)
class StudyResult:
    """A finished study.

    Attributes:
        rows: One mapping per cell, see the columns of ``results.parquet``.
        table: ``results.parquet``.
        page: ``study.html``.
        content: What the page shows.
    """

    rows: tuple[Mapping[str, Any], ...]
    table: Path
    page: Path
    content: Page


def run_study(
    study: Study,
    data: ImageData,
    *,
    out: Path,
    device: torch.device | None = None,
    tell: Callable[[str], None] = silent,
    command: str = "",
) -> StudyResult:
    """Prune and distill in all ways, and write the table and the page.

    Every network and every cell is a file of its own in ``out``. An interrupted study, killed at any moment, goes on
    when it is started again with the same settings, in the middle of a training too; one process at a time.

    Args:
        study: What is compared.
        data: The images.
        out: Folder of the study; made if it is not there.
        device: Where to compute; None means the accelerator if there is one.
        tell: Receives one sentence per network and cell.
        command: The exact command or call, for the record.

    Raises:
        ArtifactError: If the folder belongs to another study, or cannot be written.
        SecateurError: If a network cannot be traced, cut or trained.
    """
    fabric = open_fabric(study.teaching.precision, device=device)
    settings = _settings(study, data, fabric_precision(fabric).name)
    with disk_errors(out), ExitStack() as stack:
        _meet(out, settings)
        stack.enter_context(locked(out))
        bench = Bench(study, data, out, fabric=fabric, tell=tell)
        cells = list(study.cells())
        rows: list[Mapping[str, Any]] = []
        for number, cell in enumerate(cells, 1):
            path = out / _CELLS / f"{cell.name}.json"
            if not path.is_file():
                row = _measured(bench, study, cell)
                write_atomic(path, json.dumps(row, indent=1))
                shutil.rmtree(bench.unfinished(cell.name), ignore_errors=True)
                tell(f"Cell {number} of {len(cells)}, {cell.name}: {100 * row['accuracy']:.2f} %.")
            rows.append(cast("Mapping[str, Any]", json.loads(path.read_text())))
        table = write_parquet(out / "results.parquet", rows)
        facts = tuple((name.replace("_", " "), text) for name, text in settings.items())
        provenance = Provenance.here(command, study.seeds[0])
        content = page_of(rows, facts, provenance)
        page = write_page(out / "study.html", content)
        shutil.rmtree(out / UNFINISHED, ignore_errors=True)
    return StudyResult(tuple(rows), table, page, content)


def _settings(study: Study, data: ImageData, precision: str) -> dict[str, str]:
    return {
        **{name: repr(getattr(study, name)) for name in asdict(study)},
        "data": f"{data.name}: {len(data.train)} training and {len(data.test)} test images of {data.size}",
        "normalization": f"{data.mean}, {data.std}",
        "precision": precision,
    }


def _meet(out: Path, settings: dict[str, str]) -> None:
    path = out / _SETTINGS
    if not path.exists():
        if out.exists() and (not out.is_dir() or any(not _ours(inside) for inside in out.iterdir())):
            raise ArtifactError(f"`out` must be a new folder, or that of a study; got {out}. Choose another path.")
        write_atomic(path, json.dumps(settings, indent=1))
        return
    try:
        then = cast("dict[str, str]", dict(json.loads(path.read_text())))
    except (ValueError, TypeError) as error:
        raise ArtifactError(f"{path} is damaged ({error}). Begin again in another folder.") from error
    if changes := changed_settings(then, settings):
        raise ArtifactError(
            f"`out` must be continued with the settings that the study was begun with; {changes} ({out}). "
            "Use the old settings, or another folder."
        )


def _ours(path: Path) -> bool:
    """Whether a file is what is left of a study that was killed before anything else."""
    return path.name.startswith(f".{Path(_SETTINGS).stem}.") and path.name.endswith(f".part{Path(_SETTINGS).suffix}")


def _measured(bench: Bench, study: Study, cell: Cell) -> dict[str, Any]:
    began = time.process_time()
    teacher, student = bench.teacher(cell.family), bench.student(cell.family, cell.before, cell.seed)
    schedule = replace(study.recovery, seed=cell.seed)
    sparsify, begin = None, student.model
    if cell.pruned is Pruned.WEIGHTS:
        sparsify = Sparsify(cell.kept, WeightPruning(schedule=Cubic, every=_EVERY))
    else:
        begin = _cut(student.model, bench, cell.kept)
    trained = bench.taught(
        begin,
        cell.family,
        cell.after,
        schedule=schedule,
        images=bench.recovery_images,
        checkpoint=bench.unfinished(cell.name),
        sparsify=sparsify,
    )
    model = trained if sparsify is None else with_zeros(trained)
    accuracy, example = bench.accuracy(model), bench.example[:1]
    macs, nonzero = count_macs(model, example), nonzero_params(model)
    teacher_macs, teacher_params = count_macs(teacher.model, example), count_params(teacher.model)
    efficiency = [
        performance_efficiency(accuracy=accuracy, original_accuracy=teacher.accuracy, size=size, original_size=original)
        for size, original in ((nonzero, teacher_params), (macs, teacher_macs))
    ]
    return {
        "family": cell.family.name,
        "pruned": cell.pruned.value,
        "kept": cell.kept,
        "taught": cell.taught.value,
        "order": cell.order.value,
        "seed": cell.seed,
        "accuracy": accuracy,
        "student_accuracy": student.accuracy,
        "teacher_accuracy": teacher.accuracy,
        "macs": macs,
        "params": count_params(model),
        "nonzero": nonzero,
        "size_bytes": weights_bytes(model),
        "teacher_macs": teacher_macs,
        "teacher_params": teacher_params,
        "efficiency_params": efficiency[0],
        "efficiency_macs": efficiency[1],
        "cpu_s": time.process_time() - began,
    }


def _cut(student: nn.Module, bench: Bench, kept: float) -> nn.Module:
    """The same part of every layer, the channels of least magnitude gone; not repaired, as masks are not."""
    graph = trace(student, bench.example)
    budget = Budget(macs=f"{100 * kept:g}%")
    space = SearchSpace(min_kept_fraction=0)
    found = search_architecture(student, graph, Uniform(importance=L1()), budget=budget, space=space)
    return cut(student, graph, found.architecture).model
