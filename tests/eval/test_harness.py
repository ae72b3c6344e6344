"""lm-eval over our decoders: the model, the estimate of likelihoods, the prompts, the command."""

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("lm_eval")

import lm_eval.tasks
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.tasks import TaskManager

import data.make_bundle as make_bundle
from data.prompts import PromptSource, load_prompts
from decoding.decoder import Decoder
from decoding.strategies import STRATEGIES
from decoding.text import encode, render, token_ids
from eval.command import command
from eval.harness import lm_eval_command, load_tasks, main
from eval.lm import processes
from eval.lm.answers import Answers
from eval.lm.likelihood import Pair, draw_masks, greedy_matches, log_likelihoods, mask_counts, pair_ids
from eval.lm.model import DiffusionLM
from eval.lm.presets import PRESETS, resolve
from models.causal_lm import scratch_model
from models.errors import InputError
from models.filter import FilterConfig, build_filter, save_filter
from models.helper import HelperConfig, save_helper
from models.predictor import MaskPredictor

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "eval" / "harness.py"
PROMPTS = ["What is 3 + 4?", "Sort these words: pear, apple, fig", "Tom has 12 apples."]


@pytest.fixture(scope="module")
def predictor(tiny_checkpoint: Path) -> MaskPredictor:
    return MaskPredictor.from_pretrained(tiny_checkpoint, device="cpu")


@pytest.fixture(scope="module")
def components(tmp_path_factory: pytest.TempPathFactory, predictor: MaskPredictor) -> Path:
    """A folder with a random filter and a random helper for the tiny checkpoint."""
    folder, ids = tmp_path_factory.mktemp("components"), predictor.ids
    torch.manual_seed(0)
    made_for = {"vocab_size": predictor.vocab_size, "mask_id": ids.mask, "base_fingerprint": predictor.fingerprint}
    made_for["base_family"] = predictor.family
    config = FilterConfig(block_length=8, gen_length=32, threshold=0.4, eot_rule="commit", **made_for)
    save_filter(folder / "filter", build_filter(config), config, "# random\n")
    model = scratch_model(
        predictor.vocab_size, d_model=32, n_layers=1, n_heads=4, n_kv_heads=4, mlp_hidden_size=64, max_length=256,
        tie_embeddings=True, rope_theta=1e4, eot_id=ids.eot,
    )  # fmt: skip
    save_helper(
        folder / "helper", model, HelperConfig(eot_id=ids.eot, gen_length=32, eot_rule="commit", **made_for), "#\n"
    )
    return folder


@pytest.fixture
def make_lm(tiny_checkpoint: Path):
    defaults = {"base": str(tiny_checkpoint), "device": "cpu", "gen_length": 32, "block_length": 8, "eot": "off"}
    return lambda **settings: DiffusionLM(**defaults | settings)


def generation(texts: list[str], **arguments: object) -> list[Instance]:
    return [Instance("generate_until", {}, (text, {"until": [], **arguments}), n) for n, text in enumerate(texts)]


def scoring(pairs: list[tuple[str, str]]) -> list[Instance]:
    return [Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(pairs)]


# Generation


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "oracle"])
@pytest.mark.filterwarnings("ignore:.*never fired")
def test_every_strategy_gives_the_text_of_a_plain_decode(strategy, make_lm, tiny_checkpoint, components):
    needed = {"learn2pd": {"filter": str(components / "filter")}, "apd": {"helper": str(components / "helper")}}
    given = needed.get(strategy, {})
    plain = Decoder.from_pretrained(tiny_checkpoint, strategy, device="cpu", **given)
    wanted = plain.generate(PROMPTS, gen_length=32, block_length=8, eot="off")
    lm = make_lm(strategy=strategy, **given)
    contexts = [lm.apply_chat_template([{"role": "user", "content": prompt}]) for prompt in PROMPTS]
    assert lm.generate_until(generation(contexts)) == wanted.text
    row = lm.get_model_info()["dlm_accel"]["generation"][0]
    assert row["nfe_mean"] == wanted.nfe.double().mean().item()
    assert (row["forward_calls"], row["answers"]) == (wanted.forward_calls, 3)
    # The results name every setting and weight that a decode names itself.
    kept = {name: wanted.settings[name] for name in row["settings"]}
    assert row["settings"] == kept


def test_a_learned_end_of_the_text_is_the_decoders(make_lm, tiny_checkpoint, predictor, head):
    rule = head(predictor) | {"eot_risk": 0.6}
    wanted = Decoder.from_pretrained(tiny_checkpoint, device="cpu").generate(
        PROMPTS, gen_length=32, block_length=8, **rule
    )
    lm = make_lm(**rule)
    contexts = [lm.apply_chat_template([{"role": "user", "content": prompt}]) for prompt in PROMPTS]
    assert lm.generate_until(generation(contexts)) == wanted.text
    assert lm.get_model_info()["dlm_accel"]["generation"][0]["settings"]["fingerprints"]["eot"]


