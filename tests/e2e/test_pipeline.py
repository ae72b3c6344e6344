"""The main job as a user runs it: roll out, label, train, export, decode, compare; on a random model of two layers."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open

from data.labels import PASSES
from data.manifest import open_rollouts
from data.prompts import split_of
from data.rollouts import load_records, load_sequences
from decoding import Decoder
from models.eot import load_eot
from models.errors import InputError
from models.filter import load_filter
from models.predictor import MaskPredictor, fingerprint

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: object, folder: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "WANDB_MODE": "disabled"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts of every split, as local JSONL."""
    file = tmp_path_factory.mktemp("prompts") / "sums.jsonl"
    texts = [f"What is {a} + {b}?" for a in range(12) for b in range(12)]
    assert {split_of(text) for text in texts} == {"train", "validation", "test"}
    lines = [{"prompt": text, "answer": "#### 7", "task": "sums"} for text in texts]
    file.write_text("\n".join(map(json.dumps, lines)))
    return file


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, prompts: Path) -> tuple[Path, list[str]]:
    """A finished ``train/filter.py fit`` and the words it was started with."""
    folder = tmp_path_factory.mktemp("work")
    sources = json.dumps([{"path": str(prompts), "answer_column": "answer"}])
    words = [
        ROOT / "train/filter.py", "fit", "--rollout.base", tiny_checkpoint, "--rollout.sources", sources,
        "--rollout.limit", 24, "--rollout.gen_length", 16, "--rollout.batch_size", 8,
        "--pipeline.pick_prompts", 3, "--pipeline.test_prompts", 2, "--pipeline.pick_from", "[0.5, 0.9]",
        "--pipeline.baselines", "[0.9]", "--rollout.block_length", 8,
        "--rollout.eot_evidence", "true", "--pipeline.eot_out", "exports/eot",
        "--trainer.max_epochs", 3, "--trainer.accelerator", "cpu",
    ]  # fmt: skip
    done = run(*words, folder=folder)
    assert done.returncode == 0, done.stderr
    assert "test prompts; thresholds picked on validation" in done.stdout
    return folder, [str(word) for word in words]


def test_fit_leaves_everything_a_user_needs(fitted, tiny_checkpoint):
    folder, _ = fitted
    _, config = load_filter(folder / "exports/filter")
    assert config.base_fingerprint == MaskPredictor.from_pretrained(tiny_checkpoint).fingerprint
    assert (config.gen_length, config.block_length) == (16, 8)
    assert config.threshold in (0.5, 0.9)
    assert {"validation/auroc", "validation/auroc_no_tail", "decode/nfe_mean"} <= set(config.metrics)
    assert load_eot(folder / "exports/eot")[1].base_fingerprint == config.base_fingerprint
    assert json.loads((folder / "runs/rollout/shards/manifest.json").read_text())["complete"]
    record = yaml.safe_load((folder / "runs/filter/run.yaml").read_text())
    assert record["config"]["model"]["architecture"] == "conv"
    card = (folder / "exports/filter/README.md").read_text()
    assert "(reliability.png)" in card
    assert (folder / "exports/filter/reliability.png").is_file()
    for label in (f"learn2pd {config.threshold:g}", "full_step EoT learned 0.001"):
        assert f"| {label} |" in card
    assert re.search(r"In the decode the filter took [0-9]+\.[0-9] % of a forward's time \(batch 8, .+\)\.", card)
    assert re.search(r"\n[0-9]{1,2},[0-9]{3} parameters\. Reads logits", card)
    assert "Risk of losing the text of full_step, at 95 % confidence (3 calibration prompts)" in card


