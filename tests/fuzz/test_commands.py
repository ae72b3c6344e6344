"""Hostile command lines and YAML files: one line that names the setting, status 2, and nothing done."""

import io
import json
import re
import runpy
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from lightning.pytorch import Trainer

from data.typed import Count, NotNegative, Part, Positive, Seed, Share, Text
from decoding.command_line import entry
from decoding.generate import main as generate_main
from eval.command import command, wandb_mode
from models.errors import InputError
from train.folder import check_apart
from train.trainer_settings import check_trainer, refusals

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Group:
    """Some settings.

    Args:
        share: A share.
        seed: A seed.
        rates: Some rates.
    """

    share: Share = 0.5
    seed: Seed = 0
    rates: list[Positive] = field(default_factory=lambda: [0.1])


def some(
    count: Count = 1, limit: Count | None = None, part: Part = 0.1, weight: NotNegative = 0.0, name: Text = "a",
    rule: Literal["a", "b"] | None = None, plain: int | None = None, group: Group | None = None, deep: dict | None = None,
) -> None:  # fmt: skip
    """Takes settings of every kind.

    Args:
        count: A count.
        limit: A limit.
        part: A part.
        weight: A weight.
        name: A name.
        rule: A rule.
        plain: A number.
        group: A group.
        deep: A mapping.
    """
    raise AssertionError("accepted")


def refused(capsys: pytest.CaptureFixture[str]) -> str:
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    assert not re.search(r"Traceback|pydantic|validator|<class|typing\.", err), err
    return err


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("count", v) for v in ("0", "-1", "1.5", "abc", "", "true", "null", ".nan", "[1]", "{}", "99999999999999999999")),
        *(("limit", v) for v in ("0", "-1", "1.5", "abc", "true", "[1]")),
        *(("part", v) for v in ("1", "-0.1", ".nan", ".inf", "abc", "null", "true", "[0.1]")),
        *(("weight", v) for v in ("-1", ".nan", ".inf", "abc", "null")),
        *(("rule", v) for v in ("c", "1", "[a]")), *(("plain", v) for v in ("abc", "1.5", "[1]")),
        *(("group.share", v) for v in ("2", "-1", ".nan", "abc")), *(("group.seed", v) for v in ("-1", "1.5", "4294967296")),
        *(("group.rates", v) for v in ("[0]", "[-1]", "[.nan]", "abc", "[abc]")), ("name", ""), ("colour", "red"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("way", ["words", "yaml"])
def test_types(name: str, value: str, way: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = [f"--{name}", value]
    if way == "yaml":
        *groups, last = name.split(".")
        file = tmp_path / "config.yaml"
        text = f"{last}: {value or repr(value)}"
        file.write_text(f"{groups[0]}: {{{text}}}" if groups else text)
        args = ["--config", str(file)]
    with pytest.raises(SystemExit) as stop:
        command(some, args=args)
    assert stop.value.code == 2
    line = refused(capsys)
    assert name.split(".")[-1] in line
    assert "accepted: " in line


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"count: 2\ncount: 3\n", "found 'count' twice; accepted: each key once"),
        (b"group: {share: 0.1, share: 0.2}\n", "found 'share' twice"),
        (b"deep: {a: [{b: 1, b: 2}]}\n", "found 'b' twice"),
        (b"\xff\xfe\x00count: 2", "accepted: YAML in UTF-8"),
        (b"count: [1", "flow sequence"),
        (b"- 1\n- 2\n", "config"),
        (b"count", "config"),
        (b"count: !!python/object/apply:os.system [true]\n", "could not determine a constructor"),
    ],
)
def test_files(content: bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Of two equal keys the last would win.
    file = tmp_path / "config.yaml"
    file.write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        command(some, args=["--config", str(file)])
    assert stop.value.code == 2
    assert message in refused(capsys)


BASE, RESULTS = ROOT / "models/bundled/llada-tiny", ROOT / "eval/results"
FILTER = ROOT / "models/bundled/filter-llada-tiny"
RESULT, RECIPE = RESULTS / "bench.json", ROOT / "configs/base/default.yaml"

EXPORT = "--checkpoint x --rollouts x --out /dev/null/x"


def runs(**settings: object) -> str:
    """A list of runs as the command line has it, the second one wrong."""
    return json.dumps([{"strategy": "full_step"}, {"strategy": "threshold"} | settings], separators=(",", ":"))


COMMANDS = [
    ("train/rollout.py predict", "--rollout.sources []", "sources: found none"),
    ("train/rollout.py predict", "--rollout.batch_size 0", "rollout.batch_size: found 0"),
    ("train/rollout.py predict", "--rollout.gen_length 99999999999999", "rollout.gen_length: found 99999999999999"),
    ("train/rollout.py predict", "--rollout.limit -1", "rollout.limit"),
    ("train/rollout.py predict", "--rollout.passes []", "passes: found none"),
    ("train/rollout.py predict", "--seed_everything -1", "seed_everything: found -1"),
    ("train/rollout.py predict", "--seed_everything 99999999999", "seed_everything: found 99999999999"),
    ("train/rollout.py predict", "--trainer.devices -5", "trainer"),
    ("train/rollout.py predict", "--trainer.devices 0", "trainer"),
    ("train/rollout.py predict", "--trainer.accelerator nope", "trainer"),
    ("train/filter.py fit", "--model.threshold 2", "model.threshold: found 2; accepted: a number from 0 to 1"),
    ("train/filter.py fit", "--model.layers 1000000", "layers: found 1000000"),
    ("train/filter.py fit", "--model.learning_rate -1", "model.learning_rate: found -1"),
    ("train/filter.py fit", "--model.learning_rate .nan", "model.learning_rate: found .nan"),
    ("train/filter.py fit", "--pipeline.pick_from []", "pipeline.pick_from: found none"),
    ("train/filter.py fit", "--pipeline.pick_from [2]", "pipeline.pick_from"),
    ("train/filter.py fit", "--pipeline.pick_prompts 0", "pipeline.pick_prompts: found 0"),
    ("train/filter.py fit", "--pipeline.baselines []", "pipeline.baselines: found none"),
    ("train/filter.py fit", "--data.batch_size 0", "data.batch_size: found 0"),
    ("train/helper.py fit", "--pipeline.kv_window 0", "pipeline.kv_window: found 0"),
    ("train/helper.py fit", "--pipeline.mixture_weights [2]", "pipeline.mixture_weights"),
    ("train/helper.py fit", "--model.lora_alpha -1", "model.lora_alpha: found -1"),
    ("train/helper.py fit", "--model.n_heads 0", "model.n_heads: found 0"),
    ("train/base.py fit", "--model.warmup_steps 0", "model.warmup_steps: found 0"),
    ("train/base.py fit", "--data.seed -2", "data.seed: found -2"),
    ("train/base.py fit", "--model.max_sequence_length 128", "max_length: found 384; accepted: at most model.max"),
    ("train/base.py fit", "--model.d_model 96000000", "weights; accepted: at most"),
    ("train/base.py fit", f"--model.start {BASE} --model.d_model 96", "start: found"),
    ("train/base.py fit", "--model.vocab_size 992", '"model.vocab_size" must be given via "data.vocab_size"'),
    ("eval/bench.py", "--limit -1", "limit: found -1"),
    ("eval/bench.py", "--repeats 0", "repeats: found 0"),
    ("eval/bench.py", "--repeats 999999999999", "repeats: found 999999999999; accepted: a whole number from 1 to 1000"),
    ("eval/bench.py", "--runs []", "runs: found none; accepted: at least one"),
    ("eval/bench.py", "--prompts []", "prompts: found none; accepted: at least one"),
    ("eval/risk.py", "--strategy threshold --values []", "found threshold, threshold, []; accepted: a strategy with"),
    ("eval/trace.py", "--prompt a --strategies []", "strategies: found none; accepted: one or more of"),
    ("eval/doctor.py", "--batch_size 0", "batch_size: found 0"),
    ("eval/doctor.py", "--gen_length 33", "block_length: found 32"),
    ("eval/doctor.py", "--gen_length 99999999999999", "gen_length: found 99999999999999"),
    ("eval/doctor.py", "--prompt_length -1", "prompt_length: found -1"),
    ("eval/doctor.py", "--cache nope", "cache: found nope; accepted: none | prefix | dual"),
    ("eval/doctor.py", "--dtype int8", "dtype: found 'int8'; accepted: float32"),
    ("train/eot.py", "", "rollouts: found nothing; accepted: a value"),
    ("train/eot.py", "--rollouts x --out /dev/null/x", "out: found /dev/null, no folder"),
    ("train/eot.py", f"--rollouts x --out {FILTER}", "which does not hold a eot"),
    ("train/eot.py", "--rollouts x --hidden 99999", "hidden: found 99999; accepted: a whole number from 1 to 4096"),
    ("train/eot.py", "--rollouts x --hidden 0", "hidden: found 0"),
    ("train/eot.py", "--rollouts x --steps 99999999999", "steps: found 99999999999; accepted: a whole number from 1 to 1048576"),
    ("train/eot.py", "--rollouts x --learning_rate .nan", "learning_rate: found .nan"),
    ("train/eot.py", "--rollouts x --seed -1", "seed: found -1"),
    ("train/eot.py", "--rollouts x --base /nope", "found '/nope'; accepted: a folder with config.json"),
    ("train/eot.py", f"--rollouts nowhere --base {BASE}", "nowhere/manifest.json: found"),
    ("eval/harness.py", "--tasks short --system_instruction \udcff", "system_instruction: found '\\udcff'; accepted: text"),
    ("eval/bench.py", "--margin 1", "margin: found 1"),
    ("eval/bench.py", "--runs [{strategy:\u00a0full_step}]", "runs"),
    ("eval/bench.py", '--runs [{"strategy":"full_step","limit":-1}]', 'runs.limit: found -1'),
    ("eval/bench.py", '--runs [{"strategy":"full_step","temperature":-1}]', "temperature"),
    ("eval/harness.py", "--limit 0", "limit: found 0; accepted: null | a number above 0, and finite"),
    ("eval/harness.py", "--num_fewshot -1", "num_fewshot: found -1"),
    ("eval/harness.py", "--temperature .inf", "temperature: found .inf"),
    ("eval/trace.py", "--prompt a --strategies [threshold] --seed -1", "seed: found -1"),
    ("eval/risk.py", "--strategy threshold --values [.nan]", "threshold.threshold: found nan"),
    ("eval/trace.py", "--prompt a --strategies [threshold] --out /dev/null/x.html", "out: found /dev/null, no folder"),
    ("eval/bench.py", "--out /dev/null/x", "out: found /dev/null, no folder"),
    ("eval/risk.py", "--strategy threshold --values [0.9] --run /dev/null/x", "run: found /dev/null, no folder"),
    ("train/filter.py fit", "--run /dev/null/x", "run: found /dev/null, no folder"),
    ("train/filter.py fit", "--pipeline.out /dev/null/x", "pipeline.out: found /dev/null, no folder"),
    ("train/rollout.py predict", "--rollout.folder /dev/null/x", "rollout.folder: found /dev/null, no folder"),
    ("eval/card.py", "--training a --samples -1", "samples: found -1"),
    ("eval/card.py", "--training a --batch_size 0", "batch_size: found 0"),
    ("eval/card.py", "--training a --recipes []", "recipes: found none"),
    ("eval/card.py", "--training a --recipes [/nope.yaml]", "recipes: /nope.yaml: found [Errno 2]"),
    ("eval/card.py", f"--training a --recipes [{RECIPE}] --base /dev/null", "base: found /dev/null, no folder"),
    ("eval/pages.py", "--results nowhere", "nowhere/bench.json: found"),
    ("eval/pages.py", f"--results {RESULTS} --root nowhere", "nowhere/README.md: found"),
    ("eval/report.py compare", f"--before {RESULT} --after {RESULT} --out /dev/null/x", "out: found /dev/null, no folder"),
    ("eval/report.py compare", f"--before {RESULT} --after {RESULT} --out /tmp", "out: found /tmp, a folder"),
    ("data/make_bundle.py", "tusks", "make_bundle.py: found tusks; accepted: no words, for everything, or `tasks`"),
    ("eval/risk.py", f"--strategy threshold --values [0.9] --base {BASE} --refresh 2", "refresh: found 2 with cache none"),
    ("eval/risk.py", f"--strategy threshold --values [0.9] --base {BASE} --gen_length 33", "block_length: found 32"),
    ("eval/bench.py", f"--base {BASE} --runs {runs(eot='learned')}", "eot_head: found None"),
    ("eval/bench.py", f"--base {BASE} --runs {runs(eot='learned', eot_head='/nope')}", "found no folder /nope"),
    ("eval/bench.py", f"--base {BASE} --runs {runs(refresh=3)}", "refresh: found 3 with cache none"),
    ("eval/bench.py", f"--base {BASE} --runs {runs(options={'thresh': 1})}", "threshold.thresh: found an unknown setting"),
    ("eval/bench.py", f"--base {BASE} --runs {runs(gen_length=64, block_length=33)}", "first of gen_length 64"),
    ("eval/bench.py", "--runs [{}]", "runs: found {}; accepted: a mapping with at least one setting"),
    ("eval/bench.py", '--runs [{"strategy":"full_step"},5]', "runs: found 5; accepted: a mapping with at least one setting"),
    ("eval/bench.py", f"--runs {runs(colour='red')}", "runs.colour: found an unknown setting; accepted: strategy"),
    ("eval/bench.py", "--config /dev/null", "config: found '/dev/null' (path is not a file); accepted: a YAML file"),
    ("eval/bench.py", "--config /nowhere.yaml", "config: found '/nowhere.yaml' (file does not exist)"),
    ("eval/harness.py", "--tasks short --limit 2.5", "limit: found 2.5; accepted: a whole number of prompts"),
    ("eval/harness.py", "--tasks short --devices 9999", "devices: found 9999; accepted: at most"),
    ("train/rollout.py", "predict --trainer.accelerator cpu --trainer.devices 999", "trainer.devices: found 999; accepted: at"),
    ("train/filter.py", "fit --trainer.accelerator cpu --trainer.devices 999", "trainer.devices: found 999; accepted: at"),
    ("train/rollout.py", "", "subcommand: found nothing; accepted: predict"),
    ("train/rollout.py", "nope", "subcommand: found 'nope'; accepted: 'predict'"),
    ("train/rollout.py merge", "", "merge.folder: found nothing; accepted: a value"),
    ("train/rollout.py merge", "--folder nowhere", "nowhere/manifest.json: found"),
    ("train/rollout.py predict", "--rollout.sources [5]", "rollout.sources: found 5; accepted: a mapping"),
    ("train/rollout.py predict", '--rollout.sources [{"nope":1}]', "rollout.sources.nope: found an unknown setting"),
    ("train/rollout.py predict", '--rollout.sources [{"answer_column":"a"}]', "answer_column: found 'a'; accepted: no such"),
    ("train/rollout.py predict", '--rollout.sources [{"path":"stories:story","size":9999999}]', "size: found 9999999"),
    ("train/rollout.py predict", "--trainer.log_every_n_steps -1", "trainer.log_every_n_steps: found -1"),
    ("train/rollout.py predict", "--ray.actors 5", "ray.actors: found 5"),
    ("train/rollout.py predict", "--ray.actors [2,1]", "ray.actors: found 2 to 1"),
    ("train/rollout.py predict", "--engine rey", "engine: found rey; accepted: lightning | ray"),
    ("train/rollout.py predict", "--dry_run perhaps", "dry_run: found perhaps"),
    ("train/rollout.py predict", "--rollout.folder nope://b/set", "rollout.folder: found nope://b/set (Protocol not known"),
    ("train/filter.py fit", "--rollout.folder nope://b/set", "rollout.folder: found nope://b/set (Protocol not known"),
    ("train/rollout.py merge", "--folder nope://b/set", "folder: found nope://b/set (Protocol not known"),
    ("train/filter.py fit", "--trainer.max_epochs 0", "trainer.max_epochs: found 0; accepted: more than that"),
    ("train/filter.py fit", "--trainer.max_steps 0", "trainer.max_steps: found 0"),
    ("train/filter.py fit", "--trainer.limit_val_batches 0", "trainer.limit_val_batches: found 0"),
    ("train/filter.py fit", "--trainer.limit_train_batches 0", "trainer.limit_train_batches: found 0"),
    ("train/filter.py fit", "--trainer.val_check_interval 0", "trainer.val_check_interval: found 0"),
    ("train/filter.py fit", "--trainer.accumulate_grad_batches 0", "trainer.accumulate_grad_batches: found 0"),
    ("train/filter.py fit", "--trainer.gradient_clip_val -1", "trainer.gradient_clip_val: found -1"),
    ("train/filter.py fit", "--trainer.check_val_every_n_epoch 0", "trainer.check_val_every_n_epoch: found 0"),
    ("train/filter.py fit", "--trainer.check_val_every_n_epoch 99", "check_val_every_n_epoch: found 99; accepted: at most max"),
    ("train/filter.py fit", "--trainer.max_time 00:00:00:00", "trainer.max_time: found 00:00:00:00; accepted: more"),
    ("train/filter.py fit", "--trainer.max_time {seconds:0}", "trainer.max_time: found {seconds:0}; accepted: more"),
    ("train/filter.py fit", "--trainer.precision 64-true", "trainer.precision: found 64-true; accepted: null | 32-true"),
    ("train/filter.py fit", "--trainer.num_nodes 2", "trainer.num_nodes: found 2; accepted: 1, unless torchrun"),
    ("train/filter.py fit", "--run runs/filter --rollout.folder runs/filter", "run: found runs/filter, the folder of"),
    ("train/filter.py fit", "--pipeline.out runs/rollout/shards/x", "pipeline.out: found runs/rollout/shards/x, in rollout"),
    ("train/filter.py fit", "--pipeline.out runs/rollout/shards", "pipeline.out: found runs/rollout/shards, in rollout"),
    ("train/filter.py fit", "--run e/x --pipeline.out e", "e/x, in pipeline.out e, which is replaced; accepted: a folder"),
    ("train/helper.py fit", "--rollout.folder e/x --pipeline.out e", "e/x, in pipeline.out e, which is replaced"),
    ("train/filter.py fit", f"--run {FILTER}", "an exported model, with config.json in it; accepted: a folder of its own"),
    ("train/filter.py fit", f"--run {FILTER}/x", "filter-llada-tiny, an exported model; accepted: a folder beside it"),
    ("train/filter.py fit", "--rounds 99999999", "rounds: found 99999999; accepted: a whole number from 0"),
    ("train/base.py fit", "--data.tasks [nope]", "data.tasks: found nope; accepted: a mapping with at least one setting"),
    ("train/base.py fit", "--data.gym [nope]", "data.gym: found ['nope']; accepted: null | a mapping"),
    ("train/base.py fit", "--data.tasks nope", "data.tasks: found nope; accepted: list"),
    ("train/base.py fit", "--data.tasks [{name:nope}]", "data.tasks"),
    ("train/rollout.py predict", "--rollout.sources [nope]", "rollout.sources: found nope; accepted: a mapping"),
    ("train/base.py fit", "--data.workers 99999", "data.workers: found 99999; accepted: a whole number from 0 to 1024"),
    ("train/base.py fit", "--data.validation_batches 99999999999", "data.validation_batches: found 99999999999"),
    ("train/rollout.py predict", "--trainer.precision 16-true", "trainer.precision: found 16-true; accepted: null | 32"),
    ("train/rollout.py predict", "--trainer.num_nodes 99", "trainer.num_nodes: found 99; accepted: 1, unless torchrun"),
    ("train/rollout.py predict", "--trainer.num_nodes 0", "trainer.num_nodes: found 0"),
    ("train/rollout.py predict", "--trainer.limit_predict_batches 1", "trainer.limit_predict_batches: found 1; accepted: null"),
    ("train/rollout.py predict", "--trainer.limit_predict_batches 0.5", "trainer.limit_predict_batches: found 0.5"),
    ("train/rollout.py predict", "--trainer.fast_dev_run true", "trainer.fast_dev_run: found True; accepted: false"),
    ("train/rollout.py predict", f"--run {FILTER}", "an exported model, with config.json in it; accepted: a folder of its own"),
    ("train/filter.py fit", "--trainer.fast_dev_run true", "trainer.fast_dev_run: found true; accepted: false"),
    ("train/filter.py fit", "--trainer.enable_checkpointing false", "trainer.enable_checkpointing: found false"),
    ("train/filter.py fit", "--data.rollouts 5", "data.rollouts: found a value of its own; accepted: none: it is rollout.folder"),
    ("train/filter.py fit", "--data.passes []", "passes: found none"),
    ("train/filter.py fit", "--model.kernel 1000001", "kernel: found 1000001"),
    ("train/filter.py export", f"{EXPORT} --base x --threshold 0.5", "out: found /dev/null, no folder"),
    ("train/helper.py export", f"{EXPORT} --base x", "out: found /dev/null, no folder"),
    ("train/base.py export", "--checkpoint x --tokenizer x --out /dev/null/x", "out: found /dev/null, no folder"),
    ("train/base.py fit", "--data.more_blocks [0]", "more_blocks: found [0"),
    ("train/base.py fit", f"--data.tokenizer {ROOT}/models/bundled/filter-llada-tiny", "a folder of something else; accepted"),
    ("decoding/generate.py", "", "prompt: found None"),
    ("decoding/generate.py", "--prompt a --seed -1", "seed: found -1"),
    ("decoding/generate.py", "--prompt a --pause -1", "pause: found -1"),
    ("decoding/generate.py", "--prompt a --gen_length 99999999999999", "gen_length: found 99999999999999"),
    ("decoding/generate.py", "--prompt a --strategy threshold --options {\"threshold\":\"abc\"}", "threshold.threshold: found"),
    ("decoding/generate.py", "--prompt a --filter 5", "filter"),
    *(("decoding/generate.py", f"--prompt a --strategy threshold {words}", message) for words, message in [
        ("--filter /nowhere", "filter: found '/nowhere'; accepted: none; it is read with strategy learn2pd only"),
        ("--helper /nowhere", "helper: found '/nowhere'; accepted: none; it is read with strategy apd only"),
        ("--eot_risk 0.5", "eot_risk: found 0.5; accepted: none; it is read with eot learned only"),
        ("--batch_size 0", "batch_size: found 0; accepted: none; it is read with plan only"),
        ("--dtype float64", "dtype: found 'float64'"), ("--prompt_length -3", "prompt_length: found -3"),
        ("--options {1:\t2}", "options: found {1: 2}; accepted: a mapping from the names"),
        ('--options {"device":"meta"}', "threshold.device: found an unknown setting"),
        ('--options {"compile":true}', "threshold.compile: found an unknown setting"),
        ("--interactive --gen_length 48", "block_length: found 32"),
        ("--plan x --batch_size 1048576", "batch_size: found 1048576; accepted: a whole number from 1 to 1024"),
    ]),
    ("eval/trace.py", "--prompt a --strategies [threshold] --options {threshold:\t{1:\t2}}", "options: found {1: 2}"),
    ("eval/harness.py", "--tasks short --options {1:\t2}", "options: found {1: 2}; accepted: a mapping from the names"),
    ("decoding/generate.py", "--strategy threshold --plan /dev/zero", "/dev/zero: found no regular file"),
]  # fmt: skip


@pytest.mark.parametrize(("script", "words", "message"), COMMANDS, ids=lambda value: str(value)[:60])
def test_commands(
    script: str, words: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    name, *verb = script.split()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(ROOT / name), *verb, *filter(None, words.split(" "))])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / name), run_name="__main__")
    assert stop.value.code == 2
    assert message in refused(capsys)
    assert not list(tmp_path.rglob("*"))


