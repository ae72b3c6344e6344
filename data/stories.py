"""Instruction data of our own: problems with worked answers whose wording is drawn (no extra, no compiler).

A deterministic template leaves a mask predictor no doubt, and without doubt there is nothing for a learned decoder to tell
apart. Here every step of an answer has five forms or more, of different lengths and orders: a guess may be right although
its probability is .4 (a wording), or wrong although it is .9 (a number that depends on text not yet written).

Tasks: ``story`` (people who buy, lose, share, double and pack things), ``order`` (things put in order of a number) and
``short`` (one step of arithmetic). A sample is addressed by ``(task, seed, index)``.
"""

import functools
import itertools
import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from data.prompt import Prompt
from data.wording import ASIDES, BOXES, CLOSINGS, ITEMS, LEADS, NAMES, OPENINGS, PROMPT, STEPS, THINGS, WEIGHTS
from models.errors import InputError

Step = tuple[str, int, int, int, str]
"""A step of an answer: what is done, two operands, the result, and whose it is; what a step does not have is 0 or empty."""

_EVENTS = (
    ("gain", 0.3),
    ("lose", 0.25),
    ("move", 0.12),
    ("pack", 0.1),
    ("double", 0.08),
    ("share", 0.08),
    ("distract", 0.07),
)

_PERSONAL = ("gain", "lose", "double", "share", "pack")
"""Steps about what one person has: in a story about two, each says whose it is."""


@dataclass
class StoryTask:
    """One task of the generator.

    Args:
        name: ``story``, ``order`` or ``short``.
        weight: Share of the training mixture, relative to the other tasks.
        max_number: Largest number in a problem or its answer.
        max_events: ``story``: events of the longest problem; ``order``: things of the longest list.
        wording: ``train`` or ``held_out``: which of the two sets of sentences prompts are made of.
        pairs: ``story``: share of the stories that are about two people.
    """

    name: str
    weight: float = 1.0
    max_number: int = 99
    max_events: int = 8
    wording: str = "train"
    pairs: float = 0.5

    def __post_init__(self) -> None:
        if self.name not in TASKS:
            raise InputError("story task: name", repr(self.name), " | ".join(TASKS))
        if self.wording not in PROMPT:
            raise InputError(f"{self.name}: wording", repr(self.wording), " | ".join(PROMPT))
        if not 20 <= self.max_number <= 99:
            raise InputError(f"{self.name}: max_number", self.max_number, "20 to 99")
        if not 3 <= self.max_events <= 8:
            raise InputError(f"{self.name}: max_events", self.max_events, "3 to 8")
        if not 0 <= self.pairs <= 1:
            raise InputError(f"{self.name}: pairs", self.pairs, "0 to 1")


@dataclass(frozen=True)
class Score:
    """What a text is worth as an answer.

    Attributes:
        exact: The final answer is right.
        steps: Share of the steps that are said, in their place, with the right numbers.
        well_formed: Every sentence is one that the task knows.
    """

    exact: bool
    steps: float
    well_formed: bool

    @property
    def valid(self) -> bool:
        """Every sentence is well formed and every step right."""
        return self.well_formed and self.steps == 1


def samples(task: StoryTask, seed: int, start: int = 0) -> Iterator[Prompt]:
    """Endless prompts of one task for one seed, from index ``start`` on."""
    for index in itertools.count(start):
        rng = random.Random(f"{task.name}-{task.wording}-{seed}-{index}")
        writer = _Writer(rng, task.wording)
        response = TASKS[task.name](rng, task, writer)
        yield Prompt(
            id=f"{task.name}-{task.wording}-{seed}-{index}",
            task=task.name,
            prompt=" ".join(writer.question),
            response=response,
            answer=response.rpartition("#### ")[2],
            metadata=json.dumps({"start": writer.start, "steps": writer.steps, "wording": task.wording}),
        )


def knows(prompt: Prompt) -> bool:
    """Whether a prompt is of these tasks, and :func:`score` can judge its answer."""
    return prompt.task in TASKS and "steps" in json.loads(prompt.metadata)


def score(text: str, prompt: Prompt) -> Score:
    """Judges an answer by its final answer, its steps, and whether each sentence is one of the task's.

    Args:
        text: The answer, as decoded.
        prompt: The prompt it answers; its metadata holds the steps.
    """
    body, mark, final = text.rpartition("####")
    known = json.loads(prompt.metadata)
    expected: list[Step] = [tuple(step) for step in known["steps"]]
    fillers = {text.format(c=prompt.answer) for text, _ in (*OPENINGS, *ASIDES, *CLOSINGS)}
    said: list[bool] = []
    well_formed = bool(mark)
    for sentence in re.findall(r"[^.]*\.|[^.]+$", body.strip()):
        sentence = sentence.strip()
        start = _says(sentence, "start")
        if sentence in fillers or (start and known["start"].get(start["p"]) == start["c"]):
            continue
        step = expected[len(said)] if len(said) < len(expected) else None
        slots = _says(sentence, step[0]) if step else None
        if step and slots is not None:
            known_slots = dict(zip("abcp", step[1:], strict=False))  # earlier prompts do not say whose a step is
            said.append(all(known_slots.get(name, value) == value for name, value in slots.items()))
            continue
        said.append(False)
        well_formed = well_formed and any(_says(sentence, kind) is not None for kind in STEPS)
    return Score(bool(mark) and final.strip() == prompt.answer, sum(said) / max(len(expected), len(said)), well_formed)


