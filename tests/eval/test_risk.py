"""A risk that the user names: measured, promised, kept."""

import json
import math
import random
import warnings

import pytest
from scipy.stats import binom

from decoding import Decoder
from decoding.risk import Calibration, load_calibration
from eval.command import command
from eval.risk import broken_promises, main, mean_bound, upper_bound
from models.errors import InputError

VALUES = [0.99, 0.95, 0.9, 0.8, 0.7, 0.5]


def calibration(bounds, **changed) -> Calibration:
    count = len(bounds)
    fields = {
        "strategy": "threshold", "options": {}, "option": "threshold", "values": VALUES[:count], "lost": [0] * count,
        "bounds": list(bounds), "nfe": [1.0] * count, "prompts": 100, "loss": "answer", "confidence": 0.95,
        "decoding": {}, "fingerprints": {},
    }  # fmt: skip
    return Calibration(**fields | changed)


@pytest.mark.parametrize(("lost", "prompts", "confidence"), [(0, 299, 0.95), (3, 512, 0.95), (40, 64, 0.9)])
def test_the_bound_is_the_share_at_which_so_few_losses_are_just_likely_enough(lost, prompts, confidence):
    bound = upper_bound(lost, prompts, confidence)
    assert binom.cdf(lost, prompts, bound) == pytest.approx(1 - confidence)
    assert upper_bound(prompts, prompts, confidence) == 1


def test_one_in_a_hundred_takes_299_prompts_without_a_loss():
    assert upper_bound(0, 299, 0.95) < 0.01 < upper_bound(0, 298, 0.95)
    assert upper_bound(0, 2995, 0.95) < 0.001 < upper_bound(0, 2994, 0.95)


@pytest.mark.parametrize(("lost", "prompts"), [(0, 100), (0.4, 100), (7.25, 512), (60, 64)])
def test_the_bound_of_a_mean_is_where_its_p_value_is_just_small_enough(lost, prompts):
    bound, mean = mean_bound(lost, prompts, 0.95), lost / prompts
    divergence = sum(a * math.log(a / b) for a, b in ((mean, bound), (1 - mean, 1 - bound)) if a)
    bentkus = math.e * binom.cdf(math.ceil(lost), prompts, bound)
    assert min(math.exp(-prompts * divergence), bentkus) == pytest.approx(0.05)
    assert mean_bound(lost + 0.01, prompts, 0.95) > bound > mean
    assert mean_bound(prompts, prompts, 0.95) == 1 >= mean_bound(prompts - 0.01, prompts, 0.95)


def test_a_mean_is_bounded_less_tightly_than_a_share_of_which_more_is_known():
    assert mean_bound(0, 299, 0.95) == pytest.approx(upper_bound(0, 299, 0.95))
    assert mean_bound(10, 512, 0.95) > upper_bound(10, 512, 0.95)


def test_settings_are_tested_from_the_safest_on_until_one_fails():
    assert calibration([0.01, 0.05, 0.01]).value(0.02) == 0.99  # the third was only lucky
    assert calibration([0.01, 0.015, 0.03]).value(0.02) == 0.95
    with pytest.raises(InputError, match=r"risk: found 0.005; accepted: at least 0.01, which 100 calibration prompts"):
        calibration([0.01, 0.001]).value(0.005)
    for risk in (0, 1, -0.1):
        with pytest.raises(InputError, match="risk: found"):
            calibration([0.01]).value(risk)


@pytest.mark.parametrize("risk", [0.02, 0.05])
def test_the_promise_is_kept_on_fresh_prompts(risk):
    # A prompt that a safer setting loses is lost by the cheaper ones too, as it nearly is in a decode.
    shares = [0.001, 0.006, 0.012, 0.024, 0.055, 0.2]
    rng, broken, naive, used = random.Random(0), 0, 0, set()
    for _ in range(200):
        hardness = [rng.random() for _ in range(600)]
        lost = [sum(h < share for h in hardness) for share in shares]
        found = calibration([upper_bound(count, 600, 0.95) for count in lost]).value(risk)
        used.add(found)
        broken += shares[VALUES.index(found)] > risk
        naive += shares[max(n for n, count in enumerate(lost) if count / 600 <= risk)] > risk
    assert broken <= 10  # 5 % of 200
    assert naive > 20  # what calibration prompts themselves show is no promise
    assert len(used) > 1


@pytest.mark.parametrize("risk", [0.02, 0.05])
def test_a_mean_share_of_tokens_is_kept_on_fresh_prompts(risk):
    # Most texts are full_step's; a few are other ones nearly from their beginning: skewed, and no binomial.
    means = [0.001, 0.008, 0.018, 0.023, 0.055, 0.2]
    rng, broken, naive, used = random.Random(1), 0, 0, set()
    for _ in range(200):
        draws = [(rng.random(), rng.betavariate(4, 1)) for _ in range(600)]
        lost = [sum(share for hard, share in draws if hard < mean / 0.8) for mean in means]  # a share is .8 in the mean
        found = calibration([mean_bound(total, 600, 0.95) for total in lost]).value(risk)
        used.add(found)
        broken += means[VALUES.index(found)] > risk
        naive += means[max(n for n, total in enumerate(lost) if total / 600 <= risk)] > risk
    assert broken <= 10  # 5 % of 200
    assert naive > 20  # the calibration prompts' own mean is no promise
    assert len(used) > 1


