"""What a helper learns, what it is scored on, and that an interrupted training goes on as if it had not been."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from data.helper_data import HelperDataModule, TextBatch, Texts
from data.manifest import Rollouts
from models.causal_lm import scratch_model
from models.errors import InputError
from models.helper import Helper
from models.predictor import MaskPredictor
from train.folder import load_checkpoint
from train.helper import describe
from train.helper_module import HelperModule

SIZES: dict[str, Any] = {"d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "mlp_hidden_size": 64}
FRESH: dict[str, Any] = {"max_length": 64, "tie_embeddings": False, "rope_theta": 1e4, "eot_id": 1}


@pytest.fixture(scope="module")
def predictor(tiny_checkpoint: Path) -> MaskPredictor:
    return MaskPredictor.from_pretrained(tiny_checkpoint, device="cpu")


@pytest.fixture
def texts(predictor: MaskPredictor) -> Texts:
    """Prompts that tell the response apart only by their first token; every response ends with EoT."""
    generator = torch.Generator().manual_seed(3)
    ids, prompts = [], []
    for number in range(10):
        prompt = torch.tensor([20 + number, *[9] * (number % 4)])
        response = torch.randint(30, 200, (3 + number % 5,), generator=generator)
        ids.append(torch.cat([prompt, response, torch.tensor([predictor.ids.eot])]))
        prompts.append(len(prompt))
    length = np.array(list(map(len, ids)))
    return Texts(torch.cat(ids).numpy(), length.cumsum() - length, length, np.array(prompts))


def each(texts: Texts) -> list[tuple[Tensor, int]]:
    """Token ids of each text, and how many are the prompt's."""
    return [(texts[row], int(start)) for row, start in enumerate(texts.prompt)]


@pytest.fixture
def data(texts: Texts, predictor: MaskPredictor):
    def make(batch_size: int = 5) -> HelperDataModule:
        module = HelperDataModule(Path("rollouts"), batch_size=batch_size)
        module.parts = {"train": texts, "validation": texts, "test": texts}
        settings = {"eot_id": predictor.ids.eot, "gen_length": 12, "eot": "commit"}
        module.manifest = {"model_fingerprint": predictor.fingerprint, "settings": settings}
        return module

    return make


def trainer(epochs: int = 1, callbacks: list[Callback] | None = None, **settings: Any) -> Trainer:
    return Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=bool(callbacks), callbacks=callbacks,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, **settings,
    )  # fmt: skip


@pytest.fixture
def module(tiny_checkpoint: Path):
    def make(**settings: Any) -> HelperModule:
        torch.manual_seed(0)
        return HelperModule(base=str(tiny_checkpoint), **(SIZES | {"init": "embeddings"} | settings))

    return make


def batch_of(texts: Texts) -> TextBatch:
    return texts.batch(list(range(len(texts))), pad=62)


@torch.no_grad()
def test_the_response_up_to_its_first_eot_is_scored_and_nothing_else(module, predictor, texts):
    ours = module()
    ours.build(predictor)
    batch = batch_of(texts)
    logits, tokens = ours.logits(batch)
    responses = [ids[start:] for ids, start in each(texts)]
    assert torch.equal(tokens, torch.cat(responses))
    by_hand = []
    for ids, start in each(texts):  # alone, without padding
        said = ours.net(input_ids=ids[None]).logits[0]
        by_hand.append(F.cross_entropy(said[start - 1 : -1], ids[start:], reduction="none"))
    torch.testing.assert_close(ours.loss(logits, tokens), torch.cat(by_hand).mean())
    padding = torch.arange(batch.ids.shape[1]) >= batch.end[:, None]
    batch.ids[padding] = 11
    assert torch.equal(ours.logits(batch)[0], logits)


def test_an_overfitted_helper_says_its_references(module, data, texts, predictor):
    ours, run = module(learning_rate=1e-2, weight_decay=0.0, warmup_steps=5), trainer(60)
    run.fit(ours, datamodule=data())
    metrics = {name: value.item() for name, value in run.callback_metrics.items()}
    assert metrics["validation/agreement"] == 1.0
    assert 1 <= metrics["validation/perplexity"] < 1.2
    # And it does so by itself, with the cache it is decoded with.
    helper = Helper(ours.net, describe(ours, predictor, Rollouts(Path("rollouts"), data().manifest), {}))
    for ids, start in each(texts):
        said, cache = ids[:start].tolist(), helper.allocate_cache(1, len(ids))
        done = 0
        while len(said) < len(ids):
            columns = torch.arange(done, len(said))[None]
            logits = helper(torch.tensor(said)[columns], columns, cache)
            done = len(said)
            said.append(int(logits[0, -1].argmax()))
        assert said == ids.tolist()


