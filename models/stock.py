"""Helpers that nobody trained for the predictor: causal language models as published that share its token ids."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from models.causal_lm import check_same_ids, load_causal_lm, pretrained_folder
from models.checkpoint import read_json
from models.errors import InputError, first_line
from models.helper import DESCRIPTION, Helper, HelperConfig, load_helper, read_description
from models.predictor import MaskPredictor, checkpoint_folder

ACCEPTED = (
    "the folder of an exported helper, or a causal LM over the predictor's ids: its folder, or a reachable hub id"
)


def helper_folder(path: str | Path) -> Path:
    """The folder of a helper, an export or a published model; a hub id's files are downloaded first.

    Raises:
        InputError: Neither, or an export whose description is not right.
    """
    try:
        folder = checkpoint_folder(path)
    except InputError as error:
        if error.field != "base checkpoint":  # a file in it
            raise
        raise InputError("helper folder", repr(str(path)), ACCEPTED) from error
    if (folder / DESCRIPTION).is_file():
        read_description(folder)
    elif not (folder / "config.json").is_file():
        raise InputError("helper folder", f"{folder} without {DESCRIPTION} or config.json", ACCEPTED)
    elif not _names_a_model(folder / "config.json"):
        raise InputError("helper folder", f"{folder / 'config.json'} without model_type", ACCEPTED)
    return folder


def _names_a_model(file: Path) -> bool:
    """Whether a config.json is that of a model; a filter, say, has one too."""
    try:
        content = read_json(file)
    except InputError:
        return False
    return isinstance(content, dict) and isinstance(content.get("model_type"), str)


def load_any_helper(folder: Path, predictor: MaskPredictor) -> Helper:
    """Reads a helper to the predictor's device.

    Args:
        folder: From :func:`helper_folder`.
        predictor: The mask predictor. A published model may have fewer ids than it, or more.

    Raises:
        InputError: It cannot be read, or a published model has other ids, or none that could be compared.
    """
    if (folder / DESCRIPTION).is_file():
        return load_helper(folder, device=predictor.device)
    if not (folder / "tokenizer.json").is_file():
        raise InputError(f"{folder}: tokenizer.json", "no such file", "the tokenizer, to compare with the predictor's")
    check_same_ids(folder, predictor.tokenizer)
    model = load_causal_lm(folder, torch.float32 if predictor.device.type == "cpu" else "auto")
    helper = Helper(model, _stock_config(folder, predictor)).to(predictor.device)
    helper.probe(str(folder))
    return helper


def outline_helper(folder: Path, predictor: MaskPredictor) -> Helper:
    """A helper of fresh weights in its files' dtype, for whoever wants to know its sizes; an adapter counts as merged.

    Args:
        folder: From :func:`helper_folder`.
        predictor: The mask predictor, of which only sizes and family are known.

    Raises:
        InputError: The description cannot be read, or is of a helper over another vocabulary.
    """
    config = read_description(folder) if (folder / DESCRIPTION).is_file() else _stock_config(folder, predictor)
    if config.vocab_size != predictor.vocab_size:
        raise InputError("helper: vocab_size", config.vocab_size, f"{predictor.vocab_size}, that of the model")
    if config.adapter:
        assert config.source is not None
        folder = pretrained_folder(config.source)
    try:
        known = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model = AutoModelForCausalLM.from_config(
            known, dtype=known.dtype or torch.float32, attn_implementation="sdpa", trust_remote_code=False
        )
    except Exception as error:  # transformers has no error of its own
        raise InputError(str(folder), first_line(error), "a causal LM's config.json") from error
    return Helper(model, config)


def _stock_config(folder: Path, predictor: MaskPredictor) -> HelperConfig:
    return HelperConfig(
        vocab_size=predictor.vocab_size, mask_id=predictor.ids.mask, eot_id=predictor.ids.eot,
        base_fingerprint=predictor.fingerprint, gen_length=predictor.max_length, eot_rule="off", source=str(folder),
        base_family=predictor.family,
    )  # fmt: skip
