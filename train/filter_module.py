"""Training of a filter: loss, optimizer and metrics."""

from dataclasses import replace
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from lightning import LightningModule
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import (
    BinaryAUROC,
    BinaryAveragePrecision,
    BinaryPrecision,
    BinaryRecall,
)

from data.filter_data import FilterBatch, FilterDataModule
from data.typed import Count, Length, NotNegative, Part, Positive, Share, Whole
from models.errors import InputError
from models.features import FEATURES
from models.filter import ConvFilter, FilterConfig, build_filter
from models.predictor import MaskPredictor, token_embeddings
from train.callbacks import check_finite
from train.reliability import Reliability

_CUTS = torch.linspace(-14, 14, 281).sigmoid()
"""Where ranks are told apart, closest at both ends: the sums of AUROC take the same room however many examples there are."""


class FilterModule(LightningModule):
    """Trains a filter by weighted binary cross-entropy on masked positions (Learn2PD, arXiv 2509.25188).

    Logged for ``validation`` and ``test``: ``loss``, and over examples ``auroc``, ``average_precision``,
    ``precision`` and ``recall`` at ``threshold``, ``calibration_error`` (expected, 15 bins), and as ``confidence_auroc``
    and ``confidence_error`` those of the bare confidence: what learning has to beat. Each but the loss also as
    ``*_no_tail``, without the positions after the reference's first EoT.

    Args:
        architecture: ``conv`` or ``block_mlp``.
        block_length: Positions in a block of the rollouts.
        features: Columns that ``conv`` reads; null for all.
        channels: Width of each convolution.
        kernel: Positions each convolution sees.
        layers: Number of convolutions.
        embedding: Width of the embedding through which ``conv`` reads the block's tokens; 0: it reads none. It begins as the
            principal components of the base's own embeddings, so that tokens the rollouts lack lie near their likes.
        hidden: Width of the projection through which ``conv`` reads the predictor's hidden states, of rollouts with
            ``hidden_states``; 0: it reads none, and runs in engines that keep theirs.
        dropout: Share of embedding and projection left out at each step; without it a few hundred prompts are learned by heart.
        base: Folder or hub id of the base model, for ``embedding`` and ``hidden``.
        learning_rate: Peak learning rate of AdamW.
        weight_decay: Decoupled weight decay.
        schedule: ``cosine`` falls to zero over the whole run, ``constant`` stays.
        threshold: Probability at which precision and recall are measured.
    """

    def __init__(
        self,
        architecture: Literal["conv", "block_mlp"] = "conv",
        block_length: Length = 32,
        features: list[str] | None = None,
        channels: Count = 32,
        kernel: Count = 5,
        layers: Count = 2,
        embedding: Whole = 0,
        hidden: Whole = 0,
        dropout: Part = 0.3,
        base: str | None = None,
        learning_rate: Positive = 3e-3,
        weight_decay: NotNegative = 0.01,
        schedule: Literal["cosine", "constant"] = "cosine",
        threshold: Share = 0.9,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        names = ["confidence"] if architecture == "block_mlp" else list(FEATURES)
        if architecture == "block_mlp" and features not in (None, names):
            raise InputError("features", features, "null or [confidence] for block_mlp, which reads nothing else")
        if not 0 <= dropout < 1:
            raise InputError("dropout", dropout, "a share from 0 to 1")
        if (embedding or hidden) and base is None:
            raise InputError("base", None, "the base model, for a filter that reads tokens or hidden states")
        self.config = FilterConfig(
            architecture=architecture, features=tuple(names if features is None else features),
            block_length=block_length, channels=channels, kernel=kernel, layers=layers, embedding=embedding,
            hidden=hidden, hidden_size=MaskPredictor.outline(base).hidden_size if hidden and base else 0, threshold=threshold,
        )  # fmt: skip
        self.net = self._with_tokens(base) if embedding and base else build_filter(self.config)
        if isinstance(self.net, ConvFilter):
            self.net.dropout = dropout
        self.learning_rate, self.weight_decay, self.schedule = learning_rate, weight_decay, schedule
        self.meters = nn.ModuleDict({stage: _meters(stage, threshold) for stage in ("validation", "test")})

    def _with_tokens(self, base: str) -> ConvFilter:
        """The network of a configuration that reads tokens, which also learns how many there are."""
        known, width = token_embeddings(base), self.config.embedding
        if not 0 < width <= min(known.shape):
            raise InputError("embedding", width, f"a whole number from 0 to {min(known.shape)}, the base's own width")
        self.config = replace(self.config, vocab_size=len(known))
        net = build_filter(self.config)
        assert isinstance(net, ConvFilter)
        assert net.embedding is not None
        net.embedding.weight.data.copy_(principal_components(known, width))
        return net

    def setup(self, stage: str) -> None:
        """Looks at the training data once: input normalisation, and whether decoded positions hold confidences.

        Raises:
            InputError: The rollouts have another block length.
        """
        data: FilterDataModule | None = getattr(self.trainer, "datamodule", None)
        if data is None:
            return
        evidence = data.parts["train"].sample().evidence
        length = evidence.masked.shape[1]
        if length != self.config.block_length:
            raise InputError("block_length", self.config.block_length, f"{length}, that of the rollouts")
        if self.config.embedding and evidence.text is None:
            raise InputError("embedding", self.config.embedding, "0 with rollouts that lack the text; roll out again")
        width = 0 if evidence.hidden is None else evidence.hidden.shape[-1]
        if self.config.hidden and self.config.hidden_size != width:
            found = "rollouts without hidden states" if not width else f"rollouts with hidden states of {width}"
            accepted = f"such of {self.config.hidden_size}; roll out with rollout.hidden_states true, or hidden 0"
            raise InputError("hidden", found, accepted)
        if self.config.architecture == "block_mlp":
            # At decode time it must see decoded positions as it does here: their confidence, or zero.
            self._read_all_positions(bool((evidence.confidence[~evidence.masked] > 0).any()))
        if stage == "fit":
            self.net.fit_normalisation(evidence)

    def _read_all_positions(self, flag: bool) -> None:
        self.config = replace(self.config, needs_all_positions=flag)
        self.net.needs_all_positions = flag

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["needs_all_positions"] = self.config.needs_all_positions

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._read_all_positions(checkpoint["needs_all_positions"])

    def configure_optimizers(self) -> Any:
        """AdamW, with a cosine down to zero where that is asked for.

        Raises:
            InputError: A cosine over a run without an end.
        """
        optimizer = torch.optim.AdamW(self.net.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay)
        if self.schedule == "constant":
            return optimizer
        steps = self.trainer.estimated_stepping_batches
        if not 0 < steps < float("inf"):
            raise InputError("schedule", "cosine without an end", "constant, or a trainer with max_epochs or max_steps")
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=int(steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cosine, "interval": "step"}}

    def loss(self, logits: Tensor, batch: FilterBatch) -> Tensor:
        """Mean of the cross-entropy of ``logits`` ``(B, K)`` under the batch's weights, in nats a position."""
        each = F.binary_cross_entropy_with_logits(logits, batch.final.float(), reduction="none")
        return (each * batch.weight).sum() / batch.weight.sum().clamp(min=1e-6)

    def training_step(self, batch: FilterBatch, batch_idx: int) -> Tensor:
        """Loss of one batch."""
        loss = self.loss(self.net(batch.evidence), batch)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(batch))
        return loss

    def validation_step(self, batch: FilterBatch, batch_idx: int) -> None:
        """Adds one batch to the validation metrics."""
        self._measure(batch, "validation")

    def test_step(self, batch: FilterBatch, batch_idx: int) -> None:
        """Adds one batch to the test metrics."""
        self._measure(batch, "test")

    def _measure(self, batch: FilterBatch, stage: str) -> None:
        if not len(batch):
            return
        logits = self.net(batch.evidence)
        meters, loss = cast(Any, self.meters[stage]), self.loss(logits, batch)
        check_finite(f"{stage}/loss", loss)
        meters["loss"].update(loss, batch.weight.sum())
        probability = logits.sigmoid()
        for part, where in (("all", batch.example), ("no_tail", batch.example & ~batch.tail)):
            final = batch.final[where].long()
            meters[part].update(probability[where], final)
            meters[f"{part}_confidence"].update(batch.evidence.confidence[where], final)

    def on_validation_epoch_end(self) -> None:
        """Logs the validation metrics."""
        self._report("validation")

    def on_test_epoch_end(self) -> None:
        """Logs the test metrics."""
        self._report("test")

    def _report(self, stage: str) -> None:
        meters: Any = self.meters[stage]
        # compute() joins the ranks; sync_dist then averages equal values and only keeps Lightning from warning.
        values = {f"{stage}/loss": meters["loss"].compute()}
        for part in ("all", "no_tail"):
            values |= meters[part].compute() | meters[f"{part}_confidence"].compute()
        self.log_dict(values, sync_dist=True)
        self.reliability = {
            "the filter's": meters["no_tail"]["calibration_error"].found,
            "bare confidence": meters["no_tail_confidence"]["confidence_error"].found,
        }
        for meter in meters.values():
            meter.reset()


