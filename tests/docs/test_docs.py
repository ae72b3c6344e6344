"""README and docs do what they print: blocks below ``<!-- run -->`` or ``<!-- run alone -->`` are run as they stand.

Those that cannot be stand below ``<!-- not run: reason -->``.
"""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(r"(?:<!-- (run|run alone|not run: [^\n]+) -->\n)?^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A block of a page.

    Attributes:
        mark: ``run``, ``run alone``, ``not run: `` and a reason, or empty.
        language: ``python``, ``bash`` or another.
        text: What is in it.
    """

    mark: str
    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    return [Block(mark or "", language, text) for mark, language, text in _BLOCK.findall(page.read_text())]


def marked(*marks: str, language: str = "") -> list:
    """Every block with one of the marks, named by its page and its place among all of the page's."""
    return [
        pytest.param(block, id=f"{page.stem}-{number}")
        for page in PAGES
        for number, block in enumerate(blocks(page))
        if block.mark in marks and language in ("", block.language)
    ]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return prepared(tmp_path, monkeypatch)


def prepared(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that looks like a clone, in which what is written stays out of this one."""
    for name in ("models", "decoding", "data", "train", "configs"):
        (folder / name).symlink_to(ROOT / name)
    for name in ("eval", "docs"):  # what a block may write to
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("decodes", "__pycache__"))
    shutil.copy(ROOT / "README.md", folder)
    monkeypatch.chdir(folder)
    paths = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    fresh = {"HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"}  # no caches, no settings of one's own
    for name, value in (paths | fresh).items():
        monkeypatch.setenv(name, value)
    for name in ("HF_HOME", "XDG_CACHE_HOME", "TRITON_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    (folder / "home").mkdir()
    return folder


def run(block: Block) -> str:
    """Runs a block in the current folder, and returns what it printed."""
    start = ["bash", "-euo", "pipefail", "-c"] if block.language == "bash" else [sys.executable, "-c"]
    done = subprocess.run([*start, block.text], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{block.text}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.mark.parametrize("block", marked("run alone", language="python"))
def test_python_that_needs_nothing_before_it(block: Block, workplace: Path):
    exec(compile(block.text, "block", "exec"), {"__name__": "block"})  # in this process: torch is imported already


@pytest.mark.slow
@pytest.mark.parametrize("block", marked("run alone", language="bash"))
def test_commands_that_need_nothing_before_them(block: Block, workplace: Path):
    assert run(block)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_from_its_first_line_to_its_last(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if not any(block.mark == "run" for block in blocks(page)):
        pytest.skip("every block of it stands alone")
    prepared(tmp_path, monkeypatch)
    for block in blocks(page):
        if block.mark in ("run", "run alone"):
            run(block)


def test_every_command_is_run_or_says_why_not():
    for page in PAGES:
        bare = [block.text for block in blocks(page) if block.language in ("python", "bash") and not block.mark]
        assert bare == [], page.name


def test_every_mark_is_read_and_every_script_is_there():
    # A mark that stands one line off, or a script that was renamed, would be passed over in silence.
    for page in PAGES:
        text = page.read_text()
        marks = len(re.findall(r"<!-- (?:not )?run", text))
        assert marks == sum(bool(block.mark) for block in blocks(page)), page.name
        scripts = [
            name for block in blocks(page) for name in re.findall(r"\b(?:train|eval|decoding|data)/\w+\.py", block.text)
        ]
        assert [name for name in scripts if not (ROOT / name).is_file()] == [], page.name
        assert {block.language for block in blocks(page) if block.mark} <= {"python", "bash"}, page.name
    assert len(marked("run", "run alone")) >= 8


def test_the_first_screen_is_one_screen():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert lines.index("<!-- /front -->") < 40
    assert len(lines) <= 250
    table = [line for line in lines[: lines.index("<!-- /front -->")] if line.startswith("|")]
    assert len(table) <= 2 + 6
    assert table[0].count("|") <= 6
    words = (ROOT / "README.md").read_text().split("## Words")[1]
    assert {"NFE", "EoT", "Block", "Oracle", "Threshold", "Trace"} <= set(re.findall(r"\*\*(\w+)\*\*:", words))


def test_links_between_pages_lead_somewhere():
    for page in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]:
        text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
        links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
        assert [link for link in links if link and not (page.parent / link).exists()] == [], page.name


def test_the_changelog_is_of_the_version_that_is_declared():
    (version,) = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    first = re.search(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert first is not None
    assert first[1].split(",")[0] == version


def test_the_citation_has_what_the_format_asks_for():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["cff-version"] == "1.2.0"
    assert f'version = "{citation["version"]}"' in (ROOT / "pyproject.toml").read_text()
    assert [reference["url"].rpartition("/")[2] for reference in citation["references"]] == [
        "2509.25188", "2506.00413", "2602.23792", "2110.01052",
    ]  # fmt: skip
    for entry in citation["references"]:
        assert {"type", "title", "authors"} <= set(entry)
        assert all({"given-names", "family-names"} <= set(author) for author in entry["authors"])
