"""What one decode of a list of prompts costs and how good it is: a row of a comparison."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from data import gym, stories
from data.prompt import Prompt, is_right
from decoding.decoder import Generation
from decoding.eot import first_true
from decoding.output import Timer
from eval.intervals import paired, wilson


def judge(prompts: Sequence[Prompt], texts: Sequence[str]) -> tuple[Tensor | None, list[str]]:
    """Which answers are right, and who says so.

    The bundled tasks have a scorer of their own, reasoning-gym's prompts have that task's where it is installed (a full score
    is right), every other one is judged by its final answer.

    Returns:
        ``(B,)`` bool, and the scorers that were used; ``None`` and none if a prompt has no answer.
    """
    if not all(prompt.answer for prompt in prompts):
        return None, []
    with_gym = find_spec("reasoning_gym") is not None
    right, scorers = [], set()
    for prompt, text in zip(prompts, texts, strict=True):
        if stories.knows(prompt):
            right.append(stories.score(text, prompt).exact)
            scorers.add("the task's own")
        elif with_gym and "source_dataset" in json.loads(prompt.metadata):
            right.append(gym.score(prompt.task, text, prompt) >= 1.0)
            scorers.add("reasoning-gym")
        else:
            right.append(is_right(text, prompt.answer))
            scorers.add("final answer")
    return torch.tensor(right), sorted(scorers)


def validity(prompts: Sequence[Prompt], texts: Sequence[str]) -> Tensor | None:
    """Which answers are well formed and right in each of their steps, ``(B,)`` bool; ``None`` where no scorer reads steps."""
    if not all(map(stories.knows, prompts)):
        return None
    return torch.tensor([stories.score(text, prompt).valid for prompt, text in zip(prompts, texts, strict=True)])


def agreement(ours: Tensor, reference: Tensor, eot: int) -> tuple[Tensor, Tensor]:
    """How far decodes equal their references, counting only text: what follows the first EoT never counts.

    Args:
        ours: ``(B, G)`` int64.
        reference: ``(B, G)`` int64.
        eot: Id of the EoT token.

    Returns:
        Per row, whether the texts are equal (``(B,)`` bool), and the share of equal positions up to the end of the longer
        text, its EoT included (``(B,)`` float32).
    """
    ends = torch.maximum(first_true(ours == eot), first_true(reference == eot))
    counted = torch.arange(ours.shape[1]) <= ends[:, None]
    both = counted & (ours == reference)
    share = both.sum(1) / counted.sum(1)
    return (both == counted).all(1), share


def measure(
    out: Generation,
    prompts: Sequence[Prompt],
    reference: Tensor,
    reference_right: Tensor | None,
    eot: int,
    *,
    component: str = "",
    component_seconds: float = 0.0,
    judge: Callable[[Sequence[Prompt], Sequence[str]], tuple[Tensor | None, list[str]]] = judge,
) -> dict[str, Any]:
    """The figures of one decode.

    Args:
        out: The decode.
        prompts: Its prompts.
        reference: ``(B, G)`` int64, full_step's decode of them.
        reference_right: ``(B,)`` bool, which of its answers are right; ``None`` if ``out`` is the reference.
        eot: Id of the EoT token.
        component: Name of the count that tells what the strategy's learned component did; empty without one.
        component_seconds: Time inside a filter's network, see :func:`timed`.
        judge: Says which answers are right.

    Returns:
        Plain data. Rates and shares are from 0 to 1, times in seconds, intervals 95 %. ``tokens`` counts what comes
        before each row's first EoT; ``nfe`` forwards of the predictor. ``truncated_correct_answers`` is the share of
        prompts that full_step answers rightly and this decode wrongly, in a text that ends before full_step's does.
        Figures of right answers are ``None`` where a prompt has none, ``valid`` where no scorer reads steps.

        With APD there is ``helper``. Its ``acceptance`` is the share of accepted positions among those accepted or refused:
        the first of a forward is always taken, and what is right of a refused one does not count. ``forwards`` are its own
        for an answer; ``milliseconds`` and ``predictor_milliseconds`` are the time of one forward of the rows in a batch.
        Where a filter was timed ``component`` has its ``milliseconds`` a forward of the predictor, and ``share_of_forward``,
        what part of that forward's time they are; ``loop_seconds`` include them.
    """
    right, scorers = judge(prompts, out.text)
    reference_right = right if reference_right is None else reference_right
    same, share = agreement(out.sequences, reference, eot)
    length, reference_length = first_true(out.sequences == eot), first_true(reference == eot)
    columns = {
        "right": right, "reference_right": reference_right, "valid": validity(prompts, out.text), "same": same,
        "share": share, "nfe": out.nfe, "tokens": length,
    }  # fmt: skip
    tasks = [prompt.task for prompt in prompts]
    spans = [span(tokens) for tokens in reference_length.tolist()]
    truncated = None
    if right is not None and reference_right is not None:
        truncated = (reference_right & ~right & (length < reference_length)).double().mean().item()
    tokens = int(length.sum())
    loop = out.seconds - out.predictor_seconds - out.helper_seconds
    row = _figures(columns) | {
        "by_task": _groups(columns, tasks),
        "by_length": _groups(columns, spans, order=lambda name: int(name.split()[0])),
        "empty_answers": (length == 0).double().mean().item(),
        "truncated_correct_answers": truncated,
        "tokens": tokens,
        "seconds": out.seconds,
        "predictor_seconds": out.predictor_seconds,
        "helper_seconds": out.helper_seconds,
        "loop_seconds": loop,
        "loop_share": loop / out.seconds,
        "tokens_per_second": tokens / out.seconds,
        "tokens_per_second_without_helper": tokens / (out.seconds - out.helper_seconds),
        "forward_calls": out.forward_calls,
        "counts": {name: int(count.sum()) for name, count in out.counts.items()},
        "scorers": scorers,
        "right": None if right is None else "".join("1" if value else "0" for value in right.tolist()),
    }
    accepted, refused = (row["counts"].get(name, 0) for name in ("helper_commits", "helper_refusals"))
    if accepted + refused:
        row["helper"] = {
            "acceptance": accepted / (accepted + refused),
            "forwards": row["counts"]["helper_forwards"] / len(prompts),
            "milliseconds": 1000 * out.helper_seconds / out.forward_calls,
            "predictor_milliseconds": 1000 * out.predictor_seconds / out.forward_calls,
        }
    if component:
        row["component"] = {
            "count": component,
            "commits": row["counts"][component],
            "per_forward": row["counts"][component] / int(out.nfe.sum()),
        }
        if component_seconds:
            row["component"]["milliseconds"] = 1000 * component_seconds / out.forward_calls
            row["component"]["share_of_forward"] = component_seconds / out.predictor_seconds
    return row


@contextmanager
def timed(network: object, device: torch.device) -> Iterator[Timer]:
    """Measures the time inside a network's forwards as long as the context lasts; of what is no module, nothing.

    Args:
        network: A filter's network, which the decode itself does not time.
        device: Where it runs.
    """
    timer, hooks = Timer(device), []
    if isinstance(network, nn.Module):
        hooks.append(network.register_forward_pre_hook(lambda *_: timer.__enter__()))
        hooks.append(network.register_forward_hook(lambda *_: timer.__exit__()))
    try:
        yield timer
    finally:
        for hook in hooks:
            hook.remove()


def span(tokens: int) -> str:
    """The bin of an answer's length: ``0 tokens``, ``1 to 2``, ``3 to 4``, ``5 to 8``, and so on in powers of two."""
    if tokens < 1:
        return "0 tokens"
    high = 2 ** math.ceil(math.log2(max(tokens, 2)))
    return f"{high // 2 + 1 if high > 2 else 1} to {high}"


