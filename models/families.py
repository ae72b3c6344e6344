"""The model families: which code computes a checkpoint, and what else is to be known of it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerFast, Qwen2Tokenizer

from models.dream import DreamModel
from models.errors import InputError
from models.layers import MaskedLM
from models.llada import LLaDAModelLM
from models.llada_moe import LLaDAMoEModelLM


@dataclass(frozen=True)
class Family:
    """What is to be known of a model family beside its modelling code.

    Attributes:
        model: Its model; ``config_class`` reads ``config.json``.
        tokenizer: Class that reads its tokenizer's files; ``None``: the one that ``tokenizer_config.json`` names.
        mask: Text of the mask token.
        eot: Text of the token that ends and pads the generated text.
        end_of_turn: Text of the token that may close a turn before ``eot``.
        bos: Text of the token that opens a prompt.
        max_length: Field of ``config.json`` with the longest sequence, in tokens.
        embeddings: Name of the tensor of the token embeddings.
    """

    model: type[MaskedLM]
    tokenizer: Any
    mask: str
    eot: str
    end_of_turn: str
    bos: str
    max_length: str
    embeddings: str


FAMILIES = {
    "llada": Family(
        model=LLaDAModelLM,
        tokenizer=None,
        mask="<|mdm_mask|>",
        eot="<|endoftext|>",
        end_of_turn="<|eot_id|>",
        bos="<|startoftext|>",
        max_length="max_sequence_length",
        embeddings="model.transformer.wte.weight",
    ),
    "Dream": Family(
        model=DreamModel,
        tokenizer=Qwen2Tokenizer,  # what the checkpoint names is code of its own, which does the same
        mask="<|mask|>",
        eot="<|endoftext|>",
        end_of_turn="<|im_end|>",
        bos="<|beginoftext|>",
        max_length="max_position_embeddings",
        embeddings="model.embed_tokens.weight",
    ),
    "llada_moe": Family(
        model=LLaDAMoEModelLM,
        tokenizer=PreTrainedTokenizerFast,
        mask="<|mask|>",
        eot="<|endoftext|>",
        end_of_turn="<|role_end|>",
        bos="<|startoftext|>",
        max_length="max_position_embeddings",
        embeddings="model.embed_tokens.weight",
    ),
}
"""``model_type`` to its description."""


def read_config(config_file: Path) -> tuple[dict[str, Any], Family]:
    """A checkpoint's ``config.json`` and its family.

    Raises:
        InputError: It cannot be read, or is of no known family.
    """
    try:
        raw = json.loads(config_file.read_text())
    except (OSError, ValueError) as error:
        raise InputError(str(config_file), str(error), "a readable config.json of a mask predictor") from error
    # LLaDA-MoE is published as a "llada" like LLaDA itself: its architecture tells them apart.
    if any(str(name).startswith("LLaDAMoE") for name in raw.get("architectures") or ()):
        raw["model_type"] = "llada_moe"
    family = FAMILIES.get(raw.get("model_type"))
    if family is None:
        raise InputError(f"{config_file}: model_type", repr(raw.get("model_type")), " | ".join(FAMILIES))
    return raw, family


def described(raw: dict[str, Any], family: Family) -> PreTrainedConfig:
    """The configuration that the fields of a ``config.json`` are for.

    Raises:
        ValueError: They ask for what the family does not compute.
    """
    kind: Any = family.model.config_class
    return kind.from_dict(raw)