@pytest.mark.parametrize("mode", ["nonsense", "OFFLINE", "0"])
def test_modes_of_wandb(mode: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WANDB_MODE", mode)
    with pytest.raises(InputError, match=f"WANDB_MODE: found {mode}; accepted: online | offline | disabled"):
        wandb_mode()


def test_a_set_is_no_run_folder(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").touch()
    with pytest.raises(InputError, match="run: found .*, a rollout set, with manifest.json in it"):
        check_apart(tmp_path, None, {})
    (tmp_path / "config.json").touch()  # anybody's
    check_apart(tmp_path / "run", str(tmp_path / "run/shards"), {"pipeline.out": str(tmp_path / "run/export")})


@pytest.mark.parametrize("other", ["export", "export/eot", "."])
def test_an_export_does_not_lie_where_another_is_replaced(tmp_path: Path, other: str) -> None:
    outs = {"pipeline.out": str(tmp_path / "export"), "pipeline.eot_out": str(tmp_path / other)}
    with pytest.raises(
        InputError, match=r"pipeline\.(eot_)?out: found .*, which is replaced; accepted: a folder beside"
    ):
        check_apart(tmp_path.parent / "run", None, outs)
    check_apart(tmp_path.parent / "run", None, outs | {"pipeline.eot_out": str(tmp_path / "eot")})


def test_an_accelerator_that_is_not_installed_is_named() -> None:
    with pytest.raises(InputError, match="trainer: found .*torch_xla.*; accepted: settings that"), refusals():
        Trainer(accelerator="tpu")


def test_nodes_are_taken_from_who_started_them(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = dict.fromkeys(
        ["accumulate_grad_batches", "check_val_every_n_epoch", "gradient_clip_val", "log_every_n_steps", "devices",
         "accelerator", "precision", "val_check_interval", "limit_predict_batches", "fast_dev_run"]
    ) | {"num_nodes": 2}  # fmt: skip
    for name in ("MASTER_ADDR", "SLURM_NTASKS"):
        with pytest.raises(InputError, match="num_nodes"):
            check_trainer(settings, "predict", exports=False)
        with monkeypatch.context() as patch:
            patch.setenv(name, "2")
            check_trainer(settings, "predict", exports=False)


def test_a_terminal_without_a_character_is_no_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    told = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", told)
    entry(lambda: print("2× as fast"))
    told.seek(0)
    assert told.read() == "2\\xd7 as fast\n"


@pytest.mark.parametrize(
    ("content", "status", "message"),
    [
        (b"seed: 1\nseed: 2\n", 2, "found 'seed' twice; accepted: each key once"),
        (b"options: {a: 1, a: 2}\n", 2, "found 'a' twice"),
        (b"\xff\xfe\x00seed: 2", 2, "accepted: YAML in UTF-8"),
    ],
)
def test_config_of_generate(
    content: bytes, status: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    file = tmp_path / "config.yaml"
    file.write_bytes(content)
    monkeypatch.setattr(sys, "argv", ["generate.py", "--prompt", "a", "--config", str(file)])
    with pytest.raises(SystemExit) as stop:
        generate_main()
    assert stop.value.code == status
    assert message in refused(capsys)


def test_generate_has_the_status_of_a_refusal_of_the_system(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device", "/cache")

    monkeypatch.setattr("decoding.generate.MaskPredictor.from_pretrained", refuse)
    monkeypatch.setattr(sys, "argv", ["generate.py", "--prompt", "a"])
    with pytest.raises(SystemExit) as stop:
        generate_main()
    assert stop.value.code == 74
    assert "generate.py: /cache: No space left on device" in refused(capsys)


@pytest.mark.parametrize(
    ("typed", "words", "message"),
    [
        (b"a\n\xff\xfe\n", "", "prompt: found 'utf-8' codec can't decode byte 0xff"),
        (b"a\nb\n", "--eot learned --eot_head /nowhere", "/nowhere"),
    ],
)
def test_what_ends_a_session(
    typed: bytes, words: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Of a setting that is wrong every message would be told, with status 0.
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed), encoding="utf-8"))
    words = f"--interactive --strategy full_step --gen_length 8 --block_length 8 {words}"
    monkeypatch.setattr(sys, "argv", ["generate.py", *words.split()])
    with pytest.raises(SystemExit) as stop:
        generate_main()
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("script", ["eval/bench.py", "eval/risk.py", "train/filter.py fit", "train/filter.py export"])
def test_help_names_types_that_a_person_knows(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name, *verb = script.split()
    monkeypatch.setattr(sys, "argv", [str(ROOT / name), *verb, "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / name), run_name="__main__")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "Annotated" not in text
    assert "int" in text or "float" in text
