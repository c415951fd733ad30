"""Every command on a real run with handwritten digits."""

import csv
import json
import re
import shutil
from importlib import import_module
from pathlib import Path

import pytest
import torch
from command_line import Run, Small, compress_words

import secateur
from secateur.cost import count_macs, count_params
from secateur.data import load_data
from secateur.export import is_artifact
from secateur.train import Silent


def test_compress_says_what_it_wrote_and_shows_before_and_after(small: Small):
    said = small.said.stdout
    for row in ("test accuracy (n = 359)", "MACs", "parameters", "weights file", "latency, onnxruntime"):
        assert row in said
    names = sorted(path.name for path in small.folder.iterdir())
    assert names == ["history.csv", "model.onnx", "model.pt2", "model.safetensors", "report.html", "secateur.json"]
    with (small.folder / "history.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["loop"], row["epoch"]) for row in rows] == [("train", str(n)) for n in range(3)]
    metrics = json.loads((small.folder / "secateur.json").read_text())["metrics"]
    assert [float(row["validation_score"]) for row in rows] == [e["validation_score"] for e in metrics["history"]]
    for name in names:
        assert f"Wrote {small.folder / name}" in said.replace("\n", "")
    assert "FAILED" not in said
    # With one thread the clock counts processor time, and the report must say so.
    assert "1 thread, 30 rounds, processor time" in (small.folder / "report.html").read_text()
    assert not small.folder.with_name("small.work").exists()


def test_result_is_really_half_and_nearly_as_good(small: Small):
    manifest = json.loads((small.folder / "secateur.json").read_text())
    loaded = secateur.load(small.folder)
    original, _ = secateur.load_model("digits_resnet", weights=small.weights)
    example = torch.zeros(1, 1, 8, 8)
    before, after = count_macs(original, example), count_macs(loaded.model, example)
    assert 0.49 * before <= after <= 0.5 * before
    assert manifest["cost"]["after"] == {"macs": after, "params": count_params(loaded.model)}
    accuracy = {step["step"]: step["top1"] for step in manifest["metrics"]["test_accuracy"]}
    assert accuracy["original"] > 0.9
    last = list(accuracy.values())[-1]
    assert last > accuracy["original"] - 0.05
    data = load_data("digits")
    assert secateur.evaluate(loaded.model, data.test).value == pytest.approx(last, abs=1.5 / len(data.test))


def test_report_is_one_offline_page(small: Small):
    page = (small.folder / "report.html").read_text()
    assert "digits_resnet" in page
    assert "macs&lt;=50%" in page or "macs<=50%" in page
    for outside in ("http://", "https://"):
        assert f'src="{outside}' not in page
        assert f'<link href="{outside}' not in page


def test_verify_passes_and_measures_again(small: Small, run: Run):
    found = run("verify", small.folder, "--data", "digits", "--trust-source", "--threads", 1)
    assert found.exit_code == 0, found.output
    names = [check.name for check in secateur.verify(small.folder, trust_source=True).checks]
    for what in ("SHA-256", "recorded costs", "recorded outputs", "model.onnx", "model.pt2"):
        assert sum(what in name for name in names) == 1
    assert "of 359 images" in found.stdout
    assert "FAILED" not in found.stdout
    assert run("verify", "--model", small.folder).exit_code == 0


def test_verify_notices_an_export_of_another_model(small: Small, run: Run, tmp_path: Path):
    folder = tmp_path / "copy"
    shutil.copytree(small.folder, folder)
    original, _ = secateur.load_model("digits_resnet", weights=small.weights)
    secateur.export_onnx(
        original, torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), folder / "model.onnx"
    )
    found = run("verify", folder)
    assert found.exit_code == 2
    assert "FAILED" in found.stdout
    assert "does not hold what it says" in found.stderr


def test_evaluate_uses_the_artifacts_normalization(small: Small, run: Run):
    found = run("evaluate", "--model", small.folder, "--data", "digits", "--threads", 1)
    assert found.exit_code == 0, found.output
    steps = json.loads((small.folder / "secateur.json").read_text())["metrics"]["test_accuracy"]
    assert f"test accuracy {100 * steps[-1]['top1']:.2f} % of 359 images" in found.stdout
    assert "interval" in found.stdout


@pytest.mark.long
def test_artifact_remembers_the_image_size(small: Small, run: Run, tmp_path: Path):
    out = tmp_path / "larger"
    words = (
        *compress_words(small.weights, out, quick=True),
        "--image-size",
        12,
        "--epochs",
        0,
        "--export",
        "",
        "--quiet",
    )
    assert run(*words).exit_code == 0
    assert json.loads((out / "secateur.json").read_text())["input"]["shape"] == [1, 12, 12]
    found = run("verify", out, "--data", "digits", "--threads", 1)
    assert found.exit_code == 0, found.output
    assert "of 359 images; recorded" in " ".join(found.stdout.split())


def test_export_writes_and_compares(small: Small, run: Run, tmp_path: Path):
    found = run("export", "--model", small.folder, "--data", "digits", "--export", "pt2", "--out", tmp_path / "files")
    assert found.exit_code == 0, found.output
    assert (tmp_path / "files" / "model.pt2").is_file()
    assert "agrees with the model within" in found.stdout


