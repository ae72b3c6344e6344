"""What is nearly right is told what was probably meant, wherever a name is looked up."""

import sys

import pytest

from data.prompts import PromptSource, load_prompts
from decoding.config import DecodeConfig
from decoding.generate import main as generate
from decoding.strategies import make_strategy
from eval import doctor
from eval.bench import main as bench
from eval.command import command
from eval.lm.presets import resolve
from models.errors import InputError
from models.filter import FilterConfig, build_filter


@pytest.mark.parametrize(
    ("call", "meant"),
    [
        (lambda: make_strategy("treshold"), "threshold"),
        (lambda: make_strategy("full-step"), "full_step"),
        (lambda: make_strategy("threshold", treshold=0.9), "threshold"),
        (lambda: DecodeConfig(cache="duel"), "dual"),  # type: ignore[arg-type]
        (lambda: DecodeConfig(eot="commmit"), "commit"),  # type: ignore[arg-type]
        (lambda: DecodeConfig.of({"gen_lenght": 64}), "gen_length"),
        (lambda: build_filter(FilterConfig(block_length=8, features=("confidense",))), "confidence"),
        (lambda: build_filter(FilterConfig(block_length=8, architecture="conf")), "conv"),
        (lambda: load_prompts([PromptSource("bundled")], split="vaildation"), "validation"),
        (lambda: resolve("gsm8k_265", {}), "gsm8k_256"),
    ],
)
def test_the_nearest_name_is_said(call, meant):
    with pytest.raises(InputError, match=rf"accepted: .*; did you mean {meant}\?$"):
        call()


@pytest.mark.parametrize(
    ("run", "words", "meant"),
    [
        (generate, "--prompt x --strategy treshold", "did you mean threshold?"),
        (generate, "--prompt x --cache duel", "did you mean dual?"),
        (generate, "--promt x", "accepted: prompt"),
        (lambda: command(doctor.main), "--cache duel", "did you mean dual?"),
        (lambda: command(doctor.main), "--dtype bflaot16", "did you mean bfloat16?"),
        (lambda: command(doctor.main), "--bsae x", "accepted: base"),
        (lambda: command(bench, "eval/bench"), "--split tests", "did you mean test?"),
    ],
)
def test_the_command_line_says_it_in_its_one_line(run, words, meant, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["command.py", *words.split()])
    with pytest.raises(SystemExit) as stop:
        run()
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert meant in said


@pytest.mark.parametrize("found", ["'both'", 12, "1.5", None, "full_step", ["a"], "a sentence of many words"])
def test_nothing_is_guessed_where_nothing_is_near(found):
    assert "did you mean" not in str(InputError("x", found, "a number of at least 16 | full_step | 128"))