def test_a_stop_sequence_ends_an_answer_and_saves_forwards(make_lm):
    lm = make_lm()
    (whole,) = lm.generate_until(generation(PROMPTS[:1]))
    stop = whole[8:11]
    assert lm.generate_until(generation(PROMPTS[:1], until=["never", stop])) == [whole[: whole.index(stop)]]
    assert lm.generate_until(generation(PROMPTS[:1], until=stop)) == [whole[: whole.index(stop)]]
    full, stopped, _ = lm.get_model_info()["dlm_accel"]["generation"]
    assert stopped["nfe_mean"] < full["nfe_mean"]
    assert stopped["settings"]["stop"] == ["never", stop]
    ids = lm.decoder.generate(PROMPTS[:1], gen_length=32, block_length=8, eot="off", chat_template=False).tokens[0]
    before = next(n for n in range(33) if len(lm.decoder.decode_text(ids[:n])) >= whole.index(stop))
    assert stopped["tokens"] == before  # what was decoded after it, in the same block, is no part of the answer


def test_an_answer_has_no_more_tokens_than_were_asked_for(make_lm):
    lm = make_lm(gen_length=None)
    long, short = (lm.generate_until(generation(PROMPTS[:1], max_gen_toks=most))[0] for most in (16, 11))
    assert long.startswith(short)
    assert len(short) < len(long)
    rows = lm.get_model_info()["dlm_accel"]["generation"]
    assert sum(row["tokens"] for row in rows) == 27


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_depend_neither_on_the_batch_nor_on_the_order(temperature, make_lm):
    asked = generation(PROMPTS, do_sample=temperature > 0, temperature=temperature)
    alone = [make_lm(strategy="threshold", batch_size=1).generate_until([request])[0] for request in asked]
    together = make_lm(strategy="threshold", batch_size=3).generate_until(asked[::-1])
    assert together[::-1] == alone


def test_a_request_that_asks_to_sample_is_sampled_anew_each_time(make_lm):
    lm = make_lm(gen_length=None)
    greedy, cold = (
        lm.generate_until(generation(PROMPTS[:1], max_gen_toks=9, **given)) for given in ({}, {"temperature": 0})
    )
    assert greedy == cold
    request = generation(PROMPTS[:1], do_sample=True, max_gen_toks=9)
    first, second = lm.generate_until(request * 2)
    assert first != second
    rows = lm.get_model_info()["dlm_accel"]["generation"]
    assert [row["settings"]["temperature"] for row in rows] == [0.0, 1.0]
    assert {row["settings"]["gen_length"] for row in rows} == {16}  # 9 tokens in whole blocks of 8
    # What the model was told goes before what the request asks for.
    greedy, told = (
        lm.generate_until(generation(PROMPTS[:1], **given))
        for lm, given in ((make_lm(), {}), (make_lm(temperature=0), {"do_sample": True, "temperature": 1.0}))
    )
    assert greedy == told


def test_what_cannot_be_honoured_is_refused_by_name(make_lm):
    lm = make_lm()
    with pytest.raises(InputError, match=r"gen_kwargs.top_p: found 0.9; accepted: until"):
        lm.generate_until(generation(PROMPTS, top_p=0.9))
    with pytest.raises(
        InputError, match=r"context: found .* tokens; accepted: at most 224: the model's 256 less gen_length 32"
    ):
        lm.generate_until(generation([*PROMPTS, "apples " * 300]))
    assert lm.get_model_info()["dlm_accel"]["generation"] == []  # nothing was decoded before the error
    for given, said in [
        ({"strategy": "oracle"}, "strategy: found 'oracle'"), ({"batch_size": "auto"}, "batch_size: found 'auto'"),
        ({"gen_length": "many"}, "gen_length: found 'many'"), ({"cache": "none", "refresh": 2}, "refresh"),
        ({"device": "cupboard"}, "device"), ({"strategy": "threshold", "tau": 1}, "threshold.tau: found an unknown setting"),
        ({"gen_length": None, "steps": 8}, "steps: found 8 without gen_length"), ({"temperature": "hot"}, "temperature"),
    ]:  # fmt: skip
        with pytest.raises(InputError, match=said):
            make_lm(**given)


