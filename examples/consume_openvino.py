"""Print the class of images with model.xml and model.bin: python consume_openvino.py FOLDER/model.xml IMAGE..."""

import json
import sys
from pathlib import Path

import openvino
from preprocess import model_input  # the file beside this one

path = Path(sys.argv[1])
about = json.loads((path.parent / "secateur.json").read_text())
settings = {"INFERENCE_PRECISION_HINT": "f32"}  # processors that can, compute in bfloat16 otherwise
model = openvino.compile_model(path, "CPU", settings)
for image in sys.argv[2:]:
    logits = model([model_input(image, about)])[0]
    print(about["classes"][logits[0].argmax()])
