"""``model.generate(**inputs, custom_generate=learned_decoding, strategy="learn2pd", filter="folder", gen_length=128)``."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from decoding.config import CacheRule, DecodeConfig, EotRule
from decoding.eot import first_true
from decoding.loop import decode_steps
from decoding.output import StepResult, empty_output
from decoding.strategies import make_strategy
from models.families import FAMILIES
from models.generation import check_plain
from models.predictor import MaskPredictor, TokenIds, checkpoint_folder, fingerprint
from models.rules import CALLABLE, SETTINGS, check, whole


def learned_decoding(
    model: PreTrainedModel, input_ids: Tensor, logits_processor: LogitsProcessorList, stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig, *, strategy: str = "full_step", filter: str | Path | None = None,
    helper: str | Path | None = None, options: dict[str, Any] | None = None, gen_length: int | None = None,
    block_length: int = 32, steps: int | None = None, temperature: float = 0.0, eot: EotRule = "commit", seed: int = 0,
    cache: CacheRule = "none", refresh: int | None = None, eot_head: str | Path | None = None, eot_risk: float = 0.001,
    on_step: Callable[[StepResult], object] = lambda step: None, **model_kwargs: Any,
) -> Tensor | GenerateDecoderOnlyOutput:  # fmt: skip
    """Decodes with a strategy in place of transformers' own loop; ``generate`` calls it with prompts ``(B, P)`` int64.

    ``options`` are further settings of the strategy; ``gen_length`` (by default ``max_new_tokens``, or 128) to ``eot_risk`` are
    those of :class:`~decoding.config.DecodeConfig`. ``on_step`` is called with what every forward changed. Stopping criteria
    are asked about each token of a block once it is decoded, save for length, and for EoT where ``eot`` is ``off``.

    Returns:
        ``(B, P + n)`` int64, prompts and what was generated, up to the longest row's end, padded with EoT.

    Raises:
        InputError: A setting, a logits processor, a prompt or a component that cannot be used, by name.
    """
    check_plain(generation_config, logits_processor)
    check({"options": options, "on_step": on_step}, {"options": SETTINGS.or_null(), "on_step": CALLABLE})
    folders = {name: each for name, each in (("filter", filter), ("helper", helper)) if each is not None}
    rule = make_strategy(strategy, folders | dict(options or {}))
    length = next(each for each in (gen_length, generation_config.max_new_tokens, 128) if each is not None)
    config = DecodeConfig(length, block_length, steps, temperature, eot, seed, cache, refresh, eot_head, eot_risk)
    mask = model_kwargs.get("attention_mask")
    prompts = [row.tolist() if mask is None else row[mask[i].bool()].tolist() for i, row in enumerate(input_ids)]
    trained, training = [each for each in model.parameters() if each.requires_grad], model.training
    predictor, output = _predictor(model, bool(rule.fingerprints() or eot_head)), empty_output(len(prompts), config)
    ruled = (MaxLengthCriteria, EosTokenCriteria) if eot == "off" else MaxLengthCriteria
    stop = _Stop([each for each in stopping_criteria if not isinstance(each, ruled)], prompts, predictor)
    try:
        for step in decode_steps(predictor, prompts, config, rule, output, stop=stop if stop.criteria else None):
            on_step(step)
    finally:  # a predictor is frozen, the caller's model need not be
        model.train(training)
        for each in trained:
            each.requires_grad_(True)
    width = stop.finish(output.sequences, eot != "off")
    result: Any = torch.cat((input_ids, output.sequences[:, :width].to(input_ids.device)), 1)
    return GenerateDecoderOnlyOutput(sequences=result) if generation_config.return_dict_in_generate else result


def _predictor(model: PreTrainedModel, known: bool) -> MaskPredictor:
    """The model as decoders know it; ``known`` where a component has to be compared with the folder it came from."""
    config, name = model.config, str(model.name_or_path)
    identity = fingerprint(checkpoint_folder(name)) if known and name else "unsaved"
    check({"model.config.mask_token_id": config.mask_token_id}, {"model.config.mask_token_id": whole(0)})
    ids = TokenIds(config.mask_token_id, *[config.eos_token_id] * 3, bos=config.eos_token_id)
    longest = getattr(config, FAMILIES[config.model_type].max_length)
    return MaskPredictor(model, ids, config.vocab_size, longest, identity)


class _Stop:
    """Asks the criteria about each token in turn, as a loop of one token a step would, and remembers where rows end."""

    def __init__(self, criteria: list[Any], prompts: list[list[int]], predictor: MaskPredictor) -> None:
        self.criteria, self.prompts = StoppingCriteriaList(criteria), prompts
        self.device, self.eot, self.asked, self.ends = predictor.device, predictor.ids.eot, [0] * len(prompts), {}

    def __call__(self, row: int, tokens: list[int]) -> bool:
        ids, prompt = torch.tensor([self.prompts[row] + tokens], device=self.device), len(self.prompts[row])
        for end in range(self.asked[row] + 1, len(tokens) + 1):
            if row not in self.ends and bool(self.criteria(ids[:, : prompt + end], None)):  # type: ignore[arg-type]
                self.ends[row] = end
        self.asked[row] = len(tokens)
        return row in self.ends

    def finish(self, sequences: Tensor, eot: bool) -> int:
        """Asks about what the loop did not, each row's last block, cuts the rows there, and tells the longest's length."""
        ends = first_true((sequences == self.eot) & eot).tolist()
        for row, end in enumerate(ends):
            if row in self.ends or self(row, sequences[row, :end].tolist()):
                sequences[row, self.ends[row] :], ends[row] = self.eot, self.ends[row] - 1
        return max(ends) + 1