def test_a_long_context_loses_its_beginning_where_that_is_allowed(make_lm):
    lm = make_lm(truncate=True)
    long = "apples " * 300 + PROMPTS[0]
    with pytest.warns(UserWarning, match="lose their beginning"):
        (text,) = lm.generate_until(generation([long]))
    ids = lm.tokenizer(long, add_special_tokens=False)["input_ids"][-224:]
    assert lm.decoder.generate([ids], gen_length=32, block_length=8, eot="off").text == [text]


def test_lm_evals_own_cache_is_fed(make_lm, tmp_path, monkeypatch):
    requests, pairs = generation(PROMPTS), scoring([("1 + 1 =", " 2")])
    first = CachingLM(make_lm(), str(tmp_path / "cache.db"))
    answers, values = first.generate_until(requests), first.loglikelihood(pairs)
    again = make_lm()
    monkeypatch.setattr(again, "decoder", None)  # whoever decodes now fails
    second = CachingLM(again, str(tmp_path / "cache.db"))
    assert second.generate_until(requests) == answers
    assert second.loglikelihood(pairs) == values


# Likelihood


def exact(predictor: MaskPredictor, pair: Pair) -> tuple[float, dict[tuple[int, ...], float]]:
    """The expectation over all masks, and each mask's sum of log-probabilities, forward by forward."""
    length, total, sums = len(pair.answer), 0.0, {}
    for count in range(1, length + 1):
        masks = list(itertools.combinations(range(length), count))
        for mask in masks:
            ids = torch.tensor([pair.prompt + pair.answer])
            at = torch.tensor([len(pair.prompt) + place for place in mask])
            wanted = ids[0, at]
            ids[0, at] = predictor.ids.mask
            logits = predictor.logits(predictor(ids, None, torch.arange(ids.shape[1])[None], at))
            sums[mask] = logits.float().log_softmax(-1).gather(1, wanted[:, None]).sum().item()
            total += sums[mask] / len(masks) / length * length / count
    return total, sums


@pytest.mark.parametrize("prompt", [[], [7, 8, 9, 10]])
def test_the_estimate_is_the_mean_over_all_masks(prompt, predictor):
    pair = Pair(prompt, [20, 21, 22, 23])
    wanted, sums = exact(predictor, pair)
    samples = 4096
    spread = max(abs(4 / len(mask) * value - wanted) for mask, value in sums.items())
    (found,) = log_likelihoods(predictor, [pair], samples=samples)
    assert abs(found - wanted) < 5 * spread / math.sqrt(samples)
    assert found != wanted  # it is an estimate: the masks were drawn


@pytest.mark.parametrize(("length", "samples"), [(4, 3), (3, 8), (2, 5)])
def test_few_draws_are_unbiased(length, samples):
    # Each mask of l tokens has probability 1 / L / C(L, l), and counts L / l: that is its mean weight.
    runs, mean = 4000, {}
    for seed in range(runs):
        masks, weights = draw_masks(length, samples, seed)
        for mask, weight in zip(masks.tolist(), weights.tolist(), strict=True):
            mean[tuple(mask)] = mean.get(tuple(mask), 0) + weight / runs
    assert len(mean) == 2**length - 1
    for mask, weight in mean.items():
        assert weight == pytest.approx(1 / math.comb(length, sum(mask)) / sum(mask), rel=0.25)


def test_counts_are_spread_evenly():
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        assert mask_counts(5, 20, generator).bincount().tolist() == [0, 4, 4, 4, 4, 4]
        assert mask_counts(100, 10, generator).diff().tolist() == [10] * 9


def test_one_token_is_exact_and_needs_one_row(predictor):
    pair = Pair([7, 8, 9], [20])
    assert len(draw_masks(1, 128, 0)[0]) == 1
    assert log_likelihoods(predictor, [pair])[0] == pytest.approx(exact(predictor, pair)[0], abs=1e-6)
    assert log_likelihoods(predictor, [Pair([7], [])]) == [0.0]


def test_a_likelihood_depends_neither_on_the_batch_nor_on_the_order(make_lm):
    pairs = [("1 + 1 =", " 2"), ("Tom has", " 12 apples and eats"), ("", "Sort these"), ("1 + 1 =", " 11")]
    alone = [make_lm(batch_size=1, mc_samples=8).loglikelihood([request])[0][0] for request in scoring(pairs)]
    together = [value for value, _ in make_lm(batch_size=7, mc_samples=8).loglikelihood(scoring(pairs)[::-1])]
    assert together[::-1] == pytest.approx(alone, abs=1e-4)
    other = make_lm(mc_samples=8, seed=1).loglikelihood(scoring(pairs))
    assert other[1][0] != pytest.approx(alone[1], abs=1e-4)