def test_inspect_shows_axes_reasons_and_range(small: Small, run: Run):
    found = run("inspect", "--model", "cifar_resnet20")
    assert found.exit_code == 0, found.output
    assert "layer1.0.conv1" in found.stdout
    assert "reaches the model's output" in found.stdout
    assert "Reachable: macs" in found.stdout
    assert "to 40.6 M" in found.stdout
    coarse = run("inspect", "--model", "cifar_resnet20", "--divisor", 8)
    assert coarse.stdout != found.stdout
    again = run("inspect", "--model", small.folder)
    assert again.exit_code == 0, again.output


class _StopsInEpoch2(Silent):
    """Ctrl-C in the middle of a training."""

    def start(self, loop: str, *, epochs: int, steps: int, done: int):
        from contextlib import contextmanager

        class Loop:
            def step(self, epoch: int, step: int, numbers: object) -> None:
                pass

            def epoch(self, epoch: int, numbers: object, line: str) -> None:
                if epoch == 2:
                    raise KeyboardInterrupt

        @contextmanager
        def opened():
            yield Loop()

        return opened()


@pytest.mark.long
def test_interrupted_run_goes_on_to_the_same_weights(
    small: Small, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out, work = tmp_path / "small", tmp_path / "small.work"
    words = (*compress_words(small.weights, out, quick=True), "--epochs", 2, "--export", "")
    with monkeypatch.context() as patch:
        patch.setattr(import_module("secateur.train.callbacks"), "TerminalProgress", _StopsInEpoch2)
        stopped = run(*words)
    assert stopped.exit_code == 130
    assert "--resume" in stopped.stderr
    assert "Traceback" not in stopped.output
    assert work.is_dir()
    assert not out.exists()

    refused = run(*words)
    assert refused.exit_code == 2
    assert "--resume" in refused.stderr
    assert "--restart" in refused.stderr
    other = run(*compress_words(small.weights, out, "macs=40%", quick=True), "--epochs", 2, "--export", "", "--resume")
    assert other.exit_code == 2
    assert "budget was macs<=50%, now macs<=40%" in " ".join(other.stderr.split())

    resumed = run(*words, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert not work.exists()
    assert (out / "model.safetensors").read_bytes() == (small.folder / "model.safetensors").read_bytes()


@pytest.mark.long
def test_artifact_can_be_compressed_again(small: Small, run: Run, tmp_path: Path):
    out = tmp_path / "smaller"
    found = run(
        *("compress", "--model", small.folder, "--data", "digits", "--budget", "macs=60%", "--out", out),
        *("--epochs", 1, "--export", "", "--threads", 1, "--quiet", "--strategy", "knapsack", "--divisor", 1),
        *("--target", "torch"),
    )
    assert found.exit_code == 0, found.output
    assert is_artifact(out)
    once, twice = secateur.load(small.folder).model, secateur.load(out).model
    assert count_macs(twice, torch.zeros(1, 1, 8, 8)) <= 0.6 * count_macs(once, torch.zeros(1, 1, 8, 8))


@pytest.mark.long
def test_older_artifact_is_replaced_whole(small: Small, run: Run, tmp_path: Path):
    out = tmp_path / "small"
    shutil.copytree(small.folder, out)
    words = compress_words(small.weights, out, "params=40%")
    found = run(*words, "--epochs", 0, "--export", "", "--strategy", "uniform", "--importance", "l1", "--divisor", 2)
    assert found.exit_code == 0, found.output
    assert sorted(path.name for path in out.iterdir()) == ["model.safetensors", "report.html", "secateur.json"]
    assert "Uniform" in json.loads((out / "secateur.json").read_text())["metrics"]["search"]["strategy"]


@pytest.mark.long
def test_a_search_that_learns_goes_the_whole_way(run: Run, small: Small, tmp_path: Path):
    out, log = tmp_path / "out", tmp_path / "curves"
    words = (
        *compress_words(small.weights, out), "--epochs", 1, "--export", "", "--limit", 600,
        *("--strategy", "tas", "--search-epochs", 2, "--search-over", "both", "--untied", "--tensorboard", log),
    )  # fmt: skip
    found = run(*words)
    assert found.exit_code == 0, found.output
    metrics = json.loads((out / "secateur.json").read_text())["metrics"]
    assert [epoch["epoch"] for epoch in metrics["search"]["search"]] == [1, 2]
    assert metrics["branches"] == "untied"
    assert metrics["search"]["strategy"].startswith("TAS(widths=Widths(")
    page = (out / "report.html").read_text()
    assert "How the search decided" in page
    assert "Widths over the search" in page
    assert "Depths over the search" in page
    assert sorted(path.name for path in log.iterdir()) == ["search", "train"]
    loaded = secateur.load(out).model
    original = run("inspect", "--model", "digits_resnet", "--json")
    macs = json.loads(original.stdout)["original"]["macs"]
    assert 0.97 * 0.5 * macs <= count_macs(loaded, torch.zeros(1, 1, 8, 8)) <= 0.5 * macs
    assert not (tmp_path / "out.work").exists()


@pytest.mark.long
def test_an_interrupted_search_goes_on(run: Run, small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    words = ("--epochs", 1, "--export", "", "--limit", 600, "--strategy", "tas", "--search-epochs", 3)
    words = (*words, "--target", "torch")
    whole = run(*compress_words(small.weights, tmp_path / "whole"), *words)
    assert whole.exit_code == 0, whole.output
    parts = (*compress_words(small.weights, tmp_path / "parts"), *words)
    with monkeypatch.context() as patch:
        patch.setattr(import_module("secateur.train.callbacks"), "TerminalProgress", _StopsInEpoch2)
        stopped = run(*parts)
    assert stopped.exit_code == 130
    assert "--resume" in stopped.stderr
    assert run(*parts).exit_code == 2
    resumed = run(*parts, "--resume")
    assert resumed.exit_code == 0, resumed.output
    one, other = (tmp_path / name / "model.safetensors" for name in ("whole", "parts"))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.long
def test_a_student_from_scratch(run: Run, small: Small, tmp_path: Path):
    out = tmp_path / "out"
    words = ("--export", "", "--strategy", "uniform", "--divisor", 1, "--from-scratch", "--epochs", 4, "--lr", 0.05)
    words = (*words, "--target", "torch")
    found = run(*compress_words(small.weights, out), *words)
    assert found.exit_code == 0, found.output
    steps = {s["step"]: s["top1"] for s in json.loads((out / "secateur.json").read_text())["metrics"]["test_accuracy"]}
    assert list(steps) == ["original", "cut, weights drawn anew", "distilled"]
    assert steps["cut, weights drawn anew"] < 0.3 < steps["distilled"]


def test_inspect_shows_untied_branches(run: Run):
    found = run("inspect", "--model", "cifar_resnet20", "--untied")
    assert found.exit_code == 0, found.output
    assert "layer1.0.conv2/branch" in found.stdout
    assert "/branch" not in run("inspect", "--model", "cifar_resnet20").stdout


@pytest.mark.shared
@pytest.mark.slow
def test_cifar_resnet20_repaired_without_training(run: Run, tmp_path: Path, cifar10_folder: Path, weights_folder: Path):
    out = tmp_path / "out"
    found = run(
        *("compress", "--model", "cifar_resnet20", "--weights", weights_folder / "cifar10_resnet20.safetensors"),
        *("--data", cifar10_folder, "--budget", "macs=70%", "--limit", 512, "--epochs", 0),
        *("--out", out, "--threads", 1, "--export", ""),
    )
    assert found.exit_code == 0, found.output
    manifest = json.loads((out / "secateur.json").read_text())
    accuracy = {step["step"]: step["top1"] for step in manifest["metrics"]["test_accuracy"]}
    assert accuracy["original"] == pytest.approx(0.9173, abs=0.002)  # as published with the weights
    assert accuracy["cut and repaired"] > 0.7
    assert manifest["cost"]["after"]["macs"] <= 0.7 * manifest["cost"]["before"]["macs"]


@pytest.mark.long
def test_demo_goes_the_whole_way(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from secateur import pipeline
    from secateur.train import TrainConfig

    short = pipeline.Demo(
        strategy=secateur.Knapsack(), teaching=TrainConfig(4, 64, 0.05), recovery=TrainConfig(1, 64, 0.02)
    )

    def quick(*args: object, **kwargs: object) -> object:
        return demo(*args, **kwargs, settings=short)

    demo = pipeline.demo
    monkeypatch.setattr(import_module("secateur.pipeline.demo"), "demo", quick)
    log = tmp_path / "curves"
    found = run("demo", "--out", tmp_path / "demo", "--export", "", "--quiet", "--tensorboard", log)
    assert sorted(path.name for path in log.iterdir()) == ["teach", "train"]
    assert found.exit_code == 0, found.output
    assert "report.html in a browser" in found.stdout
    assert re.search(r"With \d+ % of the MACs, it takes .* ms in onnxruntime .*: .* x the speed\.", found.stdout)
    manifest = json.loads((tmp_path / "demo" / "secateur.json").read_text())
    assert manifest["cost"]["after"]["macs"] <= 0.3 * manifest["cost"]["before"]["macs"]


@pytest.mark.slow
def test_demo_keeps_its_promise(run: Run, tmp_path: Path):
    found = run("demo", "--out", tmp_path / "demo")
    assert found.exit_code == 0, found.output
    manifest = json.loads((tmp_path / "demo" / "secateur.json").read_text())
    accuracy = [step["top1"] for step in manifest["metrics"]["test_accuracy"]]
    assert accuracy[-1] >= accuracy[0] - 0.01
    assert manifest["cost"]["after"]["macs"] <= 0.3 * manifest["cost"]["before"]["macs"]
    assert manifest["metrics"]["latency"][0]["runtime"].startswith("onnxruntime")
    assert manifest["metrics"]["latency"][0]["speedup"][1] >= 1.5
