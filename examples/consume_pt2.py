"""Print the class of images with model.pt2 (only if you trust it): python consume_pt2.py FOLDER/model.pt2 IMAGE..."""

import json
import sys
from pathlib import Path

import torch
from preprocess import model_input  # the file beside this one

path = Path(sys.argv[1])
about = json.loads((path.parent / "secateur.json").read_text())
model = torch.export.load(path).module()
for image in sys.argv[2:]:
    with torch.no_grad():
        logits = model(torch.from_numpy(model_input(image, about)))
    print(about["classes"][logits[0].argmax()])
