"""Other engines decode what our own loop decodes, token for token."""

import copy
import json
import pkgutil
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from transformers import GenerationConfig, StoppingCriteria

from decoding.adapters import for_sglang
from decoding.adapters.for_dinfer import LearnedParallelDecoder
from decoding.adapters.for_transformers import learned_decoding
from decoding.config import DecodeConfig
from decoding.decoder import Decoder
from decoding.engine import Engine, join, split
from decoding.loop import decode
from decoding.strategies import APD, make_strategy
from models.errors import InputError
from models.features import FEATURES
from models.filter import FilterConfig, build_filter, load_filter, save_filter
from models.predictor import MaskPredictor, TokenIds, fingerprint

MASK, EOT, SIZE = 63, 62, 8


@pytest.fixture(scope="module")
def random_llada(make_model):
    return MaskPredictor(make_model("llada", 64, MASK, EOT), TokenIds(MASK, EOT, 61, EOT, bos=60), 64, 512)


@pytest.fixture(scope="module")
def ending_llada(random_llada):
    """The same, but it says EoT now and then."""
    model = copy.deepcopy(random_llada.model)
    model.model.transformer["ff_out"].weight[EOT] *= 2
    return MaskPredictor(model, random_llada.ids, 64, 512)


@pytest.fixture(scope="module")
def filter_folder(tmp_path_factory):
    """Random filters that accept some guesses: one of all features, history and tokens among them, and one as published."""
    folder = tmp_path_factory.mktemp("exports")
    every = FilterConfig(
        block_length=SIZE, gen_length=32, vocab_size=64, mask_id=MASK, base_fingerprint="unsaved", base_family="llada",
        embedding=4, threshold=0.5,
    )  # fmt: skip
    mlp = replace(every, architecture="block_mlp", features=("confidence",), embedding=0, needs_all_positions=True)
    torch.manual_seed(2)
    for name, config in (("learn2pd", every), ("published", mlp)):
        save_filter(folder / name, build_filter(config), config, "# random\n")
    return folder


STRATEGIES = {
    "full_step": {},
    "threshold": {"threshold": 0.3},
    "factor": {"factor": 3.0},
    "entropy_bound": {"gamma": 4.0},
    "dream": {"top_p": 0.9},
    "klass": {"threshold": 0.1, "divergence": 2.0, "history": 1},
    "dico": {"alpha": 0.0, "beta": 0.9, "seed_threshold": 0.1, "grow_threshold": 0.1, "sure": 0.4, "margin": 0.3},
    "learn2pd": {},
    "published": {},
}


def chosen(name, folder):
    """Name and options of a strategy, as YAML and command lines have them."""
    if STRATEGIES[name] or name == "full_step":
        return name, STRATEGIES[name]
    return "learn2pd", {"filter": str(folder / name)}


def made(name, folder):
    strategy, options = chosen(name, folder)
    return make_strategy(strategy, **options)


def looped(predictor, prompt, blocks, step):
    """A stub of an engine: a loop of its own over the blocks of one prompt; ``step(logits, ids, begins)`` writes in place."""
    tokens = torch.tensor([prompt + [MASK] * (SIZE * blocks)])
    positions = torch.arange(tokens.shape[1])
    calls = 0
    for first in range(len(prompt), tokens.shape[1], SIZE):
        begins = True
        while (tokens[:, first : first + SIZE] == MASK).any():
            hidden = predictor(tokens, None, positions[None], positions)
            logits = predictor.logits(hidden)[first : first + SIZE].clone()
            step(logits[None], tokens[:, first : first + SIZE], begins)
            begins, calls = False, calls + 1
    return tokens[0, len(prompt) :].tolist(), calls


