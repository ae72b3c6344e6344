import json
from pathlib import Path

import pytest
import torch
from torch import nn

from models import checkpoint
from models.checkpoint import load_component, load_tensors, save_component
from models.errors import InputError

CONFIG = {"kind": "thing", "schema_version": 3, "size": 2}
FIELDS = ("schema_version", "size")


def save(folder: Path, value: float = 1.0, **changes) -> None:
    save_component(folder, CONFIG | changes, {"weight": torch.full((2, 2), value)}, "# A thing\n")


def load(folder: Path):
    return load_component(folder, "thing", 3, FIELDS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(tmp_path / "thing")
    return tmp_path / "thing"


def rewrite(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    text = json.dumps({key: value for key, value in config.items() if value is not None})
    (folder / "config.json").write_text(text)


def test_what_was_saved_is_read(folder: Path):
    config, tensors = load(folder)
    assert config == {"schema_version": 3, "size": 2}
    assert torch.equal(tensors["weight"], torch.ones(2, 2))
    assert (folder / "README.md").read_text() == "# A thing\n"
    assert [entry.name for entry in folder.parent.iterdir()] == ["thing"]


def test_an_older_component_is_replaced(folder: Path):
    save(folder, 2.0, size=5)
    config, tensors = load(folder)
    assert config["size"] == 5
    assert tensors["weight"][0, 0] == 2
    assert [entry.name for entry in folder.parent.iterdir()] == ["thing"]


@pytest.mark.parametrize("stage", ["tensors", "rename"])
def test_an_interrupted_save_leaves_the_old_component(folder: Path, monkeypatch: pytest.MonkeyPatch, stage: str):
    def interrupt(*_):
        raise KeyboardInterrupt

    if stage == "tensors":
        monkeypatch.setattr(checkpoint, "save_file", interrupt)
    else:
        rename = Path.rename
        monkeypatch.setattr(Path, "rename", lambda a, b: interrupt() if a.suffix == ".new" else rename(a, b))
    with pytest.raises(KeyboardInterrupt):
        save(folder, 2.0)
    monkeypatch.undo()
    assert load(folder)[1]["weight"][0, 0] == 1
    assert [entry.name for entry in folder.parent.iterdir()] == ["thing"]


def test_an_interrupted_first_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "thing")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["notes.txt", "config.json", None])
def test_what_is_not_a_component_is_never_deleted(tmp_path: Path, content: str | None):
    # A base model is config.json + model.safetensors + README.md as well.
    target = tmp_path / "mine"
    if content is None:
        target.write_text("precious")
    else:
        target.mkdir()
        (target / content).write_text('{"kind": "other"}')
    with pytest.raises(InputError, match="thing folder"):
        save(target)
    assert target.read_text() == "precious" if content is None else (target / content).is_file()


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"kind": "filter"}, "config.json: kind"),
        ({"kind": None}, "config.json: kind"),
        ({"schema_version": 4}, "config.json: schema_version"),
        ({"schema_version": None}, "config.json: schema_version"),
        ({"colour": 1}, "config.json: colour"),
        ({"size": None}, "config.json: size"),
    ],
)
def test_a_config_key_is_refused_by_name(folder: Path, changes: dict, field: str):
    rewrite(folder, **changes)
    with pytest.raises(InputError) as error:
        load(folder)
    assert error.value.field == f"{folder}/{field}"


@pytest.mark.parametrize("text", ["{", "[]", "\x00"])
def test_a_config_that_is_no_json_object_is_refused(folder: Path, text: str):
    (folder / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"config\.json"):
        load(folder)


def test_bytes_that_are_no_text_are_refused(folder: Path):
    (folder / "config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(InputError, match=r"config\.json"):
        load(folder)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(folder: Path, file: str):
    (folder / file).unlink()
    with pytest.raises(InputError) as error:
        load(folder)
    assert error.value.field == str(folder / file)


def test_a_missing_folder_is_named(tmp_path: Path):
    with pytest.raises(InputError, match="nowhere"):
        load(tmp_path / "nowhere")


def test_truncated_tensors_are_refused(folder: Path):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(InputError, match=r"model\.safetensors: found unreadable"):
        load(folder)


@pytest.mark.parametrize(
    ("tensors", "name"),
    [
        ({"weight": torch.ones(2, 2)}, "bias"),
        ({"weight": torch.ones(2, 2), "bias": torch.ones(2), "more": torch.ones(1)}, "more"),
        ({"weight": torch.ones(2, 3), "bias": torch.ones(2)}, "weight"),
        ({"weight": torch.ones(2, 2, dtype=torch.float16), "bias": torch.ones(2)}, "weight"),
        ({"weight": torch.full((2, 2), torch.nan), "bias": torch.ones(2)}, "weight"),
    ],
)
def test_a_tensor_is_refused_by_name(tensors: dict, name: str):
    with pytest.raises(InputError) as error:
        load_tensors(nn.Linear(2, 2), tensors, "model.safetensors")
    assert error.value.field == f"model.safetensors: {name}"


def test_nothing_that_cannot_be_read_back_is_written(tmp_path: Path):
    with pytest.raises(InputError, match="weight"):
        save(tmp_path / "thing", float("nan"))
    with pytest.raises(InputError, match=r"config\.json"):
        save(tmp_path / "thing", size=float("nan"))
    assert list(tmp_path.iterdir()) == []
