"""LLaDA's pre-training objective in its supervised form, as a LightningModule."""

import torch
import torch.nn.functional as F
from lightning import LightningModule
from torch import Tensor

from models import LLaDAConfig, LLaDAModelLM


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
        compile: Run the blocks through ``torch.compile``.
    """

    def __init__(
        self, d_model: int, n_layers: int, n_heads: int, mlp_hidden_size: int, max_sequence_length: int,
        vocab_size: int, rope_theta: float, learning_rate: float, weight_decay: float, warmup_steps: int,
        decay_steps: int, compile: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.save_hyperparameters()
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.warmup_steps, self.decay_steps, self.compiled = warmup_steps, decay_steps, compile
        self.automatic_optimization = False  # two optimizers
        config = LLaDAConfig(
            d_model=d_model, n_layers=n_layers, n_heads=n_heads, n_kv_heads=n_heads, mlp_hidden_size=mlp_hidden_size,
            max_sequence_length=max_sequence_length, vocab_size=vocab_size, embedding_size=vocab_size,
            rope_theta=rope_theta, mask_token_id=None, eos_token_id=None, pad_token_id=None,
        )  # fmt: skip
        self.model = LLaDAModelLM(config)

    def setup(self, stage: str) -> None:
        if self.compiled and stage == "fit":
            torch._dynamo.config.recompile_limit = 32  # one graph for each sequence length
            self.model.model.compile(dynamic=False)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        blocks = self.model.model.transformer["blocks"]
        matrices = [p for p in blocks.parameters() if p.ndim == 2]
        rest = [p for p in self.parameters() if all(p is not matrix for matrix in matrices)]
        muon = torch.optim.Muon(
            matrices, lr=self.learning_rate, weight_decay=self.weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        return [muon, torch.optim.AdamW(rest, lr=self.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)]

    def rate(self, step: int) -> float:
        """Learning rate of optimizer step ``step``."""
        left = (self.trainer.max_steps - step) / max(1, self.decay_steps)
        return self.learning_rate * min(1.0, (step + 1) / self.warmup_steps, left)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Weighted cross-entropy in nats per response token, an upper bound of the negative log-likelihood."""
        logits = self.model(batch["input_ids"], logits_at=batch["masked"]).logits
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
        self.log("validation/loss", self.loss(batch), prog_bar=True, sync_dist=True, batch_size=1)
