"""Trained components on disk: a folder of config.json, model.safetensors and README.md, checked whenever it is read."""

import json
import os
import re
import shutil
import socket
import time
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.errors import InputError, first_line

CONFIG, TENSORS, CARD = "config.json", "model.safetensors", "README.md"
INDEX = f"{TENSORS}.index.json"
_HOST = socket.gethostname()
_ENDINGS = (".part", ".new", ".old")
CALIBRATION, PICTURE = "risk.json", "reliability.png"
"""What a fit or a calibration leaves in the folder of the component it is about; it goes with the component."""


def save_component(folder: str | Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], card: str) -> None:
    """Writes a component aside and renames it into place, replacing an older component of the same kind.

    Whatever interrupts the writing, ``folder`` holds the old component or the new one. A folder cannot be replaced in a
    single system call, so a kill between the two renames leaves the old one beside it as ``.<name>.<host>-<pid>.old``,
    until the next is written.

    Args:
        folder: Where to; parents are created.
        config: What ``config.json`` holds; ``kind`` and ``schema_version`` must be among it.
        tensors: What ``model.safetensors`` holds.
        card: Text of the model card.

    Raises:
        InputError: ``folder`` exists and is neither empty nor a component of this kind, a value of ``config`` cannot be
            written as JSON, or a tensor is not finite.
    """
    folder = Path(folder).absolute()
    check_replaceable(folder, config["kind"])
    try:
        text = json.dumps(dict(config), indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"{folder / CONFIG}", error, "values that JSON can hold") from None
    check_finite(folder / TENSORS, tensors)
    with replacing(folder) as aside:
        aside.mkdir(parents=True)
        (aside / CONFIG).write_text(text + "\n", encoding="utf-8")
        (aside / CARD).write_text(card, encoding="utf-8")
        # Copies: safetensors refuses tensors that share storage.
        save_file({name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()},
                  aside / TENSORS)  # fmt: skip


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Lets a folder appear in full or not at all: what the block writes into the path it is given replaces ``folder``.

    Args:
        folder: An absolute path; whatever is there goes, so check first that it may.

    Yields:
        A path beside it, to be created.
    """
    aside = _beside(folder, "new")
    old = aside.with_suffix(".old")
    try:
        yield aside
        if folder.exists():
            folder.rename(old)
        try:
            aside.rename(folder)
        except BaseException:
            if old.exists():
                old.rename(folder)
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    _sweep(folder)


@contextmanager
def writing(file: Path, sweep: bool = True) -> Iterator[Path]:
    """Lets a file appear in full or not at all: what the block writes into the path it is given replaces ``file``.

    It is on the disk before it is renamed, and nothing is left beside it, whatever goes wrong; what a kill leaves goes when
    the file is written again.

    Args:
        file: The file; its folder is made.
        sweep: Look for what kills have left, which lists the folder; one of very many files has to be swept as a whole.

    Yields:
        A path beside it, of this process alone.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = _beside(file, "part")
    try:
        yield aside
        with aside.open("rb+") as stream:
            os.fsync(stream.fileno())
        aside.replace(file)
    finally:
        aside.unlink(missing_ok=True)
    if sweep:
        _sweep(file)


def _beside(path: Path, ending: str) -> Path:
    """A path beside another, of this process alone."""
    return path.with_name(f".{path.name}.{_HOST}-{os.getpid()}.{ending}")


def _sweep(path: Path) -> None:
    """Removes what processes that were killed have left beside a path."""
    start = f".{path.name}."
    for left in path.parent.iterdir():
        if left.name.startswith(start) and left.suffix in _ENDINGS and abandoned(left):
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)


def abandoned(aside: Path) -> bool:
    """Whether nobody writes a path of :func:`writing` any more: its process is gone, or on another machine and a day old."""
    ours = re.search(rf"\.{re.escape(_HOST)}-(\d+)\.[a-z]+$", aside.name)
    try:
        if ours is None:
            return time.time() - aside.stat().st_mtime > 86_400
        os.kill(int(ours[1]), 0)
    except (ProcessLookupError, FileNotFoundError):
        return True
    except PermissionError:
        pass
    return False


def read_json(file: Path, accepted: str = "JSON") -> Any:
    """What a JSON file holds.

    Args:
        file: The file.
        accepted: What it should be, for the message.

    Raises:
        InputError: It is not there, no regular file, which might never end, not UTF-8, or not what :func:`parse_json` reads.
    """
    try:
        if file.exists() and not file.is_file():
            raise ValueError("no regular file")
        return parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(str(file), first_line(error), accepted) from error


def parse_json(text: str) -> Any:
    """What JSON says, where it says it once.

    Raises:
        ValueError: It is none, has a key twice, of which Python would take the last, or is nested beyond any use.
    """
    try:
        return json.loads(text, object_pairs_hook=_once)
    except RecursionError:
        raise ValueError("lists or objects that are nested too deeply") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the key {name!r} twice")
        found[name] = value
    return found


def check_regular(folder: Path) -> None:
    """Raises an InputError for a file of a checkpoint or component that is a pipe, say: whoever opened it would wait for ever."""
    for file in sorted(folder.iterdir()):
        if (
            file.suffix in (".json", ".safetensors", ".jinja", ".txt", ".model")
            and file.exists()
            and not file.is_file()
        ):
            raise InputError(str(file), "no regular file", "a file")


