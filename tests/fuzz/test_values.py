"""Hostile values of every setting: each is refused by name, at once, whatever its type."""

import dataclasses
import math

import pytest
import torch

from decoding import Decoder
from decoding.adapters.for_sglang import engine_of
from decoding.config import DecodeConfig
from decoding.engine import Engine
from decoding.strategies import STRATEGIES, make_strategy
from models.errors import InputError
from models.filter import FilterConfig, build_filter
from models.predictor import MaskPredictor, TokenIds

WRONG = ["abc", "", math.nan, math.inf, -math.inf, -1, [], {}, [1], True, b"1", object(), 10**30, 1j]
"""Wrong for any number or folder that a setting may be; ``True`` is no number."""
FREE = {("threshold", "threshold"), ("factor", "factor"), ("entropy_bound", "gamma"), ("klass", "threshold")}
"""Settings without an upper end, which 10**30 is not too large for."""
WORDS = {"filter", "helper"}


def settings_of(name: str) -> list[str]:
    strategy = STRATEGIES[name]
    return [field.name for field in dataclasses.fields(strategy)] if dataclasses.is_dataclass(strategy) else []


def has_end(name: str, setting: str) -> bool:
    dico = {"alpha", "sigma", "divide_exit", "growth", "sure", "factor", "top_threshold", "spread_threshold"}
    dico |= {"conquer_exit", "margin", "divide_steps", "patience"}
    klass = {"threshold", "divergence", "history"}
    free = {"dico": dico, "klass": klass, "learn2pd": {"budget"}}.get(name, set())
    return setting not in free and (name, setting) not in FREE


STRATEGY_CASES = [
    pytest.param(name, setting, value, id=f"{name}.{setting}={value!r:.20}")
    for name in STRATEGIES
    for setting in settings_of(name)
    for value in WRONG
    if (setting not in WORDS or value != "abc") and (value != 10**30 or has_end(name, setting))
]


@pytest.mark.parametrize(("name", "setting", "value"), STRATEGY_CASES)
def test_strategy_settings(name: str, setting: str, value: object) -> None:
    # A comparison with text or a list is a traceback, one with NaN a setting that never commits anything.
    with pytest.raises(InputError, match=rf"^{name}\.{setting}: found .*; accepted: ."):
        make_strategy(name, **{setting: value})


NUMBERS = ("gen_length", "block_length", "steps", "temperature", "seed", "refresh")


@pytest.mark.parametrize("setting", [*NUMBERS, "eot", "cache"])
@pytest.mark.parametrize("value", [*WRONG, 10**14, "32", 32.5], ids=lambda value: f"{value!r:.20}")
def test_decode_settings(setting: str, value: object) -> None:
    if (setting, value) in [("seed", 10**14), ("refresh", 10**14), ("refresh", 10**30), ("temperature", 32.5)]:
        pytest.skip("accepted")
    with pytest.raises(InputError, match=f"^{setting}: found "):
        DecodeConfig(**{"cache": "dual"} | {setting: value})  # type: ignore[arg-type]


def test_lengths_are_whole_numbers() -> None:
    with pytest.raises(InputError, match=r"gen_length: found 32\.0; accepted: a whole number from 1 to 1048576"):
        DecodeConfig(gen_length=32.0)  # type: ignore[arg-type]


SIZES = ("block_length", "channels", "kernel", "layers", "embedding", "hidden", "hidden_size", "features")


@pytest.mark.parametrize("setting", SIZES)
@pytest.mark.parametrize("value", [*WRONG, 10**6 + 1, "32", 32.5, None], ids=lambda value: f"{value!r:.20}")
def test_filter_sizes(setting: str, value: object) -> None:
    if value == 10**6 + 1 and setting in ("block_length", "hidden_size"):
        pytest.skip("a convolution serves any block, and hidden states may be wide")
    # A million layers would be built for ever.
    with pytest.raises(InputError, match=rf"^filter: ({setting}|sizes): found "):
        build_filter(FilterConfig(**{"vocab_size": 1000, "hidden": 4, "hidden_size": 1000} | {setting: value}))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def decoder(tiny_checkpoint) -> Decoder:
    return Decoder.from_pretrained(tiny_checkpoint, "full_step", device="cpu")


