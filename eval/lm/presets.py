"""The field's settings for its four benchmarks, by name: ``gsm8k_256`` to ``mbpp_1024``.

A preset fixes the task's side and the lengths; strategy, cache and end-of-text rule stay free. The settings are those of
Fast-dLLM (arXiv 2505.22618: its tables, and ``eval_gsm8k.sh`` and ``eval_humaneval.sh`` in its repository), whose evaluation
code Learn2PD takes over and runs at 1024 too (arXiv 2509.25188), with LLaDA-8B-Instruct:

- GSM8K 5-shot, MATH (``minerva_math``) 4-shot, HumanEval 0-shot, MBPP 3-shot.
- Blocks of 32, a step for each token (``steps`` is ``gen_length`` unless given), temperature 0.
- All shots in one user message inside the chat template: the code wraps the finished few-shot prompt of an Instruct model.

What differs: their HumanEval figures come from ``humaneval`` and a script that cleans the saved samples afterwards; here
``humaneval_instruct`` asks for the code in a fence instead. Tables rarely say which of GSM8K's two filters, or of MATH's two
metrics, they show; both are reported. ``minerva_math`` needs ``pip install 'lm-eval[math]'``. HumanEval and MBPP run the
model's code: they need consent, ``HF_ALLOW_CODE_EVAL=1`` and the hub's ``code_eval``.
"""

from dataclasses import asdict, dataclass
from typing import Any

from models.errors import InputError

LENGTHS = (256, 512, 1024)


@dataclass(frozen=True)
class Preset:
    """What a preset fixes; all fields but ``metrics`` are arguments of the command.

    Attributes:
        tasks: lm-eval's name of the task.
        num_fewshot: Solved examples before the question.
        gen_length: Generated positions.
        metrics: What published tables show, by lm-eval's names.
        block_length: Positions of a block.
        temperature: 0 takes the most probable token.
        apply_chat_template: Wrap the prompt in the chat template.
        fewshot_as_multiturn: Give every example a turn of its own.
    """

    tasks: str
    num_fewshot: int
    gen_length: int
    metrics: tuple[str, ...]
    block_length: int = 32
    temperature: float = 0.0
    apply_chat_template: bool = True
    fewshot_as_multiturn: bool = False


_TASKS = {
    "gsm8k": ("gsm8k", 5, ("exact_match,strict-match", "exact_match,flexible-extract")),
    "math": ("minerva_math", 4, ("exact_match,none", "math_verify,none")),
    "humaneval": ("humaneval_instruct", 0, ("pass@1,create_test",)),
    "mbpp": ("mbpp", 3, ("pass_at_1,none",)),
}

PRESETS = {
    f"{name}_{length}": Preset(task, shots, length, metrics)
    for name, (task, shots, metrics) in _TASKS.items()
    for length in LENGTHS
}


def resolve(preset: str | None, given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fills in what was not given: from the preset, where there is one, else the prompt's format.

    Args:
        preset: Name of a preset, or ``None``.
        given: The command's arguments; ``None`` is not given.

    Returns:
        The settings, and those among them that were given otherwise than the preset has them.

    Raises:
        InputError: No such preset, or turns without a chat template.
    """
    if preset is not None and preset not in PRESETS:
        raise InputError("preset", repr(preset), " | ".join(PRESETS))
    fixed = {} if preset is None else {k: v for k, v in asdict(PRESETS[preset]).items() if k != "metrics"}
    overrides = {name: given[name] for name, value in fixed.items() if given[name] not in (None, value)}
    settings = given | fixed | overrides
    if settings["apply_chat_template"] is None:
        settings["apply_chat_template"] = True
    if settings["fewshot_as_multiturn"] is None:
        settings["fewshot_as_multiturn"] = settings["apply_chat_template"]
    if settings["fewshot_as_multiturn"] and not settings["apply_chat_template"]:
        raise InputError("fewshot_as_multiturn", "true without the chat template", "false")
    return settings, overrides
