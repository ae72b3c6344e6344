from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning import Trainer
from torchmetrics import Metric

from data.examples import examples
from data.filter_data import Batches, FilterBatch, FilterDataModule
from data.labels import PASSES, Records
from data.order import Shuffle
from models.errors import InputError
from models.features import Evidence
from models.predictor import token_embeddings
from train.filter_module import FilterModule, principal_components

PROMPTS = 40
SPLITS = ["test" if i % 10 == 0 else "validation" if i % 10 == 1 else "train" for i in range(PROMPTS)]


def records(rows: int = 4000, length: int = 16, seed: int = 0, everywhere: bool = False) -> Records:
    """A guess is final where its left neighbour is decoded; in the tail always. Confidence hints at it a little."""
    g = torch.Generator().manual_seed(seed)
    masked = torch.rand(rows, length, generator=g) < 0.5
    left_known = torch.ones_like(masked)
    left_known[:, 1:] = ~masked[:, :-1]
    tail = (torch.arange(length) >= length // 2).expand(rows, length)
    final = left_known | tail
    confidence = (torch.rand(rows, length, generator=g) + 0.2 * final) / 1.2
    seen = confidence if everywhere else torch.where(masked, confidence, 0.0)
    zero = torch.zeros(rows, length)
    evidence = Evidence(masked, zero.long(), seen, zero, zero, zero.long(), zero)
    number = torch.arange(rows)
    return Records(
        evidence, final, tail, prompt=number % PROMPTS, passes=number // PROMPTS % 2, block=zero[:, 0].long(),
        step=number, prompt_ids=[str(i) for i in range(PROMPTS)], splits=SPLITS,
    )  # fmt: skip


def data(given: Records, **settings) -> FilterDataModule:
    module = FilterDataModule(Path("rollouts"), **settings)
    module.records = given
    return module


def trainer(epochs: int = 1, **settings) -> Trainer:
    return Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, **settings,
    )  # fmt: skip


def fit(given: Records, epochs: int = 6, batch_size: int | None = 256, **settings):
    module, run = FilterModule(block_length=16, **settings), trainer(epochs)
    run.fit(module, datamodule=data(given, batch_size=batch_size))
    return module, {name: value.item() for name, value in run.callback_metrics.items()}


@pytest.fixture(scope="module")
def fitted():
    torch.manual_seed(0)
    return fit(records())


def test_what_a_neighbour_tells_is_learned(fitted):
    _, metrics = fitted
    assert metrics["validation/confidence_auroc_no_tail"] < 0.8
    assert metrics["validation/auroc_no_tail"] > 0.98
    assert metrics["validation/average_precision_no_tail"] > 0.98
    assert metrics["validation/precision_no_tail"] > 0.95
    assert metrics["validation/calibration_error_no_tail"] < 0.1


def test_metrics_without_the_tail_differ_from_those_with_it():
    # An untrained filter: the tail, where everything is final, makes precision look good.
    module = FilterModule(block_length=16, threshold=0.01)
    run = trainer()
    run.validate(module, datamodule=data(records()), verbose=False)
    with_tail, without = (run.callback_metrics[f"validation/precision{part}"] for part in ("", "_no_tail"))
    assert with_tail > without + 0.1


def batch(rows: int = 64) -> FilterBatch:
    module = data(records(rows * 8))
    module.setup("fit")
    return module.parts["train"].take(torch.arange(rows))


@pytest.mark.parametrize("architecture", ["conv", "block_mlp"])
def test_decoded_positions_never_influence_the_loss(architecture):
    some = batch()
    module = FilterModule(architecture, block_length=16)
    before = module.loss(module.net(some.evidence), some)
    decoded = ~some.evidence.masked
    some.final = some.final ^ decoded
    for name in ("confidence", "margin", "entropy", "previous"):
        setattr(some.evidence, name, torch.where(decoded, 0.9, getattr(some.evidence, name)))
    assert torch.equal(module.loss(module.net(some.evidence), some), before)


