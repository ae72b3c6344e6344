"""The README's commands for LLaDA-8B, word for word, on a small base and a local file of the same columns."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer

from data.prompts import split_of
from models import LLaDAModelLM
from models.filter import load_filter
from train.cards import made_from, metadata

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def sharded(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A base whose weights are in several files beside an index, as those of 8B are."""
    folder = tmp_path / "base"
    LLaDAModelLM.from_pretrained(tiny_checkpoint, max_sequence_length=512).save_pretrained(
        folder, max_shard_size="20KB"
    )
    AutoTokenizer.from_pretrained(tiny_checkpoint).save_pretrained(folder)
    assert len(list(folder.glob("model-0000*-of-*.safetensors"))) > 2
    return folder


@pytest.mark.slow  # starts the commands, with two processes
@pytest.mark.parametrize("devices", [1, 2])
def test_the_readmes_commands_for_8b(devices: int, sharded: Path, tmp_path: Path) -> None:
    section = (ROOT / "README.md").read_text().partition("## On LLaDA-8B")[2]
    text, script = re.search(r"```yaml\n(.*?)```.*?```bash\n(.*?)```", section, re.DOTALL).groups()  # type: ignore[union-attr]
    many = [f"What is {a} + {b}?" for a in range(12) for b in range(12)]
    questions = [
        question
        for split, count in (("train", 12), ("validation", 2), ("test", 2))
        for question in [question for question in many if split_of(question) == split][:count]
    ]
    rows = [{"question": question, "answer": "It is 4. #### 4"} for question in questions]
    (tmp_path / "gsm8k.jsonl").write_text("\n".join(map(json.dumps, rows)))
    hub = "GSAI-ML/LLaDA-8B-Instruct"
    swapped = text.replace(hub, str(sharded)).replace("openai/gsm8k, subset: main", "gsm8k.jsonl")
    assert (text.count(hub), "subset" in text, "subset" in swapped) == (1, True, False)
    (tmp_path / "8b.yaml").write_text(swapped)
    environment = {**os.environ, "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    lines = script.strip().splitlines()
    assert [line.split()[1] for line in lines] == ["eval/doctor.py", "train/rollout.py", "train/filter.py"]
    for line in lines:
        words = line.replace(hub, str(sharded)).replace("--trainer.devices 8", "").split()[1:]
        if "doctor" not in line:
            words += ["--trainer.accelerator", "cpu", "--trainer.devices", str(devices)]
        if "filter" in line:
            words += ["--trainer.max_epochs", "1"]
        done = subprocess.run(
            [sys.executable, str(ROOT / words[0]), *words[1:]], cwd=tmp_path, env=environment, capture_output=True,
            text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "runs/8b/shards/manifest.json").read_text())
    assert (manifest["complete"], manifest["counts"]["prompts"]) == (True, len(questions))
    assert load_filter(tmp_path / "exports/filter-8b")[1].gen_length == 256


def test_a_card_names_what_the_hub_knows(tmp_path: Path) -> None:
    rollout = {"base": "GSAI-ML/LLaDA-8B-Instruct", "sources": [{"path": "openai/gsm8k"}, {"path": "bundled"}]}
    _, text, rest = metadata("filter", rollout).split("---\n")
    assert rest == ""
    found = yaml.safe_load(text)
    assert (found["base_model"], found["datasets"]) == ("GSAI-ML/LLaDA-8B-Instruct", ["openai/gsm8k"])
    assert "learn2pd" in found["tags"]
    assert (found["library_name"], found["metrics"]) == ("dlm-accel", ["exact_match"])
    manifest = {
        "schema_version": 4, "complete": False, "model_fingerprint": "f", "tokenizer_hash": "a", "shards": [],
        "settings": {"block_length": 32, "eot_id": 1, "passes": ["oracle"]}, "sources": [{"sources": rollout["sources"]}],
    }  # fmt: skip
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert made_from(rollout["base"], tmp_path) == rollout
    assert "base_model" not in yaml.safe_load(metadata("helper", rollout | {"base": str(tmp_path)}).split("---\n")[1])
