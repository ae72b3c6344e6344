"""Loading a mask predictor: ids from the checkpoint, refusals by name."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models import LLaDAConfig, LLaDAModelLM
from models.errors import InputError
from models.filter import load_filter
from models.layers import Elementwise
from models.predictor import MaskPredictor, fingerprint
from models.tokenizer import train_tokenizer


@pytest.fixture
def folder(tmp_path):
    tokenizer = train_tokenizer(["the cat sat on 12 mats", "user\n\nassistant\n\n"] * 3, 300)
    tokenizer.save_pretrained(tmp_path)
    ids = tokenizer.get_vocab()
    torch.manual_seed(0)
    LLaDAModelLM(
        LLaDAConfig(
            d_model=16, n_layers=1, n_heads=2, mlp_hidden_size=16, vocab_size=len(tokenizer), init_std=0.3,
            mask_token_id=ids["<|mdm_mask|>"], eos_token_id=ids["<|endoftext|>"], pad_token_id=ids["<|endoftext|>"],
            max_sequence_length=77,
        )
    ).save_pretrained(tmp_path)  # fmt: skip
    return tmp_path


def change_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_ids_and_limits_come_from_the_checkpoint(folder):
    predictor = MaskPredictor.from_pretrained(folder)
    vocabulary = predictor.tokenizer.get_vocab()
    assert predictor.ids.mask == vocabulary["<|mdm_mask|>"]
    assert predictor.ids.eot == predictor.ids.pad == vocabulary["<|endoftext|>"]
    assert predictor.ids.end_of_turn == vocabulary["<|eot_id|>"]
    assert predictor.max_length == 77
    assert not predictor.model.training
    assert not any(parameter.requires_grad for parameter in predictor.model.parameters())


def test_digits_go_by_twos():
    """A number up to 99 is one token; a larger one never becomes a token of its own."""
    tokenizer = train_tokenizer(["mats 12 34 1234 7"] * 50, 320)
    assert tokenizer.tokenize("mats 12 34 1234 7")[-5:] == ["Ġ12", "Ġ34", "Ġ12", "34", "Ġ7"]


@pytest.mark.parametrize("change", ["missing", "unexpected", "mismatched"])
def test_tensors_that_do_not_fit_are_named(folder, change):
    tensors = load_file(folder / "model.safetensors")
    name = "model.transformer.blocks.0.up_proj.weight"
    if change == "missing":
        del tensors[name]
    elif change == "unexpected":
        name = "model.transformer.blocks.7.up_proj.weight"
        tensors[name] = torch.zeros(3)
    else:
        tensors[name] = torch.zeros(3, 3)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        MaskPredictor.from_pretrained(folder)


def test_truncated_weights_are_refused(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(InputError, match="safetensors"):
        MaskPredictor.from_pretrained(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bert"}, "model_type: found 'bert'; accepted: llada"),
        ({"mask_token_id": 5}, "mask_token_id: found 5"),
        ({"activation_type": "relu"}, "activation_type"),
    ],
)
def test_config_is_refused_by_field(folder, changes, message):
    change_config(folder, **changes)
    with pytest.raises(InputError, match=message):
        MaskPredictor.from_pretrained(folder)


def test_no_folder(tmp_path):
    with pytest.raises(InputError, match="base checkpoint: found .*nowhere"):
        MaskPredictor.from_pretrained(tmp_path / "nowhere")


def test_a_model_that_ignores_the_mask_is_refused(folder, monkeypatch):
    forward = LLaDAModelLM.forward

    def deaf(self, input_ids, attention_mask=None, position_ids=None, logits_at=None, **options):
        return forward(self, input_ids, None, position_ids, logits_at, **options)

    monkeypatch.setattr(LLaDAModelLM, "forward", deaf)
    with pytest.raises(InputError, match="attention_mask"):
        MaskPredictor.from_pretrained(folder)


def test_weights_go_straight_to_the_device(folder, monkeypatch):
    # Eight ranks would hold eight copies in the host's memory.
    pytest.importorskip("accelerate")
    asked, load = [], LLaDAModelLM.from_pretrained
    monkeypatch.setattr(
        LLaDAModelLM,
        "from_pretrained",
        lambda *given, **named: asked.append(named["device_map"]) or load(*given, **named),
    )
    assert MaskPredictor.from_pretrained(folder, device="cpu").device.type == "cpu"
    assert asked == [{"": torch.device("cpu")}]


def test_fingerprint_follows_the_weights(folder):
    before = fingerprint(folder)
    assert before == fingerprint(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.transformer.ln_f.weight"][0] += 1e-3
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint(folder) != before


def test_fingerprint_sees_every_byte_of_a_large_file_and_reads_it_once(tmp_path, monkeypatch):
    file = tmp_path / "model.safetensors"
    with file.open("wb") as stream:
        stream.truncate(200 << 20)
    before = fingerprint(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", None)
        assert fingerprint(tmp_path) == before
    with file.open("r+b") as stream:
        stream.seek(100 << 20)  # 36 MiB after the nearest multiple of 64
        stream.write(b"1")
    assert fingerprint(tmp_path) != before


def test_bundled_components_still_know_their_base():
    base = fingerprint(Path("models/bundled/llada-tiny"))
    assert load_filter("models/bundled/filter-llada-tiny")[1].base_fingerprint == base


def test_a_compiled_forward_is_checked_against_the_eager_one(folder, monkeypatch):
    predictor = MaskPredictor.from_pretrained(folder)
    ids, at = torch.arange(12).view(2, 6), torch.tensor([1, 7])
    positions = torch.arange(6).expand(2, 6)
    eager = predictor(ids, None, positions, at)
    predictor.compile(backend="eager")  # traced as by any backend, run by the usual kernels
    assert predictor.model.model.ops != Elementwise()
    torch.testing.assert_close(predictor(ids, None, positions, at), eager)

    monkeypatch.setattr(torch, "compile", lambda function, **_: lambda *args: function(*args) * 1.01)
    with pytest.raises(InputError, match="compile: found hidden states .* away from eager ones"):
        predictor.compile()
    torch.testing.assert_close(predictor(ids, None, positions, at), eager)


def test_what_cannot_be_compiled_here_is_one_error_and_decodes_eagerly(folder, monkeypatch, tmp_path):
    predictor = MaskPredictor.from_pretrained(folder, device="cpu")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # nothing compiled before
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    torch._dynamo.reset()
    with pytest.raises(InputError, match=r"compile: found .*; accepted: false; or a C\+\+ compiler"):
        predictor.compile()
    assert predictor.model.model.ops == Elementwise()


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="inductor needs a C++ compiler")
def test_a_really_compiled_forward(folder):
    predictor = MaskPredictor.from_pretrained(folder, compile=True)
    assert predictor.model.model.ops != Elementwise()
