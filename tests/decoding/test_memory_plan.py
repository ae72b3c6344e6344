"""What the planner counts is what a decode takes, and no step reads the device more than once."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from decoding.config import DecodeConfig
from decoding.loop import decode
from decoding.memory_plan import plan_memory
from decoding.output import empty_output
from decoding.run import Request
from decoding.strategies import make_strategy
from models import LLaDAConfig, LLaDAModelLM, LLaDAMoEConfig
from models.eot import load_eot
from models.errors import InputError
from models.filter import FilterConfig, build_filter
from models.helper import HelperConfig, save_helper
from models.predictor import MaskPredictor, TokenIds

NAMES = ["full_step", "threshold", "factor", "entropy_bound", "dream", "klass", "dico", "oracle", "learn2pd", "apd"]
SHAPE = LLaDAConfig(
    d_model=64, n_layers=3, n_heads=4, n_kv_heads=2, mlp_hidden_size=160, vocab_size=3000, max_sequence_length=512,
    mask_token_id=0, eos_token_id=1, pad_token_id=1,
)  # fmt: skip


def strategy_of(name, helper=None, vocab_size=3000):
    if name == "apd":
        return make_strategy("apd", **helper, kv_window=8, max_lookahead=16)
    if name != "learn2pd":
        return make_strategy(name)
    config = FilterConfig(
        block_length=32, gen_length=64, threshold=0.5, base_fingerprint="unsaved", vocab_size=vocab_size, mask_id=0
    )
    return make_strategy(name, network=build_filter(config).eval(), config=config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shape")
    SHAPE.save_pretrained(folder)
    return folder


HELPER = HelperConfig(
    base_fingerprint="unsaved", base_family="llada", vocab_size=3000, mask_id=0, eot_id=1, gen_length=128, eot_rule="commit"
)  # fmt: skip


@pytest.fixture(scope="module")
def helper_folder(tmp_path_factory):
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=3000, max_position_embeddings=512,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("helper") / "export"
    save_helper(folder, LlamaForCausalLM(config), HELPER, "# Helper\n")
    return folder


def allocated(run):
    """The most bytes alive at a time within a call, by the profiler's own record of what was allocated and freed."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize(
    ("name", "cache"), [*itertools.product(["threshold", "klass", "learn2pd"], ["none", "dual"]), ("apd", "none")]
)
def test_the_count_is_what_a_real_step_allocates(folder, helper_folder, cache, name):
    config = DecodeConfig(128, 32, eot="commit" if name == "apd" else "published", cache=cache)
    strategy = strategy_of(name, {"helper": helper_folder})
    plan = plan_memory(folder, config, strategy, dtype="float32", batch_size=6, prompt_length=40)
    model = LLaDAModelLM(SHAPE)
    predictor = MaskPredictor(model, TokenIds(0, 1, 2, 1, 3), 3000, 512)
    if name == "apd":
        assert strategy.networks == []  # the plan has loaded nothing
        strategy.prepare(predictor, config)
    request = Request(predictor, [[4] * 40] * 6, config, strategy, empty_output(6, config))

    @torch.inference_mode()
    def steps():
        run = request.strategy.start(request)
        run.step()

    steps()  # whatever libraries allocate once
    assert plan.weights == sum(p.nbytes for network in (model, *strategy.networks) for p in network.parameters())
    layers = (
        {"none": 0, "dual": 3}[cache] if name != "apd" else 3 + 2
    )  # the predictor's for its window, and the helper's
    assert plan.keys == 2 * layers * 6 * (40 + 128) * 32 * 4
    assert plan.peak - plan.weights == pytest.approx(allocated(steps), rel=0.1)


@pytest.mark.parametrize("name", ["dico", "learn2pd"])
def test_a_decode_after_a_plan_has_nothing_of_it(folder, name):
    # What is made once and kept would be a tensor without contents.
    size, config = 16, DecodeConfig(32, 16)
    described = FilterConfig(
        block_length=size, gen_length=32, threshold=0.5, base_fingerprint="unsaved", vocab_size=3000, mask_id=0,
        features=("log_margin", "masked", "confidence"),
    )  # fmt: skip
    options = {"network": build_filter(described).eval(), "config": described} if name == "learn2pd" else {}
    plan_memory(folder, config, make_strategy(name, **options), dtype="float32")
    predictor = MaskPredictor(LLaDAModelLM(SHAPE), TokenIds(0, 1, 2, 1, 3), 3000, 512)
    out = decode(predictor, [[4] * 5], config, make_strategy(name, **options))
    assert (out.sequences != 0).all()


LARGE = Path(__file__).parents[2] / "docs" / "llada_8b.json"


@pytest.mark.parametrize("name", NAMES)
def test_an_8b_model_decodes_a_long_region_in_16_rows_on_a_card_of_80_gb(tmp_path, name):
    size = json.loads(LARGE.read_text())["vocab_size"]
    described = LlamaConfig(  # a helper of 1.1 B parameters
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4,
        vocab_size=size, max_position_embeddings=2048, dtype=torch.bfloat16,
    )  # fmt: skip
    described.save_pretrained(tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(described | {"architectures": ["LlamaForCausalLM"]}))
    config = (
        DecodeConfig(1024, 32, eot="commit") if name == "apd" else DecodeConfig(1024, 32, eot="published", cache="dual")
    )
    plan = plan_memory(LARGE, config, strategy_of(name, {"helper": tmp_path}, size), batch_size=16, prompt_length=256)
    assert plan.peak < 80e9
    assert plan.evidence <= 2**30
    assert plan.weights > (17e9 if name == "apd" else 15e9)


