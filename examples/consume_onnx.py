"""Print the class of images with model.onnx or model.int8.onnx: python consume_onnx.py FOLDER/model.onnx IMAGE..."""

import json
import sys
from pathlib import Path

import onnxruntime
from preprocess import model_input  # the file beside this one

path = Path(sys.argv[1])
about = json.loads((path.parent / "secateur.json").read_text())
session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
for image in sys.argv[2:]:
    (logits,) = session.run(None, {session.get_inputs()[0].name: model_input(image, about)})
    print(about["classes"][logits[0].argmax()])
