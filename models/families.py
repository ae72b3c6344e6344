"""The model families: which code computes a checkpoint, and what else is to be known of it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerFast, Qwen2Tokenizer

from models.checkpoint import read_json
from models.dream import DreamModel
from models.errors import InputError, first_line
from models.layers import MaskedLM
from models.llada import LLaDAModelLM
from models.llada_moe import LLaDAMoEModelLM


@dataclass(frozen=True)
class Family:
    """What is to be known of a model family beside its modelling code.

    Attributes:
        model: Its model; ``config_class`` reads ``config.json``.
        tokenizer: Class that reads its tokenizer's files where there is no ``tokenizer.json``; ``None``: the one that
            ``tokenizer_config.json`` names.
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


def described(config_file: Path) -> tuple[dict[str, Any], Family, PreTrainedConfig]:
    """A checkpoint's ``config.json``, its family, and the configuration that the family makes of it.

    Raises:
        InputError: It cannot be read, is of no known family, or has a field that is not accepted.
    """
    accepted = "a readable config.json of a mask predictor"
    raw = read_json(config_file, accepted)
    if not isinstance(raw, dict):
        raise InputError(str(config_file), f"a JSON {type(raw).__name__}", accepted)
    # LLaDA-MoE is published as a "llada" like LLaDA itself: its architecture tells them apart.
    names = raw.get("architectures")
    if isinstance(names, list) and any(str(name).startswith("LLaDAMoE") for name in names):
        raw["model_type"] = "llada_moe"
    found = raw.get("model_type")
    family = FAMILIES.get(found) if isinstance(found, str) else None
    if family is None:
        raise InputError(f"{config_file}: model_type", repr(found), " | ".join(FAMILIES))
    kind: Any = family.model.config_class
    try:
        return raw, family, kind.from_dict(raw)
    except InputError as error:
        raise error.within(config_file) from None
    except Exception as error:  # transformers checks its own fields, each in its own way
        raise InputError(str(config_file), first_line(error), accepted) from error
