"""Text in, text out: a base model, a strategy and its exported component behind one object."""

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from decoding.config import DecodeConfig
from decoding.eot import RULES
from decoding.loop import check_prompts, decode, decode_steps
from decoding.output import DecodeOutput, StepResult, StepTrace, empty_output
from decoding.risk import Calibration, calibration_file, load_calibration, plain
from decoding.strategies import Strategy, make_strategy
from decoding.text import PromptLike, encode
from models.errors import InputError
from models.predictor import MaskPredictor, fingerprint
from models.rules import FLAG, LENGTH, SEED, TEXT, check, list_of


@dataclass
class Generation:
    """What ``generate`` returns; every list and tensor is in the order of the prompts.

    Attributes:
        text: Decoded text of each row, special tokens left out, up to the first stop sequence.
        tokens: Generated ids of each row before its first EoT.
        sequences: ``(B, gen_length)`` int64, the whole generated region.
        nfe: ``(B,)`` int64, forwards in which the row still had masked positions.
        forward_calls: Batched forwards launched.
        counts: Name to ``(B,)`` int64 totals of the strategy's events.
        trace: Steps in order (``rows`` index the prompts), or ``None`` where not asked for.
        seconds: Wall time of the decode.
        predictor_seconds: Part of it inside the predictor.
        helper_seconds: Part of it inside the helper, for strategies that have one.
        settings: The complete decode settings, with the fingerprints of all weights.
    """

    text: list[str]
    tokens: list[list[int]]
    sequences: Tensor
    nfe: Tensor
    forward_calls: int
    counts: dict[str, Tensor]
    trace: list[StepTrace] | None
    seconds: float
    predictor_seconds: float
    settings: dict[str, Any] = field(default_factory=dict)
    helper_seconds: float = 0.0


_RULES = {
    "batch_size": LENGTH,
    "chat_template": FLAG,
    "trace": FLAG,
    "stop": list_of(TEXT, "texts, none of them empty"),
    "seeds": list_of(SEED, "whole numbers of at least 0").or_null(),
}