@pytest.mark.parametrize("name", STRATEGIES)
def test_an_engine_commits_what_the_decode_loop_commits(name, random_llada, prompts, filter_folder):
    # KLASS remembers across blocks in a loop without a dual cache; an engine's block has nothing before its first step.
    blocks = 1 if name == "klass" else 3
    config = DecodeConfig(SIZE * blocks, SIZE, eot="off")
    for prompt in prompts[:3]:
        expected = decode(random_llada, [prompt], config, made(name, filter_folder))
        engine, state = Engine(made(name, filter_folder), MASK, SIZE), None

        def step(logits, ids, begins, engine=engine):
            nonlocal state
            untouched = logits.clone()
            transfer, tokens, state = engine.commit(logits, ids, None if begins else state)
            assert torch.equal(logits, untouched)
            ids.copy_(torch.where(transfer, tokens, ids))

        tokens, calls = looped(random_llada, prompt, blocks, step)
        assert tokens == expected.sequences[0].tolist()
        assert calls == int(expected.nfe[0])


def test_the_comparison_is_not_hollow(random_llada, prompts, filter_folder):
    config, forwards = DecodeConfig(SIZE * 3, SIZE, eot="off"), {}
    for name in STRATEGIES:
        forwards[name] = int(decode(random_llada, prompts, config, made(name, filter_folder)).nfe.sum())
    fixed = ("full_step", "dream")  # a token a forward
    assert all((count < forwards["full_step"]) is (name not in fixed) for name, count in forwards.items()), forwards


def test_blocks_at_different_steps_share_a_commit_and_their_states_can_be_kept_apart(filter_folder):
    torch.manual_seed(3)
    logits = [torch.randn(1, SIZE, 64) * 4 for _ in range(3)]
    for name in STRATEGIES:
        engine, ids = Engine(made(name, filter_folder), MASK, SIZE), torch.full((1, SIZE), MASK)
        _, _, old = engine.commit(logits[0], ids)
        alone = [engine.commit(logits[1], ids, old), engine.commit(logits[2], ids)]
        both = join([*split(old), *split(engine.begin(logits[2]))])
        together = engine.commit(torch.cat(logits[1:]), ids.expand(2, -1), both)
        for part, (first, second) in zip(together[:2], zip(alone[0][:2], alone[1][:2], strict=True), strict=True):
            assert torch.equal(part, torch.cat((first, second))), name


def test_an_end_of_the_text_fills_its_block_as_in_the_loop(table):
    # EoT comes first, right of it a token that is committed before it, left of it what is still to come.
    said, sure = [1, 2, EOT, 4, 5, 6, EOT, 8], [3.0, 5, 9, 12, 3, 3, 3, 3]
    rule, prompt = make_strategy("full_step"), [9, 9]
    expected = decode(table(said, sure, 2), [prompt], DecodeConfig(SIZE, SIZE), rule)
    assert expected.sequences[0].tolist() == [1, 2, *[EOT] * 6]
    engine = Engine(rule, MASK, SIZE, eot_id=EOT)

    def step(logits, ids, begins):
        transfer, tokens, _ = engine.commit(logits, ids)
        ids.copy_(torch.where(transfer, tokens, ids))

    assert looped(table(said, sure, 2), prompt, 1, step) == (expected.sequences[0].tolist(), int(expected.nfe[0]))


@pytest.mark.parametrize(
    ("strategy", "found"),
    [
        (make_strategy("oracle"), "a reference decode"),
        (make_strategy("dico"), "how much of the whole text is decoded"),
        (APD.__new__(APD), "the whole sequence"),
    ],
    ids=["oracle", "dico", "apd"],
)
def test_what_reads_more_than_its_block_is_refused_by_name(strategy, found):
    with pytest.raises(InputError, match=f"strategy: found {strategy.name}, which reads {found}"):
        Engine(strategy, MASK, SIZE)


def test_an_export_says_where_it_runs(filter_folder):
    config = json.loads((filter_folder / "learn2pd/config.json").read_text())
    assert config["logits_only"] is True
    card = (filter_folder / "learn2pd/README.md").read_text()
    assert "Reads logits and the block's tokens alone: it runs in SGLang and dInfer, too" in card


def test_a_filter_that_reads_hidden_states_says_so_and_is_refused(filter_folder, tmp_path, monkeypatch):
    _, config = load_filter(filter_folder / "learn2pd")
    monkeypatch.setitem(FEATURES, "entropy", replace(FEATURES["entropy"], needs=frozenset({"hidden"})))
    save_filter(tmp_path / "filter", build_filter(config), config, "# random\n")
    assert json.loads((tmp_path / "filter/config.json").read_text())["logits_only"] is False
    assert "it runs in this project's own loop alone" in (tmp_path / "filter/README.md").read_text()
    with pytest.raises(InputError, match="strategy: found learn2pd, which reads hidden states"):
        Engine(make_strategy("learn2pd", filter=tmp_path / "filter"), MASK, SIZE)


