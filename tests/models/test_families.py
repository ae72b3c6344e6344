"""What holds for every family: logits of an independent computation in float64, whatever the batch and the cache."""

import pytest
import torch

from models.families import FAMILIES
from models.layers import MaskedLM
from models.predictor import MaskPredictor, TokenIds


@pytest.fixture
def model(family, make_model):
    return make_model(family, 300, 299, 298, scale=4, rope_theta=100.0)


def texts(*lengths):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 298, (length,), generator=generator) for length in lengths]


def ragged(rows):
    """Left-padded ids, mask and positions."""
    width = max(map(len, rows))
    ids = torch.stack([torch.cat((torch.full((width - len(row),), 298), row)) for row in rows])
    mask = torch.arange(width) >= torch.tensor([[width - len(row)] for row in rows])
    return ids, mask, (mask.long().cumsum(1) - 1).clamp(min=0)


def test_every_family_is_tested(family):
    assert family in FAMILIES


def test_logits_equal_a_plain_computation(model, plain_forward):
    assert 100_000 < sum(parameter.numel() for parameter in model.parameters()) < 1_000_000
    (ids,) = texts(13)
    with torch.no_grad():
        ours = model(ids[None]).logits[0]
    expected = plain_forward(model, ids)[0]
    torch.testing.assert_close(ours.double(), expected, atol=1e-4 * expected.abs().max().item(), rtol=0)


def test_a_row_left_padded_in_a_batch_is_the_row_alone(model, plain_forward):
    # Where flattened indices went astray, a row would be predicted by the end of the row above.
    rows = texts(4, 11, 1, 7)
    ids, mask, positions = ragged(rows)
    at = mask.view(-1).nonzero()[:, 0]
    with torch.no_grad():
        some = model(ids, mask, positions, at).logits
        every = model(ids, mask).logits
    assert torch.equal(every[mask].argmax(-1), some.argmax(-1))
    for row, ours in zip(rows, some.split(list(map(len, rows))), strict=True):
        expected = plain_forward(model, row)[0]
        torch.testing.assert_close(ours.double(), expected, atol=1e-4 * expected.abs().max().item(), rtol=0)


def test_attention_goes_both_ways_and_predictions_are_of_their_own_position(model):
    (ids,) = texts(6)
    changed = ids.clone()
    changed[5] = (changed[5] + 1) % 298
    with torch.no_grad():
        assert not torch.allclose(model(ids[None]).logits[0, 0], model(changed[None]).logits[0, 0])


def test_a_part_over_cached_keys_equals_the_whole_forward(model: MaskedLM):
    # Rows at different places, each with as many columns left of what is asked for as the family declares.
    rows, context = texts(8, 8), model.left_context
    ids, positions, length = torch.stack(rows), torch.arange(8).expand(2, 8), 3 + context
    cache = model.allocate_cache(2, 8)
    columns = torch.tensor([[2], [5]]) - context + torch.arange(length)
    at = (torch.arange(2)[:, None] * length + context + torch.arange(3)).flatten()
    with torch.no_grad():
        whole = model(ids, position_ids=positions, cache=cache).logits
        torch.testing.assert_close(whole, model(ids).logits)
        part = model(
            ids.gather(1, columns), position_ids=columns, logits_at=at, cache=cache, cache_index=columns
        ).logits
    wanted = torch.cat((whole[0, 2:5], whole[1, 5:8]))
    torch.testing.assert_close(part, wanted, atol=1e-4, rtol=1e-4)


def test_a_compiled_forward_is_the_eager_one(model, family):
    predictor = MaskPredictor(model, TokenIds(mask=299, eot=298, end_of_turn=297, pad=298, bos=296), 300, 512)
    predictor.compile(backend="eager")  # raises where hidden states differ
    assert predictor.family == family
