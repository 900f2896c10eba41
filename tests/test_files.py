import json

import pytest

from nnunet_topomae.files import read_json, write_file, write_json


def test_a_file_is_replaced_as_a_whole(tmp_path):
    file = tmp_path / "a.json"
    write_json({"old": 1}, file)
    write_json({"new": [1, 2]}, file)
    assert json.loads(file.read_text()) == {"new": [1, 2]}
    assert list(tmp_path.iterdir()) == [file]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(b"old")

    def fail(stream):
        stream.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_file(file, fail)
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, FileNotFoundError, r"a\.json does not exist$"),
        ("{", ValueError, r"a\.json is no valid JSON: Expecting property name"),
        ("[1]", ValueError, r"a\.json must hold a JSON object, got list$"),
    ],
)
def test_what_is_no_json_object_is_refused_by_name(tmp_path, content, error, message):
    file = tmp_path / "a.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(error, match=message):
        read_json(file)