def load_component(
    folder: str | Path,
    kind: str,
    schema_version: int,
    fields: Collection[str],
    older: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Reads a component; its tensors still have to be checked against the network, see :func:`load_tensors`.

    Args:
        folder: Where from.
        kind: What the component has to be.
        schema_version: The version of ``config.json`` that the caller reads.
        fields: The keys ``config.json`` must hold besides ``kind``, no more and no less.
        older: Those of them that older components lack, and what they mean by it.

    Returns:
        The config without ``kind``, and the tensors by name, on the CPU.

    Raises:
        InputError: Something is missing, unreadable, of another kind or schema, or a key is unknown or missing.
    """
    folder = Path(folder)
    file = folder / CONFIG
    if not folder.is_dir():
        raise InputError(f"{kind} folder", f"no folder {folder}", f"a folder with {CONFIG} and {TENSORS}")
    check_regular(folder)
    config = read_json(file, f"the description of an exported {kind}")
    if not isinstance(config, dict):
        raise InputError(str(file), f"a JSON {type(config).__name__}", "a JSON object")
    for key, wanted in (("kind", kind), ("schema_version", schema_version)):
        if key not in config:
            raise InputError(f"{file}: {key}", "nothing", repr(wanted))
        if config[key] != wanted:
            raise InputError(f"{file}: {key}", repr(config[key]), repr(wanted))
    del config["kind"]
    for key in config:
        if key not in fields:
            raise InputError(f"{file}: {key}", "an unknown key", ", ".join(sorted(fields)))
    config = dict(older or {}) | config
    for key in fields:
        if key not in config:
            raise InputError(f"{file}: {key}", "nothing", "a value; every key is required")
    return config, _read_tensors(folder / TENSORS)


def current_eot_rule(found: Any, where: str) -> Any:
    """The EoT rule that a file names. Older files call ``commit`` ``filter``, which is accepted and told.

    Args:
        found: What the file says.
        where: The file and the field, for the message.
    """
    if found != "filter":
        return found
    warnings.warn(f"{where}: found 'filter', the older name of 'commit'; read as 'commit'", stacklevel=2)
    return "commit"


def load_tensors(net: nn.Module, tensors: Mapping[str, Tensor], file: str | Path) -> None:
    """Fills a network after checking names, shapes, dtypes and values against it.

    Args:
        net: The network; every entry of its state dict is set.
        tensors: What was read.
        file: Where it was read from, for the messages.

    Raises:
        InputError: A tensor is missing, unexpected, of another shape or dtype, or not finite.
    """
    expected = net.state_dict()
    for name, wanted in expected.items():
        if name not in tensors:
            raise InputError(f"{file}: {name}", "no such tensor", f"{wanted.dtype} of shape {tuple(wanted.shape)}")
    for name, tensor in tensors.items():
        if name not in expected:
            raise InputError(f"{file}: {name}", "an unexpected tensor", ", ".join(expected))
        wanted = expected[name]
        if tensor.shape != wanted.shape or tensor.dtype != wanted.dtype:
            raise InputError(
                f"{file}: {name}",
                f"{tensor.dtype} of shape {tuple(tensor.shape)}",
                f"{wanted.dtype} of shape {tuple(wanted.shape)}",
            )
    check_finite(file, tensors)
    net.load_state_dict(dict(tensors))


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except FileNotFoundError:
        raise InputError(str(file), "no such file", "safetensors") from None
    except (SafetensorError, OSError) as error:
        raise InputError(str(file), f"unreadable ({error})", "safetensors") from None


def check_files(folder: Path) -> None:
    """Raises an InputError if a file that a checkpoint in several files is made of is missing, or their index damaged.

    Args:
        folder: A checkpoint's; without an index, or with the weights in one file as well, there is nothing to check.
    """
    index = folder / INDEX
    if not index.exists() or (folder / TENSORS).exists():
        return
    accepted = "JSON with weight_map, from each tensor's name to its file in this folder"
    try:
        files = set(read_json(index, accepted)["weight_map"].values())
        missing = sorted(name for name in files if not (folder / Path(name).name).is_file())
    except (TypeError, KeyError, AttributeError) as error:
        raise InputError(str(index), f"{type(error).__name__}: {first_line(error)}", accepted) from None
    if missing or not files:
        found = (
            f"{len(missing)} of {len(files)} files missing: {', '.join(missing[:3])}{', ...' if missing[3:] else ''}"
        )
        raise InputError(str(index), found if files else "no files", "a folder with all of them")


def check_finite(where: str | Path, tensors: Mapping[str, Tensor], most: int | None = None) -> None:
    """Raises an InputError for a tensor with a NaN or an infinity: it would load, decide nonsense and say nothing.

    Args:
        where: File or folder, for the message.
        tensors: The tensors by name.
        most: Looks at about so many values of each, evenly spread; ``None`` looks at all.
    """
    for name, tensor in tensors.items():
        values = tensor if most is None else tensor.flatten()[:: -(-tensor.numel() // most) or 1]
        if not torch.isfinite(values).all():
            raise InputError(f"{where}: {name}", "values that are not finite", "finite values")


def check_replaceable(folder: Path, kind: str) -> None:
    """Raises an InputError unless a component may take a folder's place.

    Replacing means deleting, so only what an earlier export of the same kind wrote may be there.
    """
    if not folder.exists():
        return
    accepted = f"a new folder, or one that an earlier export of a {kind} wrote"
    if not folder.is_dir() or folder.is_symlink():
        raise InputError(f"{kind} folder", f"{folder}, not a plain folder", accepted)
    names = {entry.name for entry in folder.iterdir()}
    if foreign := sorted(names - {CONFIG, TENSORS, CARD, CALIBRATION, PICTURE}):
        raise InputError(f"{kind} folder", f"{folder} with {foreign[0]} in it", accepted)
    if names:
        try:
            found = read_json(folder / CONFIG)["kind"]
        except (ValueError, KeyError, TypeError):
            found = None
        if found != kind:
            raise InputError(f"{kind} folder", f"{folder}, which does not hold a {kind}", accepted)
