"""LLaDA-MoE in plain PyTorch, reading and writing the official checkpoint format.

LLaDA's attention in both directions and its unshifted logits, queries and keys that are normalised, and in place of each MLP
many small ones, of which a router picks a few for every token; Zhu et al., "LLaDA-MoE: A Sparse MoE Diffusion Language
Model", arXiv 2509.24389. The experts of a layer are kept as one tensor; on disk each has its own, under the official names.
"""

import itertools
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from models.errors import InputError
from models.layers import Elementwise, only
from models.rules import COUNT, FLAG, NOT_NEGATIVE, POSITIVE, Rule, check, list_of, number, whole
from models.stack import Attention, Layer, StackLM

_ONLY = {
    "hidden_act": "silu",
    "qk_layernorm": True,
    "moe_router_score_function": "softmax",
    "routed_scaling_factor": 1,
    "partial_rotary_factor": 1,
}
# Not implemented, and no published checkpoint asks for them; left out, null, false and 0 all mean without.
_WITHOUT = (
    "attention_bias", "clip_qkv", "moe_router_enable_expert_bias", "norm_topk_prob", "rope_parameters", "rope_scaling",
    "router_num_group", "router_topk_group", "shared_expert_intermediate_size",
)  # fmt: skip

_RULES = {
    **dict.fromkeys(("vocab_size", "hidden_size", "expert_intermediate_size", "num_attention_heads"), COUNT),
    **dict.fromkeys(("num_experts", "num_experts_per_tok", "max_position_embeddings"), COUNT),
    **dict.fromkeys(("mask_token_id", "eos_token_id", "pad_token_id"), whole(0).or_null()),
    "num_key_value_heads": COUNT.or_null(), "num_hidden_layers": whole(1, 1024), "initializer_range": NOT_NEGATIVE,
    "rope_theta": POSITIVE, "tie_word_embeddings": FLAG,
    "rms_norm_eps": number("a number above 0 and at most 1", lambda value: 0 < value <= 1),
    "moe_layer_freq": Rule("1", lambda value: isinstance(value, int) or list_of(COUNT, "").accepts(value)),
}  # fmt: skip


class LLaDAMoEConfig(PreTrainedConfig):
    """The official ``config.json`` fields; unknown ones are kept and written back unchanged.

    Args:
        vocab_size: Number of token ids.
        hidden_size: Width of the residual stream.
        expert_intermediate_size: Width of an expert's gated hidden layer.
        num_experts: Experts of a layer.
        num_experts_per_tok: Experts that a token goes through.
        num_hidden_layers: Number of layers.
        num_attention_heads: Number of query heads; ``hidden_size`` must be a multiple.
        num_key_value_heads: Number of key/value heads; ``None``: as many.
        max_position_embeddings: Longest sequence, in tokens.
        initializer_range: Standard deviation of fresh weights.
        rms_norm_eps: Epsilon of the RMS normalisation.
        rope_theta: Base of the rotary embedding.
        tie_word_embeddings: Use the embedding as the head; the checkpoint then has no ``lm_head`` tensor.
        moe_layer_freq: 1 for each layer that has experts: for all of them.
        mask_token_id: Id of ``<|mask|>``.
        eos_token_id: Id of ``<|endoftext|>``, which also pads.
        pad_token_id: The same.
        use_cache: Kept as it is found.
        **kwargs: Further fields; see ``_ONLY`` and ``_WITHOUT`` for those whose value is checked.

    Raises:
        InputError: A field asks for a computation this implementation does not do, or sizes do not fit.
    """

    model_type = "llada_moe"

    def __init__(
        self,
        vocab_size: int = 157184,
        hidden_size: int = 2048,
        expert_intermediate_size: int = 1024,
        num_experts: int = 64,
        num_experts_per_tok: int = 8,
        num_hidden_layers: int = 16,
        num_attention_heads: int = 16,
        num_key_value_heads: int | None = None,
        max_position_embeddings: int = 8192,
        initializer_range: float = 0.02,
        rms_norm_eps: float = 1e-5,
        rope_theta: float = 50000.0,
        tie_word_embeddings: bool = False,
        moe_layer_freq: int | list[int] = 1,
        mask_token_id: int | None = 156895,
        eos_token_id: int | None = 156892,
        pad_token_id: int | None = 156892,
        use_cache: bool = False,
        **kwargs: Any,
    ) -> None:
        check(locals(), _RULES)
        only(kwargs, _ONLY)
        for name in _WITHOUT:
            if found := kwargs.pop(name, None):
                raise InputError(name, repr(found), "null; nothing else is implemented")
        if set([moe_layer_freq] if isinstance(moe_layer_freq, int) else moe_layer_freq) != {1}:
            raise InputError("moe_layer_freq", moe_layer_freq, "1; nothing else is implemented")
        heads = num_key_value_heads or num_attention_heads
        if hidden_size % num_attention_heads:
            raise InputError("hidden_size", hidden_size, f"a multiple of num_attention_heads {num_attention_heads}")
        if num_attention_heads % heads:
            raise InputError("num_key_value_heads", heads, f"a divisor of num_attention_heads {num_attention_heads}")
        if num_experts_per_tok > num_experts:
            raise InputError("num_experts_per_tok", num_experts_per_tok, f"at most num_experts {num_experts}")
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.expert_intermediate_size = expert_intermediate_size
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = heads
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta = rope_theta
        self.moe_layer_freq = moe_layer_freq
        self.mask_token_id = mask_token_id
        self.use_cache = use_cache
        ours: dict[str, Any] = {"eos_token_id": eos_token_id, "pad_token_id": pad_token_id}
        super().__init__(**ours, tie_word_embeddings=tie_word_embeddings, **kwargs)  # pyright: ignore[reportCallIssue]


