"""Small models that every test can afford, of every family, and what they should say."""

import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from models import DreamConfig, DreamModel, LLaDAConfig, LLaDAModelLM, LLaDAMoEConfig, LLaDAMoEModelLM
from models.eot import COLUMNS, EotConfig, EotHead, save_eot
from models.predictor import MaskPredictor
from models.tokenizer import train_tokenizer

LINES = ["What is 3 + 4?", "Sort these words: pear, apple, fig", "Tom has 12 apples and eats 5 of them.", "#### 7"]


@pytest.fixture(autouse=True)
def no_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test may reach a network or leave runs behind."""
    monkeypatch.setenv("WANDB_MODE", "disabled")


def make_llada(vocab_size: int, mask: int, eot: int) -> LLaDAModelLM:
    torch.manual_seed(0)
    config = LLaDAConfig(
        d_model=32,
        n_layers=2,
        n_heads=4,
        mlp_hidden_size=64,
        max_sequence_length=256,
        vocab_size=vocab_size,
        mask_token_id=mask,
        eos_token_id=eot,
        pad_token_id=eot,
        init_std=0.3,  # sharp enough that some guesses are confident
    )
    return LLaDAModelLM(config).eval()


FAMILIES = ["llada", "Dream", "llada_moe"]


@pytest.fixture(scope="session", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Each family's ``model_type``."""
    return request.param


