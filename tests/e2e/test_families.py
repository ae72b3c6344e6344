"""Every command with ``--base`` of a family that is not the bundled one's; on random models of two layers."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from data.prompts import split_of
from decoding import Decoder
from models.errors import InputError
from models.filter import load_filter
from models.helper import load_helper

pytestmark = pytest.mark.parametrize("family", ["Dream", "llada_moe"], indirect=True, scope="session")
ROOT = Path(__file__).resolve().parents[2]
SIZES = ["--rollout.gen_length", 16, "--rollout.block_length", 8, "--rollout.limit", 16, "--rollout.batch_size", 8]
TRAINER = ["--trainer.max_epochs", 1, "--trainer.accelerator", "cpu", "--trainer.logger", "false"]
DECODES = ["--gen_length", 16, "--block_length", 8]
TASK = """task: sums
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
output_type: generate_until
test_split: test
doc_to_text: "{{prompt}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 16}
metric_list: [{metric: exact_match}]
"""


def run(script: str, *words: object) -> int:
    """The command in this process, which spares starting Python anew; its exit status."""
    arguments, sys.argv = sys.argv, [str(ROOT / script), *map(str, words)]
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        sys.argv = arguments
    return 0


@pytest.fixture(scope="module")
def base(family_checkpoint) -> Path:
    return family_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A working folder with prompts of every split."""
    folder = tmp_path_factory.mktemp("work")
    texts = [f"What is {a} + {b}?" for a in range(12) for b in range(12)]
    assert {split_of(text) for text in texts} == {"train", "validation", "test"}
    lines = [json.dumps({"prompt": text, "answer": "7", "task": "sums"}) for text in texts]
    (folder / "sums.jsonl").write_text("\n".join(lines))
    (folder / "sums.yaml").write_text(TASK.replace("FILE", str(folder / "sums.jsonl")))
    return folder


@pytest.fixture(scope="module")
def fitted(base, folder, tmp_path_factory) -> Path:
    """A working folder with a fitted filter and a fitted helper."""
    work = tmp_path_factory.mktemp("fitted")
    sources = json.dumps([{"path": str(folder / "sums.jsonl"), "answer_column": "answer"}])
    words = ["fit", "--rollout.base", base, "--rollout.sources", sources, *SIZES, *TRAINER]
    small = [
        "--model.init", "embeddings", "--model.d_model", 32, "--model.n_heads", 4, "--model.n_kv_heads", 4,
        "--model.n_layers", 1, "--model.mlp_hidden_size", 64,
    ]  # fmt: skip
    picking = ["--pipeline.pick_prompts", 3, "--pipeline.test_prompts", 2, "--pipeline.pick_from", "[0.5]"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        patch.setenv("WANDB_MODE", "disabled")
        assert run("train/filter.py", *words, *picking, "--pipeline.baselines", "[0.9]") == 0
        assert (
            run(
                "train/helper.py",
                *words,
                *small,
                "--pipeline.measure_prompts",
                3,
                "--pipeline.mixture_weights",
                "[0.5]",
            )
            == 0
        )
    return work


def test_what_was_fitted_decodes_and_says_for_whom(fitted, base, family):
    assert load_filter(fitted / "exports/filter")[1].base_family == family
    assert load_helper(fitted / "exports/helper").config.base_family == family
    for strategy in ("filter", "helper"):
        name, options = {"filter": ("learn2pd", {}), "helper": ("apd", {"kv_window": 4, "max_lookahead": 6})}[strategy]
        decoder = Decoder.from_pretrained(base, name, **{strategy: fitted / "exports" / strategy}, **options)
        out = decoder.generate(["What is 3 + 4?", "10"], gen_length=16, block_length=8, eot="off")
        assert (out.sequences != decoder.predictor.ids.mask).all()


@pytest.mark.parametrize("strategy", ["learn2pd", "apd"])
def test_it_is_refused_for_the_other_family_by_name(fitted, tiny_checkpoint, family, strategy):
    part = {"learn2pd": "filter", "apd": "helper"}[strategy]
    decoder = Decoder.from_pretrained(tiny_checkpoint, strategy, **{part: fitted / "exports" / part})
    with pytest.raises(InputError, match=f"{part}: base_family: found '{family}'; accepted: 'llada'"):
        decoder.generate(["What is 3 + 4?"], gen_length=16, block_length=8)


def test_bench_harness_and_trace_decode_it(fitted, base, folder, monkeypatch):
    monkeypatch.chdir(fitted)
    runs = [
        {"strategy": "full_step", "eot": "off"},
        {"strategy": "threshold", "cache": "dual", "options": {"threshold": 0.5}},
    ]
    sources = json.dumps([{"path": str(folder / "sums.jsonl"), "answer_column": "answer"}])
    words = ["--base", base, "--runs", json.dumps(runs), "--prompts", sources, "--limit", 2, "--pick_on", 2]
    assert run("eval/bench.py", *words, *DECODES) == 0
    assert len(json.loads((fitted / "runs/bench/bench.json").read_text())["rows"]) == 2
    words = ["--base", base, "--strategy", "threshold", "--tasks", "sums", "--include_path", folder, "--limit", 2]
    assert run("eval/harness.py", *words, *DECODES, "--device", "cpu", "--out", "harness") == 0
    assert "sums" in json.loads((fitted / "harness/results.json").read_text())["results"]
    words = [
        "--prompt",
        "What is 3 + 4?",
        "--base",
        base,
        "--out",
        "page.html",
        "--strategies",
        "full_step",
        "learn2pd",
        "apd",
    ]
    assert run("eval/trace.py", *words, *DECODES, "--filter", "exports/filter", "--helper", "exports/helper") == 0
    assert (fitted / "page.html").is_file()
