"""What holds for every sub-command: the version, and errors with and without their traceback."""

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import nnunet_topomae
from nnunet_topomae.commands import cli


@pytest.fixture
def failing(tmp_path):
    """A command line that a user can mend, and its error."""
    (tmp_path / "notes.txt").write_text("mine")
    return ["demo", "--keep", str(tmp_path)], f"{tmp_path} is not empty; name a new folder"


def test_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"nnunet_topomae {nnunet_topomae.__version__}\n"
    assert metadata.version("nnunet-topomae") == nnunet_topomae.__version__


def test_an_error_is_one_line(failing, capsys):
    arguments, message = failing
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err == f"Error: {message}\n"
    assert captured.out == ""


def test_traceback_raises_the_error_itself(failing, capsys):
    arguments, message = failing
    with pytest.raises(ValueError, match="is not empty") as raised:
        cli.main(["--traceback", *arguments])
    assert str(raised.value) == message
    assert capsys.readouterr().err == ""


def test_traceback_is_printed_on_the_command_line(failing):
    arguments, message = failing
    script = Path(sys.executable).parent / "nnUNetv2_topomae"
    result = subprocess.run([str(script), "--traceback", *arguments], capture_output=True, text=True, check=False)
    lines = result.stderr.splitlines()
    assert "Traceback (most recent call last):" in lines
    assert lines[-1] == f"ValueError: {message}"
    assert result.returncode == 1
