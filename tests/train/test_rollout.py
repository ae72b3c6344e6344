"""Rollouts by the commands a user runs: killed and continued, extended, refused."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from data.labels import PASSES
from data.manifest import RolloutKey, Rollouts
from data.prompts import PromptSource, prompt_hash
from data.rollout_data import RolloutSettings, plan
from data.rollouts import load_records, load_sequences
from data.shards import ShardWriter
from decoding.config import DecodeConfig
from decoding.loop import decode
from decoding.strategies import make_strategy
from models import LLaDAConfig, LLaDAModelLM
from models.errors import InputError
from models.filter import FilterConfig, build_filter, save_filter
from models.predictor import MaskPredictor
from models.tokenizer import train_tokenizer
from train.rollout import estimate, merge
from train.rollout_module import rollout
from train.rollout_module import run as run_rollout

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {"gen_length": 16, "block_length": 4}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer LLaDA with a tokenizer, saved as users have them."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = train_tokenizer(["user\n\nWhat is 1 plus 2? It is 3.assistant\n\n"] * 20, 290)
    torch.manual_seed(0)
    config = LLaDAConfig(
        d_model=32, n_layers=2, n_heads=4, mlp_hidden_size=64, vocab_size=len(tokenizer), max_sequence_length=96,
        mask_token_id=tokenizer.mask_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, init_std=0.3,
    )  # fmt: skip
    LLaDAModelLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def file(sums: Callable[[int], Path]) -> Path:
    return sums(40)


@pytest.fixture
def sources(file: Path) -> list[PromptSource]:
    return [PromptSource(str(file))]


@pytest.fixture(scope="module")
def whole(base: Path, file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in one piece."""
    folder = tmp_path_factory.mktemp("whole")
    roll(base, folder, sources=[PromptSource(str(file))], batch_size=2, **SETTINGS)
    return folder


def roll(base: Path, folder: Path, **settings: Any) -> Rollouts:
    return rollout(RolloutSettings(str(base), folder, **settings), accelerator="cpu")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file; of the manifest, all but its time stamps."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    manifest = json.loads(files.pop("manifest.json"))
    assert manifest.pop("started") <= manifest.pop("finished")
    return files | {"manifest.json": json.dumps(manifest).encode()}


def command(base: Path, file: Path, out: Path, *more: str) -> list[str]:
    return [
        sys.executable, "train/rollout.py", "predict", "--run", str(out.parent / "run"), "--rollout.base", str(base),
        "--rollout.folder", str(out), "--rollout.gen_length", "16", "--rollout.block_length", "4",
        "--rollout.batch_size", "2", "--rollout.sources", json.dumps([{"path": str(file)}]),
        "--trainer.accelerator", "cpu", *more,
    ]  # fmt: skip


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}


@pytest.mark.slow  # starts the command
def test_killed_and_run_again_the_set_is_that_of_an_uninterrupted_run(
    base: Path, file: Path, whole: Path, tmp_path: Path
):
    killed = tmp_path / "killed"
    words = command(base, file, killed)
    with subprocess.Popen(words, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.DEVNULL) as process:
        while not list(killed.glob("shard-*.json")) and process.poll() is None:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    written = {path: path.stat().st_mtime_ns for path in killed.glob("shard-*.json")}
    kept = sum(len(json.loads(path.read_text())["prompts"]) for path in written)
    assert 0 < kept < 40
    done = subprocess.run(words, cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True, text=True)
    assert f"decoded {40 - kept}," in done.stdout
    assert all(path.stat().st_mtime_ns == when for path, when in written.items())  # nothing is decoded twice
    assert contents(killed) == contents(whole)


@pytest.mark.slow  # starts the command
def test_two_ranks_write_what_one_does(base: Path, file: Path, whole: Path, tmp_path: Path) -> None:
    words = command(base, file, tmp_path / "set", "--trainer.devices", "2")
    done = subprocess.run(words, cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True, text=True)
    assert done.stdout.count("decoded 40,") == 1
    assert contents(tmp_path / "set") == contents(whole)


def child(parent: int, mark: bytes) -> int | None:
    """The process that another one started with a variable in its environment, if it is there yet."""
    for status in Path("/proc").glob("[0-9]*/status"):
        with suppress(OSError):  # gone, or somebody else's
            ours = f"PPid:\t{parent}\n" in status.read_text()
            if ours and mark in (status.parent / "environ").read_bytes().split(b"\0"):
                return int(status.parent.name)
    return None


