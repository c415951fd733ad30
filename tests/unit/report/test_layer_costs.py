"""What each layer costs: MACs that add up to those of the model, figures, the table, and pictures of figures."""

import importlib
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import secateur
from secateur.architecture import Architecture
from secateur.cost import CostModel
from secateur.errors import ExportError
from secateur.report import LayerCost, LayerWidth, Measured, RunReport, report_figures
from secateur.report.figures import layer_macs_figure, layer_seconds_figure, page_script
from secateur.report.graph_layers import macs_of_layers
from secateur.report.html import render

_figures = importlib.import_module("secateur.report.figures")

LAYERS = (
    LayerCost("conv", (1000, 500), (2e-3, 1e-3)),
    LayerCost("norm", (0, 0)),
    LayerCost("attention", (200, 200), None),
    LayerCost("", (0, 0), (1e-4, 3e-4)),
    LayerCost("<b>head</b>", (10, 0), (1e-4, 0.0)),
)
RUN = RunReport("net", Measured(1210, 10), Measured(700, 5), layers=LAYERS, other_seconds=(1e-3, 2e-3))


def test_macs_of_layers_add_up_to_those_of_both_models():
    import torch

    model, _ = secateur.load_model("cifar_resnet20")
    graph = secateur.trace(model, torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    axis, block = graph.prunable[0], graph.removable[-1]
    cut = Architecture.of({axis.name: range(axis.size // 2)}, removed_blocks=[block.name])
    found, costs = macs_of_layers(graph, cut), CostModel(graph)
    assert sum(before for before, _ in found.values()) == costs.original.macs
    assert sum(after for _, after in found.values()) == costs.cost(cut).macs < costs.original.macs
    gone = [name for name in found if block.replaces(name)]
    assert gone
    assert {found[name][1] for name in gone} == {0}


def test_bars_are_in_pairs_and_what_grew_has_a_color_of_its_own():
    macs, seconds = layer_macs_figure(LAYERS), layer_seconds_figure(LAYERS, RUN.other_seconds)
    assert macs is not None
    assert seconds is not None
    assert [(trace["name"], trace["offsetgroup"]) for trace in macs.data] == [
        ("original", "before"), ("compressed", "after")
    ]  # fmt: skip
    assert macs.data[0]["x"] == [1000, 200, 10]
    assert macs.data[1]["x"] == [500, 200, 0]
    assert list(macs.layout["yaxis"]["ticktext"]) == ["conv", "attention", "&lt;b&gt;head&lt;/b&gt;"]
    assert seconds.layout["yaxis"]["ticktext"][1::2] == ["the model itself", "other"]
    original, smaller, grew = seconds.data
    assert original["x"] == pytest.approx([2, 0.1, 0.1, 1])
    assert (smaller["y"], grew["y"]) == ([0, 2], [1, 3])
    assert (grew["marker"]["color"], grew["offsetgroup"]) == ("@warn", "after")
    assert "table has the numbers" in seconds.label


def test_without_times_or_layers_there_is_no_figure_of_them():
    untimed = tuple(replace(layer, seconds=None) for layer in LAYERS)
    assert layer_seconds_figure(untimed, None) is None
    assert layer_macs_figure(()) is None
    assert list(report_figures(replace(RUN, layers=untimed, other_seconds=None))) == ["layer-macs"]
    assert list(report_figures(RUN)) == ["layer-macs", "layer-seconds"]


def test_of_many_layers_the_costly_ones_have_bars_and_the_others_a_sum():
    """A layer with few MACs that takes long has bars in both figures."""
    layers = [
        LayerCost(f"layer{at}.with.a.name.that.is.far.too.long", (100 + at, 50), (1e-6, 1e-6)) for at in range(60)
    ]
    layers[3] = replace(layers[3], seconds=(1e-3, 1e-3))
    macs, seconds = layer_macs_figure(layers), layer_seconds_figure(layers, (1e-6, 1e-6))
    assert macs is not None
    assert seconds is not None
    for figure, bars in ((macs, 40), (seconds, 41)):
        assert len(figure.data[0]["y"]) == bars
        names = figure.layout["yaxis"]["ticktext"]
        assert names[-1] == "20 more"
        assert max(map(len, names)) <= 24
        assert figure.data[0]["hovertext"][0].startswith("layer3.with")
    left_out = [at for at in range(21) if at != 3]
    assert macs.layout["annotations"][0][
        "text"
    ] == f"together {sum(100 + at for at in left_out) / 1000:.2f} k → 1.00 k".replace(" k", "\u00a0k")


def test_the_page_has_a_table_for_those_who_do_not_see_the_figures():
    page = render(RUN)
    table = page[page.index('id="layers"') :]
    table = table[: table.index("</section>")]
    assert "&lt;b&gt;head" in table
    assert "norm" not in table
    for words in ("the model itself", "1.00\u00a0k", "2.00\u00a0ms", "300.0\u00a0µs", "other", "<details open>"):
        assert words in table, words
    untimed = render(replace(RUN, layers=tuple(replace(layer, seconds=None) for layer in LAYERS), other_seconds=None))
    assert "What each layer costs" in untimed
    assert "Time, original" not in untimed
    assert 'id="layers"' not in render(replace(RUN, layers=()))


@pytest.mark.skipif(page_script() is None, reason="the package plotly is not installed (extra report)")
def test_both_figures_have_a_place_on_the_page():
    page = render(RUN, page_script())
    for name in ("layer-macs", "layer-seconds"):
        assert f'id="figure-{name}"' in page
    assert "<details><summary>All 4 layers as a table" in page


def test_a_picture_needs_a_name_that_says_its_kind(tmp_path: Path):
    with pytest.raises(ExportError, match=r"`path` must end in \.png or \.svg; got 'a\.pdf'"):
        report_figures(RUN)["layer-macs"].write_image(tmp_path / "a.pdf")


def test_without_kaleido_one_message_says_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "kaleido" else whole(name))
    with pytest.raises(ImportError, match=r"needs .*kaleido.*pip install 'secateur\[figures\]'"):
        report_figures(RUN)["layer-macs"].write_image(tmp_path / "a.svg")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What plotly was given; it answers with the number of its calls, or the error that is in its place."""
    calls: list[dict[str, Any]] = []

    def to_image(figure: dict[str, Any], **settings: Any) -> bytes:
        calls.append({"figure": figure, **settings})
        if settings["width"] == 13:
            raise RuntimeError("Kaleido requires Google Chrome\nand more")
        return b"picture"

    module = ModuleType("plotly.io")
    module.to_image = to_image  # type: ignore[attr-defined]
    package = ModuleType("plotly")
    package.io = module  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "plotly", package)
    monkeypatch.setitem(sys.modules, "plotly.io", module)
    whole = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: "here" if name in ("plotly", "kaleido") else whole(name)
    )
    return calls


def test_a_figure_is_written_as_a_picture(tmp_path: Path, drawn: list[dict[str, Any]]):
    figure = report_figures(RUN)["layer-macs"]
    assert figure.write_image(tmp_path / "a.PNG").read_bytes() == b"picture"
    assert figure.write_image(tmp_path / "a.svg", width=500) == tmp_path / "a.svg"
    assert [(call["format"], call["scale"], call["width"], call["height"]) for call in drawn] == [
        ("png", 2, 900, figure.height), ("svg", 1, 500, figure.height)
    ]  # fmt: skip
    assert "@" not in repr(drawn[0]["figure"])  # all words for colors are replaced
    with pytest.raises(ExportError, match=r"must find Chrome or Chromium .*requires Google Chrome Install one"):
        figure.write_image(tmp_path / "b.svg", width=13)
    assert not (tmp_path / "b.svg").exists()


def test_the_page_on_reports_writes_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drawn: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
):
    page = Path(__file__).resolve().parents[3] / "docs" / "how-to" / "report.md"
    (block,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    report = replace(RUN, widths=(LayerWidth("conv", 4, 2),))
    exec(compile(block, str(page), "exec"), {"result": SimpleNamespace(report=report)})
    assert capsys.readouterr().out.split() == ["kept", "layer-macs", "layer-seconds"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["layers.svg", "widths.png"]
    assert len(drawn) == 2