def test_a_filter_for_another_vocabulary_mask_block_or_base_is_refused(filter_folder, tiny_checkpoint):
    rule = made("learn2pd", filter_folder)
    with pytest.raises(InputError, match="mask_id"):
        Engine(rule, 5, SIZE)
    with pytest.raises(InputError, match="logits: found 65 token ids; accepted: 64"):
        Engine(rule, MASK, SIZE).commit(torch.zeros(1, SIZE, 65), torch.full((1, SIZE), MASK))
    with pytest.raises(InputError, match="base_fingerprint"):
        Engine(rule, MASK, SIZE, base=tiny_checkpoint)


# --- SGLang -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def algorithm(monkeypatch):
    """A stub of the parts of SGLang that the algorithm touches; ``algorithm(settings)`` builds the registered class."""
    names = ["sglang", "sglang.srt", "sglang.srt.dllm", "sglang.srt.dllm.algorithm", "sglang.srt.dllm.algorithm.base"]
    modules = {name: ModuleType(name) for name in names}

    class DllmAlgorithm:
        def __init__(self, config):
            self.block_size, self.mask_id = config.block_size, config.mask_id

        def init_step_state(self, forward_batch):
            return [None] * forward_batch.batch_size

    modules[names[3]].algo_name_to_cls, modules[names[4]].DllmAlgorithm = {}, DllmAlgorithm
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    for_sglang.register()
    registered = modules[names[3]].algo_name_to_cls["LearnedDecoding"]
    return lambda settings: registered(
        SimpleNamespace(block_size=SIZE, mask_id=MASK, algorithm_config={"block_size": SIZE} | settings)
    )


@pytest.mark.parametrize("wrapped", [False, True], ids=["logits", "logits_output"])
@pytest.mark.parametrize("name", STRATEGIES)
def test_sglang_writes_what_the_decode_loop_writes(name, wrapped, algorithm, random_llada, prompts, filter_folder):
    strategy, options = chosen(name, filter_folder)
    settings = {"strategy": strategy} | options
    blocks = 1 if name == "klass" else 2
    config = DecodeConfig(SIZE * blocks, SIZE, eot="off")
    ours = algorithm(settings)
    for prompt in prompts[:2]:
        expected = decode(random_llada, [prompt], config, made(name, filter_folder)).sequences[0].tolist()
        states = [None]

        def step(logits, ids, begins):
            nonlocal states
            batch = SimpleNamespace(batch_size=1, input_ids=ids.reshape(-1).clone())
            states = ours.init_step_state(batch) if begins else states
            full = logits.flatten(0, 1)
            done = ours.step(batch, SimpleNamespace(full_logits=full) if wrapped else full, states)
            assert done == [False]  # the keys of these tokens are not written yet
            ids.copy_(batch.input_ids.view(1, -1))
            if not (ids == MASK).any():
                assert ours.step(batch, full, states) == [True]

        assert looped(random_llada, prompt, blocks, step)[0] == expected


