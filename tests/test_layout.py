"""What a reader of the repository relies on: import direction, module names, config files that fit their commands."""

import runpy
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("models", "decoding", "data", "train", "eval")
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


def test_imports_go_one_way():
    tool = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([tool], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


BLOCKED = """
import sys
from importlib import import_module
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder

class Only(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] not in blocked:
            return super().find_spec(name, path, target)

blocked, modules = set(sys.argv[1].split()), sys.argv[2].split()
sys.meta_path[:] = [BuiltinImporter, FrozenImporter, Only]
for module in modules:
    import_module(module)

from decoding import Decoder
bundled = "models/bundled/"
decoder = Decoder.from_pretrained(bundled + "llada-tiny", "learn2pd", filter=bundled + "filter-llada-tiny", device="cpu")
assert decoder.generate(["What is 7 - 2?"], gen_length=32).tokens
assert not blocked & {name.partition(".")[0] for name in sys.modules}
"""


def test_a_decode_needs_only_what_it_computes_with():
    # Whoever serves with decoding/ shall not have to install what trains, tracks, draws or reads command lines.
    allowed, waiting = set(), ["torch", "transformers", "safetensors", "tokenizers", "numpy"]
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in allowed:
            continue
        allowed.add(name)
        try:
            needed = [Requirement(line) for line in requires(name) or ()]
        except PackageNotFoundError:  # for another system
            continue
        waiting += [need.name for need in needed if need.marker is None or need.marker.evaluate({"extra": ""})]
    # transformers brings rich for its own command line.
    blocked = {
        top for top, names in packages_distributions().items() if not {canonicalize_name(n) for n in names} & allowed
    }
    blocked = (blocked | {"rich", "jsonargparse", "data", "eval", "train"}) - {"models", "decoding"}
    files = [file for package in ("models", "decoding") for file in sorted((ROOT / package).rglob("*.py"))]
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files]
    command = [sys.executable, "-c", BLOCKED, " ".join(blocked), " ".join(names)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


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
    assert folders <= {*PACKAGES, "docs", "e2e", "fuzz"}


def test_an_adapter_is_a_thin_shell():
    for file in sorted((ROOT / "decoding/adapters").glob("for_*.py")):
        assert len(file.read_text().splitlines()) < 100, file.name
