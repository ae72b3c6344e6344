"""Base models that are damaged or describe something impossible: refused by file and field, before anything is decoded."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from decoding import Decoder
from models.causal_lm import scratch_model
from models.errors import InputError
from models.predictor import MaskPredictor

HEAD = "model.transformer.ff_out.weight"


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "base"))


def load(folder: Path) -> MaskPredictor:
    return MaskPredictor.from_pretrained(folder, device="cpu")


COUNTS = ("d_model", "n_layers", "n_heads", "vocab_size", "max_sequence_length")
NUMBERS = ("rms_norm_eps", "rope_theta", "init_std")
CONFIG_CASES = [
    *((name, value) for name in COUNTS for value in (0, -1, 1.5, "4", None, math.nan, [], True)),
    *((name, value) for name in NUMBERS for value in (math.nan, math.inf, -1.0, "1", None, [], True)),
    *((name, value) for name in ("n_kv_heads", "mlp_hidden_size", "embedding_size") for value in (0, -1, "4", 1.5)),
    *((name, value) for name in ("include_bias", "include_qkv_bias", "weight_tying") for value in (2, "no", None)),
    ("rope_theta", 0), ("rms_norm_eps", 0), ("rms_norm_eps", 2.0), ("n_layers", 10**6), ("embedding_size", 5),
    ("n_heads", 3), ("n_kv_heads", 3), ("mask_token_id", -1), ("eos_token_id", "x"), ("alibi", True),
    ("model_type", 5), ("model_type", None), ("model_type", ["llada"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), CONFIG_CASES, ids=lambda value: f"{value!r:.20}")
def test_config_fields(folder: Path, name: str, value: object) -> None:
    # rms_norm_eps NaN and rope_theta 0 decode to garbage with status 0; a million layers are built for ever.
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))
    with pytest.raises(InputError, match=rf"config\.json: ({name}|d_model|n_heads): found .*; accepted: ."):
        load(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"5", b"\xff\xfe{}", b"{}"])
def test_config_files(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=r"config\.json.*: found .*; accepted: ."):
        load(folder)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite(folder: Path, value: float) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[HEAD][3, 5] = value
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=rf"{HEAD}: found values that are not finite"):
        load(folder)


@pytest.mark.parametrize("change", ["missing", "mismatched", "unexpected"])
def test_one_line_where_tensors_do_not_fit(folder: Path, change: str, capfd: pytest.CaptureFixture[str]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors |= {"x" if change == "unexpected" else HEAD: torch.zeros(2, 2)}
    if change == "missing":
        del tensors[HEAD]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=rf"safetensors: found {change} tensors"):
        load(folder)
    assert capfd.readouterr() == ("", "")


@pytest.fixture
def shards(folder: Path) -> Path:
    """A base in two files with an index, as large ones are published."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {name: f"model-0000{n % 2 + 1}-of-00002.safetensors" for n, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({k: v for k, v in tensors.items() if files[k] == file}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder


def test_a_missing_file_of_several_is_named(shards: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load(shards)
    (shards / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        InputError, match=r"index\.json: found 1 of 2 files missing: model-00002-of-00002\.safetensors;"
    ):
        load(shards)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"weight_map": 5}', '{"weight_map": {}}', '{"weight_map": {"a": 5}}']
)
def test_damaged_indices(shards: Path, content: str) -> None:
    (shards / "model.safetensors.index.json").write_text(content)
    with pytest.raises(InputError, match=r"index\.json: found .*; accepted: ."):
        load(shards)


def test_sizes_of_helpers_end() -> None:
    for sizes in ({"n_layers": 10**6}, {"d_model": 10**8}, {"mlp_hidden_size": 10**11}):
        usual = {"d_model": 8, "n_layers": 1, "n_heads": 1, "n_kv_heads": 1, "mlp_hidden_size": 8, "max_length": 8}
        with pytest.raises(InputError, match=r"found .* weights; accepted: at most"):
            scratch_model(64, **(usual | sizes), eot_id=0, tie_embeddings=False, rope_theta=1e4)


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"null", b"\xff\xfe"])
def test_tokenizer_files(folder: Path, content: bytes) -> None:
    (folder / "tokenizer.json").write_bytes(content)
    with pytest.raises(InputError, match=r"tokenizer.*: found .*; accepted: ."):
        load(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null"])
def test_tokenizer_settings(folder: Path, content: bytes) -> None:
    (folder / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(InputError, match=r"(tokenizer|chat_template).*: found .*; accepted: ."):
        Decoder.from_pretrained(folder, device="cpu").generate(["hi"], gen_length=4, block_length=4)


@pytest.mark.parametrize(
    "template",
    [
        "{{",
        "{% for %}",
        "{{ messages[9].content }}",
        "{{ raise_exception('no') }}",
        "{{ 1/0 }}",
        "hello",
        "{% for message in messages %}{{ message['role'] }}{% endfor %}",
    ],
)
def test_chat_templates(folder: Path, template: str) -> None:
    (folder / "chat_template.jinja").write_text(template)
    decoder = Decoder.from_pretrained(folder, device="cpu")
    with pytest.raises(InputError, match=r"chat_template: found .*; accepted: ."):
        decoder.generate(["hi"], gen_length=4, block_length=4)