def test_the_greedy_check_is_a_decode_of_one_token_a_forward(make_lm, predictor, tiny_checkpoint):
    prompt = [7, 8, 9]
    decoder = Decoder.from_pretrained(tiny_checkpoint, device="cpu")
    answer = decoder.generate([prompt], gen_length=6, block_length=6, eot="off").sequences[0].tolist()
    pairs = [Pair(prompt, answer), Pair(prompt, [*answer[:-1], answer[-1] + 1]), Pair([7], [20, 21]), Pair([], answer)]
    assert greedy_matches(predictor, pairs) == [True, False, False, False]
    asked, not_asked = (make_lm(greedy_check=check, mc_samples=2) for check in (True, False))
    text = decoder.decode_text(answer)
    assert isinstance(asked.loglikelihood(scoring([("1 + 1 =", text)]))[0][1], bool)
    assert not_asked.loglikelihood(scoring([("1 + 1 =", text)]))[0][1] is False


def test_greedy_decoding_is_checked_where_lm_eval_reads_it(make_lm, monkeypatch):
    checked = []
    monkeypatch.setattr(
        "eval.lm.model.greedy_matches", lambda predictor, pairs, size: checked.extend(pairs) or [True] * len(pairs)
    )
    pairs = [("1 + 1 =", " 2"), ("1 + 2 =", " 3"), ("1 + 2 =", " 4"), ("1 + 3 =", " 4")]
    docs = [0, 1, 1, 2]  # the second question offers two continuations, of which the likelier is taken
    requests = [Instance("loglikelihood", {}, pair, 0, ("task", doc, 1)) for pair, doc in zip(pairs, docs, strict=True)]
    found = make_lm(mc_samples=2).loglikelihood(requests)
    assert [greedy for _, greedy in found] == [True, False, False, True]
    assert len(checked) == 2


def test_a_long_text_is_scored_in_windows(make_lm):
    lm = make_lm(mc_samples=2)
    short, long = "Tom has 12 apples", "Tom has 12 apples. " * 75
    ids = token_ids(lm.tokenizer, long)
    assert 510 < len(ids) < 765  # two whole windows and one that is shorter, which sees as much as fits
    windows = [Pair([], ids[:255]), Pair([ids[254]], ids[255:510]), Pair(ids[-256:510], ids[510:])]
    requests = [Instance("loglikelihood_rolling", {}, (text,), n) for n, text in enumerate([short, long, ""])]
    found = lm.loglikelihood_rolling(requests)
    assert found[0] == pytest.approx(lm.loglikelihood(scoring([("", short)]))[0][0], abs=1e-4)
    assert found[1] == pytest.approx(sum(log_likelihoods(lm.decoder.predictor, windows, samples=2)), rel=1e-4)
    assert found[2] == 0


# Prompts


HISTORIES = [
    [{"role": "user", "content": "What is 3 + 4?"}],
    [{"role": "user", "content": "  Is <|mdm_mask|> a word, or <|eot_id|>?\n"}],
    [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "3 + 4"},
        {"role": "assistant", "content": "#### 7 <|endoftext|>"}, {"role": "user", "content": "Sort: pear, fig"},
    ],
]  # fmt: skip


@pytest.mark.parametrize("history", HISTORIES, ids=["plain", "special text", "turns"])
def test_a_rendered_prompt_has_the_ids_of_a_plain_decode(history, tiny_tokenizer):
    assert token_ids(tiny_tokenizer, render(tiny_tokenizer, history)) == encode(tiny_tokenizer, history)


def test_special_text_is_special_in_the_template_only(tiny_tokenizer):
    special = {
        name: tiny_tokenizer.convert_tokens_to_ids(name) for name in ("<|mdm_mask|>", "<|eot_id|>", "<|endoftext|>")
    }
    ids = token_ids(tiny_tokenizer, render(tiny_tokenizer, HISTORIES[1]))
    assert [ids.count(token) for token in special.values()] == [0, 1, 0]  # the one that closes the message
    raw = token_ids(tiny_tokenizer, "a <|mdm_mask|> b")
    assert special["<|mdm_mask|>"] not in raw
    assert tiny_tokenizer.decode(raw) == "a <|mdm_mask|> b"
    # A message cannot bring marks of its own.
    sly = [{"role": "user", "content": "\ue000<|mdm_mask|>\ue000"}]
    assert special["<|mdm_mask|>"] not in token_ids(tiny_tokenizer, render(tiny_tokenizer, sly))