class Decoder:
    """Decodes prompts with one strategy.

    Args:
        predictor: The mask predictor.
        strategy: The strategy.

    Attributes:
        calibration: What vouches for the strategy's setting, where it was chosen by a risk.
    """

    def __init__(self, predictor: MaskPredictor, strategy: Strategy) -> None:
        self.predictor, self.strategy = predictor, strategy
        self.calibration: Calibration | None = None

    @classmethod
    def from_pretrained(
        cls,
        base: str | Path,
        strategy: str = "full_step",
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        compile: bool = False,
        risk: float | None = None,
        calibration: str | Path | None = None,
        **options: Any,
    ) -> "Decoder":
        """Loads a base model and builds a strategy.

        Args:
            base: Folder or hub id of the base model.
            strategy: Name of the strategy.
            device: Device of the weights; a GPU where there is one.
            dtype: Dtype of the weights.
            compile: Compile the predictor's forward; the first decode then takes minutes.
            risk: What may be lost of what full_step gives, from 0 to 1: a share of prompts, or with a calibration of loss
                ``tokens`` of a text's positions. Takes the cheapest setting that calibration prompts vouch for.
            calibration: File written by ``eval/risk.py``; by default ``risk.json`` in the folder of the filter or helper.
            **options: The strategy's settings, such as ``threshold=0.9`` or ``filter="folder"``.

        Raises:
            InputError: Anything that does not load or does not fit, by name.
        """
        known = None
        if risk is None and calibration is not None:
            raise InputError("risk", None, "a share between 0 and 1, for which the calibration has a setting")
        if risk is not None:
            known = load_calibration(calibration_file(options, calibration))
            if known.option in options:
                raise InputError(f"risk, {known.option}", f"{risk}, {options[known.option]}", "one of them")
            options[known.option] = known.value(risk)
        chosen = make_strategy(strategy, **options)
        decoder = cls(MaskPredictor.from_pretrained(base, device=device, dtype=dtype, compile=compile), chosen)
        if known is not None:
            fixed = {name: value for name, value in plain(options).items() if name != known.option}
            known.check(strategy, fixed, {"base": decoder.predictor.fingerprint} | chosen.fingerprints())
            decoder.calibration = known
        return decoder

    def generate(
        self,
        prompts: Sequence[PromptLike],
        *,
        batch_size: int = 32,
        chat_template: bool = True,
        references: Tensor | None = None,
        stop: Sequence[str] = (),
        seeds: Sequence[int] | None = None,
        trace: bool = False,
        finished: Callable[[int, list[int], int], None] | None = None,
        **settings: Any,
    ) -> Generation:
        """Decodes a list of prompts; as one is finished, the next takes its place in the batch.

        Args:
            prompts: Strings, chat messages or token ids, one entry a prompt.
            batch_size: Prompts decoded together.
            chat_template: Wrap text in the chat template.
            references: ``(B, gen_length)`` int64, for the oracle.
            stop: Texts that end a row: looked for at the end of every block, in the text decoded so far.
            seeds: Noise seed of each prompt beside ``seed``; its place in the list by default.
            trace: Keep every step.
            finished: Called with a prompt's index, its tokens before the first EoT and its NFE as soon as it is decoded.
            **settings: Of :class:`decoding.config.DecodeConfig`: ``gen_length=256``, ``cache="dual"`` and so on.

        Raises:
            InputError: A setting, a prompt or a reference that cannot be used, by name.
        """
        config = DecodeConfig.of(settings)
        if self.calibration is not None:
            self.calibration.compare(config)
        call = {"batch_size": batch_size, "chat_template": chat_template, "stop": stop}
        check(call | {"seeds": seeds, "trace": trace}, _RULES)
        ids = self._encode(prompts, config, chat_template)
        if references is not None:
            self._check_references(references, (len(ids), config.gen_length))
        if seeds is not None and len(seeds) != len(ids):
            raise InputError("seeds", f"{len(seeds)} for {len(ids)} prompts", "one for each prompt")
        order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
        index = torch.tensor(order)
        whole = decode(
            self.predictor, [ids[i] for i in order], config, self.strategy,
            None if references is None else references[index], record=trace,
            seeds=order if seeds is None else [seeds[i] for i in order], batch_size=batch_size,
            stop=(lambda row, region: cut(self.decode_text(self._before_eot(region)), stop) is not None) if stop else None,
            finished=(lambda row, region, nfe: finished(order[row], self._before_eot(region), nfe)) if finished else None,
        )  # fmt: skip
        _restore(whole, index)
        name = self.strategy.component
        if name and not whole.counts[name].any():
            warnings.warn(f"{self.strategy.name}: its component never fired ({name} is 0 in every row)", stacklevel=2)
        return self._generation(whole, config, call | {"stop": list(stop)}, trace)

    def check(self, prompts: Sequence[PromptLike], *, chat_template: bool = True, **settings: Any) -> None:
        """Raises what :meth:`generate` would raise before its first step; what is learned is loaded for it.

        Args:
            prompts: As for :meth:`generate`.
            chat_template: Likewise.
            **settings: Of :class:`decoding.config.DecodeConfig`.

        Raises:
            InputError: A setting, a prompt or a component that cannot be used, by name.
        """
        config = DecodeConfig.of(settings)
        self._encode(prompts, config, chat_template)
        RULES[config.eot]().prepare(config, self.predictor)
        self.strategy.prepare(self.predictor, config)

    def stream(
        self, prompt: PromptLike, *, chat_template: bool = True, output: DecodeOutput | None = None, **settings: Any
    ) -> Iterator[StepResult]:
        """Decodes one prompt, yielding what every forward changed; the settings are those of :class:`DecodeConfig`.

        Pass ``output`` (from :func:`decoding.output.empty_output`) to read NFE and counts as they grow.
        """
        config = DecodeConfig.of(settings)
        if self.calibration is not None:
            self.calibration.compare(config)
        ids = self._encode([prompt], config, chat_template)
        yield from decode_steps(self.predictor, ids, config, self.strategy, output or empty_output(1, config))

    def settings(self, config: DecodeConfig) -> dict[str, Any]:
        """Everything that a text depends on beside its prompt: decode settings, the strategy's, dtype and fingerprints."""
        head = {} if config.eot_head is None else {"eot": fingerprint(Path(config.eot_head))}
        return config.settings() | self.strategy.settings() | {
            "dtype": str(self.predictor.dtype).removeprefix("torch."),
            "fingerprints": {"base": self.predictor.fingerprint} | self.strategy.fingerprints() | head,
        }  # fmt: skip

    def decode_text(self, tokens: Sequence[int]) -> str:
        """Text of generated ids, special tokens left out."""
        if self.predictor.tokenizer is None:
            return ""
        return str(self.predictor.tokenizer.decode(list(tokens), skip_special_tokens=True))

    def read(self, sequences: Tensor, stop: Sequence[str] = ()) -> tuple[list[str], list[list[int]]]:
        """Text, up to the first stop sequence, and ids, up to the first EoT, of generated regions ``(B, G)`` int64."""
        tokens = [self._before_eot(region) for region in sequences.tolist()]
        return [text[: cut(text, stop)] for text in map(self.decode_text, tokens)], tokens

    def _before_eot(self, region: list[int]) -> list[int]:
        eot = self.predictor.ids.eot
        return region[: region.index(eot)] if eot in region else region

    def _encode(self, prompts: Sequence[PromptLike], config: DecodeConfig, chat_template: bool) -> list[list[int]]:
        if isinstance(prompts, str | bytes | Mapping) or not isinstance(prompts, Collection) or not len(prompts):
            raise InputError("prompts", repr(prompts)[:60], "a list of at least one prompt")
        tokenizer = self.predictor.tokenizer
        if tokenizer is None:
            if not all(isinstance(prompt, Sequence) and not isinstance(prompt, str) for prompt in prompts):
                raise InputError("prompts", "text for a predictor without a tokenizer", "lists of token ids")
            ids = [cast(list[int], list(prompt)) for prompt in prompts]
        else:
            ids = [encode(tokenizer, prompt, chat_template) for prompt in prompts]
        check_prompts(self.predictor, ids, config)
        return ids

    def _check_references(self, references: Tensor, shape: tuple[int, int]) -> None:
        if not isinstance(references, Tensor) or references.shape != shape:
            found = tuple(references.shape) if isinstance(references, Tensor) else type(references).__name__
            raise InputError("references", found, f"shape {shape}")
        size, mask = self.predictor.vocab_size, self.predictor.ids.mask
        if references.dtype is not torch.long or ((references < 0) | (references >= size) | (references == mask)).any():
            raise InputError("references", f"{references.dtype} values", f"int64 ids from 0 to {size - 1}, not MASK")

    def _generation(
        self, output: DecodeOutput, config: DecodeConfig, settings: dict[str, Any], trace: bool
    ) -> Generation:
        text, tokens = self.read(output.sequences, settings["stop"])
        return Generation(
            text=text,
            tokens=tokens,
            sequences=output.sequences,
            nfe=output.nfe,
            forward_calls=output.forward_calls,
            counts=output.counts,
            trace=output.trace if trace else None,
            seconds=output.seconds,
            predictor_seconds=output.predictor_seconds,
            helper_seconds=output.helper_seconds,
            settings=self.settings(config) | settings,
        )


def cut(text: str, stop: Sequence[str]) -> int | None:
    """Where the first stop sequence begins in a text; ``None`` if it holds none."""
    places = [place for place in map(text.find, stop) if place >= 0]
    return min(places, default=None)


def _restore(output: DecodeOutput, index: Tensor) -> None:
    """Brings a decode of the prompts ``index`` ``(B,)`` back into their order."""
    place = index.argsort()
    output.sequences, output.nfe = output.sequences[place], output.nfe[place]
    output.counts = {name: count[place] for name, count in output.counts.items()}
    for step in output.trace:
        step.rows = index[step.rows]
