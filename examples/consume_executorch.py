"""Print the class of images with model.pte (if you trust it): python consume_executorch.py FOLDER/model.pte IMAGE..."""

import json
import sys
from pathlib import Path

import torch
from executorch.runtime import Runtime
from preprocess import model_input  # the file beside this one

path = Path(sys.argv[1])
about = json.loads((path.parent / "secateur.json").read_text())
program = Runtime.get().load_program(path)
for image in sys.argv[2:]:
    logits = program.load_method("forward").execute([torch.from_numpy(model_input(image, about))])[0]
    print(about["classes"][logits[0].argmax()])