@pytest.mark.parametrize("name", STRATEGIES)
def test_sglang_takes_a_request_in_the_middle_of_anothers_block(name, algorithm, random_llada, prompts, filter_folder):
    # A state that went to the wrong request, or began anew with each round, would decode to other tokens in company.
    strategy, options = chosen(name, filter_folder)
    ours = algorithm({"strategy": strategy} | options)
    rule, config = made(name, filter_folder), DecodeConfig(SIZE, SIZE, eot="off")
    expected = [decode(random_llada, [prompt], config, rule) for prompt in prompts[:2]]
    ids = [torch.full((SIZE,), MASK) for _ in expected]
    states, steps, joins = [None, None], [0, 0], int(expected[0].nfe[0]) // 2
    assert joins or name == "published"  # the first is in the middle of its block
    for number in range(64):
        present = [row for row in ((0,) if number < joins else (1, 0)) if (ids[row] == MASK).any()]
        if not present:
            break
        logits = []
        for row in present:
            tokens = torch.tensor([prompts[row] + ids[row].tolist()])
            places = torch.arange(tokens.shape[1])
            logits.append(random_llada.logits(random_llada(tokens, None, places[None], places)[-SIZE:]).clone())
        batch = SimpleNamespace(batch_size=len(present), input_ids=torch.cat([ids[row] for row in present]))
        kept = [states[row] for row in present]
        ours.step(batch, torch.cat(logits), kept)
        for row, state, block in zip(present, kept, batch.input_ids.view(-1, SIZE), strict=True):
            states[row], ids[row], steps[row] = state, block.clone(), steps[row] + 1
    for row, out in enumerate(expected):
        assert ids[row].tolist() == out.sequences[0].tolist()
        assert steps[row] == int(out.nfe[0])


def test_sglang_keeps_the_prompt_even_where_it_holds_mask(algorithm):
    ours = algorithm({"strategy": "threshold", "threshold": 0.0})
    ids = torch.tensor([MASK, 2, *[MASK] * 6, *[MASK] * 8])
    known = torch.arange(SIZE) < torch.tensor([[2], [0]])
    batch = SimpleNamespace(batch_size=2, input_ids=ids, dllm_prompt_mask=known)
    logits = torch.zeros(2 * SIZE, 64)
    logits[:, 7] = 9
    states = ours.init_step_state(batch)
    assert ours.step(batch, logits, states) == [False, False]
    assert batch.input_ids is ids
    assert ids.tolist() == [MASK, 2, *[7] * 14]
    assert ours.step(batch, logits, states) == [True, True]


def test_sglang_finds_the_plugin_where_the_package_declares_it():
    declared = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["entry-points"][
        "sglang.srt.plugins"
    ]
    assert [pkgutil.resolve_name(name) for name in declared.values()] == [for_sglang.register]


def test_sglang_is_told_what_does_not_run_there(algorithm, caplog):
    with pytest.raises(InputError):
        algorithm({"strategy": "oracle"})
    assert "oracle, which reads a reference decode" in caplog.text  # SGLang itself would only say: unknown algorithm


# --- dInfer -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("announced", [True, False])
@pytest.mark.parametrize("name", STRATEGIES)
def test_dinfer_writes_what_the_decode_loop_writes(name, announced, random_llada, prompts, filter_folder):
    blocks = 1 if name == "klass" else 2
    config = DecodeConfig(SIZE * blocks, SIZE, eot="off")
    for prompt in prompts[:2]:
        ours = LearnedParallelDecoder(Engine(made(name, filter_folder), MASK, SIZE), eos_id=EOT)
        expected = decode(random_llada, [prompt], config, made(name, filter_folder)).sequences[0].tolist()
        block = -1

        def step(logits, ids, begins, ours=ours):
            nonlocal block
            block += begins
            if begins and announced:
                ours.block_init(ids, block)
            x = torch.zeros(1, SIZE * 3).long()
            x[:, SIZE * block : SIZE * block + SIZE] = ids
            ours.decode(logits, SIZE * block, SIZE * block + SIZE, x)
            ids.copy_(x[:, SIZE * block : SIZE * block + SIZE])

        assert looped(random_llada, prompt, blocks, step)[0] == expected


