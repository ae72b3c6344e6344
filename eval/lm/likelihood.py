"""How probable a text is to a mask predictor: LLaDA's Monte-Carlo estimate (arXiv 2502.09992, equation 6)."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from decoding.config import DecodeConfig
from decoding.loop import decode
from decoding.strategies import make_strategy
from decoding.text import MARK, token_ids
from models.predictor import MaskPredictor

MAX_POSITIONS = 8192
"""Masked positions of one forward, unless a single row has more: their logits are ``(N, V)`` in fp32."""


@dataclass(frozen=True)
class Pair:
    """A prompt, which is always visible and may be empty, and the answer to be scored; token ids."""

    prompt: list[int]
    answer: list[int]


def pair_ids(tokenizer: PreTrainedTokenizerBase, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Ids of a context and of what follows it.

    In running text the continuation's ids are those of the whole less the context's, and spaces that end the context go to
    the continuation, since a token begins with its space. A rendered prompt that opens the assistant's turn keeps its own
    end, which is the template's, and the answer is tokenised by itself, as in training.

    Args:
        tokenizer: The predictor's tokenizer.
        context: A rendered prompt or any other text; may be empty.
        continuation: What is to be scored.
    """
    head, text = "", context
    if context.startswith(MARK):
        if context.count(MARK) % 2:
            return token_ids(tokenizer, context), token_ids(tokenizer, continuation)
        head, _, text = context.rpartition(MARK)
    stripped = text.rstrip()
    before = token_ids(tokenizer, stripped)
    after = token_ids(tokenizer, text + continuation)[len(before) :] or token_ids(tokenizer, continuation)
    return token_ids(tokenizer, head) + before, after


@dataclass(frozen=True)
class Row:
    """One row of a forward: the pair it belongs to, which of its answer is masked, and its weight in the estimate."""

    index: int
    pair: Pair
    mask: Tensor
    weight: float


def mask_counts(length: int, samples: int, generator: torch.Generator) -> Tensor:
    """How many of ``length`` tokens each sample masks, ``(samples,)`` int64 from 1 to ``length``, spread evenly.

    One random start shifts a regular grid over the range. Each count is as likely as if it were drawn by itself, so the
    estimate stays unbiased, but its variance no longer holds that of the counts. When ``samples`` is a multiple of
    ``length``, every count occurs equally often, whatever the start.
    """
    start = torch.rand((), generator=generator, dtype=torch.float64)
    grid = (torch.arange(samples, dtype=torch.float64) + start) * length / samples
    return grid.long().clamp(max=length - 1) + 1


def draw_masks(length: int, samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """The different masks among ``samples`` draws, and what the log-probability under each counts in the estimate.

    A draw masks l of the L tokens, chosen uniformly without replacement, and counts L / l. A short answer has few masks:
    equal draws are one row, which is exact for a single token and saves most forwards up to some six.

    Args:
        length: Tokens of the answer.
        samples: Number of draws.
        seed: Seed of the draws.

    Returns:
        Masks ``(U, length)`` bool, and weights ``(U,)`` float64.
    """
    generator = torch.Generator().manual_seed(seed)
    counts = mask_counts(length, samples, generator)
    place = torch.rand(samples, length, generator=generator).argsort(1).argsort(1)
    masks, repeats = (place < counts[:, None]).unique(dim=0, return_counts=True)
    return masks, repeats.double() * length / masks.sum(1) / samples


def pair_seed(pair: Pair, seed: int) -> int:
    """Seed of a pair's draws: depends on its tokens and ``seed`` alone, never on the batch, the order or the process."""
    return int(hashlib.sha256(json.dumps([seed, pair.prompt, pair.answer]).encode()).hexdigest()[:15], 16)


@torch.inference_mode()
def log_likelihoods(
    predictor: MaskPredictor,
    pairs: Sequence[Pair],
    samples: int = 128,
    seed: int = 0,
    batch_size: int = 32,
    progress: Callable[[int], None] = lambda finished: None,
) -> list[float]:
    """Estimates ``log p(answer | prompt)`` of each pair, in nats.

    The mean over draws of ``L / l`` times the sum of the masked tokens' log-probabilities is an unbiased estimate of the
    bound that LLaDA is trained on. The softmax is over the whole vocabulary, in fp32.

    Args:
        predictor: The mask predictor.
        pairs: What to score; an answer without tokens has log-probability 0.
        samples: Draws for each pair.
        seed: See :func:`pair_seed`.
        batch_size: Rows of one forward.
        progress: Called after every forward with the number of pairs that are finished.
    """
    order = sorted(range(len(pairs)), key=lambda index: -len(pairs[index].prompt) - len(pairs[index].answer))
    place = {index: number for number, index in enumerate(order)}
    totals = [0.0] * len(pairs)
    for rows in _batches(_rows(pairs, order, samples, seed), batch_size):
        for row, value in zip(rows, _masked_log_probability(predictor, rows).tolist(), strict=True):
            totals[row.index] += row.weight * value
        progress(place[rows[-1].index])
    progress(len(pairs))
    return totals


def greedy_matches(predictor: MaskPredictor, pairs: Sequence[Pair], batch_size: int = 32) -> list[bool]:
    """Whether each answer is what decoding one token a forward gives, the most confident first; L forwards for L tokens.

    A pair without a prompt has nothing to be decoded from, and is False.
    """
    found = [False] * len(pairs)
    lengths = {len(pair.answer) for pair in pairs if pair.prompt and pair.answer}
    for length in sorted(lengths):
        rows = [n for n, pair in enumerate(pairs) if pair.prompt and len(pair.answer) == length]
        config = DecodeConfig(gen_length=length, block_length=length, eot="off")
        prompts = [pairs[n].prompt for n in rows]
        out = decode(predictor, prompts, config, make_strategy("full_step"), batch_size=batch_size)
        for n, sequence in zip(rows, out.sequences.tolist(), strict=True):
            found[n] = sequence == pairs[n].answer
    return found


def _rows(pairs: Sequence[Pair], order: Sequence[int], samples: int, seed: int) -> Iterator[Row]:
    for index in order:
        pair = pairs[index]
        if pair.answer:
            masks, weights = draw_masks(len(pair.answer), samples, pair_seed(pair, seed))
            for mask, weight in zip(masks, weights.tolist(), strict=True):
                yield Row(index, pair, mask, weight)


def _batches(rows: Iterator[Row], batch_size: int) -> Iterator[list[Row]]:
    batch: list[Row] = []
    positions = 0
    for row in rows:
        count = int(row.mask.sum())
        if batch and (len(batch) == batch_size or positions + count > MAX_POSITIONS):
            yield batch
            batch, positions = [], 0
        batch.append(row)
        positions += count
    if batch:
        yield batch


def _masked_log_probability(predictor: MaskPredictor, rows: Sequence[Row]) -> Tensor:
    """Sum of the masked tokens' log-probabilities of each row, ``(b,)`` float64; rows left-padded as in decoding."""
    width = max(len(row.pair.prompt) + len(row.pair.answer) for row in rows)
    ids = torch.full((len(rows), width), predictor.ids.pad)
    masked = torch.zeros(len(rows), width, dtype=torch.bool)
    pad = torch.zeros(len(rows), 1, dtype=torch.long)
    for number, row in enumerate(rows):
        tokens = row.pair.prompt + row.pair.answer
        pad[number] = width - len(tokens)
        ids[number, width - len(tokens) :] = torch.tensor(tokens)
        masked[number, width - len(row.pair.answer) :] = row.mask
    columns = torch.arange(width)
    device = predictor.device
    attention = (columns >= pad).to(device) if pad.any() else None
    positions = (columns - pad).clamp(min=0).to(device)
    at = masked.flatten().nonzero()[:, 0].to(device)
    logits = predictor.logits(
        predictor(ids.masked_fill(masked, predictor.ids.mask).to(device), attention, positions, at)
    )
    values = -cross_entropy(logits.float(), ids[masked].to(device), reduction="none")
    row_of = masked.nonzero()[:, 0]
    return torch.zeros(len(rows), dtype=torch.float64).index_add_(0, row_of, values.double().cpu())