def test_what_full_step_commits_is_no_example():
    given = records(rows=400)
    given.passes[:] = torch.arange(400) % 4 // 3  # three states of full_step for each of the oracle
    given.block[:] = torch.arange(400)  # each the last of its block
    module = data(given)
    module.setup("fit")
    part, rows = module.parts["train"], torch.tensor([name == "train" for name in SPLITS])[given.prompt]
    masked, own = part.evidence.masked, given.passes[rows] == 0
    best = part.evidence.confidence.masked_fill(~masked, -1).argmax(1)
    dropped = masked & ~part.example
    assert dropped.sum(1)[own].eq(masked[own].any(1)).all()
    assert dropped[own].nonzero()[:, 1].equal(best[own & masked.any(1)])
    assert not dropped[~own].any()
    each = part.weight.amax(1)
    assert each[own].sum().item() == pytest.approx(each[~own].sum().item(), rel=0.02)  # the passes count alike


def test_of_equal_confidences_the_one_that_was_taken_is_no_example():
    # Of 397 states of the bundled base 7 had a confidence of 1.0 twice, and not the left one was taken.
    masked = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1], [1, 0, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]]).bool()
    prompt, which = torch.tensor([0, 0, 0, 1, 0]), torch.tensor([0, 0, 0, 0, 2])
    confidence = torch.tensor([0.5, 1.0, 1.0, 1.0]).repeat(5, 1) * masked
    fields = {"prompt": prompt, "passes": which, "block": torch.zeros(5).long(), "step": torch.tensor([0, 1, 2, 0, 1])}
    shuffled = torch.tensor([3, 1, 4, 0, 2])
    given = Records(
        Evidence(masked, torch.zeros(5, 4).long(), confidence), masked.clone(), torch.zeros(5, 4).bool(), **fields,
        prompt_ids=["a", "b"], splits=["train", "train"],
    ).take(shuffled)  # fmt: skip
    batch, _ = examples(given, "train", PASSES, 1.0)
    dropped = batch.evidence.masked & ~batch.example
    # The last of a block and of another pass: the most confident, the left one of two.
    assert dropped.nonzero().tolist() == [[0, 1], [1, 3], [2, 1], [3, 1], [4, 2]]


def test_the_tail_weighs_as_much_as_it_is_told():
    some, module = batch(), FilterModule(block_length=16)
    weight = some.weight / some.weight.amax(1, keepdim=True)
    assert weight[some.example & some.tail].unique().item() == pytest.approx(0.1)
    assert weight[some.example & ~some.tail].unique().item() == 1
    assert weight[~some.example].unique().item() == 0
    logits = module.net(some.evidence)
    p, y = logits.sigmoid(), some.final.float()
    each = -(y * p.log() + (1 - y) * (1 - p).log())
    by_hand = (each * some.weight).sum() / some.weight.sum()
    torch.testing.assert_close(module.loss(logits, some), by_hand)


def test_normalisation_comes_from_the_training_split(fitted):
    given = records()
    split = torch.tensor([SPLITS[i] == "train" for i in given.prompt])
    mean = given.evidence.confidence[split].mean()
    assert fitted[0].net.mean[0].item() == pytest.approx(mean.item(), abs=1e-5)


@torch.no_grad()
def test_metrics_of_two_ranks_join_to_those_of_one():
    # Uneven ranks: a mean of the ranks' means would be wrong.
    modules = [FilterModule(block_length=16) for _ in range(3)]
    for module, rows in zip(modules, (slice(0, 10), slice(10, 64), slice(0, 64)), strict=True):
        module.load_state_dict(modules[0].state_dict())
        module._measure(batch().take(torch.arange(64)[rows]), "validation")
    meters = [[m for m in module.meters.modules() if isinstance(m, Metric)] for module in modules]
    compared = 0
    for one, other, whole in zip(*meters, strict=True):
        if whole.update_called:
            one.merge_state(other)
            torch.testing.assert_close(one.compute(), whole.compute())
            compared += 1
    assert compared == 15


def test_the_published_network_trains_in_one_batch_and_knows_what_it_was_shown(tmp_path):
    # Decoded positions must look the same in training and in decoding.
    for everywhere in (False, True):
        module, metrics = fit(records(800, everywhere=everywhere), 2, None, architecture="block_mlp")
        assert module.net.needs_all_positions is everywhere
        assert module.config.needs_all_positions is everywhere
        module.trainer.save_checkpoint(tmp_path / "last.ckpt")
        again = FilterModule.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
        assert again.config == module.config
        assert again.net.needs_all_positions is everywhere
        assert 0 < metrics["validation/loss"] < 1


