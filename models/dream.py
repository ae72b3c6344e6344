"""Dream in plain PyTorch, reading and writing the official checkpoint format.

Qwen2's layers with attention in both directions; Ye et al., "Dream 7B: Diffusion Large Language Models", arXiv 2508.15487.
It began as an autoregressive model and keeps its shift: the output at position ``i - 1`` predicts position ``i``, and the
first position's own output predicts the first.
"""

from typing import Any

from transformers import AutoConfig, AutoModel, PreTrainedConfig

from models.errors import InputError
from models.layers import Elementwise, only
from models.rules import COUNT, FLAG, NOT_NEGATIVE, POSITIVE, check, number, whole
from models.stack import MLP, Attention, Layer, StackLM

_ONLY = {"hidden_act": "silu", "rope_scaling": None, "rope_parameters": None, "use_sliding_window": False}
_RULES = {
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads"), COUNT),
    **dict.fromkeys(("mask_token_id", "eos_token_id", "pad_token_id"), whole(0).or_null()),
    "num_key_value_heads": COUNT.or_null(), "num_hidden_layers": whole(1, 1024), "max_position_embeddings": COUNT,
    "initializer_range": NOT_NEGATIVE, "rope_theta": POSITIVE, "tie_word_embeddings": FLAG,
    "rms_norm_eps": number("a number above 0 and at most 1", lambda value: 0 < value <= 1),
}  # fmt: skip


class DreamConfig(PreTrainedConfig):
    """The official ``config.json`` fields; unknown ones are kept and written back unchanged.

    Args:
        vocab_size: Number of token ids.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the MLP's gated hidden layer.
        num_hidden_layers: Number of layers.
        num_attention_heads: Number of query heads; ``hidden_size`` must be a multiple.
        num_key_value_heads: Number of key/value heads (grouped-query when below ``num_attention_heads``); ``None``: as many.
        max_position_embeddings: Longest sequence, in tokens.
        initializer_range: Standard deviation of fresh weights.
        rms_norm_eps: Epsilon of the RMS normalisation.
        rope_theta: Base of the rotary embedding.
        tie_word_embeddings: Use the embedding as the head; the checkpoint then has no ``lm_head`` tensor.
        mask_token_id: Id of ``<|mask|>``.
        eos_token_id: Id of ``<|endoftext|>``, which also pads.
        pad_token_id: The same.
        use_cache: Kept as it is found.
        **kwargs: Further fields; see ``_ONLY`` for those whose value is checked.

    Raises:
        InputError: A field asks for a computation this implementation does not do, or sizes do not divide.
    """

    model_type = "Dream"

    def __init__(
        self,
        vocab_size: int = 152064,
        hidden_size: int = 3584,
        intermediate_size: int = 18944,
        num_hidden_layers: int = 28,
        num_attention_heads: int = 28,
        num_key_value_heads: int | None = 4,
        max_position_embeddings: int = 131072,
        initializer_range: float = 0.02,
        rms_norm_eps: float = 1e-6,
        rope_theta: float = 1000000.0,
        tie_word_embeddings: bool = False,
        mask_token_id: int | None = 151666,
        eos_token_id: int | None = 151643,
        pad_token_id: int | None = 151643,
        use_cache: bool = False,
        **kwargs: Any,
    ) -> None:
        check(locals(), _RULES)
        only(kwargs, _ONLY)
        del kwargs["rope_scaling"], kwargs["rope_parameters"]  # transformers would make something of them
        heads = num_key_value_heads or num_attention_heads
        if hidden_size % num_attention_heads:
            raise InputError("hidden_size", hidden_size, f"a multiple of num_attention_heads {num_attention_heads}")
        if num_attention_heads % heads:
            raise InputError("num_key_value_heads", heads, f"a divisor of num_attention_heads {num_attention_heads}")
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = heads
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta = rope_theta
        self.mask_token_id = mask_token_id
        self.use_cache = use_cache
        ours: dict[str, Any] = {"eos_token_id": eos_token_id, "pad_token_id": pad_token_id}
        super().__init__(**ours, tie_word_embeddings=tie_word_embeddings, **kwargs)  # pyright: ignore[reportCallIssue]


class DreamModel(StackLM):
    """The mask predictor, named as in the official checkpoints' ``architectures``."""

    config_class = DreamConfig
    left_context = 1
    _no_split_modules = ["Layer"]  # noqa: RUF012 - the base class declares it so

    @staticmethod
    def layer(config: DreamConfig, ops: Elementwise) -> Layer:
        mlp = MLP(config.hidden_size, config.intermediate_size, ops)
        return Layer(config, ops, Attention(config, ops, bias=True), mlp)


AutoConfig.register(DreamConfig.model_type, DreamConfig)
AutoModel.register(DreamConfig, DreamModel)
