"""Print the class of an image with model.pte (if you trust it): python consume_executorch.py FOLDER/model.pte IMAGE"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from executorch.runtime import Runtime
from PIL import Image

path, image = Path(sys.argv[1]), Image.open(sys.argv[2])
about = json.loads((path.parent / "secateur.json").read_text())
channels, height, width = about["input"]["shape"]
image = image.convert("RGB" if channels == 3 else "L").resize((width, height), Image.Resampling.BILINEAR)
pixels = np.asarray(image, np.float32).reshape(height, width, channels) / 255
pixels = (pixels - about["input"]["mean"]) / about["input"]["std"]
batch = np.ascontiguousarray(pixels.transpose(2, 0, 1)[None], np.float32)

program = Runtime.get().load_program(path)
logits = program.load_method("forward").execute([torch.from_numpy(batch)])[0]
print(about["classes"][logits[0].argmax()])
