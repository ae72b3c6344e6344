"""Text in, text out."""

import copy
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from tokenizers import AddedToken

from decoding import Decoder, make_strategy
from decoding.decoder import cut
from decoding.text import encode
from models.errors import InputError
from models.helper import Helper

SETTINGS = {"gen_length": 16, "block_length": 8}


@pytest.fixture
def decoder(tiny_checkpoint):
    return Decoder.from_pretrained(tiny_checkpoint, "threshold", threshold=0.5)


def test_strings_messages_and_ids_decode_alike(decoder):
    text = "the cat sat"
    ids = encode(decoder.predictor.tokenizer, text)
    messages = [{"role": "user", "content": text}]
    out = decoder.generate([text, messages, ids], **SETTINGS)
    assert out.sequences.shape == (3, 16)
    assert torch.equal(out.sequences[0], out.sequences[1])
    assert torch.equal(out.sequences[0], out.sequences[2])
    assert out.nfe.shape == (3,)
    assert out.settings["strategy"] == "threshold"
    assert out.settings["steps"] == 16


def test_tokens_stop_before_the_first_eot(decoder):
    eot = decoder.predictor.ids.eot
    out = decoder.generate(["the cat", "sat on 12 mats"], **SETTINGS)
    for tokens, sequence in zip(out.tokens, out.sequences.tolist(), strict=True):
        assert eot not in tokens
        assert tokens == sequence[: len(tokens)]
        assert len(tokens) == 16 or sequence[len(tokens)] == eot


def test_more_prompts_than_the_batch_keep_their_order_and_traces(decoder):
    prompts = ["the cat", "sat", "on 12 mats the cat", "mats", "the"]
    whole = decoder.generate(prompts, batch_size=5, trace=True, **SETTINGS)
    parts = decoder.generate(prompts, batch_size=2, trace=True, **SETTINGS)
    assert torch.equal(whole.sequences, parts.sequences)
    assert torch.equal(whole.nfe, parts.nfe)
    assert parts.forward_calls > whole.forward_calls
    for row in range(5):
        assert sum(int((step.rows == row).sum()) for step in parts.trace) == parts.nfe[row]


def test_stream_ends_where_generate_does(decoder):
    prompt = "the cat sat on"
    changed = torch.zeros(16, dtype=torch.long)
    for step in decoder.stream(prompt, **SETTINGS):
        changed += step.changed[0]
        last = step.sequences[0].clone()
    assert torch.equal(last, decoder.generate([prompt], **SETTINGS).sequences[0])
    assert (changed == 1).all()  # every position is committed exactly once


def test_text_of_special_tokens_stays_text(decoder):
    tokenizer, ids = decoder.predictor.tokenizer, decoder.predictor.ids
    encoded = encode(tokenizer, "a <|mdm_mask|> and <|endoftext|> b")
    assert ids.mask not in encoded
    assert ids.eot not in encoded
    assert "<|mdm_mask|> and <|endoftext|>" in tokenizer.decode(encoded)
    plain = encode(tokenizer, "the cat sat")
    assert encoded[:2] == plain[:2]  # the template's own special tokens are still there
    assert encoded[0] == ids.bos


def test_text_of_a_special_token_without_a_role_stays_text(decoder):
    # Real checkpoints have dozens: all_special_tokens names only those that tokenizer_config.json gives a role.
    tokenizer = copy.deepcopy(decoder.predictor.tokenizer)
    tokenizer.add_tokens([AddedToken("<|fim|>", special=True)])
    assert "<|fim|>" not in tokenizer.all_special_tokens
    encoded = encode(tokenizer, "the <|fim|> cat")
    assert tokenizer.convert_tokens_to_ids("<|fim|>") not in encoded
    assert "the <|fim|> cat" in tokenizer.decode(encoded)


@pytest.mark.parametrize("prompts", [[], "one string", [""], ["  "], [[]], [[{"role": "user"}]]])
def test_prompts_are_refused_by_name(decoder, prompts):
    with pytest.raises(InputError, match=r"^(prompt|message)"):
        decoder.generate(prompts, **SETTINGS)


def test_references_must_fit(decoder):
    with pytest.raises(InputError, match=r"references: found \(1, 8\); accepted: shape \(1, 16\)"):
        decoder.generate(["the"], references=torch.zeros(1, 8, dtype=torch.long), **SETTINGS)


def test_generate_command_prints_text_and_forwards(tiny_checkpoint):
    command = [sys.executable, "decoding/generate.py", "--prompt", "the cat", "--base", str(tiny_checkpoint)]
    done = subprocess.run([*command, "--strategy", "full_step"], capture_output=True, text=True, check=True)
    assert "forwards (full_step); full_step: " in done.stdout
    assert "the same text" in done.stdout.replace("\n", " ")


