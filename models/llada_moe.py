"""LLaDA-MoE in plain PyTorch, reading and writing the official checkpoint format.

LLaDA's attention in both directions and its unshifted logits, queries and keys that are normalised, and in place of each MLP
many small ones, of which a router picks a few for every token; Zhu et al., "LLaDA-MoE: A Sparse MoE Diffusion Language
Model", arXiv 2509.24389. The experts of a layer are kept as one tensor; on disk each has its own, under the official names.
"""

import itertools
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from models.errors import InputError
from models.layers import Elementwise, only
from models.rules import COUNT, Rule
from models.stack import Attention, Layer, StackConfig, StackLM

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


class LLaDAMoEConfig(StackConfig):
    """The official ``config.json``, see :class:`models.stack.StackConfig`, and ``_ONLY`` and ``_WITHOUT`` for what is checked.

    The family's own fields: ``expert_intermediate_size``, the width of an expert's gated hidden layer; ``num_experts`` of a
    layer, of which a token goes through ``num_experts_per_tok``; ``moe_layer_freq``, 1 for each layer that has experts.
    """

    model_type = "llada_moe"
    usual: ClassVar[Mapping[str, Any]] = {
        "vocab_size": 157184, "hidden_size": 2048, "expert_intermediate_size": 1024, "num_experts": 64,
        "num_experts_per_tok": 8, "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": None,
        "max_position_embeddings": 8192, "initializer_range": 0.02, "rms_norm_eps": 1e-5, "rope_theta": 50000.0,
        "tie_word_embeddings": False, "moe_layer_freq": 1, "mask_token_id": 156895, "eos_token_id": 156892,
        "pad_token_id": 156892, "use_cache": False,
    }  # fmt: skip
    rules: ClassVar[Mapping[str, Rule]] = {
        **dict.fromkeys(("expert_intermediate_size", "num_experts", "num_experts_per_tok"), COUNT),
        "moe_layer_freq": Rule(
            "1, for every layer; nothing else is implemented",
            lambda value: value == 1 or (isinstance(value, list) and all(each == 1 for each in value)),
        ),
    }

    def __init__(self, **fields: Any) -> None:
        only(fields, _ONLY)
        for name in _WITHOUT:
            if found := fields.pop(name, None):
                raise InputError(name, repr(found), "null; nothing else is implemented")
        super().__init__(**fields)
        if self.num_experts_per_tok > self.num_experts:
            raise InputError("num_experts_per_tok", self.num_experts_per_tok, f"at most num_experts {self.num_experts}")


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
