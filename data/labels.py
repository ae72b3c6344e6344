"""Labels from decode traces: which guesses were already final, and where the text ends. Pure functions of tensors."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from decoding.output import StepTrace
from models.features import Evidence


@dataclass
class Records:
    """Every step of many decodes, one row a (prompt, block, step); ``R`` rows of ``K`` positions.

    Attributes:
        evidence: What the predictor said about the active block, ``(R, K)`` fields.
        final: ``(R, K)`` bool, True where the guess equals the reference's token.
        tail: ``(R, K)`` bool, True after the first EoT of what the row was compared with: padding, which says nothing
            about the text.
        prompt: ``(R,)`` int64, index of the prompt in ``prompt_ids``.
        passes: ``(R,)`` int64, index into ``PASSES``: which decode the row was recorded in.
        block: ``(R,)`` int64, number of the active block.
        step: ``(R,)`` int64, forwards this row of the decode had before.
        prompt_ids: Id of each prompt.
        splits: Split of each prompt.
    """

    evidence: Evidence
    final: Tensor
    tail: Tensor
    prompt: Tensor
    passes: Tensor
    block: Tensor
    step: Tensor
    prompt_ids: list[str]
    splits: list[str]

    @staticmethod
    def cat(parts: Sequence["Records"]) -> "Records":
        """The records of several sets, one after the other; a prompt that is in two of them is there twice."""
        if len(parts) == 1:
            return parts[0]
        names = ("final", "tail", "passes", "block", "step")
        tensors = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
        firsts = itertools.accumulate((len(part.prompt_ids) for part in parts), initial=0)
        prompt = torch.cat([part.prompt + first for part, first in zip(parts, firsts, strict=False)])
        ids = [name for part in parts for name in part.prompt_ids]
        splits = [name for part in parts for name in part.splits]
        evidence = Evidence.cat([part.evidence for part in parts])
        return Records(evidence=evidence, prompt=prompt, prompt_ids=ids, splits=splits, **tensors)

    def take(self, rows: Tensor) -> "Records":
        """The rows at ``rows`` ``(r,)`` int64; of the same prompts."""
        names = ("final", "tail", "prompt", "passes", "block", "step")
        tensors = {name: getattr(self, name)[rows] for name in names}
        return replace(self, evidence=self.evidence.each(lambda values: values[rows]), **tensors)


PASSES = ("full_step", "oracle", "filter")
"""The decodes that records come from: the reference itself, the oracle's pass, and a trained filter's own pass. A filter
leaves the reference's path, so its states are labelled by their own completions: the reference says nothing of them."""


@dataclass
class Completions:
    """What full_step makes of ``S`` states of a decode: of their active blocks, the rest need not be decoded.

    Attributes:
        rows: ``(S,)`` int64, index of the prompt.
        step: ``(S,)`` int64, forwards that the prompt's decode had had before.
        sequences: ``(S, G)`` int64, the state decoded to the end of its block; EoT where that was not asked for.
    """

    rows: Tensor
    step: Tensor
    sequences: Tensor


def first_eot(sequences: Tensor, eot_id: int) -> Tensor:
    """Index of the first EoT in each sequence: ``(..., G)`` int64 to ``(...)`` int64; ``G`` where there is none."""
    found = torch.nn.functional.pad(sequences == eot_id, (0, 1), value=True)
    return found.to(torch.uint8).argmax(dim=-1)


def of_block(region: Tensor, block: Tensor, block_length: int) -> Tensor:
    """The columns of each row's active block.

    Args:
        region: ``(R, G)``, one value for each generated position.
        block: ``(R,)`` int64, number of the active block.
        block_length: ``K``.

    Returns:
        ``(R, K)``, of the dtype of ``region``.
    """
    return region.unflatten(1, (-1, block_length))[torch.arange(len(block), device=block.device), block]


def labels(steps: StepTrace, references: Tensor) -> Tensor:
    """Which guesses of recorded steps were already final.

    Args:
        steps: Steps of ``R`` rows, as :func:`collect` gives them.
        references: ``(P, G)`` int64, the reference sequence of each prompt that ``steps.rows`` counts.

    Returns:
        ``(R, K)`` bool; False at decoded positions: they are no examples, and counting them as positives makes a filter
        look better than it is.
    """
    evidence = steps.evidence
    reference = of_block(references[steps.rows], steps.block, evidence.masked.shape[1])
    return (evidence.token == reference) & evidence.masked


def targets(
    steps: StepTrace, references: Tensor, completions: Completions | None, eot_id: int
) -> tuple[Tensor, Tensor]:
    """Labels of recorded steps and where the text of each ends.

    Args:
        steps: Steps of ``R`` rows, as :func:`collect` gives them.
        references: ``(P, G)`` int64, the reference sequence of each prompt that ``steps.rows`` counts.
        completions: Of the states that have labels; ``None``: the references are everybody's.
        eot_id: Id of EoT.

    Returns:
        ``final`` ``(R, K)`` bool, as :func:`labels`, and ``end`` ``(R,)`` int64, the first EoT of what a row was compared with,
        -1 where there are no labels.
    """
    if completions is None:
        return labels(steps, references), first_eot(references, eot_id)[steps.rows]
    many = int(steps.step.max()) + 1
    place = torch.full((len(references) * many,), -1)
    place[completions.rows * many + completions.step] = torch.arange(len(completions.rows))
    which = place[steps.rows * many + steps.step]
    final = labels(replace(steps, rows=which.clamp(min=0)), completions.sequences) & (which >= 0)[:, None]
    end = first_eot(completions.sequences, eot_id)[which.clamp(min=0)]
    return final, torch.where(which >= 0, end, -1)