@pytest.mark.slow  # starts the command
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the rank in /proc")
def test_a_rank_is_killed_and_three_go_on(base: Path, file: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    words = command(base, file, out, "--trainer.devices", "2")
    with subprocess.Popen(words, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.DEVNULL) as process:
        second = None
        while not (second and list(out.glob("shard-*.json"))) and process.poll() is None:
            second = second or child(process.pid, b"LOCAL_RANK=1")
            time.sleep(0.001)
        assert second is not None
        os.kill(second, signal.SIGKILL)
    assert process.returncode != 0
    assert not json.loads((out / "manifest.json").read_text())["complete"]
    # Three now, each a node of its own for torchrun: a machine with two cores takes two in one run.
    words = command(base, file, out, "--trainer.devices", "1", "--trainer.num_nodes", "3")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = ["--master_addr", "127.0.0.1", "--master_port", str(free.getsockname()[1])]
    start = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "3", "--nproc_per_node", "1", *place]
    ranks = [
        subprocess.Popen([*start, "--node_rank", str(rank), "--", *words[1:]], cwd=ROOT, env=ENVIRONMENT)
        for rank in range(3)
    ]
    assert [rank.wait() for rank in ranks] == [0, 0, 0]
    assert contents(out) == contents(whole)


@pytest.mark.slow  # starts the command
def test_two_ranks_share_what_is_not_enough_for_both(base: Path, file: Path, tmp_path: Path) -> None:
    # One shard is left: the rank without any has to wait for it, not to end the run.
    one = command(base, file, tmp_path / "one", "--rollout.limit", "2")
    subprocess.run(one, cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True)
    two = command(base, file, tmp_path / "two", "--rollout.limit", "2", "--trainer.devices", "2")
    subprocess.run(two, cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


@pytest.mark.slow  # starts the command
def test_runs_on_one_folder_share_its_work_and_one_that_dies_is_replaced(
    base: Path, file: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "set"
    words = [command(base, file, out, "--run", str(tmp_path / f"run{n}")) for n in range(3)]
    first, second = (
        subprocess.Popen(line, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) for line in words[:2]
    )
    while not list(out.glob("shard-*.json")) and first.poll() is None:
        time.sleep(0.01)
    first.kill()
    third = subprocess.run(words[2], cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True, text=True)
    told = second.communicate()[0] + third.stdout
    first.wait()
    assert second.returncode == 0
    assert contents(out) == contents(whole)
    decoded = [int(part.split(",")[0]) for part in told.split("decoded ")[1:]]
    assert len(decoded) == 2
    assert sum(decoded) <= 40  # none of it twice


def test_ranks_wait_for_each_other_for_longer_than_a_shard_takes(
    base: Path, sources, tmp_path: Path, monkeypatch
) -> None:
    waits = []
    monkeypatch.setattr(Trainer, "predict", lambda trainer, *_, **__: waits.append(trainer.strategy._timeout))
    run_rollout(RolloutSettings(str(base), tmp_path / "set", sources, **SETTINGS), accelerator="cpu", devices=2)
    assert waits[0] > timedelta(days=30)


def test_an_estimate_decodes_one_shard_and_keeps_nothing(base: Path, sources, tmp_path: Path, capsys) -> None:
    estimate(RolloutSettings(str(base), tmp_path / "set", sources, batch_size=2, **SETTINGS), accelerator="cpu")
    said = capsys.readouterr().out
    assert said.startswith("40 prompts in 5 shards of 4 batches of 2\n  sums, test: 5\n")
    hours = {int(n): float(h) for h, n in re.findall(r"([\d.e-]+) hours on (\d+)", said)}
    assert hours[8] == hours[64] == pytest.approx(hours[1] / 5, rel=0.01)  # five shards keep five devices busy
    assert re.search(r"steps: [\d.]+ MiB", said)
    assert re.search(r"memory of 2 prompts of \d+ tokens, the first shard's longest: peak [\d.]+ GiB: weights", said)
    # More rows than are counted.
    estimate(RolloutSettings(str(base), tmp_path / "set", sources, batch_size=2048, **SETTINGS), accelerator="cpu")
    assert "memory of 1024 prompts" in capsys.readouterr().out
    assert not (tmp_path / "set").exists()


def test_what_others_decode_is_left_to_them(base: Path, sources, whole: Path, tmp_path: Path, capsys) -> None:
    known = ShardWriter.begun(whole).manifest
    key = RolloutKey(known["model_fingerprint"], known["tokenizer_hash"], known["settings"])
    name = min(whole.glob("shard-*.json")).stem.removeprefix("shard-")
    with ShardWriter(tmp_path, key).claim(name) as mine:
        assert mine
        roll(base, tmp_path, sources=sources, batch_size=2, **SETTINGS)
        assert "8 prompts are left, 1 batches of them with other runs" in capsys.readouterr().out
        with pytest.raises(InputError, match="8 not decoded"):
            merge(tmp_path)
    roll(base, tmp_path, sources=sources, batch_size=2, **SETTINGS)
    merge(tmp_path)
    assert "40 prompts, complete" in capsys.readouterr().out


def test_a_finished_rows_place_goes_to_the_next_prompt_of_the_shard(base: Path, sources, tmp_path, monkeypatch) -> None:
    calls = []

    def watched(predictor, prompts, *arguments, **options):
        calls.append((prompts, decode(predictor, prompts, *arguments, **options)))
        return calls[-1][1]

    monkeypatch.setattr("train.roller.decode", watched)
    roll(base, tmp_path, sources=sources, limit=16, batch_size=2, passes=["oracle"], **SETTINGS)
    for prompts, out in calls:
        assert len(prompts) == 8
        assert all(len(step.rows) <= 2 for step in out.trace)
        assert out.forward_calls <= (int(out.nfe.sum()) + int(out.nfe.max()) + 1) // 2  # at most the last row is alone


def test_records_of_a_rollout(base: Path, sources, tmp_path: Path) -> None:
    found = roll(base, tmp_path, sources=sources, limit=10, batch_size=4, **SETTINGS)
    records, sequences = load_records(found), load_sequences(found)
    assert len(sequences.prompts) == len(records.prompt_ids) == 10
    assert (sequences.nfe["full_step"] <= 16).all()
    assert (sequences.nfe["oracle"] <= sequences.nfe["full_step"]).all()
    assert len(records.final) == sum(int(nfe.sum()) for nfe in sequences.nfe.values())
    # On the reference's own path, at least the guess that is committed is final.
    on_path = records.passes == 0
    assert records.final[on_path].any(1).all()
    manifest = found.manifest
    assert manifest["counts"] == {
        "prompts": 10,
        "splits": manifest["counts"]["splits"],
        "steps": manifest["counts"]["steps"],
    }
    assert manifest["settings"]["gen_length"] == 16
    assert manifest["settings"]["dtype"] == "float32"
    assert manifest["sources"][0]["sources"][0]["path"] == sources[0].path
    assert {"python", "torch", "transformers", "git"} <= set(manifest["versions"])


def test_states_of_a_filters_pass_are_labelled_by_their_completions(
    base: Path, sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    completed = []

    def watched(*given, **options):
        found = decode(*given, **options)
        completed.extend(found.nfe.tolist() if "regions" in options else [])
        return found

    monkeypatch.setattr("train.roller.decode", watched)
    predictor = MaskPredictor.from_pretrained(base)
    torch.manual_seed(5)
    config = FilterConfig(
        block_length=4, gen_length=16, threshold=0.5, vocab_size=predictor.vocab_size, mask_id=predictor.ids.mask,
        base_fingerprint=predictor.fingerprint,
        base_family=predictor.family,
    )  # fmt: skip
    net = build_filter(config).eval()
    save_filter(tmp_path / "filter", net, config, "card")
    asked = {"sources": sources, "limit": 12, "passes": ["filter"], "filter": tmp_path / "filter", "states": 2}
    found = roll(base, tmp_path / "set", batch_size=3, **asked, **SETTINGS)
    records, sequences = load_records(found), load_sequences(found)
    nfe = sequences.nfe["filter"]
    assert (nfe < 16).any()
    assert torch.equal(records.prompt.bincount(), nfe.clamp(max=2))
    assert records.passes.unique().tolist() == [PASSES.index("filter")]

    # By hand: the same decode, and from each of its states on full_step.
    decoding, differs, at = DecodeConfig(16, 4), 0, 0
    strategy = make_strategy("learn2pd", network=net, config=config)
    for row, tokens in enumerate(sequences.tokens):
        trace = decode(predictor, [tokens], decoding, strategy, record=True).trace
        region = torch.full((1, 16), predictor.ids.mask)
        for step in trace:
            if at < len(records.prompt) and (int(records.prompt[at]), int(records.step[at])) == (row, int(step.step)):
                rest = decode(predictor, [tokens], decoding, make_strategy("full_step"), regions=region).sequences[0]
                block, masked = int(records.block[at]), step.evidence.masked[0]
                target = rest.view(-1, 4)[block]
                assert torch.equal(records.final[at], (step.evidence.token[0] == target) & masked)
                ended = rest.tolist().index(predictor.ids.eot) if predictor.ids.eot in rest else 16
                assert torch.equal(records.tail[at], torch.arange(block * 4, block * 4 + 4) > ended)
                assert torch.equal(records.evidence.stable[at] * masked, step.evidence.stable[0] * masked)
                differs += bool((target != sequences.references[row].view(-1, 4)[block]).any())
                at += 1
            region.view(-1, 4)[step.block] = torch.where(step.transfer, step.committed, region.view(-1, 4)[step.block])
    assert at == len(records.prompt)
    # At most a forward for each position of the block (an EoT may fill some), and none for the blocks after it.
    assert sum(completed) <= int(records.evidence.masked.sum())
    assert differs  # it had left the reference's path


def test_what_steps_say_of_eot_is_kept_where_it_is_asked_for(base: Path, sources, tmp_path: Path) -> None:
    sets = [
        roll(base, tmp_path / str(asked), sources=sources, limit=4, eot_evidence=asked, **SETTINGS)
        for asked in (False, True)
    ]
    without, with_it = ([*next(iter(found.tables("steps"))).column_names] for found in sets)
    assert [name for name in with_it if name not in without] == ["open", "eot_log_odds", "eot_top"]
    one, other = (load_records(found) for found in sets)
    assert torch.equal(one.final, other.final)
    assert torch.equal(one.evidence.confidence, other.evidence.confidence)
    with pytest.raises(InputError, match=r"settings\.eot_evidence: found None; accepted: True"):
        roll(base, tmp_path / "False", sources=sources, limit=4, eot_evidence=True, **SETTINGS)


def test_hidden_states_are_kept_where_they_are_asked_for(base: Path, sources, tmp_path: Path) -> None:
    sets = [
        roll(base, tmp_path / str(asked), sources=sources, limit=4, hidden_states=asked, **SETTINGS)
        for asked in (False, True)
    ]
    assert [found.hidden_size for found in sets] == [0, 32]
    one, other = (load_records(found, hidden=True).evidence for found in sets)
    assert one.hidden is load_records(sets[1]).evidence.hidden is None
    assert other.hidden.dtype == torch.float16
    predictor = MaskPredictor.from_pretrained(base, device="cpu")
    logits = predictor.logits(other.hidden[other.masked].float()).clone()
    logits[:, predictor.ids.mask] = -torch.inf
    assert (logits.argmax(1) == other.token[other.masked]).float().mean() > 0.99  # up to what fp16 rounds
    assert not other.hidden[~other.masked].any()
    assert torch.equal(one.confidence, other.confidence)


def test_the_batch_a_prompt_is_decoded_in_does_not_change_its_labels(base: Path, sources, tmp_path: Path) -> None:
    one, many = (
        load_sequences(roll(base, tmp_path / str(size), sources=sources, limit=6, batch_size=size, **SETTINGS))
        for size in (1, 6)
    )
    assert one.prompts == many.prompts
    assert torch.equal(one.references, many.references)
    assert torch.equal(one.nfe["oracle"], many.nfe["oracle"])


def test_a_larger_limit_decodes_only_the_missing_prompts(base: Path, sources, tmp_path: Path, capsys) -> None:
    few = roll(base, tmp_path, sources=sources, limit=6, batch_size=4, **SETTINGS)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("s*")}
    first = load_records(few).prompt_ids
    # The whole of a small set may be one shard: minutes in which nothing else would be said.
    assert capsys.readouterr().err.count("decoding the first 6 prompts: full_step, oracle\n") == 1
    more = roll(base, tmp_path, sources=sources, limit=12, batch_size=4, **SETTINGS)
    assert load_records(more).prompt_ids[:6] == first
    assert more.manifest["counts"]["prompts"] == 12
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())
    capsys.readouterr()
    again = roll(base, tmp_path, sources=sources, limit=6, batch_size=4, **SETTINGS)
    assert again.manifest["counts"]["prompts"] == 12
    assert "decoding" not in capsys.readouterr().err


def test_other_settings_or_another_model_are_refused_before_any_work(base: Path, sources, tmp_path: Path) -> None:
    roll(base, tmp_path / "set", sources=sources, limit=2, **SETTINGS)
    before = contents(tmp_path / "set")
    with pytest.raises(InputError, match=r"settings\.block_length: found 4; accepted: 8"):
        roll(base, tmp_path / "set", sources=sources, limit=2, gen_length=16, block_length=8)
    other = tmp_path / "other"
    torch.manual_seed(1)
    LLaDAModelLM(LLaDAConfig.from_pretrained(base)).save_pretrained(other)
    for path in base.glob("*token*"):
        (other / path.name).write_bytes(path.read_bytes())
    (other / "chat_template.jinja").write_bytes((base / "chat_template.jinja").read_bytes())
    with pytest.raises(InputError, match=r"manifest\.json: model_fingerprint"):
        roll(other, tmp_path / "set", sources=sources, limit=2, **SETTINGS)
    assert contents(tmp_path / "set") == before


def test_a_prompt_too_long_for_the_model_is_named_before_any_is_decoded(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "long.json"
    path.write_text(json.dumps([{"prompt": "Fine?"}, {"prompt": "1 " * 90}]))
    with pytest.raises(InputError, match=r"prompt long-[0-9a-f]{16}: found \d+ tokens; accepted: at most 80"):
        roll(base, tmp_path / "set", sources=[PromptSource(str(path))], **SETTINGS)
    assert not list((tmp_path / "set").glob("*.parquet"))


def test_prompts_that_are_too_long_can_be_left_out_and_are_listed(base: Path, tmp_path: Path, capsys) -> None:
    path = tmp_path / "some.json"
    long, texts = "1 " * 90, ["Fine?", "1 plus 1", "Is it?"]
    path.write_text(json.dumps([{"prompt": texts[0]}, {"prompt": long}, *({"prompt": text} for text in texts[1:])]))
    asked = {"sources": [PromptSource(str(path))], "too_long": "skip", **SETTINGS}
    found = roll(base, tmp_path / "set", **asked)
    assert "1 prompts are too long and left out, the first with hash" in capsys.readouterr().err
    assert sorted(prompt.prompt for prompt in load_sequences(found).prompts) == sorted(texts)
    ((skipped, tokens),) = json.loads((tmp_path / "set" / "manifest.json").read_text())["skipped"].items()
    assert (skipped, tokens > 80) == (prompt_hash(long), True)
    merge(tmp_path / "set")  # waits for nobody to decode it
    assert "3 prompts, complete" in capsys.readouterr().out
    # A set without such prompts is the one that it was before there was the setting.
    path.write_text(json.dumps([{"prompt": text} for text in texts]))
    without = roll(base, tmp_path / "without", **asked)
    assert "skipped" not in without.manifest
    path.write_text(json.dumps([{"prompt": long}]))
    with pytest.raises(InputError, match="found 1[0-9]{2} tokens; accepted: .*; no prompt is left"):
        roll(base, tmp_path / "none", **asked)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"too_long": "cut"}, r"too_long: found 'cut'; accepted: refuse \| skip"),
        ({"passes": ["full"]}, r"passes: found 'full'; accepted: full_step \| oracle \| filter"),
        ({"passes": []}, "passes: found none"),
        ({"states": 0}, "states: found 0; accepted: a whole number of at least 1"),
        ({"passes": ["filter"]}, "filter: found None; accepted: the folder of an exported filter"),
        ({"eot": "published"}, r"eot: found 'published'; accepted: commit \| off"),
        ({"block_length": 5}, "block_length: found 5; accepted: a divisor of gen_length 16"),
        ({"batch_size": 0}, "batch_size: found 0"),
    ],
)
def test_bad_settings_are_refused_by_name(base: Path, sources, tmp_path: Path, settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        roll(base, tmp_path / "set", sources=sources, **SETTINGS | settings)
    assert not (tmp_path / "set").exists()


@pytest.mark.slow  # starts the command
def test_a_dry_run_says_how_much_it_is_and_writes_nothing(base: Path, file: Path, tmp_path: Path) -> None:
    words = command(base, file, tmp_path / "set", "--dry_run", "true")
    done = subprocess.run(words, cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True, text=True)
    assert done.stdout.startswith("40 prompts in 5 shards of 4 batches of 2\n")
    assert "hours on 64" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.slow  # starts the command
def test_the_command_refuses_bad_input_in_one_line(base: Path, file: Path, tmp_path: Path) -> None:
    words = command(base, file, tmp_path / "set", "--rollout.limit", "0")
    done = subprocess.run(words, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 2
    accepted = "null | a whole number of at least 1 (see rollout.py predict --help)"
    assert done.stderr.splitlines()[-1] == f"rollout.py predict: rollout.limit: found 0; accepted: {accepted}"
    assert not (tmp_path / "set").exists()


def test_batches_hold_prompts_of_similar_length_and_a_longer_list_keeps_them() -> None:
    lengths = [(7 * n) % 50 for n in range(100)]
    batches = plan(lengths, 2)
    assert sorted(index for batch in batches for index in batch) == list(range(100))
    assert sum(max(lengths[n] for n in batch) - min(lengths[n] for n in batch) for batch in batches) < 100
    assert plan(lengths[:64], 2) == batches[:32]
