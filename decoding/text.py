"""Text to token ids: the chat template, without letting a prompt's text become special tokens."""

from collections.abc import Sequence
from typing import cast

from transformers import PreTrainedTokenizerBase

from models.errors import InputError, first_line

Message = dict[str, str]
PromptLike = str | Sequence[Message] | Sequence[int]

MARK = "\ue000"
"""A private-use character that begins a rendered prompt and fences texts in it; it never reaches the model."""


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
    if isinstance(prompt, bytes) or not isinstance(prompt, Sequence):
        raise InputError("prompt", repr(prompt)[:80], "text, chat messages or token ids")
    if not isinstance(prompt, str) and all(isinstance(token, int) for token in prompt):
        return cast(list[int], list(prompt))
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    messages = cast(list[Message], asked)
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not all(isinstance(message.get(name), str) for name in ("role", "content")):
            raise InputError(f"message {number}", repr(message)[:80], "a mapping with role and content, both text")
    texts = [_unmarked(message["content"]).strip() for message in messages]
    if not texts or not texts[-1]:
        raise InputError("prompt", "no text", "a prompt with at least one character")
    if not all(map(is_unicode, texts)):
        raise InputError("prompt", ascii(texts)[:80], "text without lone surrogates")
    if not chat_template:
        return token_ids(tokenizer, "\n".join(texts))
    return token_ids(tokenizer, render(tokenizer, messages))


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8: JSON may hold halves of a character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
    """The chat template with the messages in it, as one string for :func:`token_ids`.

    It begins with a mark. Where a message holds the text of a special token, each message stands between two marks, so
    that it stays the characters it is.

    Args:
        tokenizer: The predictor's tokenizer.
        messages: Chat messages, ``role`` and ``content``.
        add_generation_prompt: Open the assistant's turn. Without it, a last message of the assistant is the beginning of the
            answer, and stays open.

    Raises:
        InputError: The tokenizer has no chat template, or one that does not render or drops the last message.
    """
    if not tokenizer.chat_template:
        raise InputError("chat_template", "a tokenizer without one", "chat_template=False or another tokenizer")
    begun = None
    if not add_generation_prompt and messages[-1]["role"] == "assistant":
        *messages, last = messages
        begun, add_generation_prompt = _unmarked(last["content"]), True
    texts = [_unmarked(message["content"]).strip() for message in messages]
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    special.update(map(str, tokenizer.all_special_tokens))
    if any(token in text for token in special for text in texts):
        texts = [f"{MARK}{text}{MARK}" for text in texts]
    filled = [{**message, "content": text} for message, text in zip(messages, texts, strict=True)]
    try:
        shell = tokenizer.apply_chat_template(filled, add_generation_prompt=add_generation_prompt, tokenize=False)
    except Exception as error:  # Jinja's, and whatever a template calls
        raise InputError("chat_template", first_line(error), "a template that renders these messages") from error
    if texts and texts[-1] not in str(shell):
        raise InputError("chat_template", f"{str(shell)[:60]!r}, without the last message", "a template that holds it")
    return f"{MARK}{shell}" if begun is None else f"{MARK}{shell}{MARK}{begun}"


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a rendered prompt, or of any other text, in which nothing is a special token."""
    if not text.startswith(MARK):
        return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])
    ids: list[int] = []
    for number, part in enumerate(text[1:].split(MARK)):
        ids += tokenizer(part, add_special_tokens=False, split_special_tokens=bool(number % 2))["input_ids"]
    return ids


def _unmarked(text: object) -> str:
    return str(text).replace(MARK, "")