CALLS = [
    ({"prompts": 5}, "prompts"), ({"prompts": None}, "prompts"), ({"prompts": []}, "prompts"), ({"prompts": "hi"}, "prompts"),
    ({"prompts": {"a": 1}}, "prompts"), ({"prompts": b"hi"}, "prompts"), ({"prompts": [None]}, "prompt"),
    ({"prompts": [5]}, "prompt"), ({"prompts": [b"x"]}, "prompt"), ({"prompts": [""]}, "prompt"),
    ({"prompts": ["\ue000"]}, "prompt"), ({"prompts": [" \n"]}, "prompt"), ({"prompts": ["\ud800"]}, "prompt"),
    ({"prompts": [[]]}, "prompt 0"), ({"prompts": [[-1]]}, "prompt 0"), ({"prompts": [[1], [99999]]}, "prompt 1"),
    ({"prompts": [[1, None]]}, "message 0"), ({"prompts": [[1.0]]}, "message 0"), ({"prompts": [[{}]]}, "message 0"),
    ({"prompts": [[{"role": "user", "content": None}]]}, "message 0"),
    ({"prompts": [[{"role": 1, "content": "a"}]]}, "message 0"),
    ({"prompts": [[{"role": "user", "content": ["a"]}]]}, "message 0"),
    ({"stop": "abc"}, "stop"), ({"stop": [""]}, "stop"), ({"stop": [1]}, "stop"), ({"stop": 1}, "stop"),
    ({"batch_size": 0}, "batch_size"), ({"batch_size": "8"}, "batch_size"), ({"batch_size": 8.0}, "batch_size"),
    ({"seeds": [-1]}, "seeds"), ({"seeds": ["a"]}, "seeds"), ({"seeds": 1}, "seeds"), ({"seeds": [1, 2]}, "seeds"),
    ({"references": [[1] * 8]}, "references"), ({"references": torch.zeros(1, 7).long()}, "references"),
    ({"references": torch.zeros(1, 8)}, "references"), ({"references": torch.full((1, 8), 99999)}, "references"),
    ({"references": torch.full((1, 8), -1)}, "references"),
    ({"gen_length": "8"}, "gen_length"), ({"gen_length": 10**14}, "gen_length"), ({"gen_length": 1000}, "gen_length"),
    ({"temperature": math.inf}, "temperature"), ({"seed": -1}, "seed"), ({"colour": 1}, "colour"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "field"), CALLS, ids=lambda value: f"{value!r:.50}")
def test_generate(decoder: Decoder, call: dict, field: str) -> None:
    given = {"prompts": ["hi"], "gen_length": 8, "block_length": 4} | call
    with pytest.raises(InputError, match=f"^{field}.*: found .*; accepted: ."):
        decoder.generate(**given)


@pytest.mark.parametrize(
    ("call", "field"),
    [
        ({"device": "nope"}, "device"), ({"device": "cuda:99"}, "device"), ({"device": 5.5}, "device"),
        ({"device": "meta"}, "device"),
        ({"device": torch.device("meta")}, "device"),
        ({"dtype": "nope"}, "dtype"), ({"dtype": 5}, "dtype"), ({"dtype": "int8"}, "dtype"),
        ({"strategy": "nope"}, "strategy"), ({"strategy": ["threshold"]}, "strategy"), ({"strategy": None}, "strategy"),
        ({"strategy": "threshold", "risk": "low", "calibration": "/nowhere"}, "/nowhere"), ({"risk": math.nan}, "calibration"),
    ],
)  # fmt: skip
def test_loading(tiny_checkpoint, call: dict, field: str) -> None:
    with pytest.raises(InputError, match=f"^{field}: found .*; accepted: ."):
        Decoder.from_pretrained(tiny_checkpoint, **{"device": "cpu"} | call)


def test_a_decode_of_nonsense_stops(tiny_llada) -> None:
    # NaN compares as neither larger nor smaller: something would be committed, with status 0.
    ids = TokenIds(mask=63, eot=62, end_of_turn=61, pad=62, bos=60)
    predictor = MaskPredictor(tiny_llada, ids, 64, 256)
    tiny_llada.model.transformer["ln_f"].weight[0] = math.nan
    with pytest.raises(InputError, match="confidence: found not finite"):
        Decoder(predictor, make_strategy("threshold")).generate([[1, 2]], gen_length=8, block_length=4)


