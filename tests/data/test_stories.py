"""The bundled tasks' generator and its scorer."""

import itertools
import json
import re
from dataclasses import replace

import pytest

from data.prompts import split_of
from data.stories import TASKS, StoryTask, samples, score
from data.wording import PROMPT, STEPS, WEIGHTS
from models.errors import InputError


def take(count=300, seed=1, start=0, **options):
    return list(itertools.islice(samples(StoryTask(**options), seed, start), count))


@pytest.mark.parametrize("wording", PROMPT)
@pytest.mark.parametrize("name", TASKS)
def test_the_generators_own_answers_score_full_marks(name, wording):
    for prompt in take(name=name, wording=wording):
        result = score(prompt.response, prompt)
        assert result.exact, prompt
        assert result.valid, prompt


@pytest.mark.parametrize("name", TASKS)
def test_a_sample_has_an_address(name):
    assert take(5, name=name, start=7) == take(12, name=name)[7:]
    assert take(5, name=name) != take(5, name=name, seed=2)


@pytest.mark.parametrize("name", TASKS)
def test_a_wrong_number_in_a_step_is_seen_although_the_final_answer_is_right(name):
    for prompt in take(name=name):
        body, mark, final = prompt.response.rpartition("####")
        numbers = list(re.finditer(r"\d+", body))
        last = numbers[-1]
        wrong = f"{body[: last.start()]}{int(last.group()) + 1}{body[last.end() :]}{mark}{final}"
        result = score(wrong, prompt)
        assert result.exact
        assert not result.valid, wrong


def test_what_a_bad_decode_writes_is_judged():
    prompt = take(1, name="story")[0]
    assert not score("", prompt).exact
    assert not score("", prompt).valid
    assert not score(prompt.response.replace("####", ""), prompt).exact, "no final answer"
    broken = score("The the apples apples. " + prompt.response, prompt)
    assert broken.exact
    assert not broken.well_formed
    sentences = prompt.response.partition(". ")
    assert score(sentences[0] + ". " + prompt.response, prompt).steps < 1 or "{" not in sentences[0]


def test_what_people_have_at_first_may_be_said_or_not():
    for prompt in take(name="story"):
        for name, count in json.loads(prompt.metadata)["start"].items():
            assert score(f"{name} owns {count}. {prompt.response}", prompt).valid
            assert not score(f"{name} owns {count + 1}. {prompt.response}", prompt).valid
            assert not score(f"Someone owns {count}. {prompt.response}", prompt).valid


def test_each_step_left_out_costs_its_share():
    prompt = next(p for p in take(name="order") if len(json.loads(p.metadata)["steps"]) >= 4)
    steps = len(json.loads(prompt.metadata)["steps"])
    body, mark, final = prompt.response.rpartition("####")
    sentences = re.findall(r"[^.]+\.", body)
    number = re.escape(str(json.loads(prompt.metadata)["steps"][-1][3]))
    kept = [sentence for sentence in sentences if not re.search(rf"\b{number}\b", sentence)]
    assert score("".join(kept) + mark + final, prompt).steps == pytest.approx((steps - 1) / steps)


def test_numbers_stay_in_range():
    for prompt in (
        take(name="story", max_number=40) + take(name="short", max_number=40) + take(name="order", max_number=40)
    ):
        assert all(int(number) <= 40 for number in re.findall(r"\d+", prompt.prompt + prompt.response))


def test_prompts_of_the_two_wordings_share_no_sentence():
    assert PROMPT["train"].keys() == PROMPT["held_out"].keys()
    for kind, forms in PROMPT["train"].items():
        assert not set(forms) & set(PROMPT["held_out"][kind])


def test_each_step_has_five_wordings_of_different_length_and_order():
    for kind, forms in STEPS.items():
        assert 5 <= len(forms) <= len(WEIGHTS)
        assert len({len(form.split()) for form in forms}) >= 2, kind
        orders = {tuple(re.findall(r"\{([abc])\}", form)) for form in forms}
        assert len(orders) >= 2 or kind in ("start", "first"), kind  # those hold one number only


def test_answers_are_long_and_short():
    lengths = sorted(len(re.findall(r"\w+|[^\w\s]", prompt.response)) for prompt in take(1000, name="story"))
    assert lengths[0] < 25
    assert 0.15 < sum(length > 96 for length in lengths) / 1000 < 0.3
    assert lengths[-1] < 256


def test_all_splits_are_there():
    assert {split_of(prompt.prompt) for prompt in take(200, name="story")} == {"train", "validation", "test"}


def test_in_a_story_of_two_every_step_says_whose_it_is():
    told = re.compile(r"\bfor (\w+), ", re.IGNORECASE)
    tried = 0
    for prompt in take(60, name="story", pairs=1.0):
        first, second = json.loads(prompt.metadata)["start"]
        personal = {step[4] for step in json.loads(prompt.metadata)["steps"]}
        assert all(name in prompt.response for name in personal)
        other = {first: second, second: first}
        wrong = told.sub(
            lambda found, other=other: found[0].replace(found[1], other[found[1]]), prompt.response, count=1
        )
        if wrong != prompt.response:
            tried += 1
            assert score(wrong, prompt).steps < 1
    assert tried > 20


def test_a_story_tells_of_one_person_after_the_other():
    for prompt in take(60, name="story", pairs=1.0):
        first, second = json.loads(prompt.metadata)["start"]
        begins = re.search(
            rf"\b(There are \d+ \w+ on the table of {second}|{second} (has|owns|starts))\b", prompt.prompt
        )
        assert begins
        assert second not in prompt.prompt[: begins.start()]
        own = re.search(rf"\b{first}\b", prompt.prompt)
        assert own.start() < begins.start()


def test_stories_of_two_people_may_be_all_or_none():
    for pairs, people in ((0.0, {1}), (1.0, {2}), (0.5, {1, 2})):
        assert {len(json.loads(prompt.metadata)["start"]) for prompt in take(40, name="story", pairs=pairs)} == people


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "tale"}, "story task: name: found 'tale'; accepted: story | order | short"),
        ({"wording": "new"}, "story: wording: found 'new'"),
        ({"max_number": 100}, "story: max_number: found 100"),
        ({"max_events": 2}, "story: max_events: found 2"),
        ({"pairs": 1.5}, "story: pairs: found 1.5"),
    ],
)
def test_bad_settings_are_named(change, message):
    with pytest.raises(InputError, match=re.escape(message)):
        replace(StoryTask("story"), **change)
