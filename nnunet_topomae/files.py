"""Reading and writing files so that none is ever half-written."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO


def write_file(file: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file under a temporary name beside it, flush it to the disk, then rename it.

    Whoever looks at ``file`` sees the old content or the whole new one, also after a crash. If writing fails, the
    temporary file is removed.

    Args:
        file: to write or to replace.
        write: writes the content to an open binary file.
    """
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(content: Any, file: Path) -> None:
    """Write ``content`` as JSON; see :func:`write_file`."""
    write_file(file, lambda stream: stream.write(json.dumps(content, indent=4).encode()))


def read_json(file: Path, kind: type = dict) -> Any:
    """Read a JSON file that holds an object, which becomes a dict, or a list.

    Args:
        file: to read.
        kind: dict or list.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it holds something else.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist")
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is no valid JSON: {error}") from error
    if not isinstance(content, kind):
        wanted = "object" if kind is dict else "list"
        raise ValueError(f"{file} must hold a JSON {wanted}, got {type(content).__name__}")
    return content
