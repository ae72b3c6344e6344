"""The helper's cache, which must equal plain forwards whatever the rows did before, and its export."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from models.causal_lm import add_lora, load_causal_lm, scratch_model
from models.errors import InputError
from models.helper import Helper, HelperConfig, check_helper, load_helper, save_helper
from models.predictor import fingerprint

VOCAB = 64
CONFIG = HelperConfig(
    VOCAB, mask_id=63, eot_id=62, base_fingerprint="f" * 16, gen_length=16, eot_rule="commit", base_family="llada"
)
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def llama(kv_heads: int = 2, vocab: int = VOCAB, tie: bool = True):
    torch.manual_seed(0)
    model = scratch_model(
        vocab, d_model=32, n_layers=2, n_heads=4, n_kv_heads=kv_heads, mlp_hidden_size=64, max_length=64,
        tie_embeddings=tie, rope_theta=1e4, eot_id=min(62, vocab - 1),
    )  # fmt: skip
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data *= 8  # sharp enough that a wrong key changes the logits
    return model


def qwen2():
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=VOCAB, num_key_value_heads=2, max_position_embeddings=64, **SMALL)
    config._attn_implementation = "sdpa"
    return Qwen2ForCausalLM(config)


MODELS = {"llama": llama, "llama, no groups": lambda: llama(4), "llama, one group": lambda: llama(1), "qwen2": qwen2}


@pytest.fixture(params=list(MODELS))
def helper(request: pytest.FixtureRequest) -> Helper:
    return Helper(MODELS[request.param](), CONFIG)


def texts(count: int, length: int = 24) -> torch.Tensor:
    return torch.randint(0, VOCAB, (count, length), generator=torch.Generator().manual_seed(1))


def plain(helper: Helper, ids: torch.Tensor) -> torch.Tensor:
    """Logits of a full forward without any cache."""
    with torch.inference_mode():
        return helper.model(input_ids=ids, use_cache=False).logits


def close(ours: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)


def test_rows_at_different_depths_equal_full_forwards(helper: Helper):
    ids, cache = texts(3), helper.allocate_cache(3, 24)
    depths = torch.tensor([3, 9, 5])
    # Ragged prompts: a short row repeats its last column with the same token.
    columns = torch.minimum(torch.arange(9).expand(3, 9), depths[:, None] - 1)
    first = helper(ids.gather(1, columns), columns, cache)
    close(first, plain(helper, ids).gather(1, columns[..., None].expand(-1, -1, VOCAB)))
    columns = depths[:, None] + torch.arange(4)
    second = helper(ids.gather(1, columns), columns, cache)
    close(second, plain(helper, ids).gather(1, columns[..., None].expand(-1, -1, VOCAB)))


def test_a_rejected_draft_leaves_no_trace(helper: Helper):
    ids, cache = texts(2), helper.allocate_cache(2, 24)
    at = torch.arange(24).expand(2, 24)
    helper(ids.flip(1), at, cache)  # a draft of the whole row
    helper(ids[:, :6], at[:, :6], cache)  # of which nothing was accepted
    helper(ids.flip(1)[:, 6:20], at[:, 6:20], cache)  # another draft, rejected from column 8 on
    helper(ids[:, 6:8], at[:, 6:8], cache)
    close(helper(ids[:, 8:11], at[:, 8:11], cache), plain(helper, ids)[:, 8:11])


def test_some_rows_go_on_while_others_rest(helper: Helper):
    ids, cache = texts(4), helper.allocate_cache(4, 24)
    at = torch.arange(24).expand(4, 24)
    helper(ids[:, :5], at[:, :5], cache)
    some = torch.tensor([3, 1])
    columns = at[some, 5:8]
    close(helper(ids[some, 5:8], columns, cache, some), plain(helper, ids)[some, 5:8])
    rest = torch.tensor([0, 2])
    close(helper(ids[rest, 5:6], at[rest, 5:6], cache, rest), plain(helper, ids)[rest, 5:6])
    close(helper(ids[:, 8:9], at[:, 8:9], cache, torch.arange(4))[some], plain(helper, ids)[some, 8:9])


def test_a_moved_row_goes_on_in_its_new_place(helper: Helper):
    ids, cache = texts(3), helper.allocate_cache(3, 24)
    cache.move(2, 0)  # nothing there yet
    at = torch.arange(24).expand(3, 24)
    helper(ids[:, :5], at[:, :5], cache)
    cache.move(2, 0)
    close(helper(ids[2:, 5:8], at[2:, 5:8], cache, torch.tensor([0])), plain(helper, ids)[2:, 5:8])


def test_the_cache_is_allocated_once(helper: Helper):
    ids, cache = texts(2), helper.allocate_cache(2, 24)
    at = torch.arange(24).expand(2, 24)
    helper(ids[:, :5], at[:, :5], cache)
    before = [layer.keys.data_ptr() for layer in cache.ragged]
    helper(ids[:, 5:20], at[:, 5:20], cache)
    assert before == [layer.keys.data_ptr() for layer in cache.ragged]


def test_ids_beyond_the_vocabulary_count_as_eot():
    helper = Helper(llama(), CONFIG)
    at = torch.arange(3)[None]
    strange, known = torch.tensor([[1, 700, 2]]), torch.tensor([[1, 62, 2]])
    close(helper(strange, at, helper.allocate_cache(1, 3)), plain(helper, known))
    small = Helper(llama(vocab=40), CONFIG)
    assert small.vocab_size == 40
    close(small(known, at, small.allocate_cache(1, 3)), plain(small, torch.tensor([[1, 0, 2]])))


def test_a_cache_never_exceeds_what_the_model_was_made_for():
    with pytest.raises(InputError, match="at most 64 tokens"):
        Helper(llama(), CONFIG).allocate_cache(1, 65)
    # A sliding window would be ignored under our mask: rows may not be longer than it.
    config = MistralConfig(vocab_size=VOCAB, num_key_value_heads=2, sliding_window=16, **SMALL)
    assert Helper(MistralForCausalLM(config), CONFIG).max_length == 16


@pytest.mark.parametrize("tie", [True, False])
def test_export_gives_the_same_logits_here_and_in_transformers(tmp_path: Path, tie: bool):
    model = llama(tie=tie)
    metrics = {"validation/perplexity": 1.5, "nothing": float("nan")}
    save_helper(tmp_path / "out", model, replace(CONFIG, metrics=metrics), "# card")
    save_helper(tmp_path / "out", model, replace(CONFIG, metrics=metrics), "# card")  # replaces the first
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    helper = load_helper(tmp_path / "out", device="cpu")
    assert helper.config.metrics == {"validation/perplexity": 1.5, "nothing": None}
    wanted = plain(Helper(model, CONFIG), texts(2))
    assert torch.equal(plain(helper, texts(2)), wanted)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.inference_mode():
        assert torch.equal(theirs(texts(2)).logits, wanted)


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory):
    """A Qwen2 folder, a tuned LoRA of it, and the description of the adapter."""
    folder = tmp_path_factory.mktemp("qwen") / "source"
    qwen2().save_pretrained(folder)
    model = add_lora(load_causal_lm(folder), rank=2, alpha=8)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    config = replace(CONFIG, source=str(folder), source_fingerprint=fingerprint(folder), adapter=True)
    return folder, model.eval(), config


def test_an_adapter_gives_the_same_logits_merged_or_not(lora, tmp_path: Path):
    source, model, config = lora
    save_helper(tmp_path / "adapter", model, config, "# card")
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert names == {"helper.json", "README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert (tmp_path / "adapter/README.md").read_text() == "# card"
    with torch.inference_mode():
        wanted = model(input_ids=texts(2)).logits
        untuned = load_causal_lm(source)(input_ids=texts(2)).logits
    assert (wanted - untuned).abs().max() > 0.01
    helper = load_helper(tmp_path / "adapter")
    close(plain(helper, texts(2)), wanted)
    save_helper(tmp_path / "merged", helper.model, replace(config, adapter=False), "# card")
    close(plain(load_helper(tmp_path / "merged"), texts(2)), wanted)
    assert "peft" not in (tmp_path / "merged/config.json").read_text()


def test_an_adapter_is_refused_over_other_weights_or_incomplete(lora, tmp_path: Path):
    _, model, config = lora
    save_helper(tmp_path / "adapter", model, replace(config, source_fingerprint="0" * 16), "# card")
    with pytest.raises(InputError, match="source_fingerprint"):
        load_helper(tmp_path / "adapter")
    save_helper(tmp_path / "adapter", model, replace(config, source=str(tmp_path / "gone")), "# card")
    with pytest.raises(InputError, match=r"pretrained: found .*gone"):
        load_helper(tmp_path / "adapter")
    # An adapter whose names do not fit would be loaded with a warning and do nothing.
    from safetensors.torch import load_file, save_file

    save_helper(tmp_path / "adapter", model, config, "# card")
    file = tmp_path / "adapter/adapter_model.safetensors"
    save_file({name.replace("layers.0", "layers.7"): t for name, t in load_file(file).items()}, file)
    with pytest.raises(InputError, match=r"adapter_model.safetensors: .*layers\.[07]"):
        load_helper(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 65}, "helper: vocab_size: found 65; accepted: 64, that of the loaded model"),
        ({"mask_id": 1}, "helper: mask_id"),
        ({"eot_id": 1}, "helper: eot_id"),
        ({"base_fingerprint": "0" * 16}, "helper: base_fingerprint"),
        ({"base_family": "Dream", "vocab_size": 65}, "helper: base_family: found 'Dream'; accepted: 'llada'"),
    ],
)
def test_a_helper_of_another_vocabulary_or_model_is_refused_by_name(change, message):
    ours = {"family": "llada", "vocab_size": VOCAB, "mask_id": 63, "eot_id": 62, "fingerprint": "f" * 16}
    assert check_helper(CONFIG, **ours, gen_length=16) == []
    assert "gen_length 16, used with 32" in check_helper(CONFIG, **ours, gen_length=32)[0]
    with pytest.raises(InputError, match=message):
        check_helper(replace(CONFIG, **change), **ours, gen_length=16)


def test_a_folder_that_is_no_helper_is_refused_by_name(tmp_path: Path):
    with pytest.raises(InputError, match=r"helper folder: .*without helper.json"):
        load_helper(tmp_path)
    save_helper(tmp_path / "out", llama(), CONFIG, "# card")
    file = tmp_path / "out/helper.json"
    good = json.loads(file.read_text())
    for change, message in (
        ({"gen_length": 0}, "gen_length: found 0"),
        ({"kind": "filter"}, "kind"),
        ({"colour": 1}, "colour: found an unknown key"),
        ({"schema_version": 9}, "schema_version: found 9"),
        ({"adapter": True}, "source: found None"),
    ):
        file.write_text(json.dumps(good | change))
        with pytest.raises(InputError, match=message):
            load_helper(tmp_path / "out")
    file.write_text(json.dumps(good))
    (tmp_path / "out/model.safetensors").unlink()
    with pytest.raises(InputError, match="safetensors"):
        load_helper(tmp_path / "out")


def test_an_export_with_the_older_name_of_the_eot_rule_is_read_and_told(tmp_path: Path):
    save_helper(tmp_path / "out", llama(), replace(CONFIG, eot_rule="filter"), "# card")
    with pytest.warns(UserWarning, match=r"helper\.json: eot_rule: found 'filter', the older name of 'commit'"):
        assert load_helper(tmp_path / "out").config.eot_rule == "commit"


def test_weights_that_are_not_finite_are_not_written(tmp_path: Path):
    model = llama()
    model.model.norm.weight.data[0] = float("nan")
    with pytest.raises(InputError, match="finite"):
        save_helper(tmp_path / "out", model, CONFIG, "# card")
    assert not list(tmp_path.iterdir())


def test_an_export_leaves_other_folders_alone(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match=r"thesis\.tex"):
        save_helper(tmp_path, llama(), CONFIG, "# card")
    assert (tmp_path / "thesis.tex").is_file()


@pytest.mark.parametrize(("change", "field"), [({"n_heads": 5}, "d_model"), ({"n_kv_heads": 3}, "n_heads")])
def test_sizes_that_do_not_divide_are_refused_by_name(change, field):
    sizes = {"d_model": 32, "n_layers": 1, "n_heads": 4, "n_kv_heads": 4, "mlp_hidden_size": 8, "max_length": 8}
    with pytest.raises(InputError) as error:
        scratch_model(8, **(sizes | change), tie_embeddings=True, rope_theta=1e4, eot_id=1)
    assert error.value.field == field
