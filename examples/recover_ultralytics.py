"""Recover a cut YOLO with its own trainer: python recover_ultralytics.py DATA.yaml IMAGES (pip install ultralytics)

DATA.yaml is a data set of Ultralytics, and IMAGES a folder of images: the search and the repairs need no labels.
"""

import sys

from torchvision.io import decode_image
from torchvision.transforms.v2.functional import resize
from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionTrainer

import secateur
from secateur.tasks import Imitation

SIZE = 640
SETTINGS = {"epochs": 1, "batch": 8, "amp": False, "plots": False, "workers": 0}


def recover_on(dataset):
    """Return a loop for `recovery=` that trains on a data set of Ultralytics."""

    def recover(student, teacher, data, context):
        class CutTrainer(DetectionTrainer):
            def get_model(self, cfg=None, weights=None, verbose=True):
                return student

        where = {"project": None if context.folder is None else str(context.folder), "imgsz": SIZE, "exist_ok": True}
        trainer = CutTrainer(overrides={**SETTINGS, **where, "model": "yolov8n.yaml", "data": dataset, "val": False,
                                        "device": context.device.type, "seed": context.seed})  # fmt: skip
        trainer.train()
        return trainer.ema.ema.float()  # the moving average of the weights, which Ultralytics saves too

    return recover


def images(folder):
    """Return the images of a folder as the model takes them."""
    paths = sorted(path for path in folder.iterdir() if path.suffix in {".jpg", ".png"})
    return [resize(decode_image(str(path), "RGB"), [SIZE, SIZE]).float() / 255 for path in paths]


if __name__ == "__main__":
    from pathlib import Path

    model = YOLO("yolov8n.pt").model.float().eval()
    found = secateur.compress(
        model, images(Path(sys.argv[2])), "macs=50%", task=Imitation(), recovery=recover_on(sys.argv[1]), export=()
    )
    print(found)