def test_dinfer_decodes_samples_at_different_blocks_in_changing_company():
    # dInfer's batches of the moment: samples come and go between the steps of a block, and nothing says which they are.
    rule = make_strategy("klass", threshold=0.1, divergence=0.5, history=2)
    ours, single = LearnedParallelDecoder(Engine(rule, MASK, SIZE)), Engine(rule, MASK, SIZE)
    x = torch.cat((torch.randint(0, 60, (1, SIZE * 2)), torch.full((1, SIZE), MASK)), 1).repeat(4, 1)
    x[1, SIZE + 3 :] = MASK  # an earlier block, three positions of which are prompt
    x[3, :SIZE] = 5
    starts = torch.tensor([2, 1, 2, 2]) * SIZE  # the third has the first's ids throughout
    generator = torch.Generator().manual_seed(4)
    sharp = torch.arange(SIZE)[:, None] < SIZE // 2  # half of the positions grow sure, and stay doubtful as tokens
    base = {start: 4 * torch.randn(1, SIZE, 64, generator=generator) for start in (SIZE, 2 * SIZE)}
    noise = [torch.randn(1, SIZE, 64, generator=generator) for _ in range(5)]
    said = [{start: value + torch.where(sharp, 0.1, 3) * more for start, value in base.items()} for more in noise]

    def decoded(remembers):
        out = x.clone()
        for row, start in enumerate(starts.tolist()):
            state, block = None, out[row : row + 1, start : start + SIZE]
            prompt = block != MASK
            for logits in said[: 3 + row % 2]:
                transfer, tokens, state = single.commit(logits[start], block, state if remembers else None, prompt)
                block.copy_(torch.where(transfer, tokens, block))
        return out

    expected, steps = decoded(True), [0] * 4
    assert not torch.equal(expected, decoded(False))
    for rows in ([0, 1], [2, 3], [3], [1, 2, 0], [2], [0, 3], [1], [1, 3]):
        some = SimpleNamespace(data=x[rows])
        logits = torch.cat([said[steps[row]][int(starts[row])] for row in rows])
        ours.batch_decode(logits, starts[rows], some, SIZE)
        x[rows] = some.data
        for row in rows:
            steps[row] += 1
    assert steps == [3, 4, 3, 4]
    assert torch.equal(x, expected)


def test_dinfer_keeps_nothing_of_finished_blocks():
    ours = LearnedParallelDecoder(Engine(make_strategy("full_step"), MASK, SIZE))
    x = SimpleNamespace(data=torch.full((2, SIZE), MASK))
    for _ in range(SIZE):
        ours.batch_decode(torch.randn(2, SIZE, 64), torch.tensor([0, 0]), x, SIZE)
    assert (x.data != MASK).all()
    assert not any(ours.begun.values())


def test_dinfer_takes_a_last_block_that_is_short():
    ours = LearnedParallelDecoder(Engine(make_strategy("klass"), MASK, SIZE))
    x = torch.full((2, SIZE + 3), MASK)
    ours.block_init(x[:, SIZE:], 1)
    for _ in range(3):
        ours.decode(torch.randn(2, 3, 64), SIZE, SIZE + 3, x)
    assert (x[:, :SIZE] == MASK).all()
    assert (x[:, SIZE:] != MASK).all()


# --- transformers -----------------------------------------------------------------------------------------------------


