"""The study: its cells, its resume after a kill, and its numbers."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from noise_images import noise_data, noise_split

from benchmarks._record import RESULTS
from benchmarks.study import FAMILIES, Family, Order, Pruned, Study, Taught, gains, run_study
from benchmarks.study.results import equal_size_gains, page_of, size_table, write_tables
from secateur.data import ImageData
from secateur.errors import ArtifactError, TrainingError
from secateur.train import Precision, TrainConfig

TINY = TrainConfig(epochs=1, batch_size=16, learning_rate=0.02, precision=Precision.FLOAT32)
STUDY = Study(
    families=(Family("tiny", "digits_resnet", "digits_resnet"),), seeds=(0,), weights_kept=(0.3,), macs_kept=(0.5,),
    teaching=TINY, learning=TINY, recovery=TINY, recovery_images=32, test_images=20,
)  # fmt: skip


def _data(n: int = 48) -> ImageData:
    return noise_data(noise_split(n, 0))


def comparable(row: Any) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "cpu_s"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[Any, ...]]:
    """The whole study, uninterrupted."""
    out = tmp_path_factory.mktemp("study") / "out"
    return out, run_study(STUDY, _data(), out=out, command="python -m benchmarks.study ...").rows


def test_every_way_to_every_size_once() -> None:
    cells = list(Study().cells())
    # Four families, two seeds, three and two sizes, seven ways: labels alone, and two losses in three orders.
    assert len(cells) == 4 * 2 * 5 * 7 == len({cell.name for cell in cells})
    phases = {(cell.taught, cell.order): (cell.before, cell.after) for cell in cells}
    assert phases == {
        (Taught.LABELS, Order.BOTH): (Taught.LABELS, Taught.LABELS),
        (Taught.KD, Order.DISTILL_THEN_PRUNE): (Taught.KD, Taught.LABELS),
        (Taught.KD, Order.PRUNE_THEN_DISTILL): (Taught.LABELS, Taught.KD),
        (Taught.KD, Order.BOTH): (Taught.KD, Taught.KD),
        (Taught.KD_AND_HINTS, Order.DISTILL_THEN_PRUNE): (Taught.KD_AND_HINTS, Taught.LABELS),
        (Taught.KD_AND_HINTS, Order.PRUNE_THEN_DISTILL): (Taught.LABELS, Taught.KD_AND_HINTS),
        (Taught.KD_AND_HINTS, Order.BOTH): (Taught.KD_AND_HINTS, Taught.KD_AND_HINTS),
    }
    assert [family.name for family in FAMILIES] == ["resnet", "densenet", "efficientnet", "mobilenet"]


def test_cells_are_what_they_say(whole: tuple[Path, tuple[Any, ...]]) -> None:
    _, rows = whole
    assert len(rows) == 14
    for row in rows:
        assert row["accuracy"] * 20 == pytest.approx(round(row["accuracy"] * 20))
        if row["pruned"] == Pruned.WEIGHTS:
            assert row["params"] == row["teacher_params"]
            assert row["macs"] == row["teacher_macs"]
            assert 0.3 < row["nonzero"] / row["params"] < 0.32
        else:
            assert 0.45 < row["macs"] / row["teacher_macs"] <= 0.5
            assert row["params"] < 0.7 * row["teacher_params"]
        kept = row["accuracy"] / row["teacher_accuracy"]
        assert row["efficiency_params"] == pytest.approx(kept / (row["nonzero"] / row["teacher_params"]))
        assert row["efficiency_macs"] == pytest.approx(kept / (row["macs"] / row["teacher_macs"]))
    # The student before pruning is one for all that begin alike.
    assert len({row["student_accuracy"] for row in rows if row["order"] == Order.PRUNE_THEN_DISTILL}) == 1


def test_the_table_and_the_page_hold_every_cell(whole: tuple[Path, tuple[Any, ...]]) -> None:
    out, rows = whole
    table = pq.read_table(out / "results.parquet").to_pylist()
    assert table == [dict(row) for row in rows]
    page = (out / "study.html").read_text()
    assert "What distillation adds to labels alone" in page
    assert "python -m benchmarks.study ..." in page
    assert page.count("(PE ") == 14
    assert len(list((out / "cells").glob("*.json"))) == 14


def test_the_gain_is_the_difference_to_labels_alone(whole: tuple[Path, tuple[Any, ...]]) -> None:
    _, rows = whole
    by_hand = {(row["pruned"], row["taught"], row["order"]): row["accuracy"] for row in rows}
    for pruned in Pruned:
        found = gains(rows, pruned, Taught.KD, Order.BOTH)
        assert found == [by_hand[pruned, "kd", "both"] - by_hand[pruned, "none", "both"]]


def test_gains_are_shown_for_every_size_on_its_own() -> None:
    """A mean over sizes hides what nothing could save: here 10 % of the weights, which stay at chance."""
    rows = [
        {"family": family, "pruned": "weights", "kept": kept, "seed": 0, "taught": taught, "order": "both",
         "accuracy": accuracy}
        for kept, taught, accuracies in (
            (0.5, "none", (0.5, 0.6)), (0.5, "kd", (0.54, 0.66)), (0.1, "none", (0.1, 0.1)), (0.1, "kd", (0.1, 0.1)),
        )
        for family, accuracy in zip("ab", accuracies, strict=True)
    ]  # fmt: skip
    table = size_table(rows)
    assert table.columns == ("way", "weights 50 %", "weights 10 %")
    # (4 + 6) / 2 points, deviation sqrt(2), error sqrt(2) / sqrt(2).
    assert {row[0]: row[1:] for row in table.rows}["kd: both"] == ("+5.00 ± 1.00 (n = 2)", "+0.00 ± 0.00 (n = 2)")
    assert {row[0]: row[1:] for row in table.rows}["kd+hints: both"] == ("none", "none")


def test_a_study_killed_between_and_within_cells_goes_on_to_the_same_numbers(
    whole: tuple[Path, tuple[Any, ...]], tmp_path: Path
) -> None:
    out, said = tmp_path / "out", []

    def dying(line: str) -> None:
        said.append(line)
        if line.startswith("Cell 5"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_study(STUDY, _data(), out=out, tell=dying)
    done = sorted((out / "cells").glob("*.json"))
    assert len(done) == 5
    # As if killed while it wrote: part of a file, and a network whose numbers are not there.
    (out / "cells" / ".half.1234.part.json").write_text("{")
    (out / "models" / "tiny-kd-seed0.json").unlink()
    times = {path: path.stat().st_mtime_ns for path in done}
    later: list[str] = []
    resumed = run_study(STUDY, _data(), out=out, tell=later.append)
    assert sum(line.startswith("Cell") for line in later) == 9
    assert {path: path.stat().st_mtime_ns for path in done} == times
    assert list(map(comparable, resumed.rows)) == list(map(comparable, whole[1]))
    nothing: list[str] = []
    run_study(STUDY, _data(), out=out, tell=nothing.append)
    assert nothing == []


def test_other_settings_or_images_are_another_study(whole: tuple[Path, tuple[Any, ...]], tmp_path: Path) -> None:
    out, _ = whole
    with pytest.raises(ArtifactError, match=r"hint_weight was 1\.0, now 2\.0"):
        run_study(replace(STUDY, hint_weight=2.0), _data(), out=out)
    with pytest.raises(ArtifactError, match=r"data was noise: 48 .*now noise: 47"):
        run_study(STUDY, _data(47), out=out)
    (tmp_path / "mine").write_text("notes")
    with pytest.raises(ArtifactError, match="`out` must be a new folder, or that of a study"):
        run_study(STUDY, _data(), out=tmp_path)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "study.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"study\.json is damaged"):
        run_study(STUDY, _data(), out=tmp_path / "broken")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"families": ()}, "`families` must be one or more, each once"),
        ({"seeds": (1, 1)}, "`seeds` must be one or more, each once"),
        ({"weights_kept": (0.0,)}, "`weights_kept` must be kept fractions between 0 and 1"),
        ({"macs_kept": (0.5, 1.0)}, "`macs_kept` must be kept fractions between 0 and 1"),
        ({"weights_kept": (), "macs_kept": ()}, "must have a fraction; got none in either"),
    ],
)
def test_studies_without_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        replace(STUDY, **changes)


def test_numbers_of_networks_are_kept(whole: tuple[Path, tuple[Any, ...]]) -> None:
    out, rows = whole
    names = {path.stem for path in (out / "models").glob("*.json")}
    assert names == {"tiny-teacher", "tiny-none-seed0", "tiny-kd-seed0", "tiny-kd-hints-seed0"}
    said = json.loads((out / "models" / "tiny-teacher.json").read_text())
    assert {row["teacher_accuracy"] for row in rows} == {said["accuracy"]}


def cell(**values: Any) -> dict[str, Any]:
    return {"family": "a", "seed": 0, "taught": Taught.LABELS.value, "order": Order.BOTH.value, "kept": 0.5,
            "teacher_accuracy": 0.7, "efficiency_params": 2.0, "cpu_s": 1.0, **values}  # fmt: skip


def test_kinds_are_compared_at_equal_size_only() -> None:
    weights = [cell(pruned=Pruned.WEIGHTS, kept=k, nonzero=100 * k, accuracy=a) for k, a in ((0.5, 0.6), (0.3, 0.4))]
    cuts = [cell(pruned=Pruned.CHANNELS, kept=0.7, nonzero=n, accuracy=0.45) for n in (40, 51, 60, 20)]
    found = equal_size_gains([*weights, *cuts])
    # Halfway between the sizes; just outside; the others are of no size that was pruned.
    assert found == [(0.7, pytest.approx(0.05)), (0.7, pytest.approx(0.15))]
    assert equal_size_gains([*cuts, *[{**row, "seed": 1} for row in weights]]) == []


def test_one_value_has_no_spread_and_teachers_at_chance_are_left_out() -> None:
    from secateur._provenance import Provenance

    rows = [
        cell(pruned=Pruned.WEIGHTS, nonzero=50, accuracy=0.6),
        cell(pruned=Pruned.CHANNELS, nonzero=50, accuracy=0.1),
    ]
    guessing = [{**row, "family": "b", "teacher_accuracy": 0.11} for row in rows]
    page = page_of([*rows, *guessing], (), Provenance.here("", 0))
    shown = [" ".join(map(str, row)) for each in page.tables for row in each.rows]
    assert not any("±" in text for text in shown)
    assert "60.00 % (PE 2.00)" in " ".join(shown)
    assert "10.00 % (at chance)" in " ".join(shown)
    assert [each.title for each in page.tables].count("b") == 0
    assert "Left out, since their teachers are at chance: b." in page.notes


def test_the_tables_of_the_records_are_those_of_the_generator(tmp_path: Path) -> None:
    import shutil

    for name in ("results.parquet", "study.json", "study.html"):
        shutil.copy(RESULTS / "study" / name, tmp_path / name)
    assert write_tables(tmp_path).read_text() == (RESULTS / "study" / "study.md").read_text()
    assert "none | none" not in (RESULTS / "study" / "study.md").read_text()