def random_model(family: str, vocab_size: int, mask: int, eot: int, scale: int = 1, **changes: Any) -> PreTrainedModel:
    """Two random layers of a family; ``scale`` 4 has a few hundred thousand parameters."""
    torch.manual_seed(0)
    ids = {"vocab_size": vocab_size, "mask_token_id": mask, "eos_token_id": eot, "pad_token_id": eot}
    if family == "llada":
        sizes = {"d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "mlp_hidden_size": 64, "init_std": 0.3}
        sizes |= {"max_sequence_length": 512}
    else:
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        sizes |= {"intermediate_size": 64, "initializer_range": 0.3, "max_position_embeddings": 512}
    if family == "llada_moe":
        sizes["expert_intermediate_size"] = sizes.pop("intermediate_size") // 4
        sizes |= {"num_experts": 8, "num_experts_per_tok": 3}
    sizes = {name: size * scale if "size" in name or name == "d_model" else size for name, size in sizes.items()}
    config, model = {
        "llada": (LLaDAConfig, LLaDAModelLM),
        "Dream": (DreamConfig, DreamModel),
        "llada_moe": (LLaDAMoEConfig, LLaDAMoEModelLM),
    }[family]
    made = model(config(**{**sizes, **ids, **changes})).eval()
    if family != "llada":  # fresh biases are 0 and fresh norms 1, which would hide that they are left out
        with torch.no_grad():
            for parameter in made.parameters():
                parameter += 0.2 * torch.randn_like(parameter) * (parameter.ndim == 1)
    return made


@pytest.fixture(scope="session")
def make_model() -> Callable[..., PreTrainedModel]:
    """See :func:`random_model`."""
    return random_model


@functools.cache
def official_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """What a model is saved as, in float64."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return {name: value.double() for name, value in load_file(Path(folder) / "model.safetensors").items()}


_LLADA = {
    "layer": "model.transformer.blocks.{}.", "embedding": "model.transformer.wte.weight",
    "head": "model.transformer.ff_out.weight", "norm": "model.transformer.ln_f.weight", "q": "q_proj",
    "k": "k_proj", "v": "v_proj", "o": "attn_out", "before": "attn_norm", "between": "ff_norm", "gate": "ff_proj",
    "up": "up_proj", "down": "ff_out",
}  # fmt: skip
_USUAL = {
    "layer": "model.layers.{}.", "embedding": "model.embed_tokens.weight", "head": "lm_head.weight", "norm": "model.norm.weight",
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
    "before": "input_layernorm", "between": "post_attention_layernorm", "gate": "mlp.gate_proj", "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}  # fmt: skip


def plain(model, ids, seen=None, frozen=None, fresh=None):
    """One unpadded row in float64; keys and values of positions that are not ``fresh`` are taken from ``frozen``.

    Written from the families' papers and formats, with nothing of ours but the tensors' official names.

    Returns the logits of all positions (those whose output is not fresh mean nothing) and each layer's keys and values.
    """
    w, c, kind = official_weights(model), model.config, model.config.model_type
    names = _LLADA if kind == "llada" else _USUAL
    n_heads, layers, size = (
        (c.n_heads, c.n_layers, c.d_model)
        if kind == "llada"
        else (c.num_attention_heads, c.num_hidden_layers, c.hidden_size)
    )
    width = size // n_heads
    exponent = torch.arange(0, width, 2).double() / width
    angle = torch.arange(len(ids)).double()[:, None] / c.rope_theta**exponent

    def norm(x, weight):
        return x / (x.pow(2).mean(-1, keepdim=True) + c.rms_norm_eps).sqrt() * weight

    def project(x, name):
        out = x @ w[name + ".weight"].T
        return out + w[name + ".bias"] if name + ".bias" in w else out

    def rope(x):
        a, b = x[..., : width // 2], x[..., width // 2 :]
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    def gated(x, gate, up, down):
        hidden = project(x, gate)
        return project(hidden * hidden.sigmoid() * project(x, up), down)

    def mlp(x, prefix):
        if kind != "llada_moe":
            return gated(x, *(prefix + names[part] for part in ("gate", "up", "down")))
        share, out = project(x, prefix + "mlp.gate").softmax(-1), torch.zeros_like(x)
        for token in range(len(x)):
            for expert in share[token].argsort(descending=True)[: c.num_experts_per_tok].tolist():
                parts = (f"{prefix}mlp.experts.{expert}.{part}_proj" for part in ("gate", "up", "down"))
                out[token] += share[token, expert] * gated(x[token], *parts)
        return out

    x, kept = w[names["embedding"]][ids], []
    for layer in range(layers):
        prefix = names["layer"].format(layer)
        n = norm(x, w[prefix + names["before"] + ".weight"])
        q, k, v = (project(n, prefix + names[part]).view(len(ids), -1, width) for part in "qkv")
        if kind == "llada_moe":
            q, k = norm(q, w[prefix + "self_attn.q_norm.weight"]), norm(k, w[prefix + "self_attn.k_norm.weight"])
        q, k = rope(q), rope(k)
        if frozen is not None:
            k = torch.where(fresh[:, None, None], k, frozen[layer][0])
            v = torch.where(fresh[:, None, None], v, frozen[layer][1])
        kept.append((k, v))
        k, v = (part.repeat_interleave(n_heads // part.shape[1], 1) for part in (k, v))
        score = torch.einsum("qhd,khd->hqk", q, k) / width**0.5
        score = score if seen is None else score.masked_fill(~seen, -torch.inf)
        mixed = torch.einsum("hqk,khd->qhd", score.softmax(-1), v).flatten(1)
        x = x + project(mixed, prefix + names["o"])
        n = norm(x, w[prefix + names["between"] + ".weight"])
        x = x + mlp(n, prefix)
    logits = norm(x, w[names["norm"]]) @ w.get(names["head"], w[names["embedding"]]).T
    if kind == "Dream":  # the output before a position predicts it
        logits = torch.cat((logits[:1], logits[:-1]))
    return logits, kept


@pytest.fixture(scope="session")
def plain_forward() -> Callable[..., Any]:
    """See :func:`plain`."""
    return plain


def byte_level() -> Tokenizer:
    """A byte-level BPE over a few lines."""
    words = Tokenizer(BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words.train_from_iterator(LINES * 4, trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False))
    return words


DREAM_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|beginoftext|>", "<|mask|>"]
DREAM_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_dream_tokenizer(folder: Path) -> dict[str, int]:
    """The files of Dream's tokenizer as they are published, which name code that is never run; special tokens to ids."""
    words = byte_level()
    folder.mkdir(parents=True, exist_ok=True)
    words.model.save(str(folder))
    ids = {token: words.get_vocab_size() + number for number, token in enumerate(DREAM_TOKENS)}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    described = {
        "tokenizer_class": "DreamTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "added_tokens_decoder": {str(number): {"content": token, **flags} for token, number in ids.items()},
        "bos_token": "<|beginoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>",
        "mask_token": "<|mask|>", "chat_template": DREAM_TEMPLATE,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    return json.loads((folder / "vocab.json").read_text()) | ids


MOE_TEMPLATE = (
    "{% for message in messages %}<role>HUMAN</role>{{ message['content'] }}<|role_end|>{% endfor %}"
    "{% if add_generation_prompt %}<role>ASSISTANT</role>{% endif %}"
)


def save_moe_tokenizer(folder: Path) -> dict[str, int]:
    """LLaDA-MoE's special tokens on a small vocabulary; special tokens to ids."""
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    words = PreTrainedTokenizerFast(
        tokenizer_object=byte_level(), **special, mask_token="<|mask|>", extra_special_tokens=["<|role_end|>"],
        chat_template=MOE_TEMPLATE,
    )  # fmt: skip
    words.save_pretrained(folder)
    return words.get_vocab()


def save_checkpoint(folder: Path, family: str, code: str, **changes: Any) -> Path:
    """A folder like a published one: weights, tokenizer, and code beside them that is never run.

    Args:
        folder: Where to.
        family: Its family.
        code: Name of the files of code, less what they begin with.
        **changes: Fields of the ``config.json`` as it is published, which differ from those that we write.
    """
    ids = {"Dream": save_dream_tokenizer, "llada_moe": save_moe_tokenizer}[family](folder)
    random_model(family, len(ids), ids["<|mask|>"], ids["<|endoftext|>"]).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    changes["auto_map"] = {"AutoConfig": f"configuration_{code}.Config", "AutoModel": f"modeling_{code}.Model"}
    (folder / "config.json").write_text(json.dumps(config | changes | {"rope_scaling": None}))
    for kind in ("configuration", "modeling", "tokenization"):
        (folder / f"{kind}_{code}.py").write_text("raise AssertionError('code of a checkpoint was run')\n")
    return folder


@pytest.fixture(scope="session")
def dream_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Dream in the official format. Shared: do not write into it."""
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint") / "dream", "Dream", "dream")


@pytest.fixture(scope="session")
def moe_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random LLaDA-MoE in the official format, which calls it a ``llada``. Shared: do not write into it."""
    folder = tmp_path_factory.mktemp("checkpoint") / "moe"
    return save_checkpoint(folder, "llada_moe", "lladamoe", model_type="llada", mask_token_id=None)


@pytest.fixture(scope="session")
def family_checkpoint(family: str, dream_checkpoint: Path, moe_checkpoint: Path, tiny_checkpoint: Path) -> Path:
    """The folder of each family's tiny random checkpoint, with its tokenizer."""
    return {"llada": tiny_checkpoint, "Dream": dream_checkpoint, "llada_moe": moe_checkpoint}[family]


@pytest.fixture
def tiny_llada() -> LLaDAModelLM:
    """Two random layers over 64 ids; MASK is 63, EoT and padding are 62."""
    return make_llada(64, mask=63, eot=62)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """The project's tokenizer, trained on a few lines."""
    return train_tokenizer(LINES * 4, 300)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A folder in the official format: two random layers and a tokenizer. Shared: do not write into it."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    mask, eot = tiny_tokenizer.convert_tokens_to_ids(["<|mdm_mask|>", "<|endoftext|>"])
    make_llada(len(tiny_tokenizer), mask, eot).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def head(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """A head that takes the predictor's most probable word: text is lost where EoT is less than even; at slope 0 it's even."""

    def make(predictor: MaskPredictor, slope: float = 8.0) -> dict[str, Any]:
        head = EotHead(2)
        for value in head.parameters():
            torch.nn.init.zeros_(value)
        head.linear1.weight.data[:, COLUMNS.index("here")] = torch.tensor([1.0, -1.0])
        head.linear2.weight.data[0] = torch.tensor([-slope, slope])
        config = EotConfig(
            hidden=2, gen_length=32, block_length=8, vocab_size=predictor.vocab_size, mask_id=predictor.ids.mask,
            base_fingerprint=predictor.fingerprint, base_family=predictor.family,
        )  # fmt: skip
        save_eot(tmp_path / "head", head, config, "# EoT head\n")
        return {"eot": "learned", "eot_head": tmp_path / "head"}

    return make


@pytest.fixture(scope="session")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Writes so many prompts of differing lengths, without answers, to a file."""

    def write(count: int) -> Path:
        file = tmp_path_factory.mktemp("prompts") / "sums.jsonl"
        rows = [{"prompt": f"What is {n} plus {'1' * (n % 5 + 1)}?"} for n in range(count)]
        file.write_text("\n".join(map(json.dumps, rows)))
        return file

    return write
