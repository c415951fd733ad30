"""Print the class of an image with model.pt2 (only if you trust it): python consume_pt2.py FOLDER/model.pt2 IMAGE"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

path, image = Path(sys.argv[1]), Image.open(sys.argv[2])
about = json.loads((path.parent / "secateur.json").read_text())
channels, height, width = about["input"]["shape"]
image = image.convert("RGB" if channels == 3 else "L").resize((width, height), Image.Resampling.BILINEAR)
pixels = np.asarray(image, np.float32).reshape(height, width, channels) / 255
pixels = (pixels - about["input"]["mean"]) / about["input"]["std"]
batch = np.ascontiguousarray(pixels.transpose(2, 0, 1)[None], np.float32)

model = torch.export.load(path).module()
with torch.no_grad():
    logits = model(torch.from_numpy(batch))
print(about["classes"][logits[0].argmax()])
