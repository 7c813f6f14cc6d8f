"""Files written whole or not at all."""

import os

import pytest

from plainconv.files import InputError, write_whole


def test_the_file_is_there_when_the_block_has_ended(tmp_path):
    target = tmp_path / "a.txt"
    with write_whole(target) as file:
        file.write(b"whole")
        assert not target.exists()
    assert target.read_bytes() == b"whole"
    assert list(tmp_path.iterdir()) == [target]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "a.txt"
    target.write_bytes(b"old")

    def fill():
        with write_whole(target) as file:
            file.write(b"ne")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        fill()
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_link_is_followed(tmp_path):
    (tmp_path / "real.txt").write_bytes(b"old")
    (tmp_path / "link.txt").symlink_to("real.txt")
    with write_whole(tmp_path / "link.txt") as file:
        file.write(b"new")
    assert (tmp_path / "real.txt").read_bytes() == b"new"
    assert (tmp_path / "link.txt").is_symlink()


@pytest.mark.parametrize("name", [".", os.devnull])
def test_what_is_no_file_is_not_replaced(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="not a regular file"), write_whole(name):
        raise AssertionError("the block must not run")


def test_new_files_have_the_usual_permissions(tmp_path):
    usual = tmp_path / "usual"
    usual.touch()
    with write_whole(tmp_path / "ours"):
        pass
    assert (tmp_path / "ours").stat().st_mode == usual.stat().st_mode