def test_the_beginning_of_an_answer_stays_open(tiny_tokenizer):
    question, begun = {"role": "user", "content": "3 + 4"}, {"role": "assistant", "content": "#### <|eot_id|> "}
    text = render(tiny_tokenizer, [question, begun], add_generation_prompt=False)
    plain = tiny_tokenizer("#### <|eot_id|> ", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert token_ids(tiny_tokenizer, text) == encode(tiny_tokenizer, [question]) + plain
    prompt, answer = pair_ids(tiny_tokenizer, text, "7")
    assert tiny_tokenizer.decode(answer) == " 7"
    assert token_ids(tiny_tokenizer, text + "7") == prompt + answer


def test_a_continuation_is_what_the_whole_has_more_than_its_context(tiny_tokenizer):
    for context, continuation in [("Tom has", " 12 apples"), ("Tom has ", "12 apples"), ("", "Tom has"), ("Tom", "s")]:
        prompt, answer = pair_ids(tiny_tokenizer, context, continuation)
        assert prompt == token_ids(tiny_tokenizer, context.rstrip())
        assert prompt + answer == token_ids(tiny_tokenizer, context + continuation)
    rendered = render(tiny_tokenizer, HISTORIES[0])
    assert pair_ids(tiny_tokenizer, rendered, "7") == (
        token_ids(tiny_tokenizer, rendered),
        token_ids(tiny_tokenizer, "7"),
    )


def test_bos_goes_before_raw_prompts_on_request(make_lm):
    lm = make_lm(add_bos=True, mc_samples=2)
    bos = lm.decoder.predictor.ids.bos
    assert lm._jobs(generation(["3 + 4"]))[0].prompt == [bos, *token_ids(lm.tokenizer, "3 + 4")]
    rendered = lm.apply_chat_template(HISTORIES[0])
    assert lm._jobs(generation([rendered]))[0].prompt == encode(lm.tokenizer, HISTORIES[0])
    wanted = log_likelihoods(lm.decoder.predictor, [Pair([bos], token_ids(lm.tokenizer, "3 + 4"))], samples=2)
    assert [lm.loglikelihood(scoring([("", "3 + 4")]))[0][0]] == pytest.approx(wanted)


# Answers that are kept


def test_a_line_that_was_being_written_is_lost_alone(tmp_path):
    cost = {"tokens": 1, "nfe": 2}
    answers = Answers(tmp_path)
    answers.add({"a": {"text": "über"} | cost, "b": {"text": "\u2028"} | cost})
    with answers.file.open("a") as stream:
        stream.write('{"key": "c", "te')
    other = Answers(tmp_path, rank=1)  # another process reads what is whole
    assert other["a"] == {"text": "über"} | cost
    assert "c" not in other
    again = Answers(tmp_path)
    again.add({"c": {"text": "whole"} | cost})
    assert Answers(tmp_path)["c"] == {"text": "whole"} | cost
    (tmp_path / "answers-rank2.jsonl").write_text("[1]\n")
    with pytest.raises(InputError, match="answers-rank2.jsonl: line 1"):
        Answers(tmp_path)


def test_other_settings_never_reuse_an_answer(make_lm, tmp_path):
    requests, pairs = generation(PROMPTS), scoring([("Tom has", " 12 apples")])
    settings = [{"strategy": "full_step"}, {"strategy": "threshold"}, {"strategy": "threshold", "threshold": 0.5},
                {"eot": "commit"}, {"gen_length": 16}, {"cache": "dual"}, {"dtype": "bfloat16"}, {"mc_samples": 2}]  # fmt: skip
    for given in settings:
        lm = make_lm(answers=tmp_path, **given)
        lm.generate_until(requests)
        lm.loglikelihood(pairs)
        info = lm.get_model_info()["dlm_accel"]
        new = "mc_samples" not in given  # which a decode does not depend on
        assert info["generation"][0]["reused"] == (0 if new else 3), given
        assert info["likelihood"][0]["reused"] == (0 if given in (settings[0], *settings[6:]) else 1), given


def test_answers_of_other_code_are_not_reused(make_lm, tmp_path):
    for changed, reused in ((False, 0), (True, 0), (False, 3)):
        lm = make_lm(answers=tmp_path)
        lm.code = f"not {lm.code}" if changed else lm.code
        lm.generate_until(generation(PROMPTS))
        assert lm.get_model_info()["dlm_accel"]["generation"][0]["reused"] == reused


def test_an_interrupted_run_goes_on_where_it_was(make_lm, tmp_path, monkeypatch):
    prompts = [f"What is {n} + 4?" for n in range(6)]
    add, kept, decoded = Answers.add, [], []

    def interrupted(self, records):
        add(self, records)
        kept.extend(records)
        if len(kept) == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Answers, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make_lm(answers=tmp_path, batch_size=3).generate_until(generation(prompts))
    generate = Decoder.generate

    def counted(self, given, **settings):
        decoded.append(len(given))
        return generate(self, given, **settings)

    monkeypatch.setattr(Decoder, "generate", counted)
    lm = make_lm(answers=tmp_path, batch_size=2)
    found = lm.generate_until(generation(prompts))
    assert decoded == [2]
    monkeypatch.setattr(Decoder, "generate", generate)
    whole = make_lm()
    assert found == whole.generate_until(generation(prompts))
    ours, theirs = (model.get_model_info()["dlm_accel"]["generation"][0] for model in (lm, whole))
    assert (ours["reused"], theirs["reused"]) == (4, 0)
    assert all(ours[name] == theirs[name] for name in ("answers", "nfe_mean", "tokens", "empty_answers"))


# The command


def run(*words: object) -> None:
    command(main, args=[*map(str, words)])


def test_the_bundled_model_knows_its_tasks(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [
        "--config",
        ROOT / "configs/harness/bundled.yaml",
        "--limit",
        4,
        "--device",
        "cpu",
        "--log_samples",
        "true",
    ]
    run(*words)
    out = tmp_path / "runs/harness/bundled+short_choice-learn2pd"
    content = json.loads((out / "results.json").read_text())
    assert content["results"]["bundled"]["exact_match,final-answer"] >= 0.5  # of twelve; four in five of many
    assert content["results"]["short_choice"]["acc,none"] >= 0.75
    info = content["config"]["dlm_accel"]
    (row,) = info["generation"]
    assert row["settings"]["strategy"] == "learn2pd"
    assert set(row["settings"]["fingerprints"]) == {"base", "filter"}
    assert row["answers"] == 12
    assert 1 <= row["nfe_mean"] < 20
    assert row["seconds"] > 0
    assert info["environment"]["torch"] == torch.__version__
    assert (content["schema_version"], content["settings"]["limit"]) == (1, 4)
    samples = [json.loads(line) for line in (out / "samples_story.jsonl").read_text().split("\n")[:-1]]
    assert [sample["doc_id"] for sample in samples] == [0, 1, 2, 3]
    assert "####" not in samples[0]["filtered_resps"][0]
    assert "exact_match" in capsys.readouterr().out

    monkeypatch.setattr(Decoder, "generate", None)  # whoever decodes now fails
    run(*words)
    again = json.loads((out / "results.json").read_text())
    assert again["results"] == content["results"]
    (reused,) = again["config"]["dlm_accel"]["generation"]
    assert (reused["reused"], reused["nfe_mean"]) == (12, row["nfe_mean"])


UNSAFE = """
task: runs_code
custom_dataset: !function somewhere.load
unsafe_code: true
"""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tasks", "shortt"], "tasks: found 'shortt'; accepted: short"),
        ([], "tasks: found None; accepted: names of lm-eval's tasks, such as bundled; or a preset: gsm8k_256 |"),
        (["--preset", "gsm8k_257"], "preset: found 'gsm8k_257'; accepted: gsm8k_256 |"),
        (["--tasks", "short", "--strategy", "oracle"], "strategy: found 'oracle', which needs references"),
        (["--tasks", "short", "--strategy", "fullstep"], "strategy: found 'fullstep'; accepted: full_step |"),
        (["--tasks", "short", "--limit", "-1"], "limit: found -1; accepted: null | a number above 0, and finite"),
        (["--tasks", "short", "--devices", "0"], "devices: found 0"),
        (["--tasks", "short", "--devices", "9999", "--device", "cpu"], "devices: found 9999; accepted: at most"),
        (["--tasks", "short", "--options", '{"seed": 1}'], "options.seed: found 1; accepted: --seed"),
        (["--tasks", "short", "--startegy", "x"], "Unrecognized arguments: --startegy x; accepted: strategy"),
        (["--tasks", "short", "--apply_chat_template", "false", "--fewshot_as_multiturn", "true"], "fewshot_as_mult"),
        (["--tasks", "bundled,runs_code"], "confirm_run_unsafe_code: found false, but runs_code runs code that the model"),
        (["--tasks", "runs_code", "--confirm_run_unsafe_code", "true"], "tasks runs_code: found Cannot import module"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_nothing_is_loaded(words, said, tmp_path, monkeypatch, capsys):
    (tmp_path / "unsafe.yaml").write_text(UNSAFE)
    # lm-eval's own tasks take seconds to index.
    monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(tmp_path / "manager.py"))
    monkeypatch.setattr(MaskPredictor, "from_pretrained", None)
    with pytest.raises(SystemExit) as stop:
        run(*words, "--include_path", tmp_path, "--out", tmp_path / "out")
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert len(lines) == 1, lines
    assert said in lines[0]
    assert not (tmp_path / "out").exists()


def test_without_the_extra_one_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SystemExit) as stop:
        run("--tasks", "short")
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_preset_fixes_the_task_and_what_is_given_goes_before_it():
    assert set(PRESETS) == {f"{task}_{n}" for task in ("gsm8k", "math", "humaneval", "mbpp") for n in (256, 512, 1024)}
    nothing = dict.fromkeys(
        [
            "tasks",
            "num_fewshot",
            "gen_length",
            "block_length",
            "temperature",
            "apply_chat_template",
            "fewshot_as_multiturn",
        ]
    )
    settings, overrides = resolve("gsm8k_256", nothing)
    assert (settings["tasks"], settings["num_fewshot"], settings["gen_length"]) == ("gsm8k", 5, 256)
    assert overrides == {}
    settings, overrides = resolve("math_1024", nothing | {"num_fewshot": 0, "block_length": 32})
    assert (settings["tasks"], settings["num_fewshot"], settings["gen_length"]) == ("minerva_math", 0, 1024)
    assert overrides == {"num_fewshot": 0}  # the block length is the preset's own


def test_presets_and_their_overrides_are_recorded(tmp_path, monkeypatch):
    # A stand-in for gsm8k, which is not on this machine.
    (tmp_path / "gsm8k.yaml").write_text(
        f"include: {ROOT / 'eval/tasks/_bundled_yaml'}\ntask: gsm8k\ndataset_kwargs: {{file: short.jsonl}}\n"
        "num_fewshot: 5\n"
    )
    out = tmp_path / "out"
    run("--preset", "gsm8k_256", "--gen_length", 64, "--num_fewshot", 1, "--strategy", "threshold", "--limit", 2,
        "--device", "cpu", "--include_path", tmp_path, "--out", out)  # fmt: skip
    content = json.loads((out / "results.json").read_text())
    assert content["preset"] == "gsm8k_256"
    assert content["overrides"] == {"gen_length": 64, "num_fewshot": 1}
    assert set(content["published_metrics"]["gsm8k"]) == {"exact_match,strict-match", "exact_match,flexible-extract"}
    assert content["n-shot"] == {"gsm8k": 1}
    decode = content["config"]["dlm_accel"]["generation"][0]["settings"]
    assert (decode["gen_length"], decode["block_length"], decode["steps"], decode["temperature"]) == (64, 32, 64, 0.0)


def test_lm_evals_own_command_line_knows_the_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["harness.py"])
    lm_eval_command(
        ["--model", "dlm-accel", "--model_args", "strategy=threshold,threshold=0.8", "--tasks", "short", "--limit", "4",
         "--include_path", str(ROOT / "eval/tasks"), "--apply_chat_template", "--batch_size", "4", "--output_path", "found"]
    )  # fmt: skip
    (file,) = (tmp_path / "found").rglob("results_*.json")
    content = json.loads(file.read_text())
    assert content["results"]["short"]["exact_match,final-answer"] >= 0.5
    (row,) = content["config"]["dlm_accel"]["generation"]
    assert (row["settings"]["strategy"], row["settings"]["threshold"], row["answers"]) == ("threshold", 0.8, 4)
    assert row["settings"]["fingerprints"]["base"]
    assert "short" in capsys.readouterr().out


