"""`train/helper.py` as a user runs it: roll out, distil, decode, export, tune further; on a random model of two layers."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open

from data.prompts import split_of
from decoding import Decoder
from decoding.risk import load_calibration, save_calibration
from models.errors import InputError
from models.helper import load_helper
from models.predictor import MaskPredictor
from train.helper_module import HelperModule

SCRIPT = Path(__file__).resolve().parents[2] / "train/helper.py"


def run(*words: object) -> int:
    """The command in this process, which spares starting Python anew; its exit status."""
    arguments, sys.argv = sys.argv, [str(SCRIPT), *map(str, words)]
    try:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        sys.argv = arguments
    return 0


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
def fitted(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, prompts: Path) -> tuple[Path, list[object]]:
    """A folder with a finished ``train/helper.py fit``, and the words it was started with."""
    folder = tmp_path_factory.mktemp("work")
    sources = json.dumps([{"path": str(prompts), "answer_column": "answer"}])
    words = [
        "--rollout.base", tiny_checkpoint, "--rollout.sources", sources, "--rollout.limit", 24,
        "--rollout.gen_length", 16, "--rollout.block_length", 8, "--rollout.batch_size", 8,
        "--pipeline.measure_prompts", 3, "--pipeline.mixture_weights", "[0.5, 1]", "--model.d_model", 32,
        "--model.n_heads", 4, "--model.n_kv_heads", 4,
        "--model.n_layers", 1, "--model.mlp_hidden_size", 64, "--trainer.max_epochs", 2, "--trainer.accelerator", "cpu",
        "--trainer.logger", "false",
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("WANDB_MODE", "disabled")
        assert run("fit", *words) == 0
    return folder, words


@pytest.fixture
def command(fitted, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs a subcommand in the folder of the finished fit, with the same words and further ones."""
    folder, words = fitted
    monkeypatch.chdir(folder)
    return lambda subcommand, *more: run(subcommand, *words, *more)


def test_fit_leaves_everything_a_user_needs(fitted, tiny_checkpoint):
    folder, _ = fitted
    config = load_helper(folder / "exports/helper").config
    predictor = MaskPredictor.from_pretrained(tiny_checkpoint)
    assert config.base_fingerprint == predictor.fingerprint
    assert (config.vocab_size, config.mask_id, config.eot_id) == (
        predictor.vocab_size, predictor.ids.mask, predictor.ids.eot,
    )  # fmt: skip
    assert (config.gen_length, config.source, config.adapter) == (16, None, False)
    assert {"validation/perplexity", "validation/agreement", "apd/0.5/exact_match"} <= set(config.metrics)
    assert config.metrics["apd/1/nfe_mean"] == 1  # R = 1 accepts everything
    assert config.metrics["apd/0.5/nfe_mean"] > 1
    record = yaml.safe_load((folder / "runs/helper/run.yaml").read_text())
    assert record["config"]["model"]["base"] == str(tiny_checkpoint)  # linked to rollout.base
    card = (folder / "exports/helper/README.md").read_text()
    assert "| apd 0.5 |" in card
    assert "| validation/perplexity |" in card


def test_it_is_measured_on_decodes_like_the_rollouts(fitted, tiny_checkpoint, tmp_path, monkeypatch):
    # Of a base without a chat template fit failed after all its training.
    shutil.copytree(tiny_checkpoint, tmp_path / "base", ignore=shutil.ignore_patterns("chat_template.jinja"))
    given = {"chat_template": False, "eot": "off", "steps": 8, "dtype": "bfloat16"}
    more = [word for name, value in given.items() for word in (f"--rollout.{name}", str(value).lower())]
    monkeypatch.chdir(tmp_path)
    assert run("fit", *fitted[1], "--rollout.base", "base", *more, "--trainer.max_epochs", 1) == 0
    decodes = list(Path("runs/helper/decodes").iterdir())
    assert len(decodes) == 3
    for file in decodes:
        with safe_open(file, "pt") as stored:
            settings = json.loads(stored.metadata()["generation"])["settings"]
        assert settings.items() >= given.items(), file


def test_the_export_decodes(fitted, tiny_checkpoint):
    out = Decoder.from_pretrained(
        tiny_checkpoint, "apd", helper=fitted[0] / "exports/helper", mixture_weight=0.5
    ).generate(["What is 3 + 4?", "What is 10 + 11?"], gen_length=16, block_length=8, eot="off")
    assert (out.nfe <= 16).all()


def test_the_export_takes_a_risk(fitted, tiny_checkpoint, tmp_path):
    helper = fitted[0] / "exports/helper"
    calibration = load_calibration(helper / "risk.json")
    assert calibration.values == sorted(calibration.values)
    assert calibration.nfe[-1] == 1
    assert calibration.loss == "text"  # this base answers nothing rightly: no answer could be lost
    assert f"- below {100 * calibration.bounds[0]:.3g} %: no setting" in (helper / "README.md").read_text()
    save_calibration(tmp_path / "risk.json", replace(calibration, bounds=[0.01, 0.02]))
    decoder = Decoder.from_pretrained(
        tiny_checkpoint, "apd", helper=helper, risk=0.02, calibration=tmp_path / "risk.json"
    )
    assert decoder.strategy.mixture_weight == calibration.values[1]


