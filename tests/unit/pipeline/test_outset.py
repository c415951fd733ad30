"""What is refused before any work begins."""

import os
from pathlib import Path

import pytest

from secateur.errors import ArtifactError
from secateur.pipeline import check_output


def test_new_and_empty_folders_are_fine(tmp_path: Path):
    check_output(tmp_path / "new" / "deep")
    check_output(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_link_file_and_foreign_folder(tmp_path: Path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(ArtifactError, match="got a file or link"):
        check_output(tmp_path / "file")
    with pytest.raises(ArtifactError, match="got a file or link"):
        check_output(tmp_path / "link")
    with pytest.raises(ArtifactError, match="new, empty, or an older artifact"):
        check_output(tmp_path)
    with pytest.raises(ArtifactError, match="cannot be"):
        check_output(tmp_path / "file" / "below")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="permissions do not bind this user")
def test_folder_that_cannot_be_written(tmp_path: Path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(ArtifactError, match="change its permissions"):
            check_output(tmp_path / "out")
    finally:
        tmp_path.chmod(0o700)


def test_what_appeared_during_an_unfinished_run_does_not_stop_it(tmp_path: Path):
    """As the logs of --tensorboard out/logs; without such a run it is somebody else's folder."""
    (tmp_path / "out" / "logs").mkdir(parents=True)
    with pytest.raises(ArtifactError, match="new, empty, or an older artifact"):
        check_output(tmp_path / "out")
    (tmp_path / "out.work").mkdir()
    (tmp_path / "out.work" / "settings.json").write_text("{}")
    check_output(tmp_path / "out")
