"""The page holds every number, needs nothing else, and escapes what it is given."""

import re
from dataclasses import fields, replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from secateur.report import (
    Check,
    ExportedFile,
    FrozenAxis,
    LayerWidth,
    Measured,
    MeasuredLatency,
    RunReport,
    Step,
    TrainedEpoch,
    write_report,
)
from secateur.report.html import headline, render, tiles
from secateur.search import SearchedDepth, SearchedWidth, SearchEpoch
from secateur.tasks import Metric, Score
from secateur.tasks.classification import TOP1

CPU = "processor time"
RUN = RunReport(
    model="resnet20",
    data="CIFAR-10",
    strategy="PCASlimming()",
    budget="macs=50%",
    before=Measured(41_000_000, 270_000, 1_100_000, Score(0.9173, None, 10_000, TOP1)),
    after=Measured(20_500_000, 130_000, 520_000, Score(0.9101, None, 10_000, TOP1)),
    latency=(
        MeasuredLatency(
            "onnxruntime 1.31", 1, 1, 30, (0.002, 0.0021, 0.0022), (0.001, 0.0011, 0.0012), (1.8, 1.9, 2), CPU
        ),
        MeasuredLatency("torch 2.15", 2, 8, 31, (0.1, 0.2, 0.3), (0.1, 0.15, 0.2), (1.2, 1.33, 1.5), "elapsed time"),
    ),
    steps=(
        Step("Original", Score(0.9173, None, 10_000, TOP1)),
        Step("Cut, not repaired", Score(0.3456, None, 9000, TOP1)),
    ),
    widths=(LayerWidth("conv1", 16, 16), LayerWidth("layer1.0.conv1", 16, 7), LayerWidth("layer2.0.conv1", 32, 11)),
    frozen=(FrozenAxis("linear", 10, "These are the outputs of the model."),),
    search=(
        SearchEpoch(
            1,
            0.987,
            5.0,
            0.71,
            0.65,
            (SearchedWidth("conv1", 0.75, 12, 16), SearchedWidth("late", 0.5, 4, 8)),
            (SearchedDepth("layer1.0", 2.5, 3, 3),),
            1.234,
            2.345,
        ),
        SearchEpoch(
            2,
            0.123,
            0.1,
            0.52,
            0.49,
            (SearchedWidth("conv1", 1.0, 16, 16), SearchedWidth("late", 0.25, 2, 8)),
            (SearchedDepth("layer1.0", 1.5, 1, 3),),
            0.5678,
            None,
        ),
    ),
    macs_limit=0.5,
    training=(TrainedEpoch(1, 1.5, 0.8), TrainedEpoch(2, 0.7512, 0.8812), TrainedEpoch(3, 0.61, 0.9)),
    original_validation_score=0.92,
    checks=(
        Check("Sliced = masked", True, 1.2e-6, 3.4e-7, 1e-5, "in float32"),
        Check("ONNX = PyTorch", False, 0.2, 0.35, 1e-4),
    ),
    notes=("Read this first.",),
    command="secateur compress --budget macs=50%",
    seed=7,
    versions={"torch": "2.15.0", "secateur": "0.1.0"},
    machine={"cpu": "Xeon 8488C", "cores": "2"},
    date="2026-01-31T09:05:00+00:00",
)
INT8_TIME = MeasuredLatency(
    "onnxruntime 1.31", 1, 1, 30, (0.002, 0.0021, 0.0022), (0.001, 0.0013, 0.0014), (1, 1, 1), CPU
)
EMPTY = RunReport("net", Measured(10, 10), Measured(10, 10))


def plain(text: str) -> str:
    """The same words with the characters of a keyboard."""
    return text.translate({0xA0: " ", 0x2212: "-", 0xD7: "x", 0x2013: "--"})


class Page(HTMLParser):
    """What a browser would see: tags with attributes, text outside style, and whether every tag is closed."""

    VOID = ("meta", "link", "br", "path", "circle", "line")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", plain(" ".join(self.words)))


