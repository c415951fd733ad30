"""The verdict of a report: words, intervals and tones; snippets; and sentences without settings of Python objects."""

from dataclasses import replace

import pytest
import torch

from secateur.report import Check, ExportedFile, FlippedImage, Measured, MeasuredLatency, RunReport, Step, TrainedEpoch
from secateur.report.figures import class_figure, page_script, training_figure
from secateur.report.html import render
from secateur.report.run import LayerCost, LayerWidth
from secateur.report.verdict import change_tone, claims, cost_tone, deploy_snippets, without_settings
from secateur.tasks import Metric, Score
from secateur.tasks.classification import TOP1
from secateur.tasks.outcomes import ClassChange, PairedTest

TIME = MeasuredLatency("onnxruntime 1.32", 1, 1, 30, (2, 2, 2), (1, 1, 1), (1.7, 1.8, 1.9), "processor time")
RUN = RunReport(
    "net",
    Measured(100, 10, 400, Score(0.900, None, 1000, TOP1)),
    Measured(50, 5, 200, Score(0.897, None, 1000, TOP1)),
    latency=(TIME,),
    checks=(Check("a", True), Check("b", True)),
    notes=("Careful.", "Refit(ridge=0.1, inner=L2(p=(1, 2))): done"),
    warnings=("Careful.",),
    paired=PairedTest.of(torch.arange(1000) < 900, (torch.arange(1000) < 885) | (torch.arange(1000) >= 988)),
    classes=(ClassChange("cat", 100, 90, 80), ClassChange("dog", 100, 90, 91)),
    confusions=(("cat", "dog", 1, 9),),
    flips=(FlippedImage("cat", "cat", "dog", "iVBORw0KGgo="),),
    sensitivity=(("conv1", 0.5, 0.25),),
    widths=(LayerWidth("conv1", 8, 4),),
    layers=(LayerCost("conv1", (100, 50), (2e-3, 1e-3)),),
    other_seconds=(1e-3, 2e-3),
    training=(TrainedEpoch(0, None, 0.5), TrainedEpoch(1, 1.0, 0.6)),
    steps=(Step("original", Score(0.9, None, 1000, TOP1)), Step("cut", Score(0.897, None, 1000, TOP1))),
    exports=(ExportedFile("model.onnx", 100, 1e-7),),
    input_size=(3, 32, 32),
)


def test_speed_loss_with_its_interval_and_checks():
    speed, loss, checks = claims(RUN)
    assert (speed.words, speed.tone) == ("1.80\N{MULTIPLICATION SIGN} as fast", "better")
    assert loss.words == "0.30 points of accuracy lost"
    assert loss.more.startswith("95 %: \u22121.")
    assert loss.more.endswith("on the same 1,000 images; can be chance")
    assert (loss.tone, checks.words, checks.more) == ("worse", "verified", "all 2 checks hold")


@pytest.mark.parametrize(
    ("after", "tone"), [(0.91, "better"), (0.9, "better"), (0.891, "worse"), (0.889, "much-worse"), (0.5, "much-worse")]
)
def test_losses_are_amber_up_to_a_point_and_red_beyond(after: float, tone: str):
    run = replace(RUN, after=replace(RUN.after, score=Score(after, None, 1000, TOP1)))
    assert change_tone(run) == tone


def test_other_metrics_and_costs_have_tones():
    error = Metric("mean error", unit="", higher_is_better=False)
    low, high = (replace(RUN.before, score=Score(value, None, 9, error)) for value in (0.3, 0.4))
    assert change_tone(replace(RUN, before=low, after=high)) == "much-worse"
    assert change_tone(replace(RUN, before=high, after=low)) == "better"
    assert (cost_tone(1, 2), cost_tone(2, 1), cost_tone(1, 1)) == ("much-worse", "better", "")


def test_slower_and_unverified_are_said():
    slow = replace(TIME, speedup=(0.7, 0.8, 0.9))
    said = claims(replace(RUN, latency=(slow,), checks=(Check("a", False),), paired=None))
    assert [claim.words for claim in said] == ["25\u00a0% slower", "0.30 points of accuracy lost", "not verified"]
    assert [claim.tone for claim in said] == ["much-worse", "worse", "much-worse"]
    assert said[1].more == "on 1,000 test images"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Refit(ridge=0.1, inner=L2(p=(1, 2))): distance", "Refit: distance"),
        ("Fastest((Knapsack(), Uniform()))", "Fastest"),
        ("92.3 % (95 %: 1 to 2) of CIFAR (small)", "92.3 % (95 %: 1 to 2) of CIFAR (small)"),
    ],
)
def test_settings_of_objects_are_left_out(text: str, words: str):
    assert without_settings(text) == words


def test_every_export_has_a_snippet_that_is_python():
    names = ["model.onnx", "model.int8.onnx", "model.pt2", "model.xml", "model.pte", "unknown.bin"]
    found = deploy_snippets(names, (3, 32, 32))
    assert [file for _, file, _ in found] == ["secateur.json", *names[:-1]]
    for _, _, code in found:
        compile(code, "snippet", "exec")
    assert "(1, 3, 32, 32)" in found[1][2]
    assert len(deploy_snippets(names, ())) == 1


@pytest.mark.parametrize(
    ("loading", "call"),
    [
        ("", 'secateur.load(".").model\n'),
        ("trust_source=True", 'secateur.load(".", trust_source=True).model\n'),
        ("factory=build", 'secateur.load(".", factory=build).model  # build: your function that builds the original\n'),
    ],
)
def test_the_snippet_loads_the_artifact_as_it_must_be_loaded(loading: str, call: str):
    assert call in deploy_snippets((), (3, 8, 8), loading)[0][2]


def test_the_page_has_all_of_it_and_no_settings():
    page = render(RUN)
    for words in ("What each class lost or gained", "cat", "Confusions", "data:image/png;base64,iVBORw0KGgo=",
                  "Which layers matter", "How to use the files", "onnxruntime.InferenceSession", "Details of the run",
                  "Refit: done"):  # fmt: skip
        assert words in page, words
    assert "ridge" not in page
    assert page.count("Careful.") == 1
    assert 'class="much-worse">\u221210.00 points' in page
    assert "<script" not in page


def test_curves_begin_with_epoch_0_and_bad_classes_are_red():
    curve = training_figure(RUN.training, 0.9, TOP1)
    assert curve is not None
    assert (curve.data[0]["x"], curve.data[0]["y"]) == ([0, 1], [50.0, 60.0])
    assert curve.data[1]["x"] == [1]
    bars = class_figure(RUN.classes)
    assert bars is not None
    assert bars.data[0]["marker"]["color"] == ["@bad", "@after"]
    assert bars.data[0]["x"] == pytest.approx([-10, 1])


@pytest.mark.skipif(page_script() is None, reason="the package plotly is not installed (extra report)")
def test_the_interactive_page_is_small_and_has_its_script_once():
    page = render(RUN, page_script())
    assert len(page.encode()) < 4_000_000
    assert page.count('id="plotly-packed"') == 1
    for name in ("kept", "training", "classes", "sensitivity"):
        assert f'id="figure-{name}"' in page
