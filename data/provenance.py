"""What a result depends on, written beside it: settings, versions, device; and files that are there in full or not at all."""

import hashlib
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers
import yaml

from models.checkpoint import writing


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str | None]:
    """Versions that a decode may depend on; ``git`` is this code's commit, ``None`` outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = None
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "lightning": version("lightning"),
        "git": commit,
    }


def code_digest(*packages: ModuleType) -> str:
    """SHA-256 of the source of some packages, committed or not, in hex."""
    digest = hashlib.sha256()
    for package in packages:
        for file in sorted(Path(package.__path__[0]).rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def environment() -> dict[str, Any]:
    """What a time depends on besides the settings: versions, device and threads."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = next((line.split(":")[1].strip() for line in _cpu_lines() if line.startswith("model name")), "")
    return {"device": device or platform.machine(), "threads": torch.get_num_threads(), **versions()}


def _cpu_lines() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []


def write_run_file(file: Path, settings: Mapping[str, Any], **known: str) -> None:
    """Writes ``run.yaml``: what a command was started with.

    Args:
        file: The file to write.
        settings: Resolved settings, as plain data.
        **known: What else it depended on, such as the digest of its rollouts.
    """
    record = {"argv": sys.argv, "time": now(), "environment": environment()} | known | {"config": dict(settings)}
    write_aside(file, yaml.safe_dump(record, sort_keys=False, allow_unicode=True))


def write_aside(file: Path, text: str) -> None:
    """Writes a text file so that it is there in full or not at all."""
    with writing(file) as aside:
        aside.write_text(text, encoding="utf-8")
