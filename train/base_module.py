"""LLaDA's pre-training objective in its supervised form, as a LightningModule."""

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning import LightningModule
from torch import Tensor

from data.base_data import BaseDataModule
from data.prompts import encode_prompts
from data.typed import Count, Length, NotNegative, Positive, Whole
from decoding.config import DecodeConfig
from decoding.loop import decode
from decoding.strategies import FullStep
from eval.measure import judge
from models import LLaDAConfig, LLaDAModelLM
from models.errors import InputError
from models.predictor import MaskPredictor, TokenIds
from train.callbacks import check_finite


class BaseModule(LightningModule):
    """Trains a small LLaDA from scratch: masked response tokens, cross-entropy weighted by 1/t (arXiv 2502.09992, eq. 5).

    Hidden matrices are optimised by Muon, everything else by AdamW, both with the same learning rate: constant after a
    linear warm-up, then linear to zero over the last ``decay_steps``.

    Args:
        d_model: Width.
        n_layers: Blocks.
        n_heads: Attention heads.
        mlp_hidden_size: Width of the gated MLP.
        max_sequence_length: Limit written into the checkpoint, in tokens.
        vocab_size: Size of the vocabulary.
        rope_theta: Base of the rotary embedding.
        learning_rate: Peak learning rate.
        weight_decay: Decoupled weight decay of the matrices.
        warmup_steps: Optimizer steps of linear warm-up.
        decay_steps: Optimizer steps of linear decay before ``max_steps``.
        start: Exported model to begin from, of the same shape; by default random weights.
        compile: Run the blocks through ``torch.compile``.
        probes: Validation prompts decoded with full_step at each validation, whose exact match is logged; 0 decodes none.
        probe_length: Their generation length, in tokens.

    Raises:
        InputError: A model that the memory here does not hold, or ``start`` of another shape.
    """

    def __init__(
        self, d_model: Count, n_layers: Count, n_heads: Count, mlp_hidden_size: Count, max_sequence_length: Count,
        vocab_size: Count, rope_theta: Positive, learning_rate: Positive, weight_decay: NotNegative, warmup_steps: Count,
        decay_steps: Whole, compile: bool, start: Path | None = None, probes: Whole = 64, probe_length: Length = 128,
    ) -> None:  # fmt: skip
        super().__init__()
        self.save_hyperparameters()
        self.probes, self.probe_length = probes, probe_length
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.warmup_steps, self.decay_steps, self.compiled = warmup_steps, decay_steps, compile
        self.automatic_optimization = False  # two optimizers
        config = LLaDAConfig(
            d_model=d_model, n_layers=n_layers, n_heads=n_heads, n_kv_heads=n_heads, mlp_hidden_size=mlp_hidden_size,
            max_sequence_length=max_sequence_length, vocab_size=vocab_size, embedding_size=vocab_size,
            rope_theta=rope_theta, mask_token_id=None, eos_token_id=None, pad_token_id=None,
        )  # fmt: skip
        weights = d_model * (2 * vocab_size + n_layers * (4 * d_model + 3 * mlp_hidden_size))
        if (memory := os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) < 4 * weights:
            names = "d_model, n_layers, mlp_hidden_size, vocab_size"
            raise InputError(names, f"{weights:.2g} weights", f"at most {memory / 4:.2g}, what the memory here holds")
        self.model = LLaDAModelLM(config)
        if start is not None:
            begun = MaskPredictor.from_pretrained(start).model.state_dict()
            shapes = {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()}
            if {name: tuple(tensor.shape) for name, tensor in begun.items()} != shapes:
                raise InputError(
                    "start", start, "a model of the family, width, layers and vocabulary that `model` says"
                )
            self.model.load_state_dict(begun)

    def setup(self, stage: str) -> None:
        if self.compiled and stage == "fit":
            self.model.model.compile(dynamic=True)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        blocks = self.model.model.transformer["blocks"]
        matrices = [p for p in blocks.parameters() if p.ndim == 2]
        rest = [p for p in self.parameters() if all(p is not matrix for matrix in matrices)]
        wide = str(self.trainer.precision).startswith("32")
        muon = WideMuon(matrices, lr=self.learning_rate, weight_decay=self.weight_decay)
        muon.dtype = torch.float32 if wide else torch.bfloat16
        return [muon, torch.optim.AdamW(rest, lr=self.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)]

    def rate(self, step: int) -> float:
        """Learning rate of optimizer step ``step``."""
        left = (self.trainer.max_steps - step) / max(1, self.decay_steps)
        return self.learning_rate * min(1.0, (step + 1) / self.warmup_steps, left)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Weighted cross-entropy in nats per response token, an upper bound of the negative log-likelihood."""
        logits = self.model(
            batch["input_ids"], batch.get("attention_mask"), batch.get("position_ids"), batch["masked"]
        ).logits
        return (F.cross_entropy(logits.float(), batch["labels"], reduction="none") * batch["weight"]).sum()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        optimizers: list[torch.optim.Optimizer] = self.optimizers()  # type: ignore[assignment]
        loss = self.loss(batch)
        self.manual_backward(loss)
        torch.nn.utils.clip_grad_norm_(self.parameters(), 1.0)
        rate = self.rate(self.global_step)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        optimizers[0].step()
        optimizers[1].optimizer.step()  # type: ignore[attr-defined]  # unwrapped: Lightning counts every step() it sees
        self.model.zero_grad()
        self.log_dict({"train/loss": loss.detach(), "train/lr": rate}, prog_bar=True)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        loss = self.loss(batch)
        check_finite("validation/loss", loss)
        self.log("validation/loss", loss, prog_bar=True, sync_dist=True, batch_size=1)

    def on_validation_epoch_end(self) -> None:
        if not self.probes or self.trainer.sanity_checking:
            return
        data: BaseDataModule = self.trainer.datamodule  # type: ignore[attr-defined]
        words = data.tokenizer
        ids = TokenIds(
            words.mask_token_id, words.eos_token_id, words.convert_tokens_to_ids("<|eot_id|>"), words.pad_token_id,
            words.bos_token_id,
        )  # fmt: skip
        model = copy.deepcopy(self.model)  # a predictor freezes what it is given
        predictor = MaskPredictor(
            model, ids, model.config.vocab_size, model.config.max_sequence_length, tokenizer=words
        )
        prompts = data.probes(self.probes)
        config = DecodeConfig(gen_length=self.probe_length)
        output = decode(predictor, encode_prompts(prompts, words), config, FullStep())
        right: dict[str, list[float]] = {}
        marks, _ = judge(prompts, words.batch_decode(output.sequences, skip_special_tokens=True))
        assert marks is not None
        for prompt, mark in zip(prompts, marks.tolist(), strict=True):
            right.setdefault(prompt.task, []).append(float(mark))
        self.log_dict(
            {f"validation/exact/{task}": sum(each) / len(each) for task, each in right.items()}, rank_zero_only=True
        )
        every = [one for each in right.values() for one in each]
        self.log("validation/exact", sum(every) / len(every), prog_bar=True, rank_zero_only=True)


class WideMuon(torch.optim.Muon):
    """PyTorch's Muon with all matrices of a shape together.

    Attributes:
        dtype: Dtype of Newton-Schulz; PyTorch's own runs in bf16: on a CPU without instructions for it, as long as forward and
            backward.
    """

    dtype = torch.float32

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes.setdefault(parameter.shape, []).append(parameter)
            for shape, matrices in shapes.items():
                updates = []
                for matrix in matrices:
                    assert matrix.grad is not None
                    momentum = self.state[matrix].setdefault("momentum_buffer", torch.zeros_like(matrix))
                    momentum.lerp_(matrix.grad, 1 - group["momentum"])
                    updates.append(matrix.grad.lerp(momentum, group["momentum"]))
                rate = (
                    group["lr"] * 0.2 * max(shape) ** 0.5
                )  # the root mean square of AdamW's updates (arXiv 2502.16982)
                for matrix, update in zip(
                    matrices, orthogonal(torch.stack(updates).to(self.dtype), group), strict=True
                ):
                    matrix.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-rate)


def orthogonal(matrices: Tensor, group: Mapping[str, Any]) -> Tensor:
    """The nearest orthogonal matrices ``(n, r, c)``, roughly, by the Newton-Schulz iteration of Muon."""
    a, b, c = group["ns_coefficients"]
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=group["eps"])
    for _ in range(group["ns_steps"]):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