def test_the_page_holds_the_numbers(tmp_path: Path) -> None:
    path = write_report(tmp_path / "new" / "report.html", RUN)
    text = Page(path.read_text(encoding="utf-8")).text
    expected = [
        *("resnet20", "CIFAR-10", "PCASlimming", "macs=50%", "Read this first."),
        *("91.73 %", "91.01 %", "-0.72 points", "n = 10,000", "91.2 % to 92.3 %"),
        *("41.0 M", "20.5 M", "41,000,000", "20,500,000", "-50.0 %", "270.0 k", "130,000", "1.10 MB", "520.0 kB"),
        *("2.10 ms", "1.10 ms", "2.00 ms to 2.20 ms", "1.90x", "1.80x to 2.00x"),
        "batch 1, 1 thread, 30 rounds, processor time",
        *("batch 8, 2 threads, 31 rounds", "200.0 ms", "150.0 ms", "1.33x"),
        *("Cut, not repaired", "34.56 %", "0.7512", "88.12 %", "34 of 64 channels are kept", "layer2.0.conv1"),
        *("Sliced = masked", "in float32", "1.2e-6", "3.4e-7", "1.0e-5", "✓ holds", "✗ fails", "3.5e-1"),
        *("2 epochs of search", "16 of 16", "2 of 8", "1 of 3 blocks", "20 % kept", "budget 50.00", "0.987", "2.3450"),
        *("These are the outputs of the model.", "secateur compress --budget macs=50%", "torch 2.15.0"),
        *("cpu Xeon 8488C", "2026-01-31 09:05 UTC"),
    ]
    assert [words for words in expected if words not in text] == []
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_the_page_loads_nothing() -> None:
    text = render(RUN)
    page = Page(text)
    assert page.open == []
    assert not re.search(r"https?:|//[a-z]|@import|url\(", text)
    assert "script" not in {tag for tag, _ in page.tags}
    links = [a[name] for _, a in page.tags for name in ("src", "href", "srcset", "data", "action") if name in a]
    assert links == ["data:,"]
    policies = [a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]
    assert len(text) < 60_000


def hostile(value: object) -> object:
    """The same data with markup in every text."""
    evil = "<img src=x onerror=alert(1)>\"'&{{7*7}}</style><script>"
    if isinstance(value, str):
        return evil
    if isinstance(value, tuple) and not all(isinstance(v, float) for v in value):
        return tuple(hostile(v) for v in value)
    if isinstance(value, dict):
        return {evil: evil}
    if hasattr(value, "__dataclass_fields__"):
        return replace(value, **{f.name: hostile(getattr(value, f.name)) for f in fields(value)})
    return value


def test_every_text_is_escaped() -> None:
    page = Page(render(hostile(RUN)))
    harmless = Page(render(RUN))
    assert page.open == []
    assert {tag for tag, _ in page.tags} == {tag for tag, _ in harmless.tags}
    assert {name for _, a in page.tags for name in a} == {name for _, a in harmless.tags for name in a}
    assert "{{7*7}}" in page.text
    assert "49" not in page.text.replace("0.49", "")


def test_pictures_have_words_and_tables_have_headers() -> None:
    page = Page(render(RUN))
    assert all(a.get("aria-label") for _, a in page.tags if a.get("role") == "img")
    assert all("scope" in a for tag, a in page.tags if tag == "th")
    assert sum(tag == "caption" for tag, _ in page.tags) == sum(tag == "table" for tag, _ in page.tags) == 7
    assert sum(tag == "h1" for tag, _ in page.tags) == 1
    assert ("html", {"lang": "en"}) in page.tags
    assert any(a.get("name") == "viewport" for _, a in page.tags)
    labeled = {a["aria-labelledby"] for tag, a in page.tags if tag == "section"}
    assert labeled == {a["id"] for tag, a in page.tags if tag == "h2"}


def test_both_color_schemes_are_styled() -> None:
    text = render(RUN)
    light, dark = (re.findall(r"(--[a-z-]+): #", part) for part in text.split("prefers-color-scheme: dark", 1))
    assert light
    assert light == dark


def test_bars_are_to_scale() -> None:
    page = Page(render(RUN))
    heights = [
        float(a["style"].removeprefix("--h:")) for tag, a in page.tags if (a.get("style") or "").startswith("--h:")
    ]
    assert heights == pytest.approx([50, 50, 50, 100 * 7 / 32, 100, 100 * 11 / 32], abs=0.01)


def test_an_empty_run_is_a_page() -> None:
    page = Page(render(EMPTY))
    assert page.open == []
    assert "net: no fewer MACs." in page.text
    assert "Nothing: every channel could be cut." in page.text
    assert "How accuracy came back" not in page.text
    assert "What was verified" not in page.text


@pytest.mark.parametrize(
    ("speedup", "words"),
    [
        ((1.8, 1.9, 2.0), "1.90x as fast"),
        ((1.009, 1.01, 1.011), "about as fast as before"),
        ((0.7, 1.4, 2.2), "about as fast as before"),
        ((0.7, 0.8, 0.9), r"25\s% slower"),
    ],
)
def test_the_headline_is_honest_about_speed(speedup: tuple[float, float, float], words: str) -> None:
    latency = replace(RUN.latency[0], speedup=speedup)
    assert re.search(words, plain(headline(replace(RUN, latency=(latency,)))))


