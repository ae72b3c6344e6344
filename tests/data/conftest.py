"""Rollout batches: random ones, which no codec can shrink, and real ones from a small random LLaDA."""

from collections.abc import Callable

import pytest
import torch

from data.prompt import Prompt
from data.shards import RolloutBatch, RolloutKey
from decoding.config import DecodeConfig
from decoding.loop import decode
from decoding.output import StepTrace
from decoding.strategies import make_strategy
from models import LLaDAConfig, LLaDAModelLM
from models.features import Evidence
from models.predictor import MaskPredictor, TokenIds

EOT = 62


@pytest.fixture(scope="session")
def predictor() -> MaskPredictor:
    """Two random layers, sharp enough for guesses to stay for a few steps."""
    torch.manual_seed(0)
    config = LLaDAConfig(
        d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, mlp_hidden_size=64, vocab_size=64, mask_token_id=63,
        eos_token_id=EOT, pad_token_id=EOT, max_sequence_length=512, init_std=0.3,
    )  # fmt: skip
    ids = TokenIds(mask=63, eot=EOT, end_of_turn=61, pad=EOT, bos=60)
    return MaskPredictor(LLaDAModelLM(config), ids, 64, 512)


def some_prompts(count: int, first: int = 0) -> list[Prompt]:
    return [
        Prompt(f"p{n}", f"task{n % 2}", f"Question {n}?", f"Because {n}", str(n)) for n in range(first, first + count)
    ]


@pytest.fixture
def decoded(predictor: MaskPredictor) -> Callable[..., RolloutBatch]:
    """A batch that the real loop decoded, full_step and oracle."""

    def make(count: int, first: int = 0, gen_length: int = 16, block_length: int = 4, eot: str = "off") -> RolloutBatch:
        tokens = [[60, *range(n % 7 + 1)] for n in range(first, first + count)]
        config = DecodeConfig(gen_length, block_length, eot=eot)  # type: ignore[arg-type]
        full = decode(predictor, tokens, config, make_strategy("full_step"), record=True, record_eot=True)
        references = full.sequences
        oracle = decode(predictor, tokens, config, make_strategy("oracle"), references, record=True, record_eot=True)
        return RolloutBatch(
            index=list(range(first, first + count)),
            prompts=some_prompts(count, first),
            tokens=tokens,
            references=references,
            nfe={"full_step": full.nfe, "oracle": oracle.nfe},
            traces={"full_step": full.trace, "oracle": oracle.trace},
        )

    return make


@pytest.fixture
def noise() -> Callable[..., RolloutBatch]:
    """A batch of a full-step decode in which every number is random."""

    def make(count: int, gen_length: int, block_length: int, vocab: int) -> RolloutBatch:
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> torch.Tensor:
            return torch.rand(*shape, generator=generator)

        order = random(count, gen_length // block_length, block_length).argsort(-1)
        trace = []
        for step in range(gen_length):
            block, done = divmod(step, block_length)
            masked = order[:, block] >= done
            region = torch.arange(gen_length).expand(count, -1) >= (block + 1) * block_length
            region[:, block * block_length : (block + 1) * block_length] = masked
            evidence = Evidence(
                masked=masked,
                token=torch.randint(0, vocab, masked.shape, generator=generator),
                confidence=random(*masked.shape),
                margin=random(*masked.shape) * masked,
                entropy=random(*masked.shape) * masked,
                stable=torch.zeros_like(masked, dtype=torch.long),
                previous=torch.zeros(masked.shape),
                text=torch.randint(0, vocab, masked.shape, generator=generator),
            )
            steps, blocks = torch.full((count,), step), torch.full((count,), block)
            probability, top = random(count, gen_length) * region, (random(count, gen_length) < 0.5) & region
            trace.append(
                StepTrace(torch.arange(count), blocks, steps, evidence, masked, evidence.token, probability, top)
            )
        references = torch.randint(0, vocab, (count, gen_length), generator=generator)
        nfe = torch.full((count,), gen_length)
        tokens = [list(range(50))] * count
        prompts = some_prompts(count)
        return RolloutBatch(list(range(count)), prompts, tokens, references, {"full_step": nfe}, {"full_step": trace})

    return make


@pytest.fixture
def key() -> RolloutKey:
    settings = {"gen_length": 16, "block_length": 4, "passes": ["full_step", "oracle"], "eot_id": EOT}
    return RolloutKey("f" * 16, "a" * 16, settings)
