"""The EoT head's columns, where a text may end, and its export."""

import json
import math

import pytest
import torch

from models.eot import (
    COLUMNS,
    EotConfig,
    EotHead,
    EotSaid,
    can_end,
    check_eot,
    eot_columns,
    first_end,
    load_eot,
    save_eot,
)
from models.errors import InputError

CONFIG = EotConfig(
    hidden=3, gen_length=16, block_length=8, vocab_size=64, mask_id=63, base_fingerprint="f" * 16, base_family="llada"
)


def test_a_text_ends_where_nothing_decoded_is_right_of_it():
    # Cutting left of a decoded token would throw away text that is already there; an EoT, and what follows it, is no text.
    masked = torch.tensor([[1, 1, 0, 1, 1], [1, 0, 1, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 0]]).bool()
    end = torch.tensor([5, 4, 3, 5, 5])
    assert can_end(masked, end).tolist() == [[0, 0, 0, 1, 1], [0, 0, 1, 1, 0], [1, 1, 1, 0, 0], [0] * 5, [0] * 5]


def test_the_leftmost_place_below_the_risk_is_taken():
    lost = torch.tensor([[0.001, 0.2, 0.02, 0.001], [0.9, 0.9, 0.9, 0.9]])
    able = torch.tensor([[False, True, True, True], [True] * 4])
    assert first_end(lost, able, 0.05).tolist() == [2, 4]


def test_columns_are_what_a_slow_loop_reads():
    torch.manual_seed(0)
    said = EotSaid(8 * torch.randn(6, 9), torch.rand(6, 9) < 0.5, torch.randint(0, 5, (6, 9)))
    masked, end = torch.rand(6, 9) < 0.7, torch.tensor([9, 9, 7, 4, 0, 9])
    columns = eot_columns(said, masked, end)
    assert columns.shape == (6, 9, len(COLUMNS))
    odds = said.log_odds.clamp(-12, 12).tolist()
    for row in range(6):
        opened = [n for n in range(9) if masked[row, n] or n >= end[row]]
        for place in range(9):
            left, right = [n for n in opened if n <= place], [n for n in opened if n > place]
            surprise = sum(math.log1p(math.exp(-odds[row][n])) for n in right)
            wanted = [
                odds[row][place],
                max([odds[row][n] for n in left] + [-12]),
                min([odds[row][n] for n in right] + [12]),
                sum(odds[row][n] for n in right) / len(right) if right else 12,
                sum(bool(said.top[row, n]) for n in right) / len(right) if right else 1,
                math.log1p(said.stable[row, place]),
                math.log1p(sum(n < place for n in left)),
                1 - len(opened) / 9,
                math.log(max(surprise, 1e-6)),
                min([math.log1p(said.stable[row, n]) for n in right] + [12]),
                12 if place == 8 else odds[row][place + 1] if place + 1 in opened else -12,
                end[row] < 9,
                math.log1p(max(int(end[row]) - place, 0)),
            ]
            assert columns[row, place].tolist() == pytest.approx(list(map(float, wanted)), abs=2e-3), (row, place)


def test_what_was_last_said_of_a_position_stays_until_a_forward_looks_again():
    said = EotSaid(torch.zeros(3), torch.zeros(3).bool(), torch.zeros(3).long())
    for odds, top in (([2.0, -1.0, 3.0], [1, 0, 1]), ([4.0, 1.0, 0.0], [1, 1, 0]), ([-1.0, 2.0, 0.0], [0, 1, 0])):
        said = said.follow(torch.tensor(odds), torch.tensor(top).bool())
    assert said.log_odds.tolist() == [-1, 2, 3]
    assert said.top.tolist() == [False, True, True]
    assert said.stable.tolist() == [0, 1, 0]


def test_a_head_is_read_back_as_it_was_and_refuses_another_base(tmp_path):
    torch.manual_seed(0)
    head = EotHead(3)
    save_eot(tmp_path / "head", head, CONFIG, "# EoT head\n")
    again, config = load_eot(tmp_path / "head")
    some = torch.randn(4, 5, len(COLUMNS))
    assert config == CONFIG
    assert torch.equal(again(some), head(some))
    ours = {"family": "llada", "vocab_size": 64, "mask_id": 63, "fingerprint": "f" * 16}
    check_eot(config, **ours)
    for name, value in (("family", "Dream"), ("vocab_size", 65), ("mask_id", 1), ("fingerprint", "0" * 16)):
        with pytest.raises(InputError, match=f"eot: .*{name}: found"):
            check_eot(config, **ours | {name: value})
    file = tmp_path / "head" / "config.json"
    content = json.loads(file.read_text())
    for change, message in (
        ({"hidden": 4}, "linear1"),
        ({"hidden": 0}, "hidden: found 0"),
        ({"kind": "filter"}, "kind"),
    ):
        file.write_text(json.dumps(content | change))
        with pytest.raises(InputError, match=message):
            load_eot(tmp_path / "head")