def principal_components(vectors: Tensor, width: int) -> Tensor:
    """The leading principal components of ``vectors`` ``(V, D)``, ``(V, width)`` float32 of variance 1 on the whole."""
    centred = vectors - vectors.mean(0)
    directions = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -width:].flip(1)
    found = centred @ directions
    return found / found.std()


def _meters(stage: str, threshold: float) -> nn.ModuleDict:
    """Metrics of one stage; torchmetrics keeps sums or all values, so ranks reduce without error."""
    meters: dict[str, nn.Module] = {"loss": MeanMetric()}
    for part, postfix in (("all", ""), ("no_tail", "_no_tail")):
        meters[part] = MetricCollection(
            {
                "auroc": BinaryAUROC(thresholds=_CUTS, validate_args=False),
                "average_precision": BinaryAveragePrecision(thresholds=_CUTS, validate_args=False),
                "precision": BinaryPrecision(threshold=threshold, validate_args=False),
                "recall": BinaryRecall(threshold=threshold, validate_args=False),
                "calibration_error": Reliability(),
            },
            prefix=f"{stage}/",
            postfix=postfix,
        )
        bare: dict[str, Metric | MetricCollection] = {
            "confidence_auroc": BinaryAUROC(thresholds=_CUTS, validate_args=False),
            "confidence_error": Reliability(),
        }
        meters[f"{part}_confidence"] = MetricCollection(bare, prefix=f"{stage}/", postfix=postfix)
    return nn.ModuleDict(meters)