def regions(steps: StepTrace, gen_length: int, mask_id: int) -> Tensor:
    """The generated region as it stood before each step, ``(R, G)`` int64, MASK where nothing was committed yet.

    Args:
        steps: All steps of some decodes, as :func:`collect` gives them.
        gen_length: ``G``.
        mask_id: Id of MASK.
    """
    length = steps.transfer.shape[1]
    before = torch.full((len(steps.rows), gen_length), mask_id)
    columns = steps.block[:, None] * length + torch.arange(length)
    for row in range(1, len(before)):
        if steps.rows[row] == steps.rows[row - 1]:
            before[row] = before[row - 1]
            chosen = steps.transfer[row - 1]
            before[row, columns[row - 1][chosen]] = steps.committed[row - 1][chosen]
    return before


def after_eot(first: Tensor, block: Tensor, block_length: int) -> Tensor:
    """True at the positions of a block that lie after the reference's first EoT.

    Args:
        first: ``(R,)`` int64, index of the first EoT in what each row was compared with.
        block: ``(R,)`` int64, number of the active block.
        block_length: ``K``.

    Returns:
        ``(R, K)`` bool. The first EoT itself is not among them: where the text ends has to be learned like any other token.
    """
    return block[:, None] * block_length + torch.arange(block_length, device=block.device) > first[:, None]


def collect(trace: Sequence[StepTrace]) -> StepTrace:
    """All steps of one decode as a single ``StepTrace``, ordered by row, then by step.

    Args:
        trace: The batched steps, in the order they happened; at least one. EoT evidence is kept if all have it.
    """
    rows, step = torch.cat([part.rows for part in trace]), torch.cat([part.step for part in trace])
    order = (rows * (int(step.max()) + 1) + step).argsort()

    def join(parts: list[Tensor]) -> Tensor:
        return torch.cat(parts)[order]

    def join_if_recorded(parts: list[Tensor | None]) -> Tensor | None:
        there = [part for part in parts if part is not None]
        return join(there) if len(there) == len(parts) else None

    return StepTrace(
        rows=rows[order],
        block=join([part.block for part in trace]),
        step=step[order],
        evidence=Evidence.cat([part.evidence for part in trace]).each(lambda values: values[order]),
        transfer=join([part.transfer for part in trace]),
        committed=join([part.committed for part in trace]),
        eot_log_odds=join_if_recorded([part.eot_log_odds for part in trace]),
        eot_top=join_if_recorded([part.eot_top for part in trace]),
    )


def history(masked: Tensor, token: Tensor, confidence: Tensor, decode: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
    """Rebuilds ``Evidence.stable`` and ``Evidence.previous``, which follow from the steps before and are not stored.

    Args:
        masked: ``(R, K)`` bool.
        token: ``(R, K)`` int64.
        confidence: ``(R, K)`` float32.
        decode: ``(R,)`` int64, a number that the rows of one decode of one prompt share. These stand together, in the
            order of their steps, none missing.
        block: ``(R,)`` int64, number of the active block.

    Returns:
        ``stable`` ``(R, K)`` int64 and ``previous`` ``(R, K)`` float32, zero at decoded positions.
    """
    follows = torch.zeros(len(masked), dtype=torch.bool, device=masked.device)  # the row above is the step before
    follows[1:] = (decode[1:] == decode[:-1]) & (block[1:] == block[:-1])
    # A position never becomes masked again, so where it is masked now it was masked, and had a guess, in the row above.
    changed = torch.ones_like(masked)
    changed[1:] = (token[1:] != token[:-1]) | ~follows[1:, None]
    row = torch.arange(len(masked), device=masked.device)[:, None]
    since = torch.where(changed, row, 0).cummax(dim=0).values if len(masked) else row
    previous = torch.zeros_like(confidence)
    previous[1:] = torch.where(follows[1:, None] & masked[1:], confidence[:-1], 0.0)
    return torch.where(masked, row - since, 0), previous


def records_of(
    traces: Mapping[str, Sequence[StepTrace]], references: Tensor, prompt_ids: list[str], splits: list[str], eot_id: int
) -> Records:
    """Records of one batch straight from its traces, without the way through shards.

    Args:
        traces: For each of the ``PASSES`` that was decoded, its trace; rows count the prompts.
        references: ``(P, G)`` int64, the full-step sequences.
        prompt_ids: Id of each prompt.
        splits: Split of each prompt.
        eot_id: Id of EoT.

    Returns:
        Records ordered by pass, prompt and step.
    """
    parts = [(PASSES.index(name), collect(trace)) for name, trace in traces.items()]
    rows, block = (torch.cat([getattr(steps, name) for _, steps in parts]) for name in ("rows", "block"))
    evidence = Evidence.cat([steps.evidence for _, steps in parts])

    return Records(
        evidence=evidence,
        final=torch.cat([labels(steps, references) for _, steps in parts]),
        tail=after_eot(first_eot(references, eot_id)[rows], block, evidence.masked.shape[1]),
        prompt=rows,
        passes=torch.cat([torch.full_like(steps.rows, number) for number, steps in parts]),
        block=block,
        step=torch.cat([steps.step for _, steps in parts]),
        prompt_ids=prompt_ids,
        splits=splits,
    )
