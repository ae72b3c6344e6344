"""The README's commands for LLaDA-8B, word for word, on a small base and a local file of the same columns."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from data.prompts import split_of
from models.filter import load_filter
from train.cards import metadata

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow  # starts the commands, with two processes
@pytest.mark.parametrize("devices", [1, 2])
def test_the_readmes_commands_for_8b(devices: int, tiny_checkpoint: Path, tmp_path: Path) -> None:
    section = (ROOT / "README.md").read_text().partition("## On LLaDA-8B")[2]
    text, script = re.search(r"```yaml\n(.*?)```.*?```bash\n(.*?)```", section, re.DOTALL).groups()  # type: ignore[union-attr]
    questions = [f"What is {a} + {b}?" for a in range(12) for b in range(12)]
    assert {split_of(question) for question in questions} == {"train", "validation", "test"}
    rows = [{"question": question, "answer": "It is 4. #### 4"} for question in questions]
    (tmp_path / "gsm8k.jsonl").write_text("\n".join(map(json.dumps, rows)))
    content = yaml.safe_load(text)
    (source,) = content["rollout"]["sources"]
    assert (source.pop("path"), source.pop("subset")) == ("openai/gsm8k", "main")
    content["rollout"] |= {
        "base": str(tiny_checkpoint), "sources": [source | {"path": "gsm8k.jsonl"}], "per_task": 40, "gen_length": 32,
    }  # fmt: skip
    (tmp_path / "8b.yaml").write_text(yaml.safe_dump(content))
    environment = {**os.environ, "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    for line in script.strip().splitlines():
        words = line.replace("--trainer.devices 8", f"--trainer.devices {devices}").split()
        assert words.pop(0) == "python"
        small = ["--trainer.accelerator", "cpu"] + ["--trainer.max_epochs", "1"] * ("fit" in words)
        done = subprocess.run(
            [sys.executable, str(ROOT / words[0]), *words[1:], *small], cwd=tmp_path, env=environment, capture_output=True,
            text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "runs/8b/shards/manifest.json").read_text())
    assert (manifest["complete"], manifest["counts"]["prompts"]) == (True, 40)
    assert load_filter(tmp_path / "exports/filter-8b")[1].gen_length == 32


def test_a_card_names_what_the_hub_knows(tmp_path: Path) -> None:
    rollout = {"base": "GSAI-ML/LLaDA-8B-Instruct", "sources": [{"path": "openai/gsm8k"}, {"path": "bundled"}]}
    _, text, rest = metadata("filter", rollout).split("---\n")
    assert rest == ""
    found = yaml.safe_load(text)
    assert (found["base_model"], found["datasets"]) == ("GSAI-ML/LLaDA-8B-Instruct", ["openai/gsm8k"])
    assert "learn2pd" in found["tags"]
    assert "base_model" not in yaml.safe_load(metadata("helper", rollout | {"base": str(tmp_path)}).split("---\n")[1])