def _says(sentence: str, kind: str) -> dict[str, int | str] | None:
    """The numbers and the person ``p`` of a sentence that says a step of this kind; ``None`` if it does not."""
    for form in _forms(kind):
        if match := form.fullmatch(sentence):
            return {name: value if name == "p" else int(value) for name, value in match.groupdict().items() if value}
    return None


@functools.cache
def _forms(kind: str) -> list[re.Pattern[str]]:
    leads = "|".join(lead for lead, _ in LEADS if lead)
    named = "(?:for (?P<p>[A-Za-z]+), )?"
    return [
        re.compile(f"(?:{leads})?{'' if '{p}' in form else named}{_pattern(form)}", re.IGNORECASE)
        for form in STEPS[kind]
    ]


def _pattern(form: str) -> str:
    """A regular expression of a form: numbers are named groups, everything else that varies is a word."""
    parts = []
    for part in re.split(r"(\{\w+\})", form):
        name = part.strip("{}")
        if part == name:
            parts.append(re.escape(part))
        elif name in ("a", "b", "c", "p"):
            value = f"(?P<{name}>{'[A-Za-z]+' if name == 'p' else '[0-9]+'})"
            parts.append(f"(?P={name})" if value in parts else value)
        else:
            parts.append(r"[A-Za-z]+")
    return "".join(parts)


class _Writer:
    """Draws the wording of one sample and keeps its steps."""

    def __init__(self, rng: random.Random, wording: str) -> None:
        self.rng, self.prompts = rng, PROMPT[wording]
        self.question: list[str] = []
        self.sentences: list[str] = []
        self.steps: list[Step] = []
        self.start: dict[str, int] = {}
        self.people = 1

    def ask(self, kind: str, **slots: Any) -> None:
        """Adds a sentence to the prompt."""
        text = self.rng.choice(self.prompts[kind]).format(**slots)
        self.question.append(text[0].upper() + text[1:])

    def say(self, kind: str, a: int = 0, b: int = 0, c: int = 0, **slots: Any) -> None:
        """Adds a step to the answer."""
        forms = STEPS[kind]
        (form,) = self.rng.choices(forms, WEIGHTS[: len(forms)])
        lead = self._draw(LEADS) if self.sentences else ""
        name = slots.get("p", "") if kind != "start" else ""
        if name and self.people > 1 and "{p}" not in form and kind in _PERSONAL:
            lead += f"for {name}, "
        text = lead + form.format(a=a, b=b, c=c, **slots)
        aside = self._draw(ASIDES) if self.steps and kind != "start" else ""
        self.sentences += [text[0].upper() + text[1:], aside]
        if kind != "start":
            self.steps.append((kind, a, b, c, name))

    def response(self, answer: str, opening: bool = True) -> str:
        """The whole answer."""
        first = self._draw(OPENINGS) if opening else ""
        parts = [first, *self.sentences, self._draw(CLOSINGS).format(c=answer), f"#### {answer}"]
        return " ".join(part for part in parts if part)

    def _draw(self, table: tuple[tuple[str, float], ...]) -> str:
        texts, weights = zip(*table, strict=True)
        return self.rng.choices(texts, weights)[0]


