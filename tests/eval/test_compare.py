"""Several decodes of the same prompts, side by side."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from data.prompt import Prompt
from data.prompts import PromptSource, load_prompts
from data.provenance import environment
from decoding.strategies import BlockStrategy, Decision, make_strategy
from eval.compare import Comparison, Run, compare
from models.errors import InputError
from models.filter import FilterConfig, build_filter
from models.predictor import MaskPredictor

LENGTHS = {"gen_length": 16, "block_length": 8}


def test_labels_tell_runs_apart():
    labels = {Run("threshold", {"threshold": t}, eot=e).label for t in (0.5, 0.9) for e in ("off", "commit")}
    assert labels == {"threshold 0.5", "threshold 0.9", "threshold 0.5 EoT off", "threshold 0.9 EoT off"}
    assert Run("dico", {"filter": "x"}, cache="dual", batch_size=8, dtype="bfloat16").label == (
        "dico + filter dual cache batch 8 bfloat16"
    )


PROMPTS = [Prompt(str(n), "gsm_symbolic", text, answer="4") for n, text in enumerate(["the cat", "sat on", "12 mats"])]


@pytest.fixture(scope="module")
def predictor(tiny_checkpoint):
    return MaskPredictor.from_pretrained(tiny_checkpoint)


def test_repeats_are_interleaved_and_every_length_has_its_own_reference(predictor):
    runs = [
        Run("full_step"), Run("threshold", {"threshold": 2.0}, limit=2, batch_size=1), Run("oracle"),
        Run("full_step", gen_length=8), Run("oracle", gen_length=8, cache="dual", limit=1), Run("full_step", dtype="bfloat16"),
    ]  # fmt: skip
    order = []
    rows = compare(predictor, PROMPTS, runs, repeats=2, progress=order.append, **LENGTHS)
    assert order == [run.label for _ in range(2) for run in runs]
    assert [row["prompts"] for row in rows] == [3, 2, 3, 3, 1, 3]
    assert [row["settings"]["gen_length"] for row in rows] == [16, 16, 16, 8, 8, 16]
    assert [row["reference"] for row in rows] == ["full_step"] * 3 + ["full_step gen 8"] * 2 + ["full_step"]
    assert all(row["sequence_agreement"] == 1.0 for row in rows[:5])
    assert rows[1]["settings"]["batch_size"] == 1
    assert rows[5]["settings"]["dtype"] == "bfloat16"
    for row in rows:
        assert row["seconds"] == min(row["seconds_all"])
        assert len(row["seconds_all"]) == 2
        assert 0 < row["loop_share"] < 1


def test_forwards_saved_by_the_end_of_text(predictor):
    runs = [Run("full_step"), Run("threshold", eot="off"), Run("threshold"), Run("factor")]
    full, off, on, factor = compare(predictor, PROMPTS, runs, **LENGTHS)
    assert full["forwards_saved_by_eot"] == 16 - full["nfe_mean"]
    assert on["forwards_saved_by_eot"] == off["nfe_mean"] - on["nfe_mean"]
    assert off["forwards_saved_by_eot"] == 0
    assert factor["forwards_saved_by_eot"] is None  # its decode without the rule is not in the list


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([Run("threshold")], "runs: first of gen_length 16: found 'threshold'; accepted: full_step, uncached"),
        ([Run("full_step", cache="dual")], "accepted: full_step, uncached"),
        (
            [Run("full_step", limit=1), Run("oracle")],
            "limit of 'oracle': found None; accepted: at most the reference's 1",
        ),
        (
            [Run("full_step"), Run("full_step")],
            "runs: found 2 named 'full_step'; accepted: a label of its own for each",
        ),
    ],
)
def test_runs_are_refused_by_name(predictor, runs, message):
    with pytest.raises(InputError, match=message):
        compare(predictor, PROMPTS, runs, **LENGTHS)


@pytest.mark.parametrize(
    "change", [{"dtype": "int8"}, {"limit": -1}, {"limit": 0}, {"batch_size": "8"}, {"temperature": -1.0}, {"eot": "x"}]
)
def test_a_run_is_refused_by_field(change):
    # A limit of -1 would leave out the last prompt.
    with pytest.raises(InputError, match=f"^{next(iter(change))}: found"):
        Run("full_step", **change)


RUNS = [Run("full_step"), Run("oracle"), Run("threshold")]


def finish(comparison, decodes=None):
    """Decodes what is left, or so many decodes; which they were."""
    done = []
    for number, repeat in comparison.work():
        if len(done) == decodes:
            break
        comparison.decode(number, repeat)
        done.append((comparison.runs[number].label, repeat))
    return done


def test_an_interrupted_comparison_goes_on_where_it_stopped(predictor, tmp_path):
    settings = {"repeats": 2, "folder": tmp_path, **LENGTHS}
    whole = [(run.label, repeat) for repeat in range(2) for run in RUNS]
    assert finish(Comparison(predictor, PROMPTS, RUNS, **settings), decodes=4) == whole[:4]
    second = Comparison(predictor, PROMPTS, RUNS, **settings)
    assert second.left() == [(1, 0), (1, 1), (2, 1)]  # the oracle's text is not read yet
    next(second.work())
    assert second.left() == [(1, 1), (2, 1)]
    assert finish(second) == whole[4:]
    assert second.left() == []
    third = Comparison(predictor, PROMPTS, RUNS, **settings)
    assert finish(third) == []
    assert third.rows() == second.rows()
    fresh = compare(predictor, PROMPTS, RUNS, repeats=2, **LENGTHS)
    changing = ("seconds", "times", "memory", "per_second", "loop_share")
    for ours, theirs in zip(third.rows(), fresh, strict=True):
        kept = [name for name in ours if not any(word in name for word in changing)]
        assert {name: ours[name] for name in kept} == {name: theirs[name] for name in kept}


def test_only_what_something_changed_for_is_decoded_again(predictor, tmp_path):
    settings = {"folder": tmp_path, **LENGTHS}
    finish(Comparison(predictor, PROMPTS, RUNS, **settings))
    runs = [*RUNS[:2], Run("threshold", {"threshold": 0.4}), Run("threshold", batch_size=1)]
    assert finish(Comparison(predictor, PROMPTS, runs, **settings)) == [("threshold 0.4", 0), ("threshold batch 1", 0)]
    renamed = [Run("full_step", label="one token a step"), *RUNS[1:]]
    assert finish(Comparison(predictor, PROMPTS, renamed, **settings)) == []
    assert len(finish(Comparison(predictor, PROMPTS[:2], RUNS, **settings))) == 3
    assert len(finish(Comparison(predictor, PROMPTS, RUNS, **settings | {"block_length": 4}))) == 3


def test_decodes_with_a_network_that_is_not_saved_are_kept_for_its_weights(predictor, tmp_path):
    # While a filter is being fitted: an interrupted fit must neither decode all again nor take another filter's decodes.
    config = FilterConfig(
        block_length=8, gen_length=16, threshold=0.5, vocab_size=predictor.vocab_size, mask_id=predictor.ids.mask,
        base_fingerprint=predictor.fingerprint,
    )  # fmt: skip
    net = build_filter(config).eval()
    runs = [Run("full_step"), Run("learn2pd", {"threshold": 0.5})]

    def comparison():
        strategy = make_strategy("learn2pd", network=net, config=config, threshold=0.5)
        return Comparison(predictor, PROMPTS, runs, strategies={runs[1].label: strategy}, folder=tmp_path, **LENGTHS)

    finish(comparison())
    again = comparison()
    assert not list(again.work())
    full, learned = again.rows()
    assert 0 < learned["component"]["share_of_forward"] < 1  # the decode measured it, and kept it
    assert learned["component"]["milliseconds"] * learned["forward_calls"] < 1000 * learned["loop_seconds"]
    assert "component" not in full
    with torch.no_grad():
        next(net.parameters()).add_(0.01)
    assert list(comparison().work()) == [(1, 0)]


def test_another_machine_code_or_chat_template_is_decoded_anew(predictor, tmp_path, monkeypatch):
    settings = {"folder": tmp_path / "decodes", **LENGTHS}

    def decoded():
        return len(finish(Comparison(predictor, PROMPTS, RUNS, **settings)))

    assert (decoded(), decoded()) == (3, 0)
    with monkeypatch.context() as patch:
        known = environment()
        patch.setattr("eval.compare.environment", lambda: known | {"threads": known["threads"] + 1})
        assert (decoded(), decoded()) == (3, 0)
    (tmp_path / "code").mkdir()
    with monkeypatch.context() as patch:
        for text in ("one", "another"):
            (tmp_path / "code" / "loop.py").write_text(text)
            patch.setattr("eval.compare.decoding", SimpleNamespace(__path__=[str(tmp_path / "code")]))
            assert (decoded(), decoded()) == (3, 0)
    with monkeypatch.context() as patch:
        patch.setattr(predictor.tokenizer, "chat_template", predictor.tokenizer.chat_template + " ")
        assert (decoded(), decoded()) == (3, 0)
    assert decoded() == 0


def test_prompts_are_decoded_as_they_are_where_there_is_no_chat_template(tiny_checkpoint, tmp_path):
    predictor = MaskPredictor.from_pretrained(tiny_checkpoint)
    settings = {"folder": tmp_path, "chat_template": False, **LENGTHS}
    finish(Comparison(predictor, PROMPTS, RUNS, **settings | {"chat_template": True}))
    predictor.tokenizer.chat_template = None
    assert len(finish(Comparison(predictor, PROMPTS, RUNS, **settings))) == 3
    with pytest.raises(InputError, match="chat_template: found a tokenizer without one"):
        Comparison(predictor, PROMPTS, RUNS, **LENGTHS)


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_decode_is_named(predictor, tmp_path, damage):
    # A flipped bit would be another token, and nobody would know.
    finish(Comparison(predictor, PROMPTS, RUNS, folder=tmp_path, **LENGTHS))
    file = next(tmp_path.glob("threshold-*"))
    content = bytearray(file.read_bytes())
    if damage == "cut":
        del content[-20:]
    else:
        content[-20] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match=f"{file.name}: .*delete the file"):
        finish(Comparison(predictor, PROMPTS, RUNS, folder=tmp_path, **LENGTHS))


def test_a_warm_up_measures_memory_and_leaves_the_result_alone(predictor):
    plain = Comparison(predictor, PROMPTS, RUNS, batch_size=2, **LENGTHS)
    warm = Comparison(predictor, PROMPTS, RUNS, batch_size=2, warm_up=True, **LENGTHS)
    for comparison in (plain, warm):
        finish(comparison)
    for ours, theirs in zip(warm.rows(), plain.rows(), strict=True):
        assert ours["right"] == theirs["right"]
        assert ours["forward_calls"] == theirs["forward_calls"]
        assert theirs["memory"] is None
        assert ours["memory"] is None or ours["memory"]["peak"] >= ours["memory"]["before"] > 0


@dataclass
class Cut(BlockStrategy):
    """Says EoT after a few tokens, whatever the predictor says."""

    after: int
    eot: int
    name = "cut"

    def decide(self, step):
        columns = torch.arange(step.evidence.token.shape[1]).expand_as(step.evidence.token)
        token = torch.where(columns < self.after, step.evidence.token, self.eot)
        return Decision((columns <= self.after) & step.evidence.masked, token=token)

    def settings(self):
        return {"strategy": self.name, "after": self.after}


def test_a_strategy_that_truncates_is_seen_to_be_faster_and_worse():
    predictor = MaskPredictor.from_pretrained("models/bundled/llada-tiny")
    prompts = load_prompts([PromptSource(split="test")], split="test", limit=8)
    runs = [Run("full_step"), Run("threshold"), Run("threshold", {"threshold": 0.8}, label="cut")]
    rows = compare(predictor, prompts, runs, strategies={"cut": Cut(3, predictor.ids.eot)})
    full, threshold, cut = rows
    assert cut["nfe_mean"] == 1.0 < threshold["nfe_mean"] < full["nfe_mean"]
    assert threshold["exact_match"] == full["exact_match"] > cut["exact_match"]
    assert cut["truncated_correct_answers"] == -cut["paired_difference"]["mean"] > 0
    assert cut["tokens"] < full["tokens"] / 2
    assert full["forwards_saved_by_eot"] == 128 - full["nfe_mean"] > 50
