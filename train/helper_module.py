"""Training of a helper: distillation of the mask predictor's text into a causal language model."""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning import LightningModule
from torch import Tensor, nn
from torchmetrics import MeanMetric

from data.helper_data import HelperDataModule, TextBatch
from data.typed import Count, NotNegative, Positive, Whole
from models.causal_lm import (
    add_lora,
    check_same_ids,
    copy_blocks,
    copy_embeddings,
    load_causal_lm,
    pretrained_folder,
    scratch_model,
    within,
)
from models.errors import InputError
from models.predictor import MaskPredictor, fingerprint
from train.callbacks import check_finite


class HelperModule(LightningModule):
    """Distils the mask predictor's text into a helper for adaptive parallel decoding (APD, arXiv 2506.00413).

    Cross-entropy on the response up to its first EoT; the prompt is read and not scored. Logged for ``validation`` and
    ``test``: ``loss`` in nats a token, ``perplexity``, and ``agreement``, the share of response tokens that are the
    helper's first choice. Matrix products are bf16 on a GPU; weights and optimizer stay fp32.

    Args:
        base: Folder or hub id of the mask predictor.
        d_model: Width of a helper from scratch, as are the next five.
        n_layers: Blocks.
        n_heads: Attention heads.
        n_kv_heads: Heads of keys and values.
        mlp_hidden_size: Width of the gated MLP.
        tie_embeddings: Use the embedding as the head too.
        init: What a helper from scratch starts as: the predictor's ``embeddings``, or all of the predictor with fewer
            ``blocks``, evenly spaced; both need the predictor's sizes. ``none`` is random.
        pretrained: Folder or hub id of a causal language model over the same ids to tune; null trains from scratch.
        lora_rank: Rank of a LoRA of ``pretrained``; null tunes all of it.
        lora_alpha: Scale of the LoRA, divided by its rank.
        learning_rate: Peak learning rate of AdamW.
        weight_decay: Decoupled weight decay.
        warmup_steps: Optimizer steps of linear warm-up.
        schedule: ``cosine`` falls to zero over the whole run, ``constant`` stays.
        kl_weight: Weight of the KL divergence from the predictor's distribution at one response position of each text,
            drawn anew each time, with that position and all right of it masked: what APD drafts from. It costs a forward
            of the predictor a step; 0 spares it.
        kl_top_k: Tokens of that distribution that are compared, the most probable ones.
    """

    def __init__(
        self,
        base: str = "models/bundled/llada-tiny",
        d_model: Count = 192,
        n_layers: Count = 3,
        n_heads: Count = 4,
        n_kv_heads: Count = 4,
        mlp_hidden_size: Count = 512,
        tie_embeddings: bool = False,
        init: Literal["none", "embeddings", "blocks"] = "blocks",
        pretrained: str | None = None,
        lora_rank: Count | None = None,
        lora_alpha: Positive = 16.0,
        learning_rate: Positive = 1e-3,
        weight_decay: NotNegative = 0.1,
        warmup_steps: Whole = 20,
        schedule: Literal["cosine", "constant"] = "cosine",
        kl_weight: NotNegative = 0.0,
        kl_top_k: Count = 16,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if lora_rank is not None and pretrained is None:
            raise InputError("lora_rank", f"{lora_rank} without a pretrained model", "null, or `pretrained` too")
        if not 0 <= kl_weight < float("inf"):
            raise InputError("kl_weight", kl_weight, "a number from 0")
        if kl_top_k < 1:
            raise InputError("kl_top_k", kl_top_k, "a whole number of at least 1")
        self.base, self.pretrained, self.lora_rank, self.lora_alpha = base, pretrained, lora_rank, lora_alpha
        self.sizes = {
            "d_model": d_model, "n_layers": n_layers, "n_heads": n_heads, "n_kv_heads": n_kv_heads,
            "mlp_hidden_size": mlp_hidden_size, "tie_embeddings": tie_embeddings,
        }  # fmt: skip
        self.source_fingerprint: str | None = None
        self.init, self.kl_weight, self.kl_top_k = init, kl_weight, kl_top_k
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.warmup_steps, self.schedule = warmup_steps, schedule
        self.strict_loading = lora_rank is None  # a checkpoint of a LoRA holds no weights of the model below it
        self.net: Any = None  # built in setup, which knows the vocabulary
        # No module of ours, so it enters no checkpoint and stays in evaluation mode.
        self.predictor: MaskPredictor | None = None
        self.meters = nn.ModuleDict(
            {
                stage: nn.ModuleDict({"loss": MeanMetric(), "agreement": MeanMetric()})
                for stage in ("validation", "test")
            }
        )

    def setup(self, stage: str) -> None:
        """Builds the network, and checks that the rollouts are the predictor's.

        Raises:
            InputError: The rollouts are another model's, or the network cannot be built.
        """
        if self.net is not None:
            return
        predictor = MaskPredictor.from_pretrained(self.base, device=self.trainer.strategy.root_device)
        data: HelperDataModule | None = getattr(self.trainer, "datamodule", None)
        if data is not None:
            wanted = (predictor.fingerprint, predictor.ids.eot)
            if (data.manifest["model_fingerprint"], data.eot_id) != wanted:
                found = data.manifest["model_fingerprint"]
                raise InputError(
                    f"{data.rollouts}: model_fingerprint", found, f"{predictor.fingerprint}, that of the base"
                )
            self.gen_length: int = data.manifest["settings"]["gen_length"]
        self.build(predictor)
        self.predictor = predictor if self.kl_weight else None

    def build(self, predictor: MaskPredictor) -> None:
        """Makes the network: new, or read from ``pretrained``.

        Raises:
            InputError: Sizes that do not fit, or a pretrained model that cannot be read or has other ids.
        """
        self.eot_id = predictor.ids.eot
        if self.pretrained is not None:
            folder = pretrained_folder(self.pretrained)
            check_same_ids(folder, predictor.tokenizer)
            self.source_fingerprint = fingerprint(folder)
            self.net = load_causal_lm(folder, torch.float32)
            if self.lora_rank is not None:
                self.net = add_lora(self.net, self.lora_rank, self.lora_alpha)
        else:
            theta = getattr(predictor.model.config, "rope_theta", 10_000.0)
            self.net = scratch_model(
                predictor.vocab_size,
                max_length=predictor.max_length,
                rope_theta=theta,
                eot_id=self.eot_id,
                **self.sizes,
            )
            if self.init != "none":
                {"embeddings": copy_embeddings, "blocks": copy_blocks}[self.init](self.net, predictor)
        self.vocab_size: int = self.net.config.vocab_size
        self.net.train()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["source_fingerprint"] = self.source_fingerprint
        if not self.strict_loading:
            trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
            checkpoint["state_dict"] = {name: t for name, t in checkpoint["state_dict"].items() if name in trained}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        found = self.source_fingerprint
        if checkpoint["source_fingerprint"] != found:
            raise InputError("pretrained", f"weights {found}", f"{checkpoint['source_fingerprint']}, the checkpoint's")

    def configure_optimizers(self) -> Any:
        """AdamW on whatever is trained, with a linear warm-up and, where asked for, a cosine down to zero.

        Raises:
            InputError: A cosine over a run without an end.
        """
        trained = [parameter for parameter in self.net.parameters() if parameter.requires_grad]
        decay = [parameter for parameter in trained if parameter.ndim >= 2]
        groups = [
            {"params": decay, "weight_decay": self.weight_decay},
            {"params": [parameter for parameter in trained if parameter.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=self.learning_rate)
        steps = self.trainer.estimated_stepping_batches
        if self.schedule == "cosine" and not 0 < steps < float("inf"):
            raise InputError("schedule", "cosine without an end", "constant, or a trainer with max_epochs or max_steps")

        def share(step: int) -> float:
            warm = min(1.0, (step + 1) / (self.warmup_steps + 1))
            return warm * (0.5 + 0.5 * math.cos(math.pi * min(1.0, step / steps)) if self.schedule == "cosine" else 1.0)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def logits(self, batch: TextBatch) -> tuple[Tensor, Tensor]:
        """What the helper says about the response tokens.

        Returns:
            ``(N, vocab_size)`` float32 logits and ``(N,)`` int64 tokens of the reference, row after row.
        """
        width = batch.ids.shape[1]
        first = max(1, int(batch.start.min()))  # nothing predicts column 0
        columns = torch.arange(first, width, device=batch.ids.device)
        scored = (columns >= batch.start[:, None]) & (columns < batch.end[:, None])
        ids = within(batch.ids, self.vocab_size, self.eot_id)
        # Padding is right of all that is scored, so causality hides it without a mask.
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            logits = self.net(input_ids=ids, use_cache=False, logits_to_keep=width - first + 1).logits
        return logits[:, :-1][scored].float(), batch.ids[:, first:][scored]

    def loss(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """Mean cross-entropy in nats a token; tokens beyond the helper's vocabulary cannot be learned and do not count."""
        return F.cross_entropy(logits, tokens.masked_fill(tokens >= self.vocab_size, -100))

    def training_step(self, batch: TextBatch, batch_idx: int) -> Tensor:
        """Loss of one batch."""
        logits, tokens = self.logits(batch)
        loss = self.loss(logits, tokens)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(batch))
        if self.predictor is not None:
            divergence = self.divergence(batch, logits)
            self.log("train/kl", divergence.detach(), prog_bar=True, batch_size=len(batch))
            loss = loss + self.kl_weight * divergence
        return loss

    def divergence(self, batch: TextBatch, logits: Tensor) -> Tensor:
        """Mean KL divergence of the helper from the predictor at one random response position of each text, in nats.

        Args:
            batch: The texts.
            logits: The first value of :meth:`logits` for them.
        """
        assert self.predictor is not None
        rank = self.trainer.global_rank * 1_000_003
        generator = torch.Generator().manual_seed(self.trainer.fit_loop.total_batch_idx + rank)
        scored = batch.end - batch.start.clamp(min=1)
        drawn = (torch.rand(len(batch), generator=generator).to(scored.device) * scored).long()
        theirs, token = self._drafts(batch, batch.start.clamp(min=1) + drawn)
        at = scored.cumsum(0) - scored + drawn
        ours = logits[at].log_softmax(-1).gather(1, token)
        return (theirs.exp() * (theirs - ours)).sum(1).mean()

    def _drafts(self, batch: TextBatch, column: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities and ids, ``(B, k)`` each, of the predictor's top tokens at ``column`` ``(B,)``.

        That column and all right of it are masked, up to the end of each row's generated region.
        """
        assert self.predictor is not None
        ends = batch.start + self.gen_length
        positions = torch.arange(int(ends.max()), device=column.device).expand(len(batch), -1)
        ids = F.pad(batch.ids, (0, max(0, positions.shape[1] - batch.ids.shape[1])))[:, : positions.shape[1]]
        ids = torch.where(positions < column[:, None], ids, self.predictor.ids.mask)
        flat = torch.arange(len(batch), device=column.device) * positions.shape[1] + column
        hidden = self.predictor(ids, positions < ends[:, None], positions, flat)
        said = self.predictor.logits(hidden).clone().float()  # usable in a backward
        said[:, self.predictor.ids.mask] = -torch.inf
        logits, token = said[:, : self.vocab_size].topk(min(self.kl_top_k, self.vocab_size - 1))
        return logits.log_softmax(-1), token

    def validation_step(self, batch: TextBatch, batch_idx: int) -> None:
        """Adds one batch to the validation metrics."""
        self._measure(batch, "validation")

    def test_step(self, batch: TextBatch, batch_idx: int) -> None:
        """Adds one batch to the test metrics."""
        self._measure(batch, "test")

    def _measure(self, batch: TextBatch, stage: str) -> None:
        if not len(batch):
            return
        logits, tokens = self.logits(batch)
        meters: Any = self.meters[stage]
        known = tokens < self.vocab_size
        if known.any():
            loss = self.loss(logits, tokens)
            check_finite(f"{stage}/loss", loss)
            meters["loss"].update(loss, known.sum())
        meters["agreement"].update((logits.argmax(-1) == tokens).float())

    def on_validation_epoch_end(self) -> None:
        """Logs the validation metrics."""
        self._report("validation")

    def on_test_epoch_end(self) -> None:
        """Logs the test metrics."""
        self._report("test")

    def _report(self, stage: str) -> None:
        meters: Any = self.meters[stage]
        # compute() joins the ranks; sync_dist then averages equal values and only keeps Lightning from warning.
        values = {name: meter.compute() for name, meter in meters.items()}
        values["perplexity"] = values["loss"].exp()
        self.log_dict({f"{stage}/{name}": value for name, value in values.items()}, sync_dist=True)
        for meter in meters.values():
            meter.reset()
