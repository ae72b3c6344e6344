"""What transformers' ``generate`` needs of a mask predictor, and what it must not do with one."""

from collections.abc import Callable
from typing import Any

from transformers import GenerationMixin

from models.errors import InputError


class DiffusionGenerationMixin(GenerationMixin):
    """``generate`` for a ``custom_generate`` alone, see ``decoding/adapters/for_transformers.py``.

    Transformers tells by the class's name that a model which has it can generate.
    """

    def generate(self, *args: Any, custom_generate: str | Callable[..., Any] | None = None, **kwargs: Any) -> Any:
        """Of transformers, whose own loop would take the model for an autoregressive one and is refused.

        Raises:
            InputError: No ``custom_generate``.
        """
        if custom_generate is None:
            accepted = "learned_decoding of decoding.adapters.for_transformers; this is no autoregressive model"
            raise InputError("custom_generate", None, accepted)
        if kwargs.get("gen_length"):  # else transformers warns of a default of its own that has no effect
            kwargs.setdefault("max_new_tokens", kwargs["gen_length"])
        return super().generate(*args, custom_generate=custom_generate, **kwargs)  # type: ignore[misc]
