"""The tables of the study as text, from results/study/results.parquet, which a study has written:

    OMP_NUM_THREADS=1 secateur compare --study pruning-x-distillation --data ../shared/data/cifar10 --limit 20000 \\
        --teacher-epochs 5 --student-epochs 1 --threads 1 --out runs/study
    cp runs/study/results.parquet runs/study/study.html runs/study/study.json benchmarks/results/study
    python benchmarks/study.py

About 90 minutes of one core.
"""

import html
import json
import re

import pyarrow.parquet as pq
from _record import RESULTS, table

from secateur._provenance import Provenance
from secateur.pipeline._study import page_of

FOLDER = RESULTS / "study"


def main() -> None:
    rows = pq.read_table(FOLDER / "results.parquet").to_pylist()
    settings = json.loads((FOLDER / "study.json").read_text())
    shown = html.unescape((FOLDER / "study.html").read_text())
    date = re.search(r"\d{4}-\d\d-\d\dT[\d:+]+", shown)
    page = page_of(rows, (), Provenance.here("", 0))
    parts = [
        f"# {page.title}",
        f"{date.group() if date else 'Undated'}. `results.parquet` has a row for each of the {len(rows)} cells, "
        "`study.html` the same tables.",
        "\n".join(f"- {name}: {value}" for name, value in settings.items()),
        "\n".join(page.notes),
    ]
    for each in page.tables:
        parts += [f"## {each.title}", each.text, table([*each.columns], [[*row] for row in each.rows])]
    (FOLDER / "study.md").write_text("\n\n".join(part.strip() for part in parts) + "\n")


if __name__ == "__main__":
    main()
