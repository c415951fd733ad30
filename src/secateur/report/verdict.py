"""What a reader of a report wants to know first: is it faster, what was lost, is it verified, how is it deployed."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from secateur.report import units
from secateur.report.run import RunReport
from secateur.tasks.outcomes import PairedTest

_FASTER = 0.02
"""A speedup nearer to 1 than this is not called faster or slower."""
_SMALL = 0.01
"""A loss of this fraction of the images, or of the value of another metric, is amber; more is red."""


@dataclass(frozen=True)
class Claim:
    """One part of the verdict: words, a second line, and its tone: ``better``, ``worse``, ``much-worse`` or empty."""

    words: str
    more: str = ""
    tone: str = ""


def claims(run: RunReport) -> tuple[Claim, ...]:
    """Return the verdict of a run: speed, what was lost, and what was checked."""
    return tuple(filter(None, (_speed(run), _quality(run), _checks(run))))


def _speed(run: RunReport) -> Claim | None:
    if not run.latency or not run.compresses:
        return None
    first = run.latency[0]
    lower, median, upper = first.speedup
    where = f"{first.runtime}, {first.threads} thread{'s' if first.threads != 1 else ''}, batch {first.batch_size}"
    if lower < 1 < upper or abs(median - 1) < _FASTER:
        return Claim("as fast as before", where)
    if median > 1:
        return Claim(f"{units.factor(median)} as fast", where, "better")
    return Claim(f"{units.percent(1 / median - 1, 0)} slower", where, "much-worse")


def _quality(run: RunReport) -> Claim | None:
    before, after = run.before.score, run.after.score
    if before is None or after is None:
        return None
    metric = after.metric
    change = metric.key(after.value) - metric.key(before.value)
    words = metric.change(0.0, abs(change)).lstrip("+")
    said = f"{words} of {metric.words} {'gained' if change > 0 else 'lost'}" if change else f"same {metric.words}"
    tone = change_tone(run)
    if run.paired is None:
        return Claim(said, f"on {after.n:,} test images", tone)
    return Claim(said, _interval(run.paired), tone)


def _interval(paired: PairedTest) -> str:
    low, high = (units.signed(100 * end, 2) for end in (paired.low, paired.high))
    certain = "" if paired.low > 0 or paired.high < 0 else "; can be chance"
    return f"95 %: {low} to {high} points, on the same {paired.n:,} images{certain}"


def change_tone(run: RunReport) -> str:
    """Return the tone of the change of the score: red for more than a point (or percent), amber for less, or better."""
    before, after = run.before.score, run.after.score
    if before is None or after is None:
        return ""
    change = after.metric.key(after.value) - after.metric.key(before.value)
    if change >= 0:
        return "better"
    scale = 1.0 if after.metric.unit == "%" else max(abs(before.value), 1e-12)
    return "worse" if -change <= _SMALL * scale else "much-worse"


def cost_tone(before: float, after: float) -> str:
    """Return the tone of the change of a cost: red if it grew."""
    return "much-worse" if after > before else "better" if after < before else ""


def _checks(run: RunReport) -> Claim | None:
    if not run.checks:
        return None
    passed, total = sum(check.passed for check in run.checks), len(run.checks)
    if passed == total:
        return Claim("verified", f"all {total} checks hold", "better")
    failed = next(check.name for check in run.checks if not check.passed)
    return Claim("not verified", f"{total - passed} of {total} checks fail: {failed}", "much-worse")


_CALL = re.compile(r"\b([A-Z][A-Za-z0-9]*)\((?:[^()]|\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\))*\)")


def without_settings(text: str) -> str:
    """Return a sentence in which objects of Python are named without their settings, which secateur.json has."""
    return _CALL.sub(r"\1", text).replace(" -> ", " → ")


_DEPLOY = {
    "model.onnx": (
        "ONNX Runtime",
        'session = onnxruntime.InferenceSession("model.onnx")\n'
        "outputs = session.run(None, {session.get_inputs()[0].name: batch})",
        "import numpy, onnxruntime",
    ),
    "model.int8.onnx": (
        "ONNX Runtime, 8-bit integers",
        'session = onnxruntime.InferenceSession("model.int8.onnx")\n'
        "outputs = session.run(None, {session.get_inputs()[0].name: batch})",
        "import numpy, onnxruntime",
    ),
    "model.pt2": (
        "PyTorch without Secateur (only files that you trust)",
        'model = torch.export.load("model.pt2").module()\noutputs = model(torch.from_numpy(batch))',
        "import numpy, torch",
    ),
    "model.xml": (
        "OpenVINO",
        'model = openvino.compile_model("model.xml", "CPU")\noutputs = model([batch])',
        "import numpy, openvino",
    ),
    "model.pte": (
        "ExecuTorch (only files that you trust)",
        'method = Runtime.get().load_program("model.pte").load_method("forward")\n'
        "outputs = method.execute([torch.from_numpy(batch)])",
        "import numpy, torch\nfrom executorch.runtime import Runtime",
    ),
}
"""Name of a file: runtime, code that runs a batch, and its imports."""


def deploy_snippets(files: Sequence[str], size: Sequence[int], loading: str = "") -> tuple[tuple[str, str, str], ...]:
    """Return (runtime, file, code) for each exported file, and for the artifact itself first.

    Args:
        files: Names of exported files; those without a snippet are left out.
        size: Channels, height, width of an input; empty if it is no single image.
        loading: What `secateur.load` needs beside the folder, such as ``factory=build``.
    """
    more = f", {loading}" if loading else ""
    comment = "  # build: your function that builds the original" if loading.startswith("factory") else ""
    found = [
        (
            "PyTorch with Secateur",
            "secateur.json",
            f'import secateur\n\nmodel = secateur.load("."{more}).model{comment}\n'
            + ("outputs = model(batch)  # normalized pixels" if size else "outputs = model(inputs)  # as the original"),
        )
    ]
    for name in files:
        if name in _DEPLOY and size:
            title, run, imports = _DEPLOY[name]
            batch = f"batch = numpy.zeros((1, {', '.join(map(str, size))}), numpy.float32)  # normalized pixels"
            found.append((title, name, f"{imports}\n\n{batch}\n{run}"))
    return tuple(found)