def _groups(
    columns: Mapping[str, Tensor | None], names: Sequence[str], order: Callable[[str], Any] = lambda name: name
) -> dict[str, dict[str, Any]]:
    """The figures of each group of prompts; ``names`` says which group a prompt belongs to."""
    found = {}
    for name in sorted(set(names), key=order):
        chosen = torch.tensor([other == name for other in names])
        found[name] = _figures({key: None if value is None else value[chosen] for key, value in columns.items()})
    return found


def _figures(columns: Mapping[str, Tensor | None]) -> dict[str, Any]:
    """Figures of some prompts, from one tensor ``(n,)`` for each of their properties."""
    right, reference, valid = columns["right"], columns["reference_right"], columns["valid"]
    same, share, tokens, nfe = (columns[name] for name in ("same", "share", "tokens", "nfe"))
    assert same is not None
    assert share is not None
    assert tokens is not None
    assert nfe is not None
    count, nfe = len(same), nfe.double()
    exact = interval = difference = None
    if right is not None and reference is not None:
        won, lost = int((right & ~reference).sum()), int((~right & reference).sum())
        exact, interval = right.double().mean().item(), wilson(int(right.sum()), count)
        difference = {"mean": (won - lost) / count, "interval": paired(won, lost, count), "won": won, "lost": lost}
    return {
        "prompts": count,
        "exact_match": exact,
        "exact_match_interval": interval,
        "paired_difference": difference,
        "valid": None if valid is None else valid.double().mean().item(),
        "sequence_agreement": same.double().mean().item(),
        "token_agreement": share.double().mean().item(),
        "nfe_mean": nfe.mean().item(),
        "nfe_median": nfe.median().item(),
        "nfe_p95": nfe.quantile(0.95).item(),
        "tokens_per_forward": tokens.sum().item() / nfe.sum().item(),
    }
