"""Reading and writing files so that none is ever half-written."""

import errno
import fcntl
import json
import os
import re
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from secrets import token_hex
from typing import Any, BinaryIO

_FULL = (errno.ENOSPC, errno.EDQUOT)  # the disk, or the share of it that a user has
_NO_FLUSH = (errno.EINVAL, errno.ENOTSUP)  # of folders, as on some file systems of networks
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_TEMPORARY = re.compile(r"\..+\.\d+-[0-9a-f]{8}")


def write_file(file: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file under a temporary name beside it, flush it to the disk, rename it, and flush the folder.

    Whoever looks at ``file`` sees the old content or the whole new one, also after a crash or a power cut. If writing
    fails, the temporary file is removed. A file system that cannot flush folders does without.

    Args:
        file: to write or to replace.
        write: writes the content to an open binary file.

    Raises:
        OSError: names the file and the reason, such as a full disk; the old content is as it was.
    """
    temporary = _temporary(file)
    try:
        with temporary.open("wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        _rename(temporary, file)
    except Exception as error:
        if (cause := _os_error(error)) is None:
            raise
        why = f"{cause.strerror or cause}; {_remedy(cause, file)}"
        raise OSError(f"{file} cannot be written: {why}. What was there before is unchanged") from error
    finally:
        _remove(temporary)


def keep_as(file: Path, older: Path) -> None:
    """Give a file a second name, which stays with its present content when the file is replaced; costs no copy.

    ``older`` is replaced, and ``file`` is there all the time. Where the disk knows no hard links, nothing happens.
    """
    temporary = _temporary(older)
    try:
        temporary.hardlink_to(file)
        _rename(temporary, older)
    except OSError:
        _remove(temporary)


def remove_leftovers(folder: Path) -> list[Path]:
    """Delete the temporary files that processes which were killed have left in a folder; returns what was deleted.

    Nobody else may be writing there.
    """
    leftovers = [file for file in folder.iterdir() if _TEMPORARY.fullmatch(file.name) and file.is_file()]
    for file in leftovers:
        file.unlink()
    return leftovers


def lock(file: Path, warn: Callable[[str], object]) -> BinaryIO:
    """Keep other processes, also on other machines, from locking a file until this one closes it or ends.

    Args:
        file: to lock.
        warn: see :func:`take_lock`.

    Returns:
        The open file, to be kept.

    Raises:
        ValueError: if another process holds it; says which.
    """
    stream = file.open("a+b")
    if not take_lock(stream, warn):
        stream.seek(0)
        holder = stream.read().decode(errors="replace")
        stream.close()
        raise ValueError(f"{file.parent} is in use by {holder or 'another process'}; wait for it, or end it")
    stream.truncate(0)
    stream.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
    stream.flush()
    return stream


def take_lock(stream: BinaryIO, warn: Callable[[str], object], *, wait: bool = False, inherited: bool = False) -> bool:
    """Lock a file that is open for writing until it is closed.

    Args:
        stream: the open file.
        warn: is told if the disk has no locks, as some of clusters have not; then nothing is locked.
        wait: whether to wait while another process holds it.
        inherited: whether processes that inherit the open file hold the lock, too, until the last of them ends. If not,
            it is a POSIX lock: one of a process that was killed is gone at once, also if processes that it had started
            go on.

    Returns:
        False if another process holds it, otherwise True.
    """
    take = fcntl.flock if inherited else fcntl.lockf
    try:
        take(stream, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        folder = Path(stream.name).parent
        warn(f"{folder} is on a disk without locks ({error.strerror}): let no other process work there")
    return True


def _temporary(file: Path) -> Path:
    """A name that no other process takes: those in containers, or on other machines, may have the same number."""
    return file.with_name(f".{file.name}.{os.getpid()}-{token_hex(4)}")


def _remove(temporary: Path) -> None:
    with suppress(OSError):  # in a folder that is read-only there is none; the error that matters is that of writing
        temporary.unlink(missing_ok=True)


def _rename(temporary: Path, file: Path) -> None:
    temporary.replace(file)
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in _NO_FLUSH:
            raise
    finally:
        os.close(folder)


def _remedy(error: OSError, file: Path) -> str:
    if error.errno not in _FULL:
        return "see that the folder is there and may be written to"
    disk = next(folder for folder in file.absolute().parents if folder.is_mount())
    return f"free space on the disk {disk}"


def _os_error(error: BaseException | None) -> OSError | None:
    """The error of the file system behind an error; libraries such as PyTorch raise others on top of it."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error


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
    except (ValueError, RecursionError) as error:  # also of text that is not UTF-8, and of brackets without end
        raise ValueError(f"{file} is no valid JSON: {error}") from error
    if not isinstance(content, kind):
        wanted = "object" if kind is dict else "list"
        raise ValueError(f"{file} must hold a JSON {wanted}, got {type(content).__name__}")
    return content
