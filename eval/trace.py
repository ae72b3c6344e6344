"""Draws how strategies decode one prompt, step by step, as one HTML page: ``python eval/trace.py --prompt "..."``."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from data.disk import check_writable
from data.provenance import write_aside
from data.typed import Length, Share, Temperature, Whole
from decoding.config import CacheRule, DecodeConfig, EotRule
from decoding.decoder import Decoder
from decoding.generate import BUNDLED
from decoding.loop import decode_steps
from decoding.output import StepTrace, empty_output
from decoding.strategies import STRATEGIES, Strategy, make_strategy
from decoding.text import encode
from eval.command import command
from models.errors import InputError
from models.predictor import MaskPredictor

TEMPLATE = Path(__file__).with_suffix(".html")
PLACEHOLDER = "TRACE_DATA"
BEYOND = 4
"""Positions shown right of the longest text."""


def main(
    prompt: str,
    strategies: list[str],
    base: str = str(BUNDLED / "llada-tiny"),
    filter: str = str(BUNDLED / "filter-llada-tiny"),
    helper: str = str(BUNDLED / "helper-llada-tiny"),
    options: dict[str, dict[str, Any]] | None = None,
    gen_length: Length = 128,
    block_length: Length = 32,
    steps: Length | None = None,
    temperature: Temperature = 0.0,
    eot: EotRule = "commit",
    eot_head: str | None = None,
    eot_risk: Share = 0.001,
    cache: CacheRule = "none",
    seed: Whole = 0,
    chat_template: bool = True,
    out: Path = Path("runs/trace/trace.html"),
) -> None:
    """Decodes a prompt with each strategy and writes a page that shows every step of every decode side by side.

    The page needs nothing but itself and a browser; ``trace.html#12`` opens it at step 12.

    Args:
        prompt: The user's message.
        strategies: Names of the strategies; the first is the reference of the others.
        base: Folder or hub id of the base model.
        filter: Folder of the filter that learn2pd uses.
        helper: Folder of the helper that apd uses.
        options: Further settings by strategy, such as {"threshold": {"threshold": 0.8}}.
        gen_length: Generated positions, in tokens.
        block_length: Positions of a block, in tokens; apd has none.
        steps: Denoising steps, for strategies with a quota; by default one token each.
        temperature: 0 takes the most probable token.
        eot: End-of-text rule.
        eot_head: Folder of the EoT head, for the rule learned.
        eot_risk: Probability of losing text below which that rule ends a text.
        cache: Keys and values that later forwards of a block take from its first one; apd has its own.
        seed: Seed of the noise.
        chat_template: Wrap the prompt in the chat template.
        out: The page.
    """
    check_writable("out", out, folder=False)
    components = {"learn2pd": {"filter": filter}, "apd": {"helper": helper}}
    chosen = choose(strategies, components, options or {})
    config = DecodeConfig(
        gen_length, block_length, steps, temperature, eot, seed, cache, eot_head=eot_head, eot_risk=eot_risk
    )
    predictor = MaskPredictor.from_pretrained(base)
    data = {"base": Path(base).name, **trace(predictor, prompt, chosen, config, chat_template)}
    write_aside(out, page(data))
    print(f"wrote {out}")
    for panel in data["panels"]:
        print(f"{panel['strategy']}: {summary(panel)}")


def choose(
    names: Sequence[str], components: dict[str, dict[str, Any]], options: dict[str, dict[str, Any]]
) -> list[Strategy]:
    """Builds the strategies.

    Args:
        names: Their names.
        components: What some of them need to be built, by name.
        options: Settings by name, which take precedence.

    Raises:
        InputError: No name, an unknown one, settings for a strategy that is not named, or settings it does not take.
    """
    if not names:
        raise InputError("strategies", "none", f"one or more of {' | '.join(STRATEGIES)}")
    for name in options:
        if name not in names:
            raise InputError("options", f"{name!r}, which is not decoded", " | ".join(names))
    return [make_strategy(name, components.get(name, {}) | options.get(name, {})) for name in names]


@dataclass
class Decode:
    """One strategy's decode of the prompt; ``S`` steps, ``G`` generated positions.

    Attributes:
        config: Its settings.
        steps: ``S`` steps as the strategy saw them.
        after: ``(S, G)`` ids, the generated region after each step.
        counts: Totals of the strategy's events.
    """

    config: DecodeConfig
    steps: list[StepTrace]
    after: list[list[int]]
    counts: dict[str, int]


def decode(
    predictor: MaskPredictor, ids: list[int], strategy: Strategy, config: DecodeConfig, reference: Tensor | None
) -> Decode:
    """Decodes one prompt and keeps every step.

    It asks the loop itself, which alone says when a rule for the end of the text dropped which positions.

    Args:
        predictor: The mask predictor.
        ids: Token ids of the prompt.
        strategy: The strategy.
        config: Decode settings; APD, which knows neither blocks, quotas nor caches, takes the rest of them.
        reference: ``(1, G)`` int64, for the oracle.
    """
    config = strategy.taken(config)
    output = empty_output(1, config)
    results = decode_steps(predictor, [ids], config, strategy, output, reference, record=True)
    after = [result.sequences[0].tolist() for result in results]
    return Decode(config, output.trace, after, {name: int(count.sum()) for name, count in output.counts.items()})


def trace(
    predictor: MaskPredictor,
    prompt: str,
    strategies: Sequence[Strategy],
    config: DecodeConfig,
    chat_template: bool = True,
) -> dict[str, Any]:
    """Decodes a prompt with each strategy.

    Args:
        predictor: The mask predictor, with a tokenizer.
        prompt: The user's message.
        strategies: The strategies; the first is the reference of the others.
        config: Decode settings.
        chat_template: Wrap the prompt in the chat template.

    Returns:
        What the page shows, as plain data: prompt and settings, the ``panels`` of the strategies (see
        :func:`panel_of`), how many ``columns`` of the region are worth showing, and the ``pieces`` of text and
        ``special`` names of all token ids.

    Raises:
        InputError: A prompt, or settings that cannot be used, by name.
    """
    assert predictor.tokenizer is not None
    ids = encode(predictor.tokenizer, prompt, chat_template)
    reference = None
    if any(strategy.name == "oracle" for strategy in strategies):
        full = decode(predictor, ids, make_strategy("full_step"), config, None)
        reference = torch.tensor(full.after[-1:])
    panels: list[dict[str, Any]] = []
    for strategy in strategies:
        done = decode(predictor, ids, strategy, config, reference)
        settings = Decoder(predictor, strategy).settings(done.config) | {"chat_template": chat_template}
        panel = panel_of(done, predictor) | {"strategy": strategy.name, "settings": settings}
        panels.append(panel | compared(panel, panels[0] if panels else panel))
    pieces, special = vocabulary(panels, predictor.tokenizer)
    columns = min(config.gen_length, max(panel["tokens"] for panel in panels) + BEYOND)
    return {
        "prompt": prompt, "config": config.settings(), "panels": panels, "columns": columns,
        "pieces": pieces, "special": special, "eot": predictor.ids.eot,
    }  # fmt: skip


def panel_of(done: Decode, predictor: MaskPredictor) -> dict[str, Any]:
    """What the page shows of a decode, as plain data.

    Args:
        done: The decode.
        predictor: What it was decoded with.

    Returns:
        ``steps``, one entry a forward: the masked positions it looked ``at``, its guess (``token``) and ``confidence``
        at each. Lists over the generated region: ``commit`` and ``drop``, the step (from 1) that committed the position
        or dropped it as being after the end of the text, 0 for never; ``token``, what was committed; ``final``, what
        was there at last. Further ``nfe``, ``tokens`` and ``text`` up to the first EoT, ``counts``, ``block_length``.
    """
    ids, size = predictor.ids, done.config.gen_length
    commit, drop, token = [0] * size, [0] * size, [ids.mask] * size
    steps: list[dict[str, Any]] = []
    for number, (step, after) in enumerate(zip(done.steps, done.after, strict=True), 1):
        evidence, first = step.evidence, int(step.block) * step.transfer.shape[1]
        # Beyond a lookahead the confidence is 0; so may be that of a token drawn against all odds.
        seen = (evidence.masked & (evidence.confidence > 0)) | step.transfer
        looked = seen[0].nonzero()[:, 0]
        confidence = evidence.confidence[0, looked].double().round(decimals=4)
        guesses = {"token": evidence.token[0, looked].tolist(), "confidence": confidence.tolist()}
        steps.append({"at": (first + looked).tolist()} | guesses)
        for place in step.transfer[0].nonzero()[:, 0].tolist():
            commit[first + place], token[first + place] = number, int(step.committed[0, place])
        for position, now in enumerate(after):
            if now != token[position] and not drop[position]:
                drop[position] = number
    final = done.after[-1]
    length = final.index(ids.eot) if ids.eot in final else size
    assert predictor.tokenizer is not None
    text = str(predictor.tokenizer.decode(final[:length], skip_special_tokens=True))
    return {
        "nfe": len(steps), "tokens": length, "text": text, "steps": steps, "commit": commit, "drop": drop,
        "token": token, "final": final, "block_length": done.config.block_length, "counts": done.counts,
    }  # fmt: skip


def compared(panel: dict[str, Any], first: dict[str, Any]) -> dict[str, Any]:
    """The ``ratio`` of the first panel's forwards to this one's, and whether the two texts are the ``same``."""
    same = panel["final"][: panel["tokens"]] == first["final"][: first["tokens"]]
    return {"ratio": first["nfe"] / panel["nfe"], "same": same}


def vocabulary(
    panels: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase
) -> tuple[dict[int, str], dict[int, str]]:
    """Text of every token in the panels, and the names of those among them that are special and have none.

    A token that is only a part of a character reads as U+FFFD.
    """
    ids = {token for panel in panels for token in [*panel["token"], *panel["final"]]}
    ids |= {token for panel in panels for step in panel["steps"] for token in step["token"]}
    pieces = {token: str(tokenizer.decode([token], skip_special_tokens=True)) for token in sorted(ids)}
    special = {token: str(tokenizer.convert_ids_to_tokens(token)) for token in set(tokenizer.all_special_ids) & ids}
    return pieces, special


def page(data: dict[str, Any]) -> str:
    """The page that shows ``data``; no text in it can end the script element it is embedded in."""
    embedded = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return TEMPLATE.read_text(encoding="utf-8").replace(PLACEHOLDER, embedded)


def summary(panel: dict[str, Any]) -> str:
    """A panel's numbers in a few words."""
    words = [
        f"{panel['nfe']} forwards",
        f"{panel['tokens']} tokens",
        "the same text" if panel["same"] else "another text",
    ]
    return ", ".join(words + [f"{name} {count}" for name, count in panel["counts"].items()])


def spaced(words: Sequence[str]) -> list[str]:
    """The words of a command line, with ``--strategies a b`` as the parser wants its lists: ``--strategies [a,b]``."""
    if "--strategies" not in words:
        return list(words)
    start = words.index("--strategies") + 1
    end = next((place for place in range(start, len(words)) if words[place].startswith("-")), len(words))
    names = words[start:end]
    listed = " ".join(names) if names and names[0].startswith("[") else f"[{','.join(names)}]"
    return [*words[:start], listed, *words[end:]]


if __name__ == "__main__":
    command(main, args=spaced(sys.argv[1:]))
