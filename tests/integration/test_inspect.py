"""``inspect`` and the flags by which a user chooses what may be cut."""

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from command_line import Run, Small, compress_words

import secateur


def _words(text: str) -> str:
    return " ".join(text.split())


def test_shows_shares_axes_reasons_and_blocks(run: Run):
    found = run("inspect", "--model", "cifar_resnet20", "--exclude", "layer1", "--axis-divisor", "layer2.*=8")
    assert found.exit_code == 0, found.output
    said = _words(found.stdout)
    assert "layer2.0.conv1 32 8 to 32 by 8 6 layer2.0.conv1, layer2.0.bn1, layer2.0.conv2" in said
    assert "layer3.0.conv1 64 16 to 64 6" in said
    assert "kept whole: matched exclude pattern 'layer1' conv1, layer1.0.conv1, layer1.1.conv1" in said
    assert "reaches the model's output linear" in said
    assert "% of the MACs in operations with one" in said
    assert "unless a rule says otherwise" in said
    assert "Residual blocks" in said
    assert "Nothing written." in said


def test_reasons_that_differ_in_names_only_are_one_row():
    from secateur.cli.tables import _grouped
    from secateur.graph import ChannelAxis

    def axis(name: str, why: str) -> ChannelAxis:
        return ChannelAxis(name, 4, (), 1, why)

    same = [axis(f"blocks.{n}.odd", f"`sort` in blocks.{n}.odd moves channels") for n in range(6)]
    alone = axis("head", "`topk` in head moves channels")
    groups = _grouped([*same, alone])
    assert groups == [
        ("`sort` in … moves channels", [a.name for a in same]),
        ("`topk` in head moves channels", ["head"]),
    ]


def test_json_is_one_object_with_everything(run: Run):
    found = run("inspect", "--model", "cifar_resnet20", "--json", "--include", "layer3", "--axis-min-width", "*.1.*=20")
    assert found.exit_code == 0, found.output
    data = json.loads(found.stdout)
    axes = {axis["name"]: axis for axis in data["axes"]}
    assert axes["layer3.1.conv1"]["smallest_width"] == 20
    assert axes["layer3.2.conv1"]["smallest_width"] == 16
    assert axes["layer3.2.conv1"]["width_step"] == 1
    assert axes["layer1.0.conv1"]["frozen_because"].startswith("kept whole: matched no include pattern ('layer3')")
    assert axes["layer1.0.conv1"]["smallest_width"] == axes["layer1.0.conv1"]["size"] == 16
    assert {"tensor": "layer3.1.conv1.weight", "dim": 0, "role": "output"} in axes["layer3.1.conv1"]["sites"]
    assert sum(layer["macs"] for layer in data["layers"]) == data["original"]["macs"]
    assert sum(layer["params"] for layer in data["layers"]) == data["original"]["params"]
    assert 0.9 < data["prunable_share"]["params"] < data["prunable_share"]["macs"] <= 1
    kept = {block["name"]: block["kept_because"] for block in data["blocks"]}
    assert kept["layer3.1"] is None
    assert "not all of it matched" in kept["layer1.1"]


def test_tree_sums_up_to_the_model(run: Run):
    found = run("inspect", "--model", "cifar_resnet20", "--tree", "--exclude", "layer1.0.conv1")
    assert found.exit_code == 0, found.output
    lines = [_words(line.strip("│├└─ ")) for line in found.stdout.splitlines()]
    assert lines[0] == "cifar_resnet20 270 k params, 100.0 % of MACs"
    assert any(line.startswith("layer3 ") and "% of MACs" in line for line in lines)
    assert (
        "conv1 2.3 k params, 5.8 % of MACs layer1.0.conv1 (16). Stays whole: matched exclude pattern 'layer1.0.conv1'"
        in lines
    )
    assert any(line.startswith("0 ") and line.endswith("block, stays") for line in lines)
    assert any(line.endswith("removable block") for line in lines)
    assert "linear 650 params, 0.0 % of MACs linear (10). Stays whole: reaches the model's output" in lines


