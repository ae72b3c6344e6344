"""Predictors for the decode tests: a scripted one, and small random models of every family."""

import copy
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from models.predictor import MaskPredictor, TokenIds

VOCAB, MASK, EOT = 64, 63, 62


class ScriptedModel(nn.Module):
    """Logits from a function of ``(ids, attention, positions)``; counts its calls."""

    config = SimpleNamespace(model_type="llada")

    def __init__(self, script: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))
        self.script, self.calls, self.asked = script, 0, []

    def forward(self, ids: Tensor, attention: Tensor, positions: Tensor, logits_at: Tensor, head: bool = True):
        self.calls += 1
        self.asked.append(logits_at.clone())
        logits = self.script(ids, attention, positions)
        return type("Output", (), {"hidden_states": (logits.flatten(0, 1)[logits_at],)})

    def head(self, hidden: Tensor) -> Tensor:
        return hidden.clone()


def wrap(model: nn.Module, max_length: int = 512) -> MaskPredictor:
    return MaskPredictor(model, TokenIds(mask=MASK, eot=EOT, end_of_turn=61, pad=EOT, bos=60), VOCAB, max_length)


@pytest.fixture(scope="session")
def scripted() -> Callable[..., MaskPredictor]:
    """A predictor from a script; ``predictor.model.calls`` counts forwards."""
    return lambda script: wrap(ScriptedModel(script))


@pytest.fixture
def table() -> Callable[..., MaskPredictor]:
    """A predictor that says ``tokens[position]`` with ``logit[position]`` in the generated region, whatever is decoded."""

    def make(tokens: list[int], logits: list[float], prompt: int) -> MaskPredictor:
        def script(ids: Tensor, attention: Tensor, positions: Tensor) -> Tensor:
            out = torch.zeros(*ids.shape, VOCAB)
            where = (positions - prompt).clamp(0, len(tokens) - 1)
            out.scatter_(2, torch.tensor(tokens)[where][..., None], torch.tensor(logits)[where][..., None])
            return out

        return wrap(ScriptedModel(script))

    return make


@pytest.fixture(scope="session", params=["llada", "Dream", pytest.param("llada_moe", marks=pytest.mark.slow)])
def family(request: pytest.FixtureRequest) -> str:
    """Every family; LLaDA-MoE among the slow tests, since to a decode it is LLaDA, and one test of :mod:`test_cache` takes it."""
    return request.param


@pytest.fixture(scope="session")
def random_base(family, make_model) -> MaskPredictor:
    """Two random layers whose guesses depend on the context, sharp enough to be confident now and then."""
    return wrap(make_model(family, VOCAB, MASK, EOT))


@pytest.fixture(scope="session")
def ending_base(random_base) -> MaskPredictor:
    """The same, but it says EoT now and then, also with text left of it still to come."""
    model = copy.deepcopy(random_base.model)
    weight = model.model.transformer["ff_out"].weight if random_base.family == "llada" else model.lm_head.weight
    weight[EOT] *= 3.5 if random_base.family == "Dream" else 2
    return wrap(model)


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """Ragged prompts."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 60, (length,), generator=generator).tolist() for length in (3, 11, 1, 7, 5)]


@pytest.fixture(scope="session")
def random_helper():
    """A random Llama over the same ids."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from models.helper import Helper, HelperConfig

    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCAB, max_position_embeddings=512, initializer_range=0.05,
    )  # fmt: skip
    described = HelperConfig(
        base_fingerprint="unsaved", vocab_size=VOCAB, mask_id=MASK, eot_id=EOT, gen_length=24, eot_rule="commit"
    )
    return Helper(LlamaForCausalLM(config), described)