def test_what_klass_keeps_has_a_budget(folder):
    # Distributions over a large vocabulary would fill a card long before anything else does.
    config, klass = DecodeConfig(1024, 128, eot="off"), make_strategy("klass")
    message = r"batch_size x block_length: found 64 x 128, .*; accepted: at most 4245 positions: 4 GiB of distributions"
    with pytest.raises(InputError, match=message):
        plan_memory(LARGE, config, klass, batch_size=64)
    plan = plan_memory(LARGE, replace(config, cache="dual"), klass, batch_size=64)
    assert 64 * 128 * 126464 * 4 < plan.state < 2**32


def test_evidence_does_not_grow_with_the_positions(tmp_path):
    wide = LLaDAConfig(**SHAPE.to_diff_dict() | {"vocab_size": 200_000, "max_sequence_length": 4096})
    wide.save_pretrained(tmp_path)
    few, many = (
        plan_memory(tmp_path, DecodeConfig(length, 32, eot="published"), strategy_of("threshold"), batch_size=8)
        for length in (64, 1024)
    )
    assert many.evidence < few.evidence * 1.2 < 2**30


@pytest.mark.parametrize("record", [False, True])
@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("name", NAMES)
def test_a_step_reads_the_device_once(random_helper, name, cache, record):
    # On tensors without contents any other read, and any operator whose shape depends on values, raises.
    if name == "apd" and cache != "none":
        pytest.skip("apd has a cache of its own")
    eot = "commit" if name == "apd" else "published"
    config = DecodeConfig(64, 32, eot=eot, cache=cache, refresh=None if cache == "none" else 2)
    reads_once(config, name, {"network": random_helper}, record)


@pytest.mark.parametrize("name", ["full_step", "dream", "apd"])
def test_a_step_that_draws_reads_the_device_once(random_helper, name):
    reads_once(DecodeConfig(64, 32, temperature=0.7), name, {"network": random_helper})


@pytest.mark.parametrize("cache", ["none", "dual"])
def test_a_step_whose_text_a_head_ends_reads_the_device_once(head, cache, monkeypatch):
    settings = head(MaskPredictor(LLaDAModelLM(SHAPE), TokenIds(0, 1, 2, 1, 3), 3000, 512))
    loaded = load_eot(settings["eot_head"])
    monkeypatch.setattr("decoding.eot.load_eot", lambda folder: loaded)  # a file has contents
    reads_once(DecodeConfig(64, 32, cache=cache, **settings), "threshold")


def reads_once(config, name, helper=None, record=False):
    rows, steps = 3, 3
    with FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode():
        predictor = MaskPredictor(LLaDAModelLM(SHAPE), TokenIds(0, 1, 2, 1, 3), 3000, 512)
        references = torch.zeros(rows, 64, dtype=torch.long) if name == "oracle" else None
        strategy = strategy_of(name, helper)
        prompts = [[4] * 5, [4] * 9, [4] * 9]
        request = Request(
            predictor,
            prompts,
            config,
            strategy,
            empty_output(rows, config),
            references,
            record=record,
            record_eot=record,
        )
        run = strategy.start(request)
        reads = []

        def told(known):
            reads.append(known)
            # Rows at different steps of different blocks, and in different phases.
            of_blocks = [[50]] * 3 if name == "apd" else [[28, 32], [0, 30], [30, 32]]
            others = known.shape[1] - 1 - len(of_blocks[0])
            return [[*masked, 64, *[row] * others] for row, masked in enumerate(of_blocks)]

        run.state.read = told
        for _ in range(steps):
            run.step()
    assert len(reads) == steps


def test_hidden_states_come_where_they_are_asked_for(random_base, prompts):
    class Asking(type(make_strategy("threshold", threshold=2.0))):
        needs = frozenset({"hidden"})

        def decide(self, step):
            seen.append(step.evidence)
            return super().decide(step)

    for cache in ("none", "dual"):
        seen = []
        decode(random_base, prompts, DecodeConfig(32, 8, cache=cache), Asking(threshold=2.0), batch_size=3)
        for evidence in seen:
            assert evidence.hidden.shape == (*evidence.masked.shape, 32)
            token = random_base.logits(evidence.hidden).index_fill(2, torch.tensor([63]), -torch.inf).argmax(-1)
            assert torch.equal(token[evidence.masked], evidence.token[evidence.masked])
            assert evidence.entropy is None  # nobody asked


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"strategy": "apd", "config": DecodeConfig(64, 32, cache="dual")}, "cache: found 'dual' with apd"),
        ({"strategy": "apd", "config_file": LARGE}, "helper: vocab_size: found 3000; accepted: 126464"),
        ({"strategy": "learn2pd", "config_file": LARGE}, "filter: vocab_size: found 3000; accepted: 126464"),
        ({"dtype": "int8"}, "dtype"), ({"batch_size": 0}, "batch_size"),
        ({"prompt_length": 0}, "prompt_length"), ({"prompt_length": 500}, "prompt_length and gen_length"),
        ({"config_file": "nowhere"}, "nowhere"),
    ],
)  # fmt: skip
def test_what_cannot_be_planned_is_refused(folder, helper_folder, change, field):
    arguments = {"config_file": folder, "config": DecodeConfig(64, 32), "strategy": "threshold"} | change
    arguments["strategy"] = strategy_of(arguments["strategy"], {"helper": helper_folder})
    with pytest.raises(InputError, match=f"^{field}"):
        plan_memory(**arguments)


def test_views_of_weights_take_nothing(tmp_path):
    # An expert's matrix is a part of one tensor; each look at it would count as all of them.
    LLaDAMoEConfig(num_hidden_layers=2).save_pretrained(tmp_path)
    plan = plan_memory(tmp_path, DecodeConfig(128, 32), make_strategy("threshold"))
    assert plan.activations < plan.weights / 10