def test_prompts_without_answers_are_judged_by_their_text(tiny_checkpoint, tmp_path):
    texts = [f"What is {a} + {b}?" for a in range(12) for b in range(12)]
    (tmp_path / "open.jsonl").write_text("\n".join(json.dumps({"prompt": text}) for text in texts))
    done = run(
        ROOT / "train/filter.py", "fit", "--rollout.base", tiny_checkpoint, "--rollout.sources", '[{"path": "open.jsonl"}]',
        "--rollout.limit", 24, "--rollout.gen_length", 16, "--rollout.batch_size", 8, "--rollout.block_length", 8,
        "--pipeline.pick_prompts", 3, "--pipeline.test_prompts", 2, "--pipeline.pick_from", "[0.5]",
        "--pipeline.baselines", "[0.9]", "--trainer.max_epochs", 1, "--trainer.accelerator", "cpu", folder=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert load_filter(tmp_path / "exports/filter")[1].metrics["decode/exact_match"] is None
    assert "| learn2pd 0.5 | – |" in (tmp_path / "exports/filter/README.md").read_text()
    assert json.loads((tmp_path / "exports/filter/risk.json").read_text())["loss"] == "text"


def test_the_threshold_is_picked_on_decodes_like_the_rollouts(fitted, tiny_checkpoint, tmp_path):
    # Of a base without a chat template fit failed after all its training; else it picked on other prompts and references.
    shutil.copytree(tiny_checkpoint, tmp_path / "base", ignore=shutil.ignore_patterns("chat_template.jinja"))
    given = {"chat_template": False, "eot": "off", "steps": 8, "dtype": "bfloat16"}
    more = [word for name, value in given.items() for word in (f"--rollout.{name}", str(value).lower())]
    more += ["--rollout.base", tmp_path / "base", "--trainer.max_epochs", 1, "--pipeline.eot_out", "null"]
    done = run(*fitted[1], *more, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    decodes = list((tmp_path / "runs/filter/decodes").iterdir())
    assert len(decodes) == 8  # full_step, threshold and two of learn2pd; of the test prompts one, and the oracle
    for file in decodes:
        with safe_open(file, "pt") as stored:
            settings = json.loads(stored.metadata()["generation"])["settings"]
        assert settings.items() >= given.items(), file
    assert json.loads((tmp_path / "exports/filter/risk.json").read_text())["decoding"]["eot"] == "off"


def test_the_export_decodes(fitted, tiny_checkpoint):
    folder, _ = fitted
    decoder = Decoder.from_pretrained(tiny_checkpoint, "learn2pd", filter=folder / "exports/filter", threshold=0.3)
    out = decoder.generate(["What is 3 + 4?", "What is 10 + 11?"], gen_length=16, block_length=8, eot="off")
    assert (out.nfe <= 16).all()
    assert (
        out.counts["filter_commits"].sum() == 32 - out.nfe.sum()
    )  # every forward commits one token without the filter
    assert out.settings["threshold"] == 0.3
    asking = {"filter": folder / "exports/filter"}
    # A model that knows no answer could lose none, so the text counts; three prompts vouch for 63.2 % at best.
    careful = Decoder.from_pretrained(tiny_checkpoint, "learn2pd", risk=0.64, **asking)
    assert careful.generate(["What is 3 + 4?"], gen_length=16, block_length=8).settings["threshold"] == 0.9
    with pytest.raises(InputError, match=r"risk: found 0\.5; accepted: at least 0\.632"):
        Decoder.from_pretrained(tiny_checkpoint, "learn2pd", risk=0.5, **asking)


def test_a_second_fit_does_not_roll_out_again(fitted):
    folder, words = fitted
    before = {file: file.stat().st_mtime_ns for file in (folder / "runs/rollout/shards").glob("*.parquet")}
    done = run(*words, "--trainer.max_epochs", 1, folder=folder)
    assert done.returncode == 0, done.stderr
    assert "step 1/" in done.stderr  # it trained anew
    assert before == {file: file.stat().st_mtime_ns for file in (folder / "runs/rollout/shards").glob("*.parquet")}


@pytest.mark.slow  # starts the command twice, with two processes
def test_on_two_devices_fit_rolls_out_what_one_does_and_trains(fitted, tmp_path):
    folder, words = fitted
    more = ["--trainer.devices", 2, "--data.batch_size", 16, "--trainer.max_epochs", 1]
    done = run(*words, *more, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("exported exports/filter") == 1
    one, two = (sorted((work / "runs/rollout/shards").glob("*.parquet")) for work in (folder, tmp_path))
    assert [file.read_bytes() for file in one] == [file.read_bytes() for file in two]


@pytest.mark.slow  # starts the command
def test_states_of_a_filter_are_recorded_and_fitted(fitted, tmp_path):
    folder, words = fitted
    more = ["--rollout.passes", "[full_step, filter]", "--rollout.filter", folder / "exports/filter"]
    done = run(*words, *more, "--trainer.max_epochs", 1, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "passes full_step, filter, 0 rounds" in (tmp_path / "exports/filter/README.md").read_text()


def test_rounds_train_on_the_filters_own_states_and_are_kept(fitted, tmp_path):
    folder, words = fitted
    shards = tmp_path / "shards"
    shutil.copytree(folder / "runs/rollout/shards", shards)
    words = [*words, "--rollout.folder", shards, "--rounds", 1, "--trainer.max_epochs", 1]
    done = run(*words, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    (own,) = shards.glob("filter-*")
    learner = tmp_path / "runs/filter/rounds/1"
    assert own.name == f"filter-{fingerprint(learner)}-0.9"
    first, second = load_records(shards), load_records(own)
    assert sorted(set(first.prompt_ids)) == sorted(set(second.prompt_ids))
    references = [load_sequences(one).references for one in (shards, own)]
    assert torch.equal(*references)  # taken from the first set
    assert second.passes.unique().tolist() == [PASSES.index("filter")]
    told = {
        name
        for file in tmp_path.glob("runs/filter/csv/*/metrics.csv")
        for name in file.read_text().split("\n")[0].split(",")
    }
    assert {"rollout/prompts", "round 1-rollout/nfe_filter", "round 1-validation/loss", "validation/loss"} <= told
    digests = "+".join(open_rollouts(one).digest for one in (shards, own))
    assert digests in (tmp_path / "exports/filter/README.md").read_text()
    # Once more: neither the round's filter nor its rollouts are made again.
    before = {file: file.stat().st_mtime_ns for part in (own, learner) for file in part.iterdir()}
    done = run(*words, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert list(shards.glob("filter-*")) == [own]
    kept = {file for file, when in before.items() if file.stat().st_mtime_ns == when}
    assert before.keys() - kept == {own / "manifest.json"}
    done = run(*words, "--model.threshold", 0.8, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(list(shards.glob("filter-*"))) == 2  # another threshold visits other states


@pytest.mark.slow  # starts the command, with two processes
def test_on_two_devices_rounds_find_each_others_filter(fitted, tmp_path):
    _, words = fitted
    more = ["--rounds", 1, "--trainer.devices", 2, "--data.batch_size", 16, "--trainer.max_epochs", 1]
    more += ["--rollout.hidden_states", "true", "--model.hidden", 4]
    done = run(*words, *more, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("exported exports/filter") == 1
    (own,) = (tmp_path / "runs/rollout/shards").glob("filter-*")
    assert open_rollouts(own).manifest["counts"]["prompts"] == 24
    assert open_rollouts(own).hidden_size == 32
    assert '"logits_only": false' in (tmp_path / "exports/filter/config.json").read_text()


def test_an_eot_head_needs_its_evidence(fitted):
    folder, words = fitted
    words = [word for word in words if word not in ("--rollout.eot_evidence", "true")]
    done = run(*words, "--run", "runs/other", folder=folder)
    assert done.returncode == 2
    assert "rollout.eot_evidence: found False; accepted: true, with pipeline.eot_out" in done.stderr


def test_the_command_refuses_what_does_not_fit(fitted):
    folder, words = fitted
    for arguments, message in (
        (["--rollout.gen_length", 32], "gen_length"),
        (["--model.hidden", 4], "rollout.hidden_states: found False; accepted: true, with model.hidden"),
        (["--rollout.base", "nowhere"], "base checkpoint: found 'nowhere'"),
        (["--model.chanels", 8], "channels"),
        (["--rounds", -1], "rounds: found -1; accepted: a whole number from 0 to 100"),
        (["--rounds", 1, "--data.passes", "[oracle]"], "data.passes: found oracle; accepted: null, or filter"),
        (["--rollout.block_length", 7], "block_length: found 7; accepted: a divisor of gen_length 16"),
    ):
        done = run(*words, *arguments, folder=folder)
        assert done.returncode == 2, arguments
        assert message in done.stderr
        assert "Traceback" not in done.stderr


def test_a_filter_of_another_model_is_refused_by_name(fitted, tiny_checkpoint):
    decoder = Decoder.from_pretrained(tiny_checkpoint, "learn2pd", filter=fitted[0] / "exports/filter")
    decoder.predictor.fingerprint = "0123456789abcdef"
    with pytest.raises(InputError, match="base_fingerprint: found .*accepted: '0123456789abcdef'"):
        decoder.generate(["What is 3 + 4?"], gen_length=16, block_length=8)