def test_the_headline_says_what_changed() -> None:
    said = plain(headline(RUN))
    assert said == "resnet20: 50.0 % fewer MACs, 1.90x as fast, 91.01 % accuracy instead of 91.73 %."


def test_tiles_never_overflow() -> None:
    larger = replace(RUN, before=RUN.after, after=RUN.before)
    assert [
        tile.percent_left for tile in tiles(larger) if tile.percent_left is not None and tile.percent_left > 100
    ] == []


def test_values_that_are_not_numbers_do_not_break_the_curve() -> None:
    training = (
        TrainedEpoch(1, 1.0),
        TrainedEpoch(2, float("nan")),
        TrainedEpoch(3, 0.5, 0.5),
        TrainedEpoch(4, 0.5, 0.5),
    )
    page = Page(render(replace(RUN, training=training, search=())))
    paths = [a["d"] for tag, a in page.tags if a.get("class") == "curve"]
    assert len(paths) == 2
    assert all("nan" not in path for path in paths)


def test_an_older_report_survives_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "report.html").write_text("older")

    def full(*_: object, **__: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        write_report(tmp_path / "report.html", RUN)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("report.html", "older")]


def test_exported_files_are_shown_with_what_was_found_of_each() -> None:
    in_float, in_int8 = Score(0.9043, None, 10_000, TOP1), Score(0.8976, None, 10_000, TOP1)
    files = (
        ExportedFile("model.xml", 798_069, difference=9.2e-7),
        ExportedFile("model.int8.onnx", 220_000, None, in_int8, in_float, 0.9712, INT8_TIME),
    )
    text = Page(render(replace(RUN, exports=files))).text
    for words in ("Files for other runtimes", "model.xml", "798.1 kB", "9.2e-7", "model.int8.onnx", "220.0 kB"):
        assert words in text
    for words in ("89.76 %", "90.43 %", "97.12 %", "1.30 ms", "2.10 ms"):
        assert words in text
    assert "Files for other runtimes" not in Page(render(RUN)).text


def test_notebooks_show_the_numbers_before_and_after() -> None:
    table = RUN._repr_html_()
    for shown in ("resnet20, macs=50%", "41,000,000", "130,000", "2.100", "1.100", "91.73 %", "91.01 %", "onnxruntime"):
        assert shown in table
    assert "<b>" not in replace(RUN, model="<b>")._repr_html_()
    bare = RunReport(model="m", before=Measured(2, 1), after=Measured(1, 1))._repr_html_()
    assert "accuracy" not in bare
    assert "ms, " not in bare


def test_scores_of_other_tasks_have_their_own_names_and_units() -> None:
    psnr = Metric("PSNR", "dB")
    before, after = (replace(m, score=Score(v, None, 9, psnr)) for m, v in ((RUN.before, 31.2), (RUN.after, 30.95)))
    run = replace(
        RUN,
        before=before,
        after=after,
        steps=(Step("Original", before.score), Step("Distilled", after.score)),
        training=(TrainedEpoch(1, 0.2, 30.5), TrainedEpoch(2, 0.1, 30.95)),
        original_validation_score=31.0,
        exports=(),
    )
    page = plain(render(run))
    for shown in ("30.95 dB PSNR instead of 31.20 dB", "-0.25 dB", "Validation PSNR (dB)", "PSNR after each step"):
        assert shown in page
    assert "ccuracy" not in page
    assert "confidence interval" not in page
    assert run.efficiency is None
    assert not run.recovered


def test_layers_that_were_not_measured_are_counted() -> None:
    cut = sum(width.after < width.before for width in RUN.widths)
    assert cut > 1
    page = " ".join(render(replace(RUN, sensitivity=(("stem", 0.5, 0.1),))).split())
    assert f"{cut - 1} more that were cut are left out" in page
    assert "The layer as a table" in page


def test_a_training_is_no_compression() -> None:
    page = render(replace(RUN, compresses=False, frozen=()))
    assert "training report" in page
    assert "Compressed" not in page
    assert "fewer MACs" not in plain(headline(replace(RUN, compresses=False)))
    assert "What was left whole" not in page


@pytest.mark.parametrize(("name", "shown"), [("mIoU", "mIoU"), ("mAP@0.5", "mAP@0.5"), ("mean error", "Mean error")])
def test_names_of_metrics_keep_their_letters(name: str, shown: str) -> None:
    score = Score(0.5, None, 10, Metric(name))
    page = render(replace(RUN, before=replace(RUN.before, score=score), after=replace(RUN.after, score=score)))
    assert f'<th scope="row">{shown}<' in page
