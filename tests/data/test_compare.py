"""What the comparison counts."""

import torch

from data.compare import Run, agreement, row_of
from data.prompts import Prompt
from decoding.decoder import Generation

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
    assert labels == {"threshold 0.5", "threshold 0.9", "threshold 0.5 (EoT off)", "threshold 0.9 (EoT off)"}