class _Story:
    """People, what they have, and what happens to it."""

    def __init__(self, rng: random.Random, task: StoryTask, writer: _Writer) -> None:
        self.rng, self.most, self.writer = rng, task.max_number, writer
        self.names = rng.sample(NAMES, 2)
        self.words: dict[str, Any] = {"t": rng.choice(THINGS), "box": rng.choice(BOXES)}
        self.have: dict[str, int] = {}

    @property
    def last(self) -> str:
        """The person told of last."""
        return self.names[len(self.have) - 1]

    def begin(self) -> None:
        """Says what the next person has."""
        name = self.names[len(self.have)]
        self.have[name] = self.writer.start[name] = self.rng.randint(2, self.most // 2)
        self.writer.ask("start", p=name, c=self.have[name], **self.words)
        if self.rng.random() < 0.35:
            self.writer.say("start", p=name, c=self.have[name], **self.words)

    def happen(self) -> None:
        """One event, of those that keep all numbers in range."""
        kinds, weights = zip(*_EVENTS, strict=True)
        while not self._happen(self.rng.choices(kinds, weights)[0]):
            pass

    def _happen(self, kind: str) -> bool:
        rng, have = self.rng, self.have
        p = rng.choice(list(have)) if kind == "move" else self.last
        q = next(name for name in self.names if name != p)
        a, b, k = have[p], rng.randint(2, 12), rng.randint(2, 5)
        possible = {
            "gain": a + b <= self.most,
            "lose": a - b >= 2,
            "move": a - b >= 2 and have.get(q, self.most) + b <= self.most,
            "pack": a + b * k <= self.most,
            "double": 2 * a <= self.most,
            "share": a % k == 0 and a // k >= 2,
            "distract": True,
        }
        if not possible[kind]:
            return False
        told = {"pack": {"a": k, "b": b}, "share": {"b": k}}.get(kind, {"b": b})
        self.writer.ask(kind, p=p, q=q, **told, **self.words)
        if kind in ("gain", "lose"):
            self._change(kind, p, b)
        elif kind == "move":
            self._change("lose", p, b)
            self._change("gain", q, b)
        elif kind == "pack":
            self.writer.say("pack", k, b, k * b, p=p, **self.words)
            self._change("gain", p, k * b)
        elif kind in ("double", "share"):
            have[p] = 2 * a if kind == "double" else a // k
            self.writer.say(kind, a, k if kind == "share" else 0, have[p], p=p, **self.words)
        return True

    def _change(self, kind: str, name: str, by: int) -> None:
        before = self.have[name]
        self.have[name] = before + by if kind == "gain" else before - by
        self.writer.say(kind, before, by, self.have[name], p=name, **self.words)

    def end(self) -> str:
        """Asks a question that can be asked, and answers it."""
        rng, writer, words = self.rng, self.writer, self.words
        p, q = sorted(self.names, key=lambda name: -self.have.get(name, 0))
        most, least = self.have[p], self.have.get(q, 0)
        asks = {"end": 0.4, "price": 0.1 if 2 * most <= self.most else 0.0}
        if least:
            asks |= {"total": 0.2 if most + least <= self.most else 0.0, "difference": 0.15, "more": 0.15}
            if most - least < 2:
                asks |= {"difference": 0.0, "more": 0.0}
        (kind,) = rng.choices(list(asks), list(asks.values()))
        if kind == "end":
            writer.ask("ask_end", p=self.last, **words)
            return str(self.have[self.last])
        if kind == "price":
            price = rng.randint(2, min(9, self.most // most))
            writer.ask("price", b=price, **words)
            writer.ask("ask_price", p=p, **words)
            writer.say("price", most, price, most * price, p=p, **words)
            return str(most * price)
        writer.ask(f"ask_{kind}", p=p, q=q, **words)
        result = {"total": most + least, "difference": most - least, "more": 0}[kind]
        writer.say(kind, most, least, result, p=p, q=q, **words)
        return p if kind == "more" else str(result)


def _story(rng: random.Random, task: StoryTask, writer: _Writer) -> str:
    story = _Story(rng, task, writer)
    writer.people = 1 if rng.random() < 1 - task.pairs else 2
    counts = range(2, task.max_events + 1)
    (events,) = rng.choices(counts, _LENGTHS[: len(counts)])
    second = rng.randint(1, events - 1)  # who is told of second comes in here
    for number in range(events):
        if number == 0 or (number == second and writer.people == 2):
            story.begin()
        story.happen()
    while not writer.steps:  # nothing but distractors so far
        story.happen()
    answer = story.end()
    return writer.response(answer)


def _order(rng: random.Random, task: StoryTask, writer: _Writer) -> str:
    counts = range(3, task.max_events + 1)
    (count,) = rng.choices(counts, _LENGTHS[: len(counts)])
    items = rng.sample(ITEMS, count)
    numbers = rng.sample(range(2, task.max_number + 1), count)
    kind = rng.choice(("up", "down"))
    writer.ask(kind, t=", ".join(f"{item} {number}" for item, number in zip(items, numbers, strict=True)))
    ranked = sorted(zip(numbers, items, strict=True), reverse=kind == "down")
    writer.say("first", c=ranked[0][0], t=ranked[0][1])
    for (before, _), (number, item) in itertools.pairwise(ranked):
        writer.say("next", before, 0, number, t=item)
    return writer.response(", ".join(item for _, item in ranked))


def _short(rng: random.Random, task: StoryTask, writer: _Writer) -> str:
    kind = rng.choice(("add", "add", "subtract", "subtract", "multiply", "divide", "compare"))
    small, factor = rng.randint(2, task.max_number - 2), rng.randint(2, 9)
    other = rng.randint(2, max(2, min(20, task.max_number - small)))
    product = factor * rng.randint(2, task.max_number // factor)
    a, b, c = {
        "add": (small, other, small + other),
        "subtract": (small + other, other, small),
        "multiply": (factor, product // factor, product),
        "divide": (product, factor, product // factor),
        "compare": (small + other, small, 0),
    }[kind]
    shown = (b, a) if kind == "compare" and rng.random() < 0.5 else (a, b)
    writer.ask(kind, a=shown[0], b=shown[1])
    writer.say(kind, a, b, c)
    return writer.response(str(c or a), opening=False)


_LENGTHS = (0.28, 0.24, 0.18, 0.12, 0.08, 0.06, 0.04)
TASKS: dict[str, Callable[[random.Random, StoryTask, _Writer], str]] = {
    "story": _story, "order": _order, "short": _short
}  # fmt: skip
