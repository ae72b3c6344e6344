"""What is asked of a disk: whether there is room for a result, and who else writes into a folder."""

import os
import shutil
import socket
import tempfile
import warnings
from pathlib import Path
from typing import IO

from models.errors import InputError

ROOM = 1 << 24
"""Bytes that have to be free where something is going to be written."""


def check_writable(field: str, path: Path, folder: bool = True) -> None:
    """Raises an InputError if nothing can be written to a path, or hardly anything: better now than after hours.

    Args:
        field: The setting, for the message.
        path: Where a file or a folder is to be; nothing is left there.
        folder: Whether it is to be a folder.
    """
    accepted = f"a path that can be written, with {ROOM >> 20} MiB free"
    path = Path(path).absolute()
    if "\0" in str(path):
        raise InputError(field, repr(str(path)), accepted)
    try:
        if astray := [place for place in (path, *path.parents) if place.is_symlink() and not place.exists()]:
            raise InputError(field, f"{astray[0]}, a link that leads nowhere", accepted)
        there = next(place for place in (path, *path.parents) if place.exists())
        if there.is_dir() is (there != path or folder):
            with tempfile.TemporaryFile(dir=there if there.is_dir() else there.parent):
                free = shutil.disk_usage(there).free
        else:
            raise InputError(field, f"{there}, {'a folder' if there.is_dir() else 'no folder'}", accepted)
    except OSError as error:
        raise InputError(field, f"{path} ({error.strerror})", accepted) from error
    if free < ROOM:
        raise InputError(field, f"{path} with {free >> 20} MiB free", accepted)


def locked(stream: IO[str], wait: bool = False) -> bool:
    """Locks a file for this process; False where another has it, unless it waits. True where the system knows no locks."""
    try:
        import fcntl

        fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except (ImportError, OSError) as error:
        warnings.warn(
            f"{stream.name}: no file locks ({error}): processes that share the folder may do the same work",
            stacklevel=2,
        )
    return True


def hold(folder: Path) -> IO[str]:
    """Takes a folder for this process alone, until the stream it returns is closed or the process ends, however it does.

    Raises:
        InputError: Another process has it, with its machine and id.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stream = (folder / ".lock").open("a+", encoding="utf-8")
    if not locked(stream):
        stream.seek(0)
        with stream:
            raise InputError(
                str(folder), f"in use by {stream.read().strip()}", "another folder, or wait for that run to end"
            )
    stream.truncate(0)
    stream.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    stream.flush()
    return stream