def grouped(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Rows times matrices, each run of rows by a matrix of its own.

    Args:
        x: ``(N, D)``.
        weights: ``(E, O, D)``.
        ends: ``(E,)`` int32, where the run of each matrix ends; runs may be empty.

    Returns:
        ``(N, O)``.
    """
    if x.device.type in ("cpu", "cuda") and hasattr(F, "grouped_mm"):
        return F.grouped_mm(x, weights.transpose(1, 2), offs=ends)
    bounds = [0, *ends.tolist()]
    return torch.cat(
        [F.linear(x[start:stop], weight) for start, stop, weight in zip(bounds, bounds[1:], weights, strict=False)]
    )


class Experts(nn.Module):
    """The gated MLPs of a layer: ``gate_up_proj`` ``(E, 2 * I, D)`` and ``down_proj`` ``(E, D, I)``."""

    def __init__(self, count: int, width: int, hidden: int, ops: Elementwise) -> None:
        super().__init__()
        self.ops = ops
        self.gate_up_proj = nn.Parameter(torch.empty(count, 2 * hidden, width))
        self.down_proj = nn.Parameter(torch.empty(count, width, hidden))

    def forward(self, flat: Tensor, chosen: Tensor, weight: Tensor) -> Tensor:
        """Sums what the chosen experts say of each token.

        Args:
            flat: ``(N, D)``.
            chosen: ``(N, k)`` int64, numbers of experts.
            weight: ``(N, k)``, what each counts.

        Returns:
            ``(N, D)``.
        """
        order = chosen.flatten().argsort(stable=True)  # tokens by expert
        counts = torch.zeros_like(self.gate_up_proj[:, 0, 0], dtype=torch.int32)
        ends = counts.index_add_(0, chosen.flatten(), torch.ones_like(order, dtype=torch.int32)).cumsum(0).int()
        gate, up = grouped(flat[order // chosen.shape[1]], self.gate_up_proj, ends).chunk(2, dim=-1)
        said = grouped(self.ops.gate(gate, up), self.down_proj, ends)
        # Back in order and then summed: adding where they belong would round differently from run to run on a GPU.
        said = said[order.argsort()].view(*chosen.shape, -1)
        return (said * weight[..., None]).sum(1)


class SparseMLP(nn.Module):
    """A router and its experts, ``(N, D)`` to the same. The weights of the chosen ones are not made to add up to 1."""

    def __init__(self, config: LLaDAMoEConfig, ops: Elementwise) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = Experts(config.num_experts, config.hidden_size, config.expert_intermediate_size, ops)

    def forward(self, flat: Tensor) -> Tensor:
        weight, chosen = self.gate(flat).softmax(-1, dtype=torch.float32).topk(self.top_k, dim=-1)
        return self.experts(flat, chosen, weight.to(flat.dtype))


class LLaDAMoEModelLM(StackLM):
    """The mask predictor, named as in the official checkpoints' ``architectures``."""

    config_class = LLaDAMoEConfig
    _no_split_modules = ["Layer"]  # noqa: RUF012 - the base class declares it so

    @classmethod
    def check_names(cls, config: LLaDAMoEConfig, names: Iterable[str]) -> None:
        # transformers makes one tensor of the experts', and fails over it as a whole.
        places = itertools.product(range(config.num_hidden_layers), range(config.num_experts), ("gate", "up", "down"))
        wanted = {f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight" for layer, expert, part in places}
        found = {name for name in names if ".mlp.experts." in name}
        for kind, wrong in (("missing", wanted - found), ("unexpected", found - wanted)):
            if wrong:
                raise ValueError(f"{kind} tensors {', '.join(sorted(wrong)[:5])}{' ...' if len(wrong) > 5 else ''}")

    @staticmethod
    def layer(config: LLaDAMoEConfig, ops: Elementwise) -> Layer:
        return Layer(config, ops, Attention(config, ops, qk_norm=True), SparseMLP(config, ops))

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Experts):
            for parameter in module.parameters():
                nn.init.normal_(parameter, std=self.config.initializer_range)


AutoConfig.register(LLaDAMoEConfig.model_type, LLaDAMoEConfig)
AutoModel.register(LLaDAMoEConfig, LLaDAMoEModelLM)
_EXPERT, _LAYER = "mlp.experts.*.", "mlp.experts."
register_checkpoint_conversion_mapping(
    LLaDAMoEConfig.model_type,
    [
        WeightConverter(
            [f"{_EXPERT}gate_proj.weight", f"{_EXPERT}up_proj.weight"], f"{_LAYER}gate_up_proj",
            operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
        ),
        WeightConverter(f"{_EXPERT}down_proj.weight", f"{_LAYER}down_proj", operations=[MergeModulelist(dim=0)]),
    ],
)  # fmt: skip
