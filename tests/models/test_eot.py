"""The EoT head's columns, where a text may end, and its export."""

import json
import math

import pytest
import torch

from models.eot import COLUMNS, EotConfig, EotHead, can_end, check_eot, eot_columns, first_end, load_eot, save_eot
from models.errors import InputError

CONFIG = EotConfig(
    hidden=3, gen_length=16, block_length=8, vocab_size=64, mask_id=63, base_fingerprint="f" * 16, base_family="llada"
)


def test_a_text_ends_where_nothing_decoded_is_right_of_it():
    # Cutting left of a decoded token would throw away text that is already there.
    masked = torch.tensor([[1, 1, 0, 1, 1], [1, 0, 1, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]).bool()
    end = torch.tensor([5, 4, 3, 5])
    assert can_end(masked, end).tolist() == [[0, 0, 0, 1, 1], [0, 0, 1, 1, 0], [1, 1, 1, 1, 1], [0] * 5]


def test_the_leftmost_place_below_the_risk_is_taken():
    lost = torch.tensor([[0.001, 0.2, 0.02, 0.001], [0.9, 0.9, 0.9, 0.9]])
    able = torch.tensor([[False, True, True, True], [True] * 4])
    assert first_end(lost, able, 0.05).tolist() == [2, 4]


def test_columns_are_what_a_slow_loop_reads():
    torch.manual_seed(0)
    probability, top = torch.rand(6, 9), torch.rand(6, 9) < 0.5
    stable, masked = torch.randint(0, 5, (6, 9)), torch.rand(6, 9) < 0.7
    columns = eot_columns(probability, top, stable, masked)
    assert columns.shape == (6, 9, len(COLUMNS))
    odds = [[math.log(p / (1 - p)) for p in row] for row in probability.half().double().clamp(1e-4, 1 - 1e-3).tolist()]
    high, low = math.log(0.999 / 0.001), math.log(1e-4 / (1 - 1e-4))
    for row in range(6):
        for place in range(9):
            left = [n for n in range(place + 1) if masked[row, n]]
            right = [n for n in range(place + 1, 9) if masked[row, n]]
            wanted = [
                odds[row][place],
                max([odds[row][n] for n in left] + [low]),
                min([odds[row][n] for n in right] + [high]),
                sum(odds[row][n] for n in right) / len(right) if right else high,
                sum(bool(top[row, n]) for n in right) / len(right) if right else 1,
                math.log1p(stable[row, place]),
                math.log1p(sum(n < place for n in left)),
                1 - masked[row].float().mean().item(),
            ]
            assert columns[row, place].tolist() == pytest.approx(wanted, abs=2e-3), (row, place)


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