class Stop(Callback):
    """Breaks training off in the middle of an epoch."""

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == 5:
            raise RuntimeError("pulled the plug")


@pytest.fixture
def pretrained(tmp_path: Path, predictor: MaskPredictor) -> str:
    torch.manual_seed(1)
    scratch_model(predictor.vocab_size, **SIZES, **FRESH).save_pretrained(tmp_path / "pretrained")
    return str(tmp_path / "pretrained")


@pytest.mark.parametrize("lora", [False, True])
def test_an_interrupted_fit_ends_as_if_it_had_not_been(module, data, tmp_path, pretrained, lora):
    settings = {"pretrained": pretrained, "lora_rank": 2} if lora else {}
    whole = module(**settings)
    trainer(4).fit(whole, datamodule=data())
    saved = ModelCheckpoint(tmp_path, save_last=True)
    with pytest.raises(RuntimeError, match="plug"):
        trainer(4, [saved, Stop()]).fit(module(**settings), datamodule=data())
    again = module(**settings)
    trainer(4).fit(again, datamodule=data(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    for (name, wanted), tensor in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
        torch.testing.assert_close(tensor, wanted, msg=name)


def test_lora_trains_and_keeps_nothing_but_the_adapter(module, data, tmp_path, pretrained):
    ours, run = module(pretrained=pretrained, lora_rank=2, warmup_steps=0), trainer(2)
    run.fit(ours, datamodule=data())
    untouched = scratch_model(ours.vocab_size, **SIZES, **FRESH)
    untouched.load_state_dict(type(untouched).from_pretrained(pretrained).state_dict())
    kept = {name: tensor for name, tensor in ours.net.state_dict().items() if "lora_" not in name}
    for name, tensor in kept.items():
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        assert torch.equal(tensor, untouched.state_dict()[plain]), name
    assert any(tensor.abs().sum() > 0 for name, tensor in ours.net.state_dict().items() if "lora_B" in name)
    run.save_checkpoint(tmp_path / "last.ckpt")
    assert all("lora_" in name for name in load_checkpoint(tmp_path / "last.ckpt")["state_dict"])
    # Continued over other weights, the adapter would mean nothing.
    scratch_model(ours.vocab_size, **SIZES, **FRESH).save_pretrained(pretrained)
    with pytest.raises(InputError, match="pretrained: found weights"):
        trainer(3).fit(module(pretrained=pretrained, lora_rank=2), datamodule=data(),
                       ckpt_path=tmp_path / "last.ckpt", weights_only=True)  # fmt: skip


@torch.no_grad()
def test_metrics_of_two_ranks_join_to_those_of_one(module, predictor, texts):
    # Texts differ in length: a mean of the ranks' means would be wrong.
    modules = []
    for rows in ([0, 1, 2], [3, 4, 5, 6, 7, 8, 9], list(range(10))):
        modules.append(module())
        modules[-1].build(predictor)
        modules[-1]._measure(texts.batch(rows, 62), "validation")
    for name in ("loss", "agreement"):
        one, other, whole = (ours.meters["validation"][name] for ours in modules)
        one.merge_state(other)
        torch.testing.assert_close(one.compute(), whole.compute())


def test_a_helper_starts_as_the_predictor(module, predictor):
    ours = module(init="embeddings")
    ours.build(predictor)
    wanted = predictor.model.get_input_embeddings().weight
    assert torch.equal(ours.net.get_input_embeddings().weight, wanted)
    other = module(init="none")
    other.build(predictor)
    assert not torch.equal(other.net.get_input_embeddings().weight, wanted)
    for change, message in (
        ({"d_model": 64}, "d_model"),
        ({"mlp_hidden_size": 8}, "mlp_hidden_size"),
        ({"n_kv_heads": 1}, "n_kv_heads"),
        ({"n_heads": 2, "n_kv_heads": 2}, "n_heads: found 2; accepted: 4"),
        ({"n_layers": 3}, "n_layers: found 3; accepted: at most 2"),
    ):
        with pytest.raises(InputError, match=message):
            module(**({"init": "blocks", "n_kv_heads": 4} | change)).build(predictor)


@torch.no_grad()
def test_a_copy_of_the_blocks_is_the_predictor_but_for_causality(module, predictor):
    # A wrong mapping of names would only show in the loss. A single token sees as much in both, and so does the last of
    # many where there is one layer.
    for n_layers, length in ((2, 1), (1, 10)):
        ours = module(init="blocks", n_kv_heads=4, n_layers=n_layers)
        ours.build(predictor)
        model = copy.deepcopy(predictor.model)
        model.model.transformer["blocks"] = model.model.transformer["blocks"][:n_layers]
        ids, positions = torch.arange(5, 5 + length)[None], torch.arange(length)[None]
        wanted = model(ids, position_ids=positions).logits[0, -1]
        torch.testing.assert_close(ours.net(input_ids=ids).logits[0, -1], wanted, rtol=1e-4, atol=1e-4)


class Scripted(torch.nn.Module):
    """A predictor that says the same everywhere and remembers what it was shown."""

    def __init__(self, row: Tensor) -> None:
        super().__init__()
        self.row = torch.nn.Parameter(row)

    def forward(self, ids: Tensor, attention: Tensor, positions: Tensor, at: Tensor, head: bool = True) -> Any:
        self.seen = ids, attention, at
        return SimpleNamespace(hidden_states=(self.row.expand(len(at), -1),))

    def head(self, hidden: Tensor) -> Tensor:
        return hidden.clone()


def test_the_divergence_is_from_what_apd_drafts(module, predictor, texts, data):
    ours = module(kl_weight=1.0, kl_top_k=400)
    ours.trainer = trainer()
    ours.build(predictor)
    ours.gen_length = 12
    row = torch.randn(predictor.vocab_size)
    scripted = Scripted(row)
    ours.predictor = MaskPredictor(scripted, predictor.ids, predictor.vocab_size, 64)
    batch = batch_of(texts)
    count = int((batch.end - batch.start).sum())
    said = row.masked_fill(torch.arange(len(row)) == predictor.ids.mask, -torch.inf).expand(count, -1).clone()
    said.requires_grad_()
    loss = ours.divergence(batch, said)
    assert loss.item() == pytest.approx(0, abs=1e-6)  # the same distribution
    loss.backward()
    # Left of the position the text, from there to the end of the region MASK, and nothing beyond.
    ids, attention, at = scripted.seen
    for number in range(len(batch)):
        column = int(at[number]) - number * ids.shape[1]
        assert batch.start[number] <= column < batch.end[number]
        assert torch.equal(ids[number, :column], batch.ids[number, :column])
        assert (ids[number, column:] == predictor.ids.mask).all()
        assert attention[number].sum() == batch.start[number] + 12
    assert ours.divergence(batch, torch.randn(count, len(row))) > 0.1


def test_the_frozen_predictor_stays_frozen_and_out_of_checkpoints(module, data, tmp_path):
    ours, run = module(kl_weight=0.5, warmup_steps=0), trainer(2)
    run.fit(ours, datamodule=data())
    assert run.callback_metrics["train/kl"] > 0
    assert not ours.predictor.model.training
    assert all(parameter.grad is None for parameter in ours.predictor.model.parameters())
    run.save_checkpoint(tmp_path / "last.ckpt")
    assert not [name for name in load_checkpoint(tmp_path / "last.ckpt")["state_dict"] if "predictor" in name]


def test_a_model_over_other_ids_is_refused_by_name(module, predictor, pretrained, tmp_path):
    assert predictor.tokenizer is not None
    predictor.tokenizer.save_pretrained(pretrained)
    module(pretrained=pretrained).build(predictor)  # the same ids
    file = Path(pretrained) / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = dict(zip(vocabulary, reversed(vocabulary.values()), strict=True))
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match="token ids"):
        module(pretrained=pretrained).build(predictor)


def test_rollouts_of_another_model_are_refused_by_name(module, data):
    other = data()
    other.manifest["model_fingerprint"] = "0" * 16
    with pytest.raises(InputError, match="model_fingerprint: found 0000"):
        trainer().fit(module(), datamodule=other)


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"lora_rank": 2}, "lora_rank"),
        ({"kl_weight": -1.0}, "kl_weight"),
        ({"kl_top_k": 0}, "kl_top_k"),
    ],
)
def test_a_bad_setting_is_refused_by_name(settings, field):
    with pytest.raises(InputError) as error:
        HelperModule(**settings)
    assert error.value.field == field


def test_a_cosine_needs_an_end(module, data):
    with pytest.raises(InputError, match="schedule"):
        trainer(-1).fit(module(), datamodule=data())
