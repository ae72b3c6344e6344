"""Prints a decode as it happens: ``python decoding/generate.py --prompt "..."``.

The only file here that knows a command line and a terminal, and only while it runs: both are imported in functions.
"""

import inspect
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from decoding.command_line import ReadsConfigs, entry, one_line, refuse_repeated_keys
from decoding.config import CacheRule, DecodeConfig, EotRule
from decoding.decoder import Decoder
from decoding.eot import first_true
from decoding.memory_plan import plan_memory
from decoding.output import empty_output
from decoding.strategies import STRATEGIES, make_strategy
from decoding.strategies.full_step import FullStep
from models.errors import InputError
from models.predictor import MaskPredictor
from models.rules import SETTINGS, check, number

BUNDLED = Path(__file__).resolve().parents[1] / "models" / "bundled"
COLOURS = ["bright_yellow", "bright_green", "bright_cyan", "bright_blue", "bright_magenta", "bright_red"]


def generate(
    prompt: str | None = None,
    interactive: bool = False,
    base: str = str(BUNDLED / "llada-tiny"),
    strategy: str = "learn2pd",
    filter: str = str(BUNDLED / "filter-llada-tiny"),
    helper: str = str(BUNDLED / "helper-llada-tiny"),
    options: dict[str, Any] | None = None,
    gen_length: int = 128,
    block_length: int = 32,
    steps: int | None = None,
    temperature: float = 0.0,
    eot: EotRule = "commit",
    eot_head: str | None = None,
    eot_risk: float = 0.001,
    cache: CacheRule = "none",
    refresh: int | None = None,
    seed: int = 0,
    compile: bool = False,
    chat_template: bool = True,
    compare: bool = True,
    pause: float = 0.0,
    plan: Path | None = None,
    batch_size: int = 1,
    prompt_length: int = 256,
    dtype: str = "bfloat16",
) -> None:
    """Decodes one prompt and prints the text live; each token has the colour of the step that committed it.

    Args:
        prompt: The user's message.
        interactive: Goes on with one message a line, each answered for itself, until the input ends (Ctrl-D).
        base: Folder or hub id of the base model.
        strategy: Name of the strategy.
        filter: Folder of the filter that learn2pd uses.
        helper: Folder of the helper that apd uses.
        options: Further settings of the strategy, such as {"threshold": 0.9}.
        gen_length: Generated positions, in tokens.
        block_length: Positions of a block, in tokens.
        steps: Denoising steps, for strategies with a quota; by default one token each.
        temperature: 0 takes the most probable token.
        eot: End-of-text rule.
        eot_head: Folder of the EoT head, for the rule learned.
        eot_risk: Probability of losing text below which that rule ends a text.
        cache: Keys and values that later forwards of a block take from its first one.
        refresh: Forwards of a block from one on the whole sequence to the next.
        seed: Seed of the noise.
        compile: Compile the predictor's forward, which takes about a minute at first.
        chat_template: Wrap the prompt in the chat template.
        compare: Also decode one token a step and report its NFE.
        pause: Seconds to wait after each step, to watch it.
        plan: config.json of a model. Prints what a decode of it with these settings takes in memory, and decodes nothing.
        batch_size: Rows of that decode.
        prompt_length: Tokens of each of its prompts.
        dtype: Dtype of its weights.
    """
    check({"pause": pause}, {"pause": number("seconds, from 0 to 3600", lambda value: 0 <= value <= 3600)})
    check({"options": options}, {"options": SETTINGS.or_null()})
    for read, by, given in (
        (strategy == "learn2pd", "strategy learn2pd", {"filter": filter}),
        (strategy == "apd", "strategy apd", {"helper": helper}),
        (eot == "learned", "eot learned", {"eot_risk": eot_risk}),
        (plan is not None, "plan", {"batch_size": batch_size, "prompt_length": prompt_length, "dtype": dtype}),
    ):
        if not read:
            _check_usual(given, by)
    options = dict(options or {})
    if strategy == "learn2pd":
        options.setdefault("filter", filter)
    if strategy == "apd":
        options.setdefault("helper", helper)
    if strategy == "oracle":
        raise InputError(
            "strategy", "'oracle'", f"{' | '.join(n for n in STRATEGIES if n != 'oracle')} (it needs a reference)"
        )
    settings: dict[str, Any] = {
        "gen_length": gen_length, "block_length": block_length, "steps": steps, "temperature": temperature, "eot": eot,
        "seed": seed, "cache": cache, "refresh": refresh, "eot_head": eot_head, "eot_risk": eot_risk,
    }  # fmt: skip
    config = DecodeConfig(**settings)
    if plan is not None:
        rule = make_strategy(strategy, options)
        print(plan_memory(plan, config, rule, dtype=dtype, batch_size=batch_size, prompt_length=prompt_length))
        return
    if prompt is None and not interactive:
        raise InputError("prompt", None, "the user's message, or --interactive")
    rule = make_strategy(strategy, options)
    decoder = Decoder(MaskPredictor.from_pretrained(base, compile=compile), rule)
    if prompt is not None:
        _show(decoder, prompt, settings, chat_template, compare, pause)
    for message in _typed() if interactive else ():
        try:
            _show(decoder, message, settings, chat_template, compare, pause)
        except InputError as error:
            if not error.field.startswith("prompt"):
                raise
            print(error)  # a message too long for the model does not end the session