def padded(prompts):
    width = max(map(len, prompts))
    ids = torch.tensor([[EOT] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return {"input_ids": ids, "attention_mask": mask}


SETTINGS = {"gen_length": 24, "block_length": SIZE}


@pytest.mark.parametrize(("cache", "eot"), [("none", "commit"), ("dual", "off")])
@pytest.mark.parametrize("name", ["threshold", "klass", "learn2pd"])
def test_generate_returns_what_the_decoder_decodes(name, cache, eot, ending_llada, prompts, filter_folder):
    inputs, settings = padded(prompts), SETTINGS | {"cache": cache, "eot": eot}
    expected = Decoder(ending_llada, made(name, filter_folder)).generate(prompts, **settings)
    written = []
    found = ending_llada.model.generate(
        **inputs, custom_generate=learned_decoding, strategy=name, options=STRATEGIES[name] or None,
        filter=filter_folder / name if name == "learn2pd" else None, on_step=lambda step: written.append(step.changed.sum()),
        **settings,
    )  # fmt: skip
    width = inputs["input_ids"].shape[1]
    assert torch.equal(found[:, :width], inputs["input_ids"])
    kept = found.shape[1] - width
    assert torch.equal(found[:, width:], expected.sequences[:, :kept])
    assert (expected.sequences[:, kept:] == EOT).all()
    assert eot == "off" or (expected.sequences[:, kept - 1] != EOT).any() or (expected.sequences == EOT).any(1).all()
    assert sum(written) == expected.sequences.numel()  # every position is streamed once


class AfterToken(StoppingCriteria):
    """Ends a row whose newest token is this one, as a stop string does."""

    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] == self.token


def test_stopping_criteria_end_a_row_at_their_token_also_in_its_last_block(random_base, prompts):
    rule = {"strategy": "threshold", "options": {"threshold": 0.3}}
    whole = Decoder(random_base, make_strategy("threshold", threshold=0.3)).generate(prompts, eot="off", **SETTINGS)
    for place in (3, 11, 22):
        token = int(whole.sequences[1, place])
        found = random_base.model.generate(
            **padded(prompts), custom_generate=learned_decoding, stopping_criteria=[AfterToken(token)], eot="off", **rule,
            **SETTINGS,
        )[:, 11:]  # fmt: skip
        lengths = []
        for row, region in zip(found.tolist(), whole.sequences.tolist(), strict=True):
            end = region.index(token) + 1 if token in region else len(region)
            lengths.append(end)
            assert row == (region[:end] + [EOT] * len(region))[: len(row)]
        assert found.shape[1] == max(lengths)


def test_generate_leaves_the_model_as_it_was_and_answers_with_a_dict_on_request(tiny_llada):
    model = tiny_llada.train()
    model.model.transformer["wte"].weight.requires_grad_(False)
    out = model.generate(
        torch.tensor([[1, 2, 3]]), custom_generate=learned_decoding, max_new_tokens=8, block_length=4,
        return_dict_in_generate=True,
    )  # fmt: skip
    assert out.sequences.shape[1] <= 11
    assert not out.sequences.is_inference()
    assert model.training
    assert [each.requires_grad for each in model.parameters()].count(False) == 1


def test_a_filter_is_checked_against_the_folder_that_the_model_came_from(tiny_checkpoint, tmp_path):
    predictor = MaskPredictor.from_pretrained(tiny_checkpoint, device="cpu")
    config = FilterConfig(
        block_length=SIZE, gen_length=24, vocab_size=predictor.vocab_size, mask_id=predictor.ids.mask,
        base_fingerprint=fingerprint(tiny_checkpoint), base_family="llada",
    )  # fmt: skip
    save_filter(tmp_path / "fits", build_filter(config), config, "# random\n")
    other = FilterConfig(**vars(config) | {"base_fingerprint": "another"})
    save_filter(tmp_path / "other", build_filter(other), other, "# random\n")

    def generate(folder):
        return predictor.model.generate(
            torch.tensor([[1, 2, 3]]), custom_generate=learned_decoding, strategy="learn2pd", filter=folder, **SETTINGS
        )

    assert generate(tmp_path / "fits").shape[0] == 1
    with pytest.raises(InputError, match="base_fingerprint"):
        generate(tmp_path / "other")


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ({}, "custom_generate"),
        ({"custom_generate": learned_decoding, "do_sample": True, "top_k": 5}, "logits_processor"),
        ({"custom_generate": learned_decoding, "num_beams": 2}, "num_beams"),
        ({"custom_generate": learned_decoding, "strategy": "learn2pd"}, "filter"),
        ({"custom_generate": learned_decoding, "gen_length": 20}, "block_length"),
    ],
    ids=["no autoregressive loop", "logits processors", "beams", "no filter", "no whole blocks"],
)
def test_what_generate_cannot_do_here_is_named(asked, field, tiny_llada):
    with pytest.raises(InputError, match=field):
        tiny_llada.generate(torch.tensor([[1, 2, 3]]), **asked)