def test_drawings(run: Run, tmp_path: Path):
    for name in ("net.svg", "net.dot"):
        found = run("inspect", "--model", "cifar_resnet20", "--draw", tmp_path / name)
        assert found.exit_code == 0, found.output
        assert f"Wrote {tmp_path / name}" in found.stdout.replace("\n", "")
        assert "Nothing written." not in found.stdout
    assert ET.parse(tmp_path / "net.svg").getroot().tag.endswith("svg")
    assert (tmp_path / "net.dot").read_text().startswith("digraph")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--include", "lair1"),
            "`--include` must match an axis, module or parameter with channels; 'lair1' matches none.",
        ),
        (("--exclude", "layer9*"), "Did you mean layer"),
        (("--keep-whole", "nothing"), "`secateur inspect` lists the axes"),
        (("--include", ""), "`--include` must be a name pattern, such as 'layer1.*'; got ''."),
        (("--exclude", "*"), "`choices` must leave something to cut; got exclude *"),
        (("--axis-divisor", "layer1"), "`--axis-divisor` must be a name pattern, = and a whole number"),
        (("--axis-divisor", "layer1=1.5"), "such as 'layer1.*=8'; got 'layer1=1.5'"),
        (("--axis-divisor", "layer1=0"), "`--axis-divisor` must be a whole number of channels, at least 1; got 0"),
        (("--axis-divisor", "=8"), "`--axis-divisor` must be a name pattern"),
        (("--axis-min-width", "layer7=8"), "`rules` must match an axis, module or parameter"),
        (("--axis-min-width", "layer1=x"), "`--axis-min-width` must be a name pattern, = and a whole number"),
        (("--axis-min-kept", "layer1=half"), "`--axis-min-kept` must be a name pattern, = and a number"),
        (("--axis-min-kept", "layer1=1.5"), "`--axis-min-kept` must be from 0 to 1; got 1.5"),
        (("--draw", "net.png"), "`--draw` must be a file name that ends in .svg"),
    ],
)
def test_bad_choices_are_refused_in_words(run: Run, words: tuple[str, ...], message: str):
    found = run("inspect", "--model", "cifar_resnet20", *words)
    assert found.exit_code == 2, found.output
    assert "Traceback" not in found.output
    assert message in _words(found.stderr)


def test_drawing_into_a_folder_that_cannot_be_written(run: Run, tmp_path: Path):
    (tmp_path / "file").write_text("")
    found = run("inspect", "--model", "cifar_resnet20", "--draw", tmp_path / "file" / "net.svg")
    assert found.exit_code == 2
    assert "Traceback" not in found.output
    assert "Check the path" in _words(found.stderr)


@pytest.mark.long
def test_compress_keeps_to_the_choices_and_reports_them(small: Small, run: Run, tmp_path: Path):
    out = tmp_path / "chosen"
    chosen = ("--exclude", "layer1", "--axis-divisor", "layer2.*=4", "--axis-min-width", "*.conv1=10")
    words = (*compress_words(small.weights, out, "macs=70%", quick=True), "--epochs", 1, "--export", "", *chosen)
    found = run(*words)
    assert found.exit_code == 0, found.output
    manifest = json.loads((out / "secateur.json").read_text())
    original, _ = secateur.load_model("digits_resnet")
    model = secateur.load(out).model
    before, after = (dict(net.named_parameters()) for net in (original, model))
    for name, tensor in after.items():
        if name.startswith("layer1."):
            assert tensor.shape == before[name].shape
    assert any(tensor.shape != before[name].shape for name, tensor in after.items())
    assert manifest["metrics"]["choices"]["exclude"] == ["layer1"]
    page = (out / "report.html").read_text()
    assert "exclude layer1; layer2.*: divisor 4; *.conv1: min_width 10" in page
    assert "kept whole: matched exclude pattern &#39;layer1&#39;" in page


def test_budget_out_of_reach_names_the_choices(small: Small, run: Run, tmp_path: Path):
    words = compress_words(small.weights, tmp_path / "out", "macs=20%")
    found = run(*words, "--include", "layer1", "--epochs", 0)
    assert found.exit_code == 2
    said = _words(found.stderr)
    assert "Reachable: macs" in said
    assert "Or loosen what you selected: include layer1." in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_blocks_are_removed_where_channels_alone_do_not_suffice(small: Small, run: Run, tmp_path: Path):
    out = tmp_path / "shallow"
    words = (*compress_words(small.weights, out, "macs=5%", quick=True), "--epochs", 1, "--export", "")
    refused = run(*words)
    assert refused.exit_code == 2
    assert "Or let residual blocks go too (--remove-blocks" in _words(refused.stderr)
    kept = run(*words, "--remove-blocks", 1, "--keep-whole", "layer1.0.conv2")
    assert kept.exit_code == 2
    assert "Or loosen what you selected: keep whole layer1.0.conv2." in _words(kept.stderr)
    found = run(*words, "--remove-blocks", 1)
    assert found.exit_code == 0, found.output
    assert "1 of 1 residual blocks were removed whole" in (out / "report.html").read_text()
    manifest = json.loads((out / "secateur.json").read_text())
    assert manifest["architecture"]["removed_blocks"] == ["layer1.0"]
    assert manifest["cost"]["after"]["macs"] <= 0.05 * manifest["cost"]["before"]["macs"]
    assert run("verify", out).exit_code == 0
    tree = run("inspect", "--model", out, "--tree")
    assert "layer1" not in tree.stdout


@pytest.mark.skipif(os.name != "posix", reason="pipes are closed in this way on POSIX systems only")
@pytest.mark.parametrize("form", ["--json", "--tree"])
def test_a_closed_pipe_is_no_error(form: str):
    read, write = os.pipe()
    os.close(read)
    code = "from secateur.cli import main; main()"
    words = [sys.executable, "-c", code, "inspect", "--model", "cifar_resnet20", form]
    ended = subprocess.run(words, stdout=write, stderr=subprocess.PIPE, check=False, text=True)
    os.close(write)
    assert (ended.returncode, ended.stderr) == (0, "")
