"""What a reader of the repository relies on: import direction, module names, config files that fit their commands."""

import runpy
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("models", "decoding", "data", "train", "eval")
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


def test_imports_go_one_way():
    tool = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([tool], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("folder", ["train", "eval", "decoding", "data"])
def test_no_script_neighbour_hides_a_package(folder: str):
    # `python train/x.py` puts train/ first on sys.path: train/wandb.py would be imported in place of W&B.
    taken = set(PACKAGES) | set(packages_distributions()) | set(sys.stdlib_module_names)
    taken -= {"trace"}  # a tool of the standard library that none of our dependencies imports
    names = {
        path.stem for path in (ROOT / folder).iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()
    }
    assert not (names - {"__init__"}) & taken


def script_of(config: Path) -> Path:
    """The script whose settings a config holds: the one named like its folder."""
    # Presets of a decode, and benchmarks.
    name = {"decoding": "generate", "eval": "bench"}.get(config.parent.name, config.parent.name)
    scripts = [ROOT / package / f"{name}.py" for package in ("train", "eval", "decoding")]
    found = [script for script in scripts if script.is_file()]
    assert len(found) == 1, f"{config}: no one script of this name in train/, eval/ or decoding/"
    return found[0]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_config_parses(config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    script = script_of(config)
    verb = [] if script.parent.name != "train" else ["predict" if script.stem == "rollout" else "fit"]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [str(script), *verb, "--config", str(config), "--print_config"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(script), run_name="__main__")
    assert stop.value.code in (None, 0), capsys.readouterr().err


def test_git_keeps_data_and_models():
    # `data/` in .gitignore hides a source package and everything bundled with it.
    lines = (ROOT / ".gitignore").read_text().split()
    assert not {"data", "data/", "/data", "/data/", "models", "models/", "/models", "/models/"} & set(lines)


def test_every_test_folder_mirrors_a_package():
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and any(path.glob("test_*.py"))}
    assert folders <= {*PACKAGES, "e2e"}