ONES = torch.ones(1, 3).long()


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        *(({"gen_length": value}, "gen_length") for value in (0, -8, 8.0, "8", True, 10**14)),
        *(({"max_new_tokens": value}, "max_new_tokens") for value in (0, "8")),
        ({"gen_length": 8, "max_new_tokens": 16}, "max_new_tokens"), ({"max_length": 11}, "max_length"),
        ({"gen_length": 8, "generation_config": GenerationConfig(max_new_tokens=16)}, "max_new_tokens"),
        ({"do_sample": True, "top_k": 0}, "do_sample"), ({"penalty_alpha": 0.6}, "penalty_alpha"),
        ({"prompt_lookup_num_tokens": 2}, "prompt_lookup_num_tokens"), ({"assistant_model": 5}, "assistant_model"),
        *(({"num_return_sequences": value}, "num_return_sequences") for value in (0, -1, "2", 1.5)),
        *(({"attention_mask": mask}, "attention_mask") for mask in (ONES[:, :2], ONES[:, [0, 0, 0, 0]], ONES[0], [[1, 1, 1]])),
        ({"attention_mask": torch.tensor([[1, 0, 1]])}, "attention_mask"),
        *(({"options": value}, "options") for value in ("abc", {1: 2}, [], 5)), ({"on_step": 5}, "on_step"),
        ({"on_step": None}, "on_step"), ({"filter": ""}, "threshold.filter"), ({"helper": "x"}, "threshold.helper"),
    ],
    ids=str,
)  # fmt: skip
def test_what_generate_is_given_is_checked(asked, field, tiny_llada):
    # gen_length 0 became 128, samples were the most probable tokens, and a mask of ones of another width was dropped.
    settings = {"gen_length": 8, "block_length": 8} if "max" not in str(asked) else {"block_length": 8}
    with pytest.raises(InputError, match=f"^{field}: found .*; accepted: ."):
        tiny_llada.generate(
            torch.tensor([[1, 2, 3]]), custom_generate=learned_decoding, strategy="threshold", **settings | asked
        )


def test_either_length_is_enough_and_prompts_may_be_padded_on_either_side(tiny_llada):
    asked = {"custom_generate": learned_decoding, "block_length": 8, "eot": "off"}
    ids = torch.tensor([[1, 2, 3]])
    expected = tiny_llada.generate(ids, gen_length=8, **asked)
    assert expected.shape == (1, 11)
    for lengths in ({"max_new_tokens": 8}, {"gen_length": 8, "max_new_tokens": 8}):
        assert torch.equal(tiny_llada.generate(ids, **lengths, **asked), expected)
    for pads in ((1, 0), (0, 1)):
        mask = torch.nn.functional.pad(ONES, pads)
        padded = tiny_llada.generate(torch.nn.functional.pad(ids, pads), attention_mask=mask, gen_length=8, **asked)
        assert torch.equal(padded[:, 4:], expected[:, 3:])


def test_generate_decodes_checkpoints_of_every_family(family_checkpoint, tmp_path):
    # Dream's logits are of the position before, and each family names its tokens and its longest text otherwise.
    predictor = MaskPredictor.from_pretrained(family_checkpoint, device="cpu")
    model, tokenizer = predictor.model, predictor.tokenizer
    if model.config.mask_token_id is None:  # as LLaDA-MoE is published
        with pytest.raises(InputError, match=r"model\.config\.mask_token_id: found None"):
            model.generate(torch.tensor([[1, 2, 3]]), custom_generate=learned_decoding)
        model.config.mask_token_id = tokenizer.mask_token_id
    tokenizer.padding_side = "left"
    texts = ["What is 3 + 4?", "Sort these words: pear, apple, fig"]
    messages = [[{"role": "user", "content": text}] for text in texts]
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    config = FilterConfig(
        block_length=SIZE, gen_length=24, vocab_size=predictor.vocab_size, mask_id=predictor.ids.mask, threshold=0.5,
        base_fingerprint=fingerprint(family_checkpoint), base_family=predictor.family,
    )  # fmt: skip
    torch.manual_seed(2)
    save_filter(tmp_path / "filter", build_filter(config), config, "# random\n")
    for strategy, options in (("threshold", {"threshold": 0.3}), ("learn2pd", {"filter": tmp_path / "filter"})):
        for settings in ({"cache": "none"}, {"cache": "dual", "eot": "off"}):
            expected = Decoder(predictor, make_strategy(strategy, **options)).generate(texts, **SETTINGS, **settings)
            found = model.generate(
                **inputs, custom_generate=learned_decoding, strategy=strategy, options=options, **SETTINGS, **settings
            )[:, inputs["input_ids"].shape[1] :]
            assert torch.equal(found, expected.sequences[:, : found.shape[1]])
            assert (expected.sequences[:, found.shape[1] :] == predictor.ids.eot).all()
