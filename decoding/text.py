"""Text to token ids: the chat template, without letting a prompt's text become special tokens."""

from collections.abc import Sequence
from typing import cast

from transformers import PreTrainedTokenizerBase

from models.errors import InputError

Message = dict[str, str]
PromptLike = str | Sequence[Message] | Sequence[int]

_HOLE = "\ue000"  # private-use character that stands for a message's text while the template is rendered


def encode(tokenizer: PreTrainedTokenizerBase, prompt: PromptLike, chat_template: bool = True) -> list[int]:
    """Token ids of a prompt.

    Special tokens come from the template alone: a message that contains the text of one, ``<|mdm_mask|>`` say, is encoded
    as ordinary text.

    Args:
        tokenizer: The predictor's tokenizer.
        prompt: A user message, a list of chat messages (``role`` and ``content``), or token ids, which pass through.
        chat_template: Wrap text in the tokenizer's chat template and open the assistant's turn; without it, the text is
            encoded as it is.

    Raises:
        InputError: An empty prompt, a message without role or content, or no chat template where one is asked for.
    """
    if not isinstance(prompt, str) and all(isinstance(token, int) for token in prompt):
        return cast(list[int], list(prompt))
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    messages = cast(list[Message], asked)
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise InputError(f"message {number}", repr(message)[:80], "a mapping with role and content")
    texts = [str(message["content"]).strip() for message in messages]
    if not texts or not texts[-1]:
        raise InputError("prompt", "no text", "a prompt with at least one character")
    if not chat_template:
        return _plain(tokenizer, "\n".join(texts))
    if not tokenizer.chat_template:
        raise InputError("chat_template", "a tokenizer without one", "chat_template=False or another tokenizer")
    special = [str(token) for token in tokenizer.all_special_tokens]
    if not any(token in text for token in special for text in texts):
        return _rendered(tokenizer, messages)
    holes = [{**message, "content": f"{_HOLE}{n}{_HOLE}"} for n, message in enumerate(messages)]
    shell = tokenizer.apply_chat_template(holes, add_generation_prompt=True, tokenize=False)
    ids: list[int] = []
    for number, part in enumerate(str(shell).split(_HOLE)):
        ids += (
            _plain(tokenizer, texts[int(part)])
            if number % 2
            else tokenizer(part, add_special_tokens=False)["input_ids"]
        )
    return ids


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> list[int]:
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return list(tokenizer(str(text), add_special_tokens=False)["input_ids"])


def _plain(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])
