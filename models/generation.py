"""What transformers' ``generate`` needs of a mask predictor, and what it must not do with one."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin

from models.errors import InputError
from models.rules import COUNT, LENGTH, check

_OTHER_LOOPS = {
    "num_beams": 1, "do_sample": False, "penalty_alpha": None, "prompt_lookup_num_tokens": None, "assistant_early_exit": None,
    "use_mtp": False, "dola_layers": None, "constraints": None, "force_words_ids": None,
}  # fmt: skip
"""Settings that ask for another of transformers' loops, and what asks for none."""


class DiffusionGenerationMixin(GenerationMixin):
    """``generate`` for a ``custom_generate`` alone, see ``decoding/adapters/for_transformers.py``.

    Transformers tells by the class's name that a model which has it can generate.
    """

    def generate(
        self, inputs: Any = None, *args: Any, custom_generate: str | Callable[..., Any] | None = None, **kwargs: Any
    ) -> Any:
        """Of transformers, whose own loop would take the model for an autoregressive one and is refused.

        Raises:
            InputError: No ``custom_generate``, lengths that contradict each other, a number of answers or an attention mask that
                cannot be, or an assistant.
        """
        if custom_generate is None:
            accepted = "learned_decoding of decoding.adapters.for_transformers; this is no autoregressive model"
            raise InputError("custom_generate", None, accepted)
        rules = {
            "gen_length": LENGTH.or_null(),
            "max_new_tokens": LENGTH.or_null(),
            "num_return_sequences": COUNT.or_null(),
        }
        config = kwargs.get("generation_config")
        given = {name: kwargs.get(name, getattr(config, name, None)) for name in rules}
        check(given, rules)
        length, other = given["gen_length"], given["max_new_tokens"]
        if None not in (length, other) and length != other:
            raise InputError("max_new_tokens", f"{other} with gen_length {length}", "one of them")
        for name, accepted in (("max_length", "gen_length or max_new_tokens"), ("assistant_model", "none")):
            if kwargs.get(name) is not None:
                raise InputError(name, repr(kwargs[name])[:80], accepted)
        check_attention_mask(kwargs.get("attention_mask"), kwargs.get("input_ids") if inputs is None else inputs)
        if length is not None:  # else transformers warns of a default of its own that has no effect
            kwargs["max_new_tokens"] = length
        return super().generate(inputs, *args, custom_generate=custom_generate, **kwargs)  # type: ignore[misc]


def check_plain(config: GenerationConfig, processors: Sequence[Any]) -> None:
    """Raises an InputError for what would have no effect: logits processors, and settings of other loops of transformers'."""
    if names := [type(each).__name__ for each in processors]:
        raise InputError("logits_processor", ", ".join(names), "none; a strategy reads logits as the model gives them")
    for name, plain in _OTHER_LOOPS.items():
        if (value := getattr(config, name, None)) not in (None, plain):
            raise InputError(name, repr(value)[:80], f"{plain}; a strategy decides what is decoded")


def check_attention_mask(mask: Any, ids: Any) -> None:
    """Raises an InputError for a mask that is not one run of ones in each row, as long as the prompts.

    Args:
        mask: ``(B, P)``, 0 where a prompt is padded; ``None`` where none is.
        ids: ``(B, P)`` int64.
    """
    if mask is None or not isinstance(ids, Tensor):
        return
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        found = tuple(mask.shape) if isinstance(mask, Tensor) else repr(mask)[:80]
        raise InputError("attention_mask", found, f"shape {tuple(ids.shape)}, as input_ids")
    if (torch.diff(mask.bool().int()).abs().sum(1) > 1).any():
        raise InputError("attention_mask", "a row with a hole", "ones for the prompt, zeros on one side of it")
