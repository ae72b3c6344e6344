"""Dream in plain PyTorch, reading and writing the official checkpoint format.

Qwen2's layers with attention in both directions; Ye et al., "Dream 7B: Diffusion Large Language Models", arXiv 2508.15487.
It began as an autoregressive model and keeps its shift: the output at position ``i - 1`` predicts position ``i``, and the
first position's own output predicts the first.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from transformers import AutoConfig, AutoModel

from models.layers import Elementwise, only
from models.rules import COUNT, Rule
from models.stack import MLP, Attention, Layer, StackConfig, StackLM

_ONLY = {"hidden_act": "silu", "rope_scaling": None, "rope_parameters": None, "use_sliding_window": False}


class DreamConfig(StackConfig):
    """The official ``config.json``; ``intermediate_size`` is the width of the MLP's gated hidden layer.

    See :class:`models.stack.StackConfig`, and ``_ONLY`` for fields whose value is checked.
    """

    model_type = "Dream"
    usual: ClassVar[Mapping[str, Any]] = {
        "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 131072, "initializer_range": 0.02,
        "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "tie_word_embeddings": False, "mask_token_id": 151666,
        "eos_token_id": 151643, "pad_token_id": 151643, "use_cache": False,
    }  # fmt: skip
    rules: ClassVar[Mapping[str, Rule]] = {"intermediate_size": COUNT}

    def __init__(self, **fields: Any) -> None:
        only(fields, _ONLY)
        del fields["rope_scaling"], fields["rope_parameters"]  # transformers would make something of them
        super().__init__(**fields)


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