def test_what_lm_eval_says_of_its_arguments_is_bad_input(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["harness.py"])
    with pytest.raises(InputError, match="arguments: found .*nope.*; accepted: arguments that"):
        lm_eval_command(
            ["--model", "nope", "--tasks", "short", "--include_path", str(ROOT / "eval/tasks"), "--limit", "1"]
        )


def test_a_bug_below_lm_eval_keeps_its_traceback(monkeypatch):
    def broken():
        raise KeyError("ours")

    monkeypatch.setattr(sys, "argv", ["harness.py"])
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", broken)
    with pytest.raises(KeyError, match="ours"):
        lm_eval_command([])


def test_presets_name_tasks_of_lm_eval():
    tasks = Path(lm_eval.tasks.__file__).parent
    folders: list[str | Path] = [tasks / name for name in ("gsm8k", "minerva_math", "benchmarks", "humaneval", "mbpp")]
    known = TaskManager(include_path=folders, include_defaults=False).all_tasks  # all of them take seconds to index
    assert {preset.tasks for preset in PRESETS.values()} <= set(known)


def test_the_tasks_hold_the_bundled_test_prompts(tmp_path, monkeypatch):
    monkeypatch.setattr(make_bundle, "TASKS", tmp_path)
    make_bundle.write_tasks()
    made = {file.name: file.read_text() for file in tmp_path.iterdir()}
    assert made == {file.name: file.read_text() for file in (ROOT / "eval/tasks").glob("*.jsonl")}
    held_out = {prompt.prompt for prompt in load_prompts([PromptSource(split="test")], split="test")}
    for text in made.values():
        rows = [json.loads(line) for line in text.split("\n")[:-1]]
        assert len(rows) == 64
        assert {row["prompt"] for row in rows} <= held_out
    choices = [json.loads(line) for line in made["short_choice.jsonl"].split("\n")[:-1]]
    assert all(len(set(row["choices"])) == 4 for row in choices)
    assert {row["label"] for row in choices} == {0, 1, 2, 3}