def test_a_helper_of_another_model_is_refused_by_name(fitted, tiny_checkpoint):
    decoder = Decoder.from_pretrained(tiny_checkpoint, "apd", helper=fitted[0] / "exports/helper")
    decoder.predictor.fingerprint = "0123456789abcdef"
    with pytest.raises(InputError, match="helper: base_fingerprint: found .*accepted: '0123456789abcdef'"):
        decoder.generate(["What is 3 + 4?"], gen_length=16, block_length=8)


def test_the_trained_helper_is_tested_without_training_again(command, capsys):
    assert command("test") == 0
    assert "test/perplexity" in capsys.readouterr().out


def test_a_checkpoint_exports_to_the_same_weights(fitted, monkeypatch):
    folder, _ = fitted
    monkeypatch.chdir(folder)
    words = ["--checkpoint", "runs/helper/checkpoints/best.ckpt", "--rollouts", "runs/rollout/shards"]
    assert run("export", *words, "--out", "exports/again") == 0
    ours, again = (load_helper(folder / "exports" / name).model.state_dict() for name in ("helper", "again"))
    assert all(torch.equal(ours[name], again[name]) for name in ours)


def test_a_lora_of_the_export_reuses_the_rollouts_and_merges(fitted, command, monkeypatch):
    folder, _ = fitted
    before = {file: file.stat().st_mtime_ns for file in (folder / "runs/rollout/shards").glob("*.parquet")}
    more = ["--model.pretrained", "exports/helper", "--model.lora_rank", 2, "--run", "runs/lora"]
    assert command("fit", *more, "--pipeline.out", "exports/lora") == 0  # decodes with the adapter, too
    assert before == {file: file.stat().st_mtime_ns for file in (folder / "runs/rollout/shards").glob("*.parquet")}
    adapter = load_helper(folder / "exports/lora")
    assert adapter.config.adapter
    assert (folder / "exports/lora/adapter_model.safetensors").is_file()
    words = ["--checkpoint", "runs/lora/checkpoints/best.ckpt", "--rollouts", "runs/rollout/shards", "--merge", "true"]
    assert run("export", *words, "--out", "exports/merged") == 0
    merged = load_helper(folder / "exports/merged")
    assert not merged.config.adapter
    ids = torch.arange(12)[None]
    with torch.inference_mode():
        ours, wanted, first = (
            helper.model(input_ids=ids).logits for helper in (merged, adapter, load_helper(folder / "exports/helper"))
        )
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)
    assert not torch.equal(wanted, first)


def test_an_interrupted_fit_continues(command, monkeypatch, capsys):
    more = ["--run", "runs/stopped", "--pipeline.out", "exports/stopped", "--pipeline.mixture_weights", "[]"]
    with monkeypatch.context() as patch:
        patch.setattr(HelperModule, "on_train_epoch_start", lambda module: stop(module.current_epoch))
        assert command("fit", *more) == 130
    assert "the same command continues" in capsys.readouterr().err
    assert not Path("exports/stopped").exists()
    assert command("fit", *more, "--model.warmup_steps", 3) == 2  # not the same command
    assert "warmup_steps" in capsys.readouterr().err
    digest = yaml.safe_load(Path("runs/stopped/run.yaml").read_text())["rollouts"]
    assert command("fit", *more, "--rollout.limit", 32) == 0
    told = capsys.readouterr().err
    assert "continuing runs/stopped/checkpoints/last.ckpt at step" in told
    now = yaml.safe_load(Path("runs/stopped/run.yaml").read_text())["rollouts"]
    assert digest != now
    assert f"the rollouts were {digest} when the checkpoint was written and are {now} now" in told
    assert f"digest of the rollouts {now}" in Path("exports/stopped/README.md").read_text()
    assert load_helper("exports/stopped").config.metrics["validation/perplexity"]


@pytest.mark.slow  # starts the command, with two processes
def test_on_two_devices_a_single_validation_batch_is_enough(fitted, tmp_path):
    _, words = fitted
    more = [
        "--trainer.devices",
        "2",
        "--trainer.max_epochs",
        "1",
        "--data.batch_size",
        "64",
        "--pipeline.mixture_weights",
        "[]",
    ]
    environment = {**os.environ, "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "fit", *map(str, words), *more], cwd=tmp_path, env=environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    metrics = load_helper(tmp_path / "exports/helper").config.metrics
    assert 0 <= metrics["validation/agreement"] <= 1


def stop(epoch: int) -> None:
    if epoch == 1:
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--rollout.gen_length", 32], "gen_length"),
        (["--rollout.base", "nowhere"], "base checkpoint: found 'nowhere'"),
        (["--model.d_modle", 8], "d_model"),
        (["--model.pretrained", "nowhere"], "pretrained: found 'nowhere'"),
        (["--pipeline.mixture_weights", "[2]"], "mixture_weights: found 2"),
        (["--model.lora_rank", 2], "lora_rank: found 2 without a pretrained model"),
    ],
)
def test_the_command_refuses_what_does_not_fit(command, more, message, capsys):
    assert command("fit", "--run", "runs/refused", *more) == 2
    assert message in capsys.readouterr().err
