"""What one decode is said to cost and to be worth."""

import time

import pytest
import torch

from data import stories
from data.gym import GymTask, samples
from data.prompt import Prompt
from data.stories import StoryTask
from decoding.decoder import Generation
from eval.intervals import paired
from eval.measure import agreement, judge, measure, span, timed

EOT = 9


def generation(sequences, nfe, text, **extra):
    sequences = torch.tensor(sequences)
    tokens = [row[: row.index(EOT) if EOT in row else None] for row in sequences.tolist()]
    counts = {name: torch.tensor(value) for name, value in extra.items()}
    return Generation(text, tokens, sequences, torch.tensor(nfe), 5, counts, None, 2.0, 1.0, {"strategy": "x"})


def test_agreement_ignores_what_follows_the_first_eot():
    ours = torch.tensor([[1, 2, EOT, 5], [1, 2, EOT, 5], [1, 2, 3, 4]])
    reference = torch.tensor([[1, 2, EOT, 7], [1, 2, 3, EOT], [1, 2, 3, 4]])
    same, share = agreement(ours, reference, EOT)
    assert same.tolist() == [True, False, True]
    assert share.tolist() == [1.0, 0.5, 1.0]


def test_tokens_count_only_up_to_the_first_eot():
    prompts = [Prompt("a", "t", "p"), Prompt("b", "t", "q")]
    short = generation([[1, EOT, EOT, EOT], [1, 2, 3, EOT]], [2, 2], ["x", "y"])
    padded = generation([[1, EOT, 7, 7], [1, 2, 3, EOT]], [2, 2], ["x", "y"])  # written after the end: no text
    for out in (short, padded):
        row = measure(out, prompts, short.sequences, None, EOT)
        assert row["tokens"] == 4
        assert row["tokens_per_forward"] == 1.0
        assert row["tokens_per_second"] == 2.0
        assert row["sequence_agreement"] == 1.0


def test_a_decode_that_truncates_is_reported_as_worse_although_it_is_faster():
    prompts = [Prompt(str(n), "gsm_symbolic", "p", answer="4") for n in range(4)]
    full = [[1, 2, 4, EOT]] * 4
    reference = measure(generation(full, [4] * 4, ["so #### 4"] * 4), prompts, torch.tensor(full), None, EOT)
    sequences = [[1, EOT, EOT, EOT], [EOT] * 4, [1, 2, 4, EOT], [1, 2, 5, EOT]]
    cut = generation(sequences, [1] * 4, ["so", "", "so #### 4", "so #### 5"])
    row = measure(cut, prompts, torch.tensor(full), torch.tensor([True] * 4), EOT)
    assert row["nfe_mean"] < reference["nfe_mean"]
    assert (reference["exact_match"], row["exact_match"]) == (1.0, 0.25)
    assert row["paired_difference"] == {
        "mean": -0.75, "interval": paired(0, 3, 4), "won": 0, "lost": 3
    }  # fmt: skip
    assert row["empty_answers"] == 0.25
    assert row["truncated_correct_answers"] == 0.5  # the fourth is wrong, but not cut
    assert row["right"] == "0010"
    assert (reference["truncated_correct_answers"], reference["empty_answers"]) == (0.0, 0.0)


def test_by_task_by_length_and_what_the_component_did():
    prompts = [Prompt("a", "sums", "p", answer="1"), Prompt("b", "words", "q", answer="x")]
    reference = torch.tensor([[1, EOT, EOT, EOT], [1, 2, 3, EOT]])
    out = generation(reference.tolist(), [1, 3], ["1", "y"], filter_commits=[0, 2])
    row = measure(out, prompts, reference, None, EOT, component="filter_commits")
    assert {name: part["exact_match"] for name, part in row["by_task"].items()} == {"sums": 1.0, "words": 0.0}
    assert {name: part["nfe_mean"] for name, part in row["by_length"].items()} == {"1 to 2": 1.0, "3 to 4": 3.0}
    assert row["component"] == {"count": "filter_commits", "commits": 2, "per_forward": 0.5}
    row = measure(out, prompts, reference, None, EOT, component="filter_commits", component_seconds=0.25)
    assert (row["component"]["milliseconds"], row["component"]["share_of_forward"]) == (50.0, 0.25)
    assert row["predictor_seconds"] + row["helper_seconds"] + row["loop_seconds"] == row["seconds"]