def test_splits_go_by_prompt_and_passes_by_name():
    given = records(400)
    given.evidence.token = given.prompt[:, None].expand(-1, 16) * 2 + given.passes[:, None]
    module = data(given, passes=["oracle"])
    module.setup("fit")
    for split, part in module.parts.items():
        seen = part.evidence.token[:, 0]
        assert {SPLITS[i] for i in (seen // 2).tolist()} == {split}
        assert (seen % 2 == 1).all()
    assert sum(map(len, module.parts.values())) == 200


def test_records_come_from_the_rollout_folder(monkeypatch):
    asked = []

    def opened(folder):
        settings = {"passes": ["full_step", "oracle"], "block_length": 16}
        manifest = {"settings": settings, "counts": {"steps": {"full_step": 200, "oracle": 200}}}
        return SimpleNamespace(folder=folder, digest="abc", manifest=manifest)

    monkeypatch.setattr("data.rollouts.load_records", lambda *given, **_: asked.append(given) or records(400))
    monkeypatch.setattr("data.rollouts.open_rollouts", opened)
    module = FilterDataModule(Path("rollouts"), passes=["oracle"])
    module.setup("fit")
    module.setup("validate")  # a second stage reads nothing again
    ((rollouts, passes),) = asked
    assert (rollouts.folder, passes, module.digest) == (Path("rollouts"), ["oracle"], "abc")
    assert len(module.parts["train"])


def numbered(rows: int) -> FilterBatch:
    some = torch.zeros(rows, 1)
    evidence = Evidence(**{f.name: some for f in fields(Evidence)})
    return FilterBatch(evidence, torch.arange(rows)[:, None], some, some, some)


@pytest.mark.parametrize(("rows", "ranks", "size"), [(10, 1, 4), (10, 1, None), (11, 2, 3), (5, 4, 2), (11, 3, None)])
def test_an_epoch_holds_every_record_and_ranks_take_as_many_steps(rows, ranks, size):
    def order(epoch: int) -> Shuffle:
        return Shuffle(rows, epoch)

    train = [Batches(numbered(rows), size, rank, ranks, order, lambda: 3) for rank in range(ranks)]
    seen = [[batch.final.flatten().tolist() for batch in rank] for rank in train]
    assert {len(rank) for rank in seen} == {len(train[0])}
    assert {sum(map(len, rank)) for rank in seen} == {-(-rows // ranks)}
    assert {i for rank in seen for batch in rank for i in batch} == set(range(rows))
    # Validation repeats nothing: a record counted twice would bias the metrics.
    scored = [
        i
        for rank in range(ranks)
        for b in Batches(numbered(rows), size, rank, ranks)
        for i in b.final.flatten().tolist()
    ]
    assert sorted(scored) == list(range(rows))


def test_the_order_changes_with_the_epoch_and_repeats_with_the_seed():
    module, again, other = (data(records(400), seed=seed) for seed in (1, 1, 2))
    for one in (module, again, other):
        one.setup("fit")
    places = np.arange(320)
    assert np.array_equal(module._order(0)(places), again._order(0)(places))
    assert not np.array_equal(module._order(0)(places), module._order(1)(places))
    assert not np.array_equal(module._order(0)(places), other._order(0)(places))


def test_an_epoch_of_more_records_than_memory_has_indices_for_begins_at_once():
    # A permutation of them all took 16 bytes a record, on each rank.
    class Endless:
        device = None

        def __len__(self) -> int:
            return 10**12

        def take(self, rows: torch.Tensor) -> torch.Tensor:
            return rows

    batches = iter(Batches(Endless(), 4, 1, 2, lambda epoch: Shuffle(10**12, epoch)))  # type: ignore[arg-type]
    drawn = torch.cat([next(batches) for _ in range(3)])
    assert len(drawn.unique()) == 12
    assert drawn.max() > 10**11
    scored = iter(Batches(Endless(), 4, 1, 2))  # type: ignore[arg-type]
    assert next(scored).tolist() == [1, 3, 5, 7]


@pytest.mark.parametrize(
    ("settings", "field"),
    [({"batch_size": 0}, "batch_size"), ({"tail_weight": -1.0}, "tail_weight"), ({"passes": ["greedy"]}, "passes")],
)
def test_a_bad_data_setting_is_refused_by_name(settings, field):
    with pytest.raises(InputError) as error:
        FilterDataModule(Path("rollouts"), **settings)
    assert error.value.field == field


def test_a_split_without_records_is_refused():
    given = records(400)
    given.splits = ["train"] * PROMPTS
    with pytest.raises(InputError, match="validation"):
        data(given).setup("fit")


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"features": ["colour"]}, "filter: features"),
        ({"kernel": 2}, "filter: kernel"),
        ({"architecture": "block_mlp", "features": ["entropy"]}, "features"),
        ({"embedding": 4}, "base"),
        ({"hidden": 4}, "base"),
        ({"hidden": 4, "base": "models/bundled/llada-tiny", "architecture": "block_mlp"}, "filter: hidden"),
        ({"embedding": 4, "base": "models/bundled/llada-tiny", "dropout": 1.0}, "dropout"),
        ({"embedding": 1000, "base": "models/bundled/llada-tiny"}, "embedding"),
        ({"embedding": 4, "base": "models/bundled/llada-tiny", "architecture": "block_mlp"}, "filter: embedding"),
    ],
)
def test_a_bad_network_setting_is_refused_by_name(settings, field):
    with pytest.raises(InputError) as error:
        FilterModule(**settings)
    assert error.value.field == field


