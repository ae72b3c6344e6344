"""The bundled model's export."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from models.errors import InputError
from models.predictor import MaskPredictor
from train.base import export, precision
from train.base_module import BaseModule, WideMuon


@pytest.fixture
def trained(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> tuple[BaseModule, Path, Path]:
    """A module, the checkpoint `fit` would have written of it, and its tokenizer's folder."""
    settings = {
        "d_model": 32, "n_layers": 2, "n_heads": 4, "mlp_hidden_size": 64, "max_sequence_length": 128,
        "vocab_size": len(tiny_tokenizer), "rope_theta": 1e4, "learning_rate": 1e-3, "weight_decay": 0.1,
        "warmup_steps": 1, "decay_steps": 1, "compile": False,
    }  # fmt: skip
    torch.manual_seed(0)
    module = BaseModule(**settings)
    checkpoint = {"state_dict": module.state_dict(), "global_step": 5, "hyper_parameters": settings}
    torch.save(checkpoint, tmp_path / "last.ckpt")
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    return module, tmp_path / "last.ckpt", tmp_path / "tokenizer"


def test_export_gives_the_same_logits_and_the_right_ids(trained, tmp_path: Path):
    module, checkpoint, tokenizer = trained
    export(checkpoint, tokenizer, tmp_path / "out")
    export(checkpoint, tokenizer, tmp_path / "out")  # replaces the first
    predictor = MaskPredictor.from_pretrained(tmp_path / "out", device="cpu")
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        torch.testing.assert_close(predictor.model(ids).logits, module.model.eval()(ids).logits, rtol=0, atol=0)
    assert predictor.max_length == 128
    assert predictor.tokenizer is not None
    assert predictor.ids.mask == predictor.tokenizer.convert_tokens_to_ids("<|mdm_mask|>")
    assert predictor.ids.eot == predictor.ids.pad == predictor.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert "auto_map" not in (tmp_path / "out/config.json").read_text(), "would ask for remote code"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "out", "tokenizer"]


def test_export_leaves_other_folders_alone(trained, tmp_path: Path):
    _, checkpoint, tokenizer = trained
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="no exported model"):
        export(checkpoint, tokenizer, tmp_path / "out")
    assert (tmp_path / "out/thesis.tex").is_file()


def test_export_names_what_it_cannot_read(trained, tmp_path: Path):
    _, checkpoint, tokenizer = trained
    with pytest.raises(InputError, match=r"gone\.ckpt"):
        export(tmp_path / "gone.ckpt", tokenizer, tmp_path / "out")
    with pytest.raises(InputError, match="tokenizer"):
        export(checkpoint, tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wide_muon_is_pytorchs_muon_up_to_bf16(dtype: torch.dtype):
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in ((6, 4), (4, 9), (6, 4))]
    theirs = [torch.nn.Parameter(parameter.detach().clone()) for parameter in ours]
    wide = WideMuon(ours, lr=0.01, weight_decay=0.1)
    wide.dtype = dtype
    plain = torch.optim.Muon(theirs, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        wide.step()
        plain.step()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=5e-4)


def test_training_can_begin_from_an_exported_model(trained, tmp_path: Path):
    module, checkpoint, tokenizer = trained
    export(checkpoint, tokenizer, tmp_path / "out")
    settings = {**module.hparams, "start": tmp_path / "out"}
    begun = BaseModule(**settings)
    assert all(torch.equal(one, other) for one, other in zip(module.parameters(), begun.parameters(), strict=True))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"n_layers": 3}, "start: found"),
        ({"d_model": 10**9}, "weights; accepted: at most"),
        ({"n_heads": 5}, "d_model: found 32"),
    ],
)  # fmt: skip
def test_a_model_that_cannot_be_trained_is_refused(trained, tmp_path: Path, changed, message):
    module, checkpoint, tokenizer = trained
    export(checkpoint, tokenizer, tmp_path / "out")
    with pytest.raises(InputError, match=message):
        BaseModule(**{**module.hparams, "start": tmp_path / "out"} | changed)


@pytest.mark.parametrize(
    ("gpu", "instructions", "expected"),
    [(False, True, "bf16-mixed"), (False, False, "32-true"), (True, True, "bf16-mixed"), (True, False, "32-true")],
)
def test_bf16_is_chosen_only_where_it_is_not_slower(monkeypatch, gpu, instructions, expected):
    # A CPU without the instructions takes four times as long, and says nothing.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    # Emulated, every card has it, and is slow.
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or instructions
    )
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: instructions and not gpu)
    assert precision() == expected
