"""Files that are there whole or not at all."""

import pytest

from alignprop_fast.files import whole, write_whole


def test_a_full_disk_leaves_what_was_there(files_up_to, tmp_path):
    write_whole(tmp_path / "text", b"first")
    with files_up_to(500), pytest.raises(OSError, match="File too large"):
        write_whole(tmp_path / "text", b"x" * 1000)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"text": b"first"}


def test_a_block_that_ends_in_an_error_leaves_what_was_there(tmp_path):
    write_whole(tmp_path / "text", b"first")
    with pytest.raises(KeyboardInterrupt), whole(tmp_path / "text") as temporary:
        temporary.write_bytes(b"second")
        raise KeyboardInterrupt
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"text": b"first"}