def _check_usual(given: dict[str, Any], by: str) -> None:
    """Raises an InputError for a setting that was given, and that nothing reads: it is read ``by`` something else alone."""
    for name, value in given.items():
        usual = inspect.signature(generate).parameters[name].default
        if value != usual:
            raise InputError(name, repr(value), f"none; it is read with {by} only")


def _typed() -> Iterator[str]:
    """Messages as they are typed, empty lines left out."""
    while True:
        try:
            message = input("> ").strip()
        except EOFError:
            print()
            return
        except UnicodeDecodeError as error:
            raise InputError("prompt", error, "text in UTF-8") from None
        if message:
            yield message


def _show(
    decoder: Decoder, prompt: str, settings: dict[str, Any], chat_template: bool, compare: bool, pause: float
) -> None:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    output = empty_output(1, DecodeConfig(**settings))
    console = Console()
    committed: list[int] = [0] * settings["gen_length"]
    text = Text()
    with Live(text, console=console, auto_refresh=False, transient=False) as live:
        for step in decoder.stream(prompt, chat_template=chat_template, output=output, **settings):
            for position in step.changed[0].nonzero()[:, 0].tolist():
                committed[position] = step.forward_call
            text = Text.assemble(*_coloured(decoder, step.sequences[0], committed))
            live.update(text, refresh=True)
            time.sleep(pause)
    length = int(first_true(output.sequences == decoder.predictor.ids.eot)[0])
    component = decoder.strategy.component
    fired = f", the {component.split('_')[0]} added {int(output.counts[component].sum())}" if component else ""
    console.print(
        f"\n{length} tokens in {int(output.nfe[0])} forwards ({decoder.strategy.name}{fired})", style="bold", end=""
    )
    if compare:
        reference = settings | {"steps": None, "cache": "none", "refresh": None}
        if settings["eot"] == "learned":
            reference |= {"eot": "commit", "eot_head": None}
        full = Decoder(decoder.predictor, FullStep()).generate([prompt], chat_template=chat_template, **reference)
        same = "the same text" if full.tokens[0] == output.sequences[0, :length].tolist() else "another text"
        console.print(f"; full_step: {int(full.nfe[0])} forwards, {same}", style="bold", end="")
    console.print()


def _coloured(decoder: Decoder, sequence: Any, committed: list[int]) -> list[tuple[str, str]]:
    """Each piece of the text up to its end, with its style."""
    ids = decoder.predictor.ids
    tokenizer = decoder.predictor.tokenizer
    pieces = []
    for token, step in zip(sequence.tolist(), committed, strict=True):
        if step and token in (ids.eot, ids.end_of_turn):
            break
        piece = str(tokenizer.decode([token])) if step and tokenizer else "░"
        pieces.append((piece, COLOURS[step % len(COLOURS)] if step else "dim"))
    return pieces


def main() -> None:
    """Runs :func:`generate` on the words of the command line.

    Raises:
        SystemExit: Bad input, with status 2, a refusal of the system, with 74, or Ctrl-C, with 130, after one line on stderr;
            any other exception is a bug and keeps its traceback.
    """
    from jsonargparse import ArgumentParser, auto_cli

    class Parser(ReadsConfigs, ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            line = one_line(message, inspect.signature(generate).parameters)
            sys.stderr.write(f"{self.prog}: {line} (see {self.prog} --help)\n")
            raise SystemExit(2)

    refuse_repeated_keys()
    entry(
        lambda: auto_cli(
            generate, as_positional=False, args=_flagged(sys.argv[1:]), parser_class=Parser, allow_abbrev=False
        )
    )


def _flagged(words: list[str]) -> list[str]:
    """The words of the command line, with ``--interactive`` alone taken as a flag; the parser wants a value after it."""
    after = [*words[1:], "--"]
    return [
        f"{word}=true" if word == "--interactive" and following.startswith("--") else word
        for word, following in zip(words, after, strict=False)  # without any word, one more follows
    ]


if __name__ == "__main__":
    main()
