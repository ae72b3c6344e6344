import torch
import torch.nn.functional as F

from models.features import FEATURES, Evidence, feature_columns, run_to_the_left


def evidence(masked: torch.Tensor) -> Evidence:
    """Something everywhere, decoded positions included: what a strategy that asks for all positions gets."""
    shape = masked.shape
    return Evidence(
        masked=masked,
        token=torch.randint(1, 9, shape),
        confidence=torch.rand(shape) * 0.9 + 0.1,
        margin=torch.rand(shape) + 0.1,
        entropy=torch.rand(shape) + 0.1,
        stable=torch.randint(1, 5, shape),
        previous=torch.rand(shape) * 0.9 + 0.1,
    )


def test_run_to_the_left_is_what_a_slow_loop_counts():
    masked = torch.rand(50, 17) < 0.7
    slow = torch.zeros(masked.shape, dtype=torch.int64)
    for row in range(50):
        for place in range(17):
            left = place - 1
            while left >= 0 and masked[row, left]:
                slow[row, place] += 1
                left -= 1
    assert torch.equal(run_to_the_left(F.pad(masked.float(), (1, 1))), slow.float())


def test_decoded_positions_show_nothing_but_their_flags():
    # Otherwise the filter would learn from what the records do not hold there.
    masked = torch.rand(8, 16) < 0.5
    columns = feature_columns(evidence(masked), tuple(FEATURES))
    assert columns.dtype == torch.float32
    for index, name in enumerate(FEATURES):
        if name.startswith("masked"):
            continue
        assert (columns[..., index][~masked] == 0).all(), name


def test_decoded_positions_never_change_a_column():
    masked = torch.rand(8, 16) < 0.5
    first, second = evidence(masked), evidence(masked)
    for name, value in second.present().items():
        setattr(second, name, torch.where(masked, getattr(first, name), value))
    names = tuple(FEATURES)
    assert torch.equal(feature_columns(first, names), feature_columns(second, names))


def test_neighbour_flags_see_the_right_neighbour():
    masked = torch.tensor([[True, False, False, True]])
    columns = feature_columns(evidence(masked), ("masked", "masked_left", "masked_right"))[0]
    assert columns.T.tolist() == [[1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 1, 0]]


def test_columns_come_in_the_order_asked_for():
    some = evidence(torch.ones(2, 4, dtype=torch.bool))
    assert torch.equal(feature_columns(some, ["entropy", "confidence"])[..., 1], some.confidence)


def test_rank_orders_masked_positions_by_confidence():
    some = evidence(torch.tensor([[True, True, False, True]]))
    some.confidence = torch.tensor([[0.5, 0.9, 0.99, 0.7]])
    assert feature_columns(some, ["rank"])[0, :, 0].tolist() == [0.5, 0.0, 0.0, 0.25]
