"""What the comparison counts."""

import pytest
import torch

from data.compare import Run, _series, agreement, compare, row_of
from data.prompts import Prompt
from decoding.decoder import Generation
from models.errors import InputError
from models.predictor import MaskPredictor

EOT = 9


def generation(sequences, nfe, text):
    sequences = torch.tensor(sequences)
    tokens = [row[: row.index(EOT) if EOT in row else None] for row in sequences.tolist()]
    return Generation(text, tokens, sequences, torch.tensor(nfe), 5, {}, None, 2.0, 1.0, {"strategy": "x"})


def test_agreement_ignores_what_follows_the_first_eot():
    ours = torch.tensor([[1, 2, EOT, 5], [1, 2, EOT, 5], [1, 2, 3, 4]])
    reference = torch.tensor([[1, 2, EOT, 7], [1, 2, 3, EOT], [1, 2, 3, 4]])
    same, share = agreement(ours, reference, EOT)
    assert same.tolist() == [True, False, True]
    assert share.tolist() == [1.0, 0.5, 1.0]


def test_tokens_count_only_up_to_the_first_eot():
    prompts = [Prompt("a", "t", "p"), Prompt("b", "t", "q")]
    out = generation([[1, EOT, EOT, EOT], [1, 2, 3, EOT]], [2, 2], ["x", "y"])
    row = row_of(Run("x"), out, prompts, out.sequences, EOT)
    assert row["tokens"] == 4
    assert row["tokens_per_forward"] == 1.0
    assert row["tokens_per_second"] == 2.0


def test_a_decode_that_truncates_is_reported_as_worse_although_it_is_faster():
    prompts = [Prompt(str(n), "gsm_symbolic", "p", answer="4") for n in range(2)]
    reference = generation([[1, 2, 4, EOT]] * 2, [4, 4], ["so #### 4"] * 2)
    cut = generation([[1, EOT, EOT, EOT]] * 2, [1, 1], ["so"] * 2)
    good = row_of(Run("x"), reference, prompts, reference.sequences, EOT)
    bad = row_of(Run("x"), cut, prompts, reference.sequences, EOT)
    assert (good["exact_match"], bad["exact_match"]) == (1.0, 0.0)
    assert (good["sequence_agreement"], bad["sequence_agreement"]) == (1.0, 0.0)
    assert bad["nfe_mean"] < good["nfe_mean"]


def test_labels_tell_runs_apart():
    labels = {Run("threshold", {"threshold": t}, eot=e).label for t in (0.5, 0.9) for e in ("off", "filter")}
    assert labels == {"threshold 0.5", "threshold 0.9", "threshold 0.5 EoT off", "threshold 0.9 EoT off"}
    assert Run("dico", {"filter": "x"}, cache="dual", batch_size=8, dtype="bfloat16").label == (
        "dico + filter dual cache batch 8 bfloat16"
    )


PROMPTS = [Prompt(str(n), "gsm_symbolic", text, answer="4") for n, text in enumerate(["the cat", "sat on", "12 mats"])]


def test_repeats_are_interleaved_and_every_length_has_its_own_reference(tiny_checkpoint):
    predictor = MaskPredictor.from_pretrained(tiny_checkpoint)
    runs = [
        Run("full_step"), Run("threshold", {"threshold": 2.0}, limit=2, batch_size=1), Run("oracle"),
        Run("full_step", gen_length=8), Run("oracle", gen_length=8, cache="dual", limit=1), Run("full_step", dtype="bfloat16"),
    ]  # fmt: skip
    order = []
    rows = compare(
        predictor, PROMPTS, runs, gen_length=16, block_length=8, repeats=2, progress=lambda label: order.append(label)
    )
    assert order == [f"{run.label} ({n} of 2)" for n in (1, 2) for run in runs]
    assert [row["prompts"] for row in rows] == [3, 2, 3, 3, 1, 3]
    assert [row["settings"]["gen_length"] for row in rows] == [16, 16, 16, 8, 8, 16]
    assert all(row["sequence_agreement"] == 1.0 for row in rows[:5])
    assert rows[1]["batch_size"] == 1
    assert rows[5]["dtype"] == "bfloat16"
    for row in rows:
        assert row["seconds"] == min(row["seconds_all"])
        assert len(row["seconds_all"]) == 2
        assert 0 < row["loop_share"] < 1


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([Run("threshold")], "runs: first of gen_length 16: found 'threshold'; accepted: full_step, uncached"),
        ([Run("full_step", cache="dual")], "accepted: full_step, uncached"),
        (
            [Run("full_step", limit=1), Run("oracle")],
            "limit of 'oracle': found None; accepted: at most the reference's 1",
        ),
        ([Run("full_step"), Run("full_step", dtype="int8")], "dtype: found 'int8'"),
    ],
)
def test_runs_are_refused_by_name(tiny_checkpoint, runs, message):
    predictor = MaskPredictor.from_pretrained(tiny_checkpoint)
    with pytest.raises(InputError, match=message):
        compare(predictor, PROMPTS, runs, gen_length=16, block_length=8)


def test_a_line_joins_runs_that_differ_in_a_value_only():
    usual = {"cache": "none", "eot": "filter"}
    names = [
        _series({"strategy": "apd", "mixture_weight": 0.5, "kv_window": None, "max_lookahead": None, **usual}),
        _series({"strategy": "apd", "mixture_weight": 0.7, "kv_window": None, "max_lookahead": None, **usual}),
        _series({"strategy": "apd", "mixture_weight": 0.7, "kv_window": 16, "max_lookahead": None, **usual}),
        _series({"strategy": "learn2pd", "filter": "x", **usual}),
        _series({"strategy": "dico", "filter": "x", **usual}),
        _series({"strategy": "full_step", "cache": "dual", "eot": "off"}),
    ]
    assert names == ["apd", "apd", "apd + kv_window", "learn2pd", "dico + filter", "full_step dual cache EoT off"]