@pytest.mark.parametrize("weight", [3e38, -3e38])
@pytest.mark.parametrize("settings", [{"threshold": 0.5}, {"budget": 1.0}], ids=str)
def test_a_filter_that_computes_nonsense_stops_the_decode(tiny_llada, weight: float, settings: dict) -> None:
    # Finite weights, and logits that are not: it would commit everything, or never anything.
    sizes = {"gen_length": 8, "block_length": 4, "vocab_size": 64, "mask_id": 63}
    config = FilterConfig(**sizes, base_family="llada", base_fingerprint="unsaved")
    net = build_filter(config)
    with torch.no_grad():
        net.head.weight.fill_(weight)
    rule = make_strategy("learn2pd", network=net.eval(), config=config, **settings)
    ids = TokenIds(mask=63, eot=62, end_of_turn=61, pad=62, bos=60)
    with pytest.raises(InputError, match="^filter: probability: found not finite"):
        Decoder(MaskPredictor(tiny_llada, ids, 64, 256), rule).generate([[1, 2]], gen_length=8, block_length=4)
    with pytest.raises(InputError, match="^filter: probability: found not finite"):
        Engine(rule, 63, 4).commit(torch.randn(1, 4, 64), torch.full((1, 4), 63))


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        *(("mask_id", value) for value in ("a", -1, 1.5, None, True, math.nan)),
        *(("eot_id", value) for value in ("x", -1, 1.5, True, 63)),  # 63 is MASK
        *(("block_length", value) for value in (0, "4", 4.0, 10**14)), *(("steps", value) for value in (0, 5, "4")),
        *(("strategy", value) for value in ("threshold", None, {})), ("base", 5), ("base", ""),
    ],
    ids=lambda value: f"{value!r:.20}",
)  # fmt: skip
def test_engines(setting: str, value: object) -> None:
    given = {"strategy": make_strategy("threshold"), "mask_id": 63, "block_length": 4, "eot_id": 62} | {setting: value}
    with pytest.raises(InputError, match=f"^{setting}: found .*; accepted: ."):
        Engine(**given)  # type: ignore[arg-type]


FIRST = {"logits": torch.zeros(2, 4, 64), "block_ids": torch.full((2, 4), 63)}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("logits", value) for value in (None, [1.0], torch.zeros(4, 64), torch.zeros(2, 4, 64).long())),
        *(("logits", torch.zeros(shape)) for shape in ((2, 5, 64), (2, 0, 64), (2, 4, 63), (2, 4, 0))),
        *(("block_ids", value) for value in (None, [63] * 4, torch.full((2, 3), 63), torch.full((3, 4), 63))),
        *(("block_ids", value) for value in (torch.full((4,), 63), torch.zeros(2, 4))),
        *(("prompt", value) for value in ([True], torch.zeros(2, 4), torch.zeros(2, 3).bool())),
        *(("state", value) for value in ({}, [], 5, {"step": 0}, {"step": torch.zeros(2).long()})),
    ],
    ids=lambda value: str(tuple(value.shape) if isinstance(value, torch.Tensor) else value)[:30],
)  # fmt: skip
def test_what_engines_hand_over(name: str, value: object) -> None:
    engine = Engine(make_strategy("klass"), 63, 4)
    with pytest.raises(InputError, match=f"^{name}: found .*; accepted: ."):
        engine.commit(**FIRST | {name: value})  # type: ignore[arg-type]


def test_a_state_of_another_batch_or_block_is_refused() -> None:
    # Of two rows' state the first would be every row's.
    for rows, length in ((1, 4), (3, 4), (2, 3)):
        engine = Engine(make_strategy("klass"), 63, 4)
        state = engine.begin(torch.zeros(rows, length, 64))
        with pytest.raises(InputError, match="^state: found "):
            engine.commit(**FIRST, state=state)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_engine_that_hands_over_nonsense_stops(value: float) -> None:
    # Token 0 would be committed.
    logits = FIRST["logits"].clone()
    logits[1, 2, 5:7] = value  # one infinity would be a choice
    engine = Engine(make_strategy("threshold"), 63, 4)
    with pytest.raises(InputError, match="^base model: confidence: found not finite"):
        engine.commit(logits, FIRST["block_ids"])
    decoded = FIRST["block_ids"].clone()
    decoded[1, 2] = 7  # nobody reads it there
    engine.commit(logits, decoded)


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        *((value, "algorithm_config") for value in (None, [], {1: 2}, "threshold")),
        ({"strategy": "threshold", "block_size": 8}, "block_size"), ({"strategy": "threshold", "block_size": None}, "block_size"),
        ({"strategy": 5}, "strategy"), ({"strategy": "threshold", "colour": 1}, "threshold.colour"),
        ({"strategy": "threshold", "eot_id": "x"}, "eot_id"), ({}, "filter"),
    ],
    ids=str,
)  # fmt: skip
def test_settings_of_sglang(settings: object, field: str) -> None:
    with pytest.raises(InputError, match=f"^{field}: found .*; accepted: ."):
        engine_of(settings, 63, 4)  # type: ignore[arg-type]
