"""What killed processes leave beside an output folder."""

from pathlib import Path

from secateur._files import clean_stale

LEFT = (".out.0123abcd.part", "..out.0123abcd.part.89efcdab.part", ".out.work.0123abcd.part", ".out.work.0123abcd.old")
OTHERS = (
    "out", "out.work", ".out.0123abcd.old", ".out.part", ".out.0123abcd.part.txt", ".other.0123abcd.part",
    ".out.XYZ.part", "..outs.0123abcd.part.89efcdab.part",
)  # fmt: skip


def test_drafts_are_swept_and_nothing_else_is(tmp_path: Path) -> None:
    """A draft, one of an artifact saved into a draft, and folders of unfinished runs; never an artifact set aside."""
    for name in (*LEFT, *OTHERS):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("")
    clean_stale(tmp_path / "out", tmp_path / "out.work")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(OTHERS)