def test_a_helper_s_acceptance_is_of_what_it_judged():
    reference = torch.tensor([[1, 2, 3, EOT]] * 2)
    said = {"helper_commits": [3, 0], "helper_refusals": [0, 1], "helper_forwards": [1, 2]}
    prompts = [Prompt("a", "t", "p"), Prompt("b", "t", "q")]
    out = generation(reference.tolist(), [1, 2], ["x"] * 2, **said)
    out.helper_seconds = 0.5
    found = measure(out, prompts, reference, None, EOT)["helper"]
    assert found == {"acceptance": 0.75, "forwards": 1.5, "milliseconds": 100.0, "predictor_milliseconds": 200.0}
    unasked = generation(reference.tolist(), [1, 2], ["x"] * 2, helper_commits=[0, 0], helper_refusals=[0, 0])
    assert "helper" not in measure(unasked, prompts, reference, None, EOT)


def test_a_network_is_timed_for_as_long_as_it_is_asked_for():
    class Slow(torch.nn.Module):
        def forward(self):
            time.sleep(0.01)

    network, device = Slow(), torch.device("cpu")
    with timed(network, device) as timer:
        network()
        network()
    found = timer.read()
    network()
    assert timer.read() == found >= 0.02
    with timed(None, device) as timer:  # a strategy without a filter
        network()
    assert timer.read() == 0


def test_spans_of_lengths():
    assert [span(n) for n in (0, 1, 2, 3, 4, 5, 8, 9, 128)] == [
        "0 tokens", "1 to 2", "1 to 2", "3 to 4", "3 to 4", "5 to 8", "5 to 8", "9 to 16", "65 to 128",
    ]  # fmt: skip


def test_without_reasoning_gym_the_final_answer_decides(monkeypatch):
    monkeypatch.setattr("eval.measure.find_spec", lambda name: None)
    prompts = [Prompt("a", "gsm_symbolic", "p", answer="4", metadata='{"source_dataset": "gsm_symbolic"}')] * 3
    right, scorers = judge(prompts, ["2+2=4\n#### 4", "#### 5", "none of them"])
    assert right.tolist() == [True, False, False]
    assert scorers == ["final answer"]


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("48 / 2 = 24.\n#### 72", "72", True),
        ("The answer is 18.", "18", True),
        (r"so \boxed{18} of 20", "18", True),
        (r"so \boxed{\frac{1}{2}}", r"\frac{1}{2}", True),
        ("#### $1,800.00", "1800", True),
        ("He has 5 apples and 3 pens", "5", False),  # the last number is the result
        ("5 apples and 3 pens make 8", "8", True),
        ("", "4", False),
        ("the answer is: Tom", "Tom", True),
        ("#### bell, vase", "vase, bell", False),
    ],
)
def test_an_answer_is_found_however_it_is_written(text, answer, right):
    assert judge([Prompt("a", "t", "p", answer=answer)], [text])[0].tolist() == [right]


def test_without_answers_nothing_is_right_or_wrong():
    out = generation([[1, EOT, EOT, EOT]], [2], [""])
    row = measure(out, [Prompt("a", "t", "p")], out.sequences, None, EOT)
    assert (row["exact_match"], row["paired_difference"], row["right"]) == (None, None, None)
    assert row["sequence_agreement"] == 1


def test_a_worked_answer_is_valid_if_every_step_is():
    prompt = next(stories.samples(StoryTask("story"), 3))
    out = generation([[1, EOT, EOT, EOT]] * 2, [1, 1], [prompt.response, f"#### {prompt.answer}"])
    row = measure(out, [prompt] * 2, out.sequences, None, EOT)
    assert (row["exact_match"], row["valid"]) == (1.0, 0.5)
    assert row["scorers"] == ["the task's own"]


def test_reasoning_gym_judges_its_own_prompts():
    pytest.importorskip("reasoning_gym")
    prompt = next(samples(GymTask("word_sorting", options={"min_words": 3, "max_words": 3}), seed=3))
    spaced = prompt.answer.replace(", ", " ,  ")  # the same list to the task's scorer, another text
    plain = Prompt("b", "words", "q", answer="x")
    right, scorers = judge([prompt, prompt, prompt, plain], [prompt.answer, spaced, "nothing", "x"])
    assert right.tolist() == [True, True, False, True]
    assert scorers == ["final answer", "reasoning-gym"]
