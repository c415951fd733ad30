"""Build the wheel, install it into an empty environment, and use it there as a new user would.

python tools/smoke.py            needs uv and build (extra dev), and a package index; minutes
python tools/smoke.py --keep     leaves the environment in place and says where it is
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = """
import torch, secateur
from torch import nn
from importlib.resources import files

torch.set_num_threads(1)
assert secateur.__file__.startswith({folder!r}), secateur.__file__
assert (files("secateur") / "py.typed").is_file()
model = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                      nn.Flatten(), nn.Linear(16, 2))
images = torch.randn(64, 1, 8, 8)
data = torch.utils.data.TensorDataset(images, (images.mean((1, 2, 3)) > 0).long())
strategy = secateur.Uniform()
result = secateur.compress(model, (data, data, data), "macs=50%", strategy=strategy, out={out!r})
assert not result.failed, result.failed
assert secateur.load({out!r}, factory=lambda: model).model[0].out_channels < 16
print(result)
"""


def main() -> int:
    """Run the script; return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", action="store_true", help="Leave the environment in place.")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="secateur-smoke-"))
    try:
        smoke(folder)
    finally:
        if given.keep:
            print(f"The environment is in {folder}.")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    print("The wheel works in an empty environment.")
    return 0


def smoke(folder: Path) -> None:
    """Build, install and use the wheel below a folder.

    Raises:
        subprocess.CalledProcessError: If a step fails.
    """
    run(sys.executable, "-m", "build", "--wheel", "--outdir", folder / "dist", ROOT)
    (wheel,) = (folder / "dist").glob("*.whl")
    python = folder / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    run(sys.executable, "-m", "uv", "venv", "--quiet", "--python", sys.executable, folder / "venv")
    pinned = ROOT / "requirements" / "pinned.txt"
    run(sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", python, "--constraint", pinned, wheel)
    # From a folder of its own, so that the source in the repository cannot be what is imported.
    run(python, "-m", "secateur", "--version", cwd=folder)
    run(python, "-m", "secateur", "compress", "--help", cwd=folder)
    program = PROGRAM.format(folder=str(folder.resolve()), out=str(folder / "small"))
    run(python, "-c", program, cwd=folder)
    for name in ("report.html", "model.onnx", "secateur.json", "model.safetensors"):
        if not (folder / "small" / name).is_file():
            raise FileNotFoundError(f"The run must write {name}; it did not.")


def run(*words: object, cwd: Path | None = None) -> None:
    """Run a command without the variables that would let it import from elsewhere."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    subprocess.run([str(word) for word in words], check=True, cwd=cwd, env=environment)


if __name__ == "__main__":
    sys.exit(main())