def test_an_interactive_session_answers_every_line_and_outlives_one_that_is_too_long(tiny_checkpoint):
    command = [sys.executable, "decoding/generate.py", "--interactive", "--base", str(tiny_checkpoint)]
    command += ["--strategy", "threshold", "--compare", "false"]
    lines = "the cat\n\n" + "a " * 300 + "\non 12 mats\n"
    done = subprocess.run(command, input=lines, capture_output=True, text=True, check=True)
    assert done.stdout.count("forwards (threshold)") == 2
    assert done.stdout.count("prompt 0: found") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", ""], "prompt: found no text"),
        (["--prompt", "x", "--block_length", "7"], "block_length: found 7; accepted: a divisor of gen_length 128"),
        (["--prompt", "x", "--strategy", "best"], "strategy: found 'best'"),
        (["--prompt", "x", "--cache", "both"], "cache: found both; accepted: none | prefix | dual"),
        (["--prompt", "x", "--base", "/nowhere"], "base checkpoint: found '/nowhere'"),
        (["--prompt", "x", "--blok_length", "7"], "block_length"),
    ],
)
def test_bad_input_is_one_line_and_status_2(tiny_checkpoint, arguments, message):
    base = ["--base", str(tiny_checkpoint), "--strategy", "full_step"]
    command = [sys.executable, "decoding/generate.py", *base, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("name", ["full_step", "threshold", "dico", "apd"])
@pytest.mark.parametrize("cache", ["none", "dual"])
def test_a_stop_sequence_saves_forwards_and_changes_no_text(decoder, random_helper, name, cache):
    if name == "apd":
        if cache == "dual":
            pytest.skip("apd has a cache of its own")
        settings = {"vocab_size": decoder.predictor.vocab_size, "mask_id": decoder.predictor.ids.mask}
        settings |= {"eot_id": decoder.predictor.ids.eot, "base_fingerprint": decoder.predictor.fingerprint}
        helper = Helper(random_helper.model, replace(random_helper.config, **settings))
        strategy = make_strategy("apd", network=helper, mixture_weight=0.5)
    else:
        strategy = make_strategy(name)
    decoder = Decoder(decoder.predictor, strategy)
    prompts, settings = (
        ["the cat", "sat on 12 mats", "mats", "12"],
        {"gen_length": 32, "block_length": 4, "cache": cache},
    )
    whole = decoder.generate(prompts, **settings)
    stop = [text[2:4] for text in whole.text[:2]]  # what two of the rows say early on
    out = decoder.generate(prompts, stop=stop, batch_size=2, **settings)
    for ours, full in zip(out.text, whole.text, strict=True):
        assert ours == full[: min((full.find(s) for s in stop if s in full), default=None)]
    assert (out.nfe <= whole.nfe).all()
    assert (out.nfe[:2] < whole.nfe[:2]).all()
    if name != "apd":  # which is asked after every step, and steps are no fixed number of tokens
        for ours, full in zip(out.tokens[:2], whole.tokens[:2], strict=True):
            texts = [decoder.decode_text(full[: 4 * block]) for block in range(1, 9)]
            assert len(ours) == 4 * next(n for n, text in enumerate(texts, 1) if any(s in text for s in stop))
    assert out.settings["stop"] == stop
    for ours, full in zip(out.tokens, whole.tokens, strict=True):
        assert ours == full[: len(ours)]


def test_the_first_stop_sequence_cuts():
    assert cut("a b c", ["c", "b"]) == 2
    assert cut("a b c", ["d"]) is None


def test_every_prompt_is_reported_as_it_is_finished(decoder):
    seen, prompts = {}, ["on 12 mats the cat", "sat", "the"]

    def finished(index, tokens, nfe):
        assert index not in seen
        seen[index] = (tokens, nfe)

    out = decoder.generate(prompts, batch_size=2, finished=finished, **SETTINGS)
    assert seen == {n: (out.tokens[n], int(out.nfe[n])) for n in range(3)}


def test_what_a_prompt_draws_follows_its_seed_not_its_place(decoder):
    settings = {"temperature": 1.0, **SETTINGS}
    prompts = ["the cat", "sat on 12 mats", "mats"]
    whole = decoder.generate(prompts, seeds=[5, 6, 7], **settings)
    assert decoder.generate(["mats", "the cat"], seeds=[7, 5], **settings).tokens == [whole.tokens[2], whole.tokens[0]]
    assert decoder.generate(prompts, seeds=[8, 9, 10], **settings).tokens != whole.tokens
    assert decoder.generate(prompts, seeds=[0, 1, 2], **settings).tokens == decoder.generate(prompts, **settings).tokens
    with pytest.raises(InputError, match="seeds: found 1 for 3 prompts"):
        decoder.generate(prompts, seeds=[1], **settings)


def test_settings_name_the_weights(decoder):
    out = decoder.generate(["the cat"], **SETTINGS)
    assert out.settings["fingerprints"] == {"base": decoder.predictor.fingerprint}
    assert (out.settings["dtype"], out.settings["batch_size"]) == ("float32", 32)


def test_an_unknown_setting_is_named_with_the_one_that_was_meant(decoder):
    with pytest.raises(InputError, match="gen_lenght: found an unknown setting; accepted: gen_length"):
        decoder.generate(["Hello"], gen_lenght=32)
