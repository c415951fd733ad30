"""Print the class of an image with model.xml and model.bin: python consume_openvino.py FOLDER/model.xml IMAGE"""

import json
import sys
from pathlib import Path

import numpy as np
import openvino
from PIL import Image

path, image = Path(sys.argv[1]), Image.open(sys.argv[2])
about = json.loads((path.parent / "secateur.json").read_text())
channels, height, width = about["input"]["shape"]
image = image.convert("RGB" if channels == 3 else "L").resize((width, height), Image.Resampling.BILINEAR)
pixels = np.asarray(image, np.float32).reshape(height, width, channels) / 255
pixels = (pixels - about["input"]["mean"]) / about["input"]["std"]
batch = np.ascontiguousarray(pixels.transpose(2, 0, 1)[None], np.float32)

settings = {"INFERENCE_PRECISION_HINT": "f32"}  # processors that can, compute in bfloat16 otherwise
model = openvino.compile_model(path, "CPU", settings)
logits = model([batch])[0]
print(about["classes"][logits[0].argmax()])
