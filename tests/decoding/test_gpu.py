"""What only a GPU can show: no hidden waits, fused attention under padding, and the same text as on a CPU."""

import copy
import warnings

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from decoding.config import DecodeConfig
from decoding.loop import decode, decode_steps
from decoding.output import empty_output
from decoding.strategies import make_strategy
from models.helper import Helper
from models.predictor import MaskPredictor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def on_gpu(random_base):
    model = copy.deepcopy(random_base.model).cuda()
    return MaskPredictor(model, random_base.ids, random_base.vocab_size, random_base.max_length)


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("eot", ["off", "commit", "published"])
@pytest.mark.parametrize("name", ["full_step", "threshold", "factor", "entropy_bound", "dream", "klass", "dico"])
def test_the_text_is_that_of_the_cpu(random_base, on_gpu, prompts, name, eot, cache):
    config, strategy = DecodeConfig(32, 8, eot=eot, cache=cache), make_strategy(name)
    there, here = (decode(p, prompts, config, strategy, batch_size=3) for p in (on_gpu, random_base))
    assert torch.equal(there.sequences, here.sequences)
    assert torch.equal(there.nfe, here.nfe)
    assert 0 < there.predictor_seconds < there.seconds


@pytest.mark.parametrize("record", [False, True])
@pytest.mark.parametrize("cache", ["none", "dual"])
def test_one_wait_for_the_device_a_step(on_gpu, prompts, cache, record):
    config = DecodeConfig(32, 8, eot="commit", cache=cache)
    waits_once(on_gpu, prompts, config, make_strategy("dico"), record=record, record_eot=record)


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("name", ["full_step", "threshold", "klass"])
def test_one_wait_a_step_where_rows_are_out_of_step(on_gpu, prompts, name, cache):
    # Rows at other steps of other blocks, whose plans, quotas and first steps the host has to tell the device.
    regions = torch.full((5, 32), on_gpu.ids.mask)
    for row in range(5):
        regions[row, : 3 * row] = 7
    config = DecodeConfig(32, 8, steps=20, cache=cache, refresh=None if cache == "none" else 3)
    waits_once(on_gpu, prompts, config, make_strategy(name), regions=regions, batch_size=4)


@pytest.mark.parametrize("window", [None, 4])
def test_one_wait_a_step_of_apd(on_gpu, random_helper, prompts, window):
    helper = Helper(copy.deepcopy(random_helper.model).cuda(), random_helper.config)
    strategy = make_strategy("apd", network=helper, mixture_weight=0.5, kv_window=window, max_lookahead=3)
    waits_once(on_gpu, prompts, DecodeConfig(32, 32), strategy, batch_size=4)


def waits_inside(predictor):
    """Waits of a forward: grouped_mm has the host read where each expert's rows end, twice a layer, unless it is in bf16."""
    config = predictor.model.config
    moe = predictor.family == "llada_moe" and predictor.dtype is not torch.bfloat16
    return 2 * config.num_hidden_layers if moe else 0


def waits_once(predictor, prompts, config, strategy, **options):
    output = empty_output(5, config)
    steps = decode_steps(predictor, prompts, config, strategy, output, **options)
    next(steps)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        for _ in range(6):
            with warnings.catch_warnings(record=True) as waits:
                warnings.simplefilter("always")
                next(steps)
            assert len([wait for wait in waits if "synchroniz" in str(wait.message)]) <= 1 + waits_inside(predictor)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_padding_needs_no_slow_attention(on_gpu, prompts, cache):
    config = DecodeConfig(32, 8, cache=cache)
    predictor = on_gpu.to_dtype("bfloat16")
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
        decode(predictor, prompts, config, make_strategy("threshold"))
        decode(predictor, prompts[:1], config, make_strategy("threshold"))


def test_a_compiled_forward_decodes_the_same(on_gpu, prompts):
    compiled = MaskPredictor(copy.deepcopy(on_gpu.model), on_gpu.ids, on_gpu.vocab_size, on_gpu.max_length)
    compiled.compile()
    for cache in ("none", "dual"):
        config = DecodeConfig(32, 8, cache=cache)
        eager, ours = (decode(p, prompts, config, make_strategy("full_step")) for p in (on_gpu, compiled))
        assert torch.equal(eager.sequences, ours.sequences)
