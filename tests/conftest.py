"""Small models that every test can afford."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from models import LLaDAConfig, LLaDAModelLM
from models.tokenizer import train_tokenizer

LINES = ["What is 3 + 4?", "Sort these words: pear, apple, fig", "Tom has 12 apples and eats 5 of them.", "#### 7"]


@pytest.fixture(autouse=True)
def no_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test may reach a network or leave runs behind."""
    monkeypatch.setenv("WANDB_MODE", "disabled")


def make_llada(vocab_size: int, mask: int, eot: int) -> LLaDAModelLM:
    torch.manual_seed(0)
    config = LLaDAConfig(
        d_model=32,
        n_layers=2,
        n_heads=4,
        mlp_hidden_size=64,
        max_sequence_length=256,
        vocab_size=vocab_size,
        mask_token_id=mask,
        eos_token_id=eot,
        pad_token_id=eot,
        init_std=0.3,  # sharp enough that some guesses are confident
    )
    return LLaDAModelLM(config).eval()


@pytest.fixture
def tiny_llada() -> LLaDAModelLM:
    """Two random layers over 64 ids; MASK is 63, EoT and padding are 62."""
    return make_llada(64, mask=63, eot=62)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """The project's tokenizer, trained on a few lines."""
    return train_tokenizer(LINES * 4, 300)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A folder in the official format: two random layers and a tokenizer. Shared: do not write into it."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    mask, eot = tiny_tokenizer.convert_tokens_to_ids(["<|mdm_mask|>", "<|endoftext|>"])
    make_llada(len(tiny_tokenizer), mask, eot).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder
