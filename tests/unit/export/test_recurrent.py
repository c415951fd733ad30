"""Cut recurrent networks come back from artifacts bit for bit, and run in ONNX Runtime."""

from pathlib import Path

import onnxruntime
import pytest
import torch
from cuts import apart, outputs, random_architecture
from recurrent_nets import RECURRENT

from secateur.export import Recipe, edits_between, export_onnx, load_artifact, save_artifact
from secateur.graph import trace
from secateur.prune import cut

SAVED = ["crnn_lstm", "lstm_cell", "seq2seq_gru", "learned_state", "own_zeros", "packed_rnn", "speaker", "recognizer"]


@pytest.mark.parametrize("name", SAVED)
def test_a_reloaded_artifact_computes_the_same(tmp_path: Path, name: str) -> None:
    model, inputs = RECURRENT[name]()
    graph = trace(model, inputs)
    made = cut(model, graph, random_architecture(graph, 1))
    recipe = Recipe({"kind": "secateur", "name": name}, made.architecture, (3, 8, 8), edits_between(model, made.model))
    save_artifact(tmp_path / "small", made.model, recipe)
    loaded = load_artifact(tmp_path / "small", build=lambda _: RECURRENT[name]()[0])
    assert apart(outputs(made.model, *inputs), outputs(loaded.model, *inputs)) == 0
    assert str(loaded.model) == str(made.model)


@pytest.mark.parametrize(
    "name", ["crnn_lstm", *(pytest.param(name, marks=pytest.mark.slow) for name in ("crnn_gru", "lstm_cell"))]
)
def test_onnx_runtime_gives_the_outputs_of_a_cut_network(tmp_path: Path, name: str) -> None:
    model, (x,) = RECURRENT[name]()
    graph = trace(model, x)
    made = cut(model, graph, random_architecture(graph, 1))
    export_onnx(made.model, x, tmp_path / "small.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "small.onnx"))
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert apart(outputs(made.model, x), [torch.from_numpy(got)]) <= 1e-5
