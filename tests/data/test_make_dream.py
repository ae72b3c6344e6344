"""A Dream made of a LLaDA: the other family's code, tokenizer and shift, and the same text."""

import pytest
import torch

from data.make_dream import BUNDLED, make, make_helper, shifted
from decoding import Decoder
from models.errors import InputError
from models.predictor import MaskPredictor

PROMPTS = ["What is 3 + 4?", "Tom has 12 apples and eats 5 of them.", "9"]


@pytest.fixture(scope="module")
def dream(tmp_path_factory, tiny_checkpoint):
    folder = tmp_path_factory.mktemp("made") / "dream"
    make(tiny_checkpoint, folder)
    make(tiny_checkpoint, folder)  # replaces the first
    return folder


def test_its_logits_are_the_llada_s_one_position_further_left(make_model):
    theirs = make_model("llada", 64, 63, 62, n_kv_heads=4)
    ours = shifted(theirs)
    ids = torch.randint(0, 64, (2, 200), generator=torch.Generator().manual_seed(0))
    seen = torch.ones_like(ids)
    seen[0, :30] = 0  # padding on the left
    with torch.no_grad():
        expected, found = theirs(ids, seen).logits, ours(ids, seen).logits
    torch.testing.assert_close(found[0, 31:], expected[0, 31:], rtol=0, atol=1e-3)
    torch.testing.assert_close(found[1, 1:], expected[1, 1:], rtol=0, atol=1e-3)
    assert (found[1, 0] - expected[1, 0]).abs().max() > 0.1  # the first keeps its own output


@pytest.mark.parametrize(("strategy", "settings"), [("full_step", {}), ("threshold", {"threshold": 0.3})])
def test_it_decodes_the_same_text(dream, tiny_checkpoint, strategy, settings):
    theirs, ours = (Decoder.from_pretrained(base, strategy, **settings) for base in (tiny_checkpoint, dream))
    assert ours.predictor.family == "Dream"
    outs = [decoder.generate(PROMPTS, gen_length=24, block_length=8, eot="off") for decoder in (theirs, ours)]
    assert torch.equal(outs[0].sequences, outs[1].sequences)
    assert torch.equal(outs[0].nfe, outs[1].nfe)


def test_apd_takes_the_bundled_helper_as_published(tmp_path):
    make(BUNDLED / "llada-tiny", tmp_path / "dream")
    make_helper(BUNDLED / "helper-llada-tiny", BUNDLED / "llada-tiny", tmp_path / "helper")
    plain = Decoder.from_pretrained(
        BUNDLED / "llada-tiny", "apd", helper=BUNDLED / "helper-llada-tiny", mixture_weight=0.5
    )
    made = Decoder.from_pretrained(tmp_path / "dream", "apd", helper=tmp_path / "helper", mixture_weight=0.5)
    outs = [decoder.generate(PROMPTS[:2], gen_length=24, block_length=24) for decoder in (plain, made)]
    assert outs[0].text == outs[1].text
    assert torch.equal(outs[0].nfe, outs[1].nfe)
    narrow = Decoder.from_pretrained(
        tmp_path / "dream", "apd", helper=tmp_path / "helper", mixture_weight=0.5, kv_window=4
    )
    out = narrow.generate(PROMPTS[:2], gen_length=24, block_length=24)
    assert (out.sequences != narrow.predictor.ids.mask).all()
    with pytest.raises(InputError, match="base_family: found 'llada'; accepted: 'Dream'"):
        Decoder.from_pretrained(tmp_path / "dream", "apd", helper=BUNDLED / "helper-llada-tiny").generate(PROMPTS)


def test_fewer_heads_of_keys_are_refused_and_so_is_another_family(make_model, dream, tmp_path):
    with pytest.raises(InputError, match="n_kv_heads: found 2; accepted: 4"):
        shifted(make_model("llada", 64, 63, 62))
    with pytest.raises(InputError, match="base: found .*a DreamModel; accepted: a LLaDA"):
        make(dream, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_text_has_the_same_ids_in_both(dream, tiny_checkpoint):
    ours, theirs = (MaskPredictor.from_pretrained(base).tokenizer for base in (dream, tiny_checkpoint))
    for text in PROMPTS:
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]
        chats = [words.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False)
                 for words in (ours, theirs)]  # fmt: skip
        assert chats[0] == chats[1]
