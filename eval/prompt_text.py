"""Prompts as lm-eval hands them about, as one string, and back to token ids.

lm-eval renders the chat template first and tokenises later, when template and message are one text. So that a message's
``<|eot_id|>`` stays the characters it is, a rendered prompt carries marks: it begins with one, and where an ordinary text
inside it must not be read for special tokens, one stands before and one after that text.
"""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from models.errors import InputError

MARK = "\ue000"
"""A private-use character; it never reaches the model."""


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]], add_generation_prompt: bool = True
) -> str:
    """The chat template with the messages in it, marked for :func:`token_ids`.

    Args:
        tokenizer: The predictor's tokenizer.
        messages: Chat messages, ``role`` and ``content``.
        add_generation_prompt: Open the assistant's turn. Without it, a last message of the assistant is the beginning of the
            answer, and stays open.

    Raises:
        InputError: The tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise InputError("apply_chat_template", "a tokenizer without a chat template", "false, or another tokenizer")
    begun = None
    if not add_generation_prompt and messages[-1]["role"] == "assistant":
        *messages, last = messages
        begun, add_generation_prompt = _unmarked(last), True
    texts = [_unmarked(message).strip() for message in messages]
    special = [str(token) for token in tokenizer.all_special_tokens]
    if any(token in text for token in special for text in texts):
        texts = [f"{MARK}{text}{MARK}" for text in texts]
    filled = [{**message, "content": text} for message, text in zip(messages, texts, strict=True)]
    shell = tokenizer.apply_chat_template(filled, add_generation_prompt=add_generation_prompt, tokenize=False)
    return f"{MARK}{shell}" if begun is None else f"{MARK}{shell}{MARK}{begun}"


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a rendered prompt, or of any other text, in which nothing is a special token."""
    if not text.startswith(MARK):
        return _plain(tokenizer, text)
    ids: list[int] = []
    for number, part in enumerate(text[1:].split(MARK)):
        ids += _plain(tokenizer, part) if number % 2 else tokenizer(part, add_special_tokens=False)["input_ids"]
    return ids


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
            return token_ids(tokenizer, context), _plain(tokenizer, continuation)
        head, _, text = context.rpartition(MARK)
    stripped = text.rstrip()
    before = _plain(tokenizer, stripped)
    after = _plain(tokenizer, text + continuation)[len(before) :] or _plain(tokenizer, continuation)
    return token_ids(tokenizer, head) + before, after


def _plain(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])


def _unmarked(message: dict[str, str]) -> str:
    return str(message["content"]).replace(MARK, "")