def test_what_the_token_tells_is_learned(tmp_path):
    # Some words are final wherever they stand, others never: confidence says nothing about it.
    given, base = records(), "models/bundled/llada-tiny"
    words = torch.tensor([40, 41, 42, 43])
    given.evidence.text = words[torch.randint(0, 4, given.final.shape, generator=torch.Generator().manual_seed(1))]
    given.final = given.evidence.text < 42
    blind = fit(given, epochs=2)[1]
    module, metrics = fit(given, embedding=4, base=base)
    assert metrics["validation/auroc"] > 0.99
    assert blind["validation/auroc"] < 0.6
    assert module.config.vocab_size == len(module.net.embedding.weight) == len(token_embeddings(base))


def test_what_the_hidden_state_tells_is_learned():
    # Confidence says nothing; one direction of the hidden states all of it.
    given, base = records(), "models/bundled/llada-tiny"
    states = torch.randn(*given.final.shape, 192, generator=torch.Generator().manual_seed(1))
    given.final = states[..., 5] > 0
    given.evidence.hidden = (states * given.evidence.masked[..., None]).half()
    blind = fit(given, epochs=2)[1]
    module, metrics = fit(given, hidden=8, base=base)
    assert metrics["validation/auroc"] > 0.95
    assert blind["validation/auroc"] < 0.6
    assert module.config.hidden_size == 192
    module.config = replace(module.config, hidden_size=32)
    with pytest.raises(InputError, match=r"hidden: found rollouts with hidden states of 192; accepted: such of 32"):
        trainer().fit(module, datamodule=data(given))


def test_rollouts_without_hidden_states_serve_no_filter_that_reads_them():
    module = FilterModule(block_length=16, hidden=4, base="models/bundled/llada-tiny")
    with pytest.raises(InputError, match=r"hidden: found rollouts without.*roll out with rollout.hidden_states true"):
        trainer().fit(module, datamodule=data(records(400)))


def test_rollouts_without_text_serve_no_filter_that_reads_it():
    module = FilterModule(block_length=16, embedding=4, base="models/bundled/llada-tiny")
    with pytest.raises(InputError, match=r"embedding: found 4.*roll out again"):
        trainer().fit(module, datamodule=data(records(400)))


def test_principal_components_are_the_directions_of_most_variance():
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([1.0, 9.0, 0.1, 3.0])
    found = principal_components(torch.randn(5000, 4, generator=generator) * scale + 7, 2)
    assert found.shape == (5000, 2)
    assert found.std().item() == pytest.approx(1, abs=1e-4)
    assert (found[:, 0].std() / found[:, 1].std()).item() == pytest.approx(3, rel=0.05)


def test_rollouts_of_another_block_length_are_refused():
    with pytest.raises(InputError, match="block_length"):
        trainer().fit(FilterModule(block_length=32), datamodule=data(records(400)))


def test_a_loss_that_is_no_number_stops_the_run():
    # The sums of the reliability diagram ended in a traceback.
    with pytest.raises(InputError, match=r"validation/loss: found (nan|inf); accepted: a finite number"):
        fit(records(400), learning_rate=1e30)


def test_a_cosine_needs_an_end():
    with pytest.raises(InputError, match="schedule"):
        trainer(-1).fit(FilterModule(block_length=16), datamodule=data(records(400)))
