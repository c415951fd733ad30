"""Measure how well the pretrained networks know the images that choices are made on.

    OMP_NUM_THREADS=1 python benchmarks/seen_images.py

They were trained on all 50,000 training images of CIFAR-10, so that the tenth that this project holds out for choices
is not new to them. Writes results/seen_images.json.
"""

import argparse

import torch
from _record import CIFAR10, WEIGHTS, surroundings, write_record

from secateur.data import load_data
from secateur.models import load_model
from secateur.train import evaluate


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[20, 56])
    asked = parser.parse_args()
    torch.set_num_threads(1)
    data, rows = load_data(str(CIFAR10), seed=0), []
    for depth in asked.depths:
        model, _ = load_model(f"cifar_resnet{depth}", weights=WEIGHTS / f"cifar10_resnet{depth}.safetensors")
        found = [evaluate(model, split) for split in (data.validation, data.test)]
        rows.append({"model": f"cifar_resnet{depth}", "validation": found[0].value, "test": found[1].value})
        print(rows[-1], flush=True)
    write_record("seen_images", {"rows": rows, "n": [len(data.validation), len(data.test)], **surroundings()})


if __name__ == "__main__":
    main()
