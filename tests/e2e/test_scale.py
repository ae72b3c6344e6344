"""The README's commands for LLaDA-8B, word for word, on a small base and a local file of the same columns."""

import json
import os
import re
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
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


def nodes(words: list[str], launcher: str) -> list[tuple[list[str], dict[str, str]]]:
    """What is started on two nodes of one device each, as command and environment; both nodes are this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    words = [*words, "--trainer.devices", "1", "--trainer.num_nodes", "2"]
    started = []
    for node in ("0", "1"):
        if launcher == "torchrun":
            where = ["--nnodes", "2", "--nproc_per_node", "1", "--node_rank", node, "--master_addr", "127.0.0.1"]
            started.append(
                ([sys.executable, "-m", "torch.distributed.run", *where, "--master_port", port, "--", *words], {})
            )
        else:
            job = {"NTASKS": "2", "NTASKS_PER_NODE": "1", "NNODES": "2", "JOB_NAME": "train", "JOB_ID": "4321"}
            job |= {"NODEID": node, "PROCID": node, "LOCALID": "0", "NODELIST": "127.0.0.1"}
            of_slurm = {f"SLURM_{name}": value for name, value in job.items()}
            started.append(([sys.executable, *words], of_slurm | {"MASTER_PORT": port}))
    return started


def finish(started: list[tuple[list[str], dict[str, str]]], folder: Path) -> None:
    """Runs commands side by side to their end."""
    environment = {**os.environ, "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    running = [
        subprocess.Popen(words, cwd=folder, env=environment | more, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for words, more in started
    ]  # fmt: skip
    with ThreadPoolExecutor() as readers:  # side by side: one that waits for the other must not wait for its reader
        for process, (_, errors) in zip(running, readers.map(subprocess.Popen.communicate, running), strict=True):
            assert process.returncode == 0, errors


@pytest.mark.slow  # starts the commands, with two processes
@pytest.mark.parametrize("start", ["alone", "two devices", "torchrun", "srun"])
def test_the_readmes_commands_for_8b(start: str, sharded: Path, tmp_path: Path) -> None:
    section = (ROOT / "README.md").read_text().partition("## On LLaDA-8B")[2]
    text, script = re.search(r"```yaml\n(.*?)```.*?```bash\n(.*?)```", section, re.DOTALL).groups()  # type: ignore[union-attr]
    many = [f"What is {a} + {b}?" for a in range(12) for b in range(12)]
    questions = [
        question
        for split, count in (("validation", 2), ("test", 2), ("train", 12))
        for question in [question for question in many if split_of(question) == split][:count]
    ]
    rows = [{"question": question, "answer": "It is 4. #### 4"} for question in questions]
    (tmp_path / "gsm8k.jsonl").write_text("\n".join(map(json.dumps, rows)))
    hub = "GSAI-ML/LLaDA-8B-Instruct"
    swapped = text.replace(hub, str(sharded)).replace("openai/gsm8k, subset: main", "gsm8k.jsonl")
    swapped = swapped.replace(
        "per_task: 1000", "per_task: 12"
    )  # fewer than there are: whoever did not know would decode more
    assert (text.count(hub), "subset" in text, "subset" in swapped) == (1, True, False)
    (tmp_path / "8b.yaml").write_text(swapped)
    lines, shards = script.strip().splitlines(), tmp_path / "runs/8b/shards"
    decoded: dict[str, bytes] = {}
    assert [line.split()[1] for line in lines] == ["eval/doctor.py", "train/rollout.py", "train/filter.py"]
    for line in lines:
        script, *words = line.replace(hub, str(sharded)).replace("--trainer.devices 8", "").split()[1:]
        words = [str(ROOT / script), *words]
        if "filter" in line:
            decoded = {file.name: file.read_bytes() for file in shards.glob("s*-*")}
            words += ["--trainer.max_epochs", "1"]
        if "doctor" in line:
            finish([([sys.executable, *words], {})], tmp_path)
            continue
        words += ["--trainer.accelerator", "cpu"]
        if start in ("torchrun", "srun"):
            finish(nodes(words, start), tmp_path)
        else:
            devices = "2" if start == "two devices" else "1"
            finish([([sys.executable, *words, "--trainer.devices", devices], {})], tmp_path)
    manifest = json.loads((shards / "manifest.json").read_text())
    assert (manifest["complete"], manifest["counts"]["prompts"]) == (True, 12)
    assert load_filter(tmp_path / "exports/filter-8b")[1].gen_length == 256
    if start == "alone":
        small = {"d_model": 32, "n_heads": 4, "n_kv_heads": 4, "n_layers": 1, "mlp_hidden_size": 64}
        words = [word for name, value in small.items() for word in (f"--model.{name}", str(value))]
        words += ["--trainer.accelerator", "cpu", "--trainer.max_epochs", "1", "--pipeline.mixture_weights", "[0.5]"]
        finish([([sys.executable, str(ROOT / "train/helper.py"), "fit", "--config", "8b.yaml", *words], {})], tmp_path)
    # What was rolled out for all of them is what each of them asks for.
    assert decoded == {file.name: file.read_bytes() for file in shards.glob("s*-*")} != {}


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
