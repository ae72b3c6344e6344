"""What a newcomer does: clone, ``make demo``, then the blocks of the README, in a new home and without a compiler."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = (
    "bash",
    "sh",
    "env",
    "git",
    "make",
    "cat",
    "touch",
    "echo",
    "rm",
    "mkdir",
    "ls",
    "uname",
    "dirname",
    "basename",
)
"""All that is on the path, beside Python."""


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A clone of what is committed, and the environment of somebody who has nothing else."""
    place = tmp_path_factory.mktemp("newcomer")
    subprocess.run(["git", "clone", "--quiet", "--depth", "1", f"file://{ROOT}", "clone"], cwd=place, check=True)
    tools, home = place / "bin", place / "home"
    tools.mkdir()
    home.mkdir()
    for name in TOOLS:
        found = shutil.which(name)
        assert found is not None, name
        (tools / name).symlink_to(found)
    (tools / "python3").symlink_to(getattr(sys, "_base_executable", sys.executable))
    kept = (
        "PIP_INDEX_URL",
        "PIP_CONFIG_FILE",
        "HTTPS_PROXY",
        "HTTP_PROXY",
        "NO_PROXY",
        "SSL_CERT_FILE",
        "OMP_NUM_THREADS",
    )
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    return place / "clone", environment | {"PATH": str(tools), "HOME": str(home), "LANG": "C.UTF-8"}


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.timeout(7200)  # five gigabytes are installed
def test_a_newcomer_runs_the_demo_and_then_the_readme(clone: tuple[Path, dict[str, str]]):
    folder, environment = clone
    assert shutil.which("g++", path=environment["PATH"]) is None

    def run(words: list[str], **more: str) -> str:
        done = subprocess.run(words, cwd=folder, env=environment | more, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{words}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    printed = run(["make", "demo"])
    assert "runs/demo/bench.png" in printed
    assert (folder / "runs/demo/bench.png").is_file()
    assert (folder / "exports/filter/config.json").is_file()
    path = f"{folder}/.venv/bin:{environment['PATH']}"
    marked = re.compile(r"^<!-- run(?: alone)? -->\n```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
    found = marked.findall((folder / "README.md").read_text())
    assert len(found) >= 6
    for language, text in found:
        start = ["bash", "-euo", "pipefail", "-c"] if language == "bash" else [f"{folder}/.venv/bin/python", "-c"]
        run([*start, text], PATH=path)