OURS = ["--tasks", "short,short_choice", "--limit", "5", "--strategy", "threshold", "--device", "cpu"]
THEIRS = [
    "lm-eval", "--model", "dlm-accel", "--model_args", "strategy=threshold", "--tasks", "short,short_choice",
    "--include_path", str(ROOT / "eval/tasks"), "--apply_chat_template", "--limit", "5", "--device", "cpu",
    "--output_path", "out",
]  # fmt: skip
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def start(folder: Path, *words: object) -> tuple[dict, str]:
    """Results and output of a command that was run in a folder."""
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=folder, capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (file,) = (folder / "out").rglob("results*.json")
    return json.loads(file.read_text()), done.stdout


@pytest.mark.parametrize("job", [{}, {"WORLD_SIZE": "1"}, {"SLURM_NTASKS": "2", "SLURM_JOB_NAME": "bash"}])
def test_without_several_tasks_of_srun_a_process_is_alone(job, monkeypatch):
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    assert processes.join() == (0, 1)


@pytest.mark.parametrize(("seen", "device"), [(1, "cuda:0"), (4, "cuda:3")])
def test_a_task_of_srun_takes_the_one_gpu_that_it_sees(seen, device, monkeypatch):
    # With --gpus-per-task=1 each task sees one, whatever its number: there was no cuda:3.
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    monkeypatch.setattr(processes.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(processes.dist, "get_world_size", lambda: 4)
    assert processes.own_device(None) == device
    assert processes.own_device("cpu") == "cpu"


@pytest.mark.slow
def test_tasks_of_srun_find_each_other_and_their_device(tmp_path):
    code = (
        "import torch; from eval.lm import processes; torch.cuda.is_available = lambda: True; "
        "torch.cuda.device_count = lambda: 2; "
        "rank, size = processes.join(); print(rank, size, processes.own_device(None), processes.gather(rank))"
    )
    job = {
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_JOB_NAME": "train",
        "SLURM_JOB_ID": "4321",
        "SLURM_NODEID": "0",
    }
    tasks = [
        subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True,
            env=os.environ | job | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [task.communicate()[0].strip() for task in tasks]
    assert said == ["0 2 cuda:0 [0, 1]", "1 2 cuda:1 [0, 1]"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return start(tmp_path_factory.mktemp("alone"), SCRIPT, *OURS, "--out", "out")[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        [SCRIPT, *OURS, "--out", "out", "--devices", "2"],
        [*TORCHRUN, SCRIPT, *OURS, "--out", "out"],
        [*TORCHRUN, SCRIPT, *THEIRS],
    ],
    ids=["devices", "torchrun", "torchrun lm-eval"],
)
def test_two_processes_find_what_one_finds(words, alone, tmp_path):
    together, printed = start(tmp_path, *words)
    assert printed.count("short_choice|") == 1  # only the first process speaks
    for task in ("short", "short_choice"):
        assert together["results"][task] == alone["results"][task]
    one, two = (content["config"]["dlm_accel"] for content in (alone, together))
    assert (one["processes"], two["processes"]) == (1, 2)
    for name in ("answers", "nfe_mean", "tokens"):
        assert two["generation"][0][name] == one["generation"][0][name]
    assert two["likelihood"][0]["answers"] == 20


def test_examples_that_a_task_does_not_take_are_refused():
    # lm-eval ignores them, and the result would say another number than was asked for.
    task = SimpleNamespace(get_config={"num_fewshot": 0}.get)
    manager = SimpleNamespace(load=lambda names: {"tasks": {"sums": task}})
    assert load_tasks(manager, ["sums"]) == load_tasks(manager, ["sums"], 0) == [task]
    with pytest.raises(InputError, match="num_fewshot: found 2; accepted: 0 or null with sums"):
        load_tasks(manager, ["sums"], 2)
