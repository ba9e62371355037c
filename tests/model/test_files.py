"""Files that are replaced whole or not at all."""

import pytest

from model.files import put_in_place, write_atomically


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "policy.json"
    write_atomically(file, b"old")
    monkeypatch.setattr(type(file), "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write_atomically(file, b"new")
    assert file.read_bytes() == b"old"


def test_writers_of_the_same_file_write_to_files_of_their_own(tmp_path):
    file = tmp_path / "stage1-batch1.bin"

    def write(partial):
        partial.write_text("half")
        put_in_place(file, lambda other: other.write_text("another's"))
        assert partial.read_text() == "half"

    put_in_place(file, write)
    assert file.read_text() == "half"
    assert list(tmp_path.iterdir()) == [file]


def test_a_file_that_cannot_be_written_in_full_leaves_nothing(tmp_path):
    def write(partial):
        partial.write_text("half")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        put_in_place(tmp_path / "stage1-batch1.bin", write)
    assert list(tmp_path.iterdir()) == []