def test_promises_on_drawn_prompts_are_judged_on_fresh_ones():
    def rows(prompts, *counts):
        return [{"name": count, "right": "0" * count + "1" * (prompts - count)} for count in counts]

    full, fresh_full = {"right": "1" * 400}, {"right": "1" * 1000}
    known, fresh = rows(400, 0, 6, 12, 100), rows(1000, 0, 50, 51, 1000)
    broken, none, taken = broken_promises(full, known, fresh_full, fresh, 0.05)
    names = [row["name"] for row in taken]
    assert (none, set(names)) == (0, {0, 50, 51})
    assert broken == names.count(51)  # 51 of 1,000 are more than 5 %, whatever the calibration prompts say
    assert names.count(50) > 0
    assert broken_promises(full, known[3:], fresh_full, fresh[3:], 0.05) == (0, 200, [])


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "sums.jsonl"
    texts = [f"What is {a} + {b}?" for a in range(6) for b in range(4)]
    file.write_text("\n".join(json.dumps({"prompt": text}) for text in texts))
    return json.dumps([{"path": str(file)}])


def calibrate(base, prompts, folder, *more):
    words = ["--base", base, "--prompts", prompts, "--split", "null", "--gen_length", 16, "--block_length", 8]
    words += ["--strategy", "threshold", "--values", "[1.01, 0.0]", "--run", folder, "--eot", "off", *more]
    command(main, args=list(map(str, words)))
    return folder / "risk.json"


def test_a_decoder_takes_the_setting_that_is_vouched_for(tiny_checkpoint, prompts, tmp_path, capsys):
    file = calibrate(tiny_checkpoint, prompts, tmp_path / "risk", "--loss", "text")
    said = capsys.readouterr().out
    assert "threshold 1.01: 16.0 forwards, 0 lost, at most 11.73 %" in said
    assert "- below 11.7 %: no setting" in said
    found = load_calibration(file)
    assert found.prompts == 24
    assert found.lost[0] == 0 < found.lost[1]
    known = {"risk": 0.12, "calibration": file}
    decoder = Decoder.from_pretrained(tiny_checkpoint, "threshold", **known)
    assert decoder.strategy.threshold == 1.01
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = decoder.generate(["What is 1 + 1?"], gen_length=16, block_length=8, eot="off")
    assert out.settings["threshold"] == 1.01
    with pytest.warns(UserWarning, match="risk: calibrated with eot off, used with commit"):
        decoder.generate(["What is 1 + 1?"], gen_length=16, block_length=8)
    for strategy, options, message in (
        ("threshold", {"threshold": 0.5}, "risk, threshold: found 0.12, 0.5; accepted: one of them"),
        ("threshold", {"risk": 0.01}, "risk: found 0.01; accepted: at least 0.117"),
        ("threshold", {"risk": None}, "risk: found None; accepted: a share between"),
        ("threshold", {"calibration": None}, "calibration: found None; accepted: a file written by eval/risk.py"),
        ("learn2pd", {"filter": "x", "calibration": None}, "x/risk.json"),
        ("klass", {}, "risk calibration: strategy: found threshold; accepted: klass"),
    ):
        with pytest.raises(InputError, match=message):
            Decoder.from_pretrained(tiny_checkpoint, strategy, **known | options)
    content = json.loads(file.read_text())
    for change, message in (
        ({"fingerprints": {"base": "f" * 16}}, "risk calibration: fingerprints: found .*ffff"),
        ({"schema_version": 2}, "risk.json: schema_version: found 2"),
        ({"nfe": [1.0]}, "as many of each"),
        ({"surprise": 1}, "risk.json: surprise: found unknown"),
    ):
        file.write_text(json.dumps(content | change))
        with pytest.raises(InputError, match=message):
            Decoder.from_pretrained(tiny_checkpoint, "threshold", **known)


def test_a_share_of_tokens_may_be_lost(tiny_checkpoint, prompts, tmp_path, capsys):
    texts = load_calibration(calibrate(tiny_checkpoint, prompts, tmp_path / "texts", "--loss", "text"))
    file = calibrate(tiny_checkpoint, prompts, tmp_path / "tokens", "--loss", "tokens")
    assert (
        "Mean share of a text's positions that differ from full_step's, at 95 % confidence" in capsys.readouterr().out
    )
    found = load_calibration(file)
    assert found.lost[0] == 0 < found.lost[1] < texts.lost[1]  # texts that differ are equal in part
    assert found.bounds == [mean_bound(lost, 24, 0.95) for lost in found.lost]
    risk = (found.bounds[1] + texts.bounds[1]) / 2  # which the texts cannot promise
    for known, threshold in ((file, 0.0), (tmp_path / "texts/risk.json", 1.01)):
        decoder = Decoder.from_pretrained(tiny_checkpoint, "threshold", risk=risk, calibration=known)
        assert decoder.strategy.threshold == threshold
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"loss": "text"}))
    with pytest.raises(InputError, match=r"risk\.json: lost: found .*; accepted: a list of whole numbers"):
        load_calibration(file)


def test_bad_input_is_refused_before_anything_is_decoded(tiny_checkpoint, prompts, tmp_path, capsys):
    for words, message in (
        (["--strategy", "full_step"], "strategy, option, values: found full_step, None"),
        (["--values", "[]"], "found threshold, threshold, []"),
        (["--confidence", "1"], "confidence: found 1.0"),
        (["--options", '{"treshold": 1}'], "threshold.treshold: found an unknown setting"),
        (["--loss", "answer"], "prompts: found 24 of 24 without an answer"),
    ):
        with pytest.raises(SystemExit) as stop:
            calibrate(tiny_checkpoint, prompts, tmp_path / "risk", *words)
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "risk").exists()
