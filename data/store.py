"""The files of a rollout set, wherever they lie: in a folder, or below a URL of an object store as ``s3://bucket/set``."""

import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import fsspec
from pydantic import Field

from data.disk import check_writable
from models.checkpoint import parse_json, read_json, writing
from models.errors import InputError, first_line

Folder = Annotated[str, Field(pattern=r"^[a-z][a-z0-9+.-]+://.")] | Path
"""A folder as settings have it: a URL stays text, since a ``Path`` would take one of its slashes."""
Stamp = tuple[int, str]
"""Bytes of a file, and what changes whenever it is written."""


def place(folder: str | Path) -> str | Path:
    """A folder as it is worked with: the path of a local one, ``file://`` ones among them, and the URL of any other."""
    if isinstance(folder, str) and "://" in folder:
        return Path(folder.removeprefix("file://")) if folder.startswith("file://") else folder.rstrip("/")
    return Path(folder)


def inside(folder: str | Path, name: str) -> str | Path:
    """What is called ``name`` in a folder."""
    return place(f"{folder}/{name}") if isinstance(folder, str) else folder / name


def absolute(folder: str | Path) -> str | Path:
    """A folder as it is called from any working directory."""
    found = place(folder)
    return found.absolute() if isinstance(found, Path) else found


def open_store(folder: str | Path) -> "LocalStore | UrlStore":
    """The files of a folder; nothing is made.

    Raises:
        InputError: The URL's scheme is unknown, or the package for it is not installed.
    """
    found = place(folder)
    return LocalStore(found) if isinstance(found, Path) else UrlStore(found)


def check_folder(field: str, folder: str | Path) -> None:
    """Raises an InputError where nothing can be written to a folder, or an object store does not answer: better now than later.

    Args:
        field: The setting, for the message.
        folder: The folder; nothing is left there.
    """
    found = place(folder)
    if isinstance(found, Path):
        return check_writable(field, found)
    store = UrlStore(found, field)
    try:
        with suppress(FileNotFoundError):
            store.fs.info(store.root)
    except Exception as error:  # each store has its own, for keys that are missing, say
        raise InputError(field, f"{found} ({first_line(error)})", "a place that can be listed and written") from error


class LocalStore:
    """The files of a folder, each written aside and renamed.

    Args:
        folder: The folder.
    """

    remote = False

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def at(self, name: str) -> str:
        """Where a file is, for messages."""
        return str(self.folder / name)

    def make(self) -> None:
        """Makes the folder where it is not there."""
        self.folder.mkdir(parents=True, exist_ok=True)

    def stamps(self) -> dict[str, Stamp]:
        """The names of the files that are there, looked up once, with the size and a stamp of each."""
        found = {}
        with os.scandir(self.folder) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):  # claims come and go
                    status = entry.stat()
                    if stat.S_ISREG(status.st_mode):
                        found[entry.name] = status.st_size, str(status.st_mtime_ns)
        return found

    def has(self, name: str) -> bool:
        """Whether a file is there."""
        return (self.folder / name).is_file()

    def json(self, name: str, accepted: str) -> Any:
        """What a JSON file holds; see :func:`models.checkpoint.read_json`."""
        return read_json(self.folder / name, accepted)

    def read(self, name: str) -> bytes:
        """What a file holds."""
        return (self.folder / name).read_bytes()

    def read_many(self, names: Iterable[str]) -> dict[str, bytes]:
        """What some files hold, of those that are there."""
        found = {}
        for name in names:
            with suppress(FileNotFoundError):
                found[name] = self.read(name)
        return found

    def write(self, name: str, content: bytes) -> None:
        """Writes a file. Leftovers of killed writers stay until the set is finished: looking for them lists the folder."""
        with writing(self.folder / name, sweep=False) as aside:
            aside.write_bytes(content)

    def remove(self, name: str) -> None:
        """Removes a file, if it is there."""
        (self.folder / name).unlink(missing_ok=True)


class UrlStore:
    """The objects below a URL, by fsspec: each is put in one piece, and is there in full or not at all.

    Args:
        url: The URL.
        field: The setting, for messages.

    Raises:
        InputError: Its scheme is unknown, or the package for it is not installed.
    """

    remote = True

    def __init__(self, url: str, field: str = "folder") -> None:
        self.folder = url
        try:
            # Listings are never kept: others write, too.
            self.fs, self.root = fsspec.url_to_fs(url, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            accepted = (
                "a URL that fsspec opens: s3:// takes s3fs, gs:// gcsfs, both in the extra: pip install -e '.[cluster]'"
            )
            raise InputError(field, f"{url} ({first_line(error)})", accepted) from None

    def at(self, name: str) -> str:
        """Where a file is, for messages."""
        return f"{self.folder}/{name}"

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def make(self) -> None:
        """Nothing: an object store has no folders."""

    def stamps(self) -> dict[str, Stamp]:
        """See :meth:`LocalStore.stamps`."""
        try:
            entries = self.fs.ls(self.root, detail=True)
        except FileNotFoundError:
            return {}
        files = [entry for entry in entries if entry["type"] == "file"]
        # Stores name what changes with every write each in its way: ETag, generation, mtime.
        return {entry["name"].rsplit("/", 1)[-1]: (entry["size"], repr(entry)) for entry in files}

    def has(self, name: str) -> bool:
        """Whether a file is there."""
        return self.fs.exists(self._path(name))

    def json(self, name: str, accepted: str) -> Any:
        """See :meth:`LocalStore.json`."""
        try:
            return parse_json(self.read(name).decode())
        except FileNotFoundError:
            raise InputError(self.at(name), "No such file or directory", accepted) from None
        except ValueError as error:
            raise InputError(self.at(name), first_line(error), accepted) from error

    def read(self, name: str) -> bytes:
        """What a file holds."""
        return self.fs.cat_file(self._path(name))

    def read_many(self, names: Iterable[str]) -> dict[str, bytes]:
        """What some files hold, of those that are there; at once, where the store can do that."""
        paths = {self._path(name): name for name in names}
        if not paths:
            return {}
        found = self.fs.cat(list(paths), on_error="return")
        for content in found.values():
            if isinstance(content, Exception) and not isinstance(content, FileNotFoundError):
                raise content
        return {paths[path]: content for path, content in found.items() if isinstance(content, bytes)}

    def write(self, name: str, content: bytes) -> None:
        """Puts a file."""
        self.fs.pipe_file(self._path(name), content)

    def remove(self, name: str) -> None:
        """Removes a file, if it is there."""
        with suppress(FileNotFoundError):
            self.fs.rm_file(self._path(name))
