"""The bundled model's card."""

import json
import re
import shutil
from pathlib import Path

import pytest

from data.prompts import load_prompts
from eval.card import HELD_OUT, calibration, main
from models.predictor import MaskPredictor


@pytest.fixture
def base(tiny_checkpoint, tmp_path) -> Path:
    """The tiny model with room for a story in its tokens, which are few letters each."""
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_sequence_length": 1024}))
    return folder


def test_the_card_holds_accuracy_calibration_recipes_and_samples(base, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("learning_rate: 3.0e-3\n")
    main("Nine steps.", base, [recipe], limit=3, samples=1, batch_size=4)
    text = (base / "README.md").read_text()
    accuracy = re.findall(r"^\| (test|held-out wording) \| (\d+) \| (\w+) \| (\d+) \|", text, re.MULTILINE)
    counts = {(title, length): count for title, length, task, count in accuracy if task == "all"}
    assert counts == {("test", "128"): "3", ("test", "256"): "3", ("held-out wording", "128"): "3"}
    assert "## Training\n\nNine steps." in text
    assert f"`{recipe}`:\n\n```yaml\nlearning_rate: 3.0e-3\n```" in text
    assert len(re.findall(r"forwards, (?:the same|another) text", text)) == 1


def test_calibration_counts_every_masked_guess_of_the_text_once(base):
    predictor = MaskPredictor.from_pretrained(base)
    prompts = load_prompts(HELD_OUT, split="test", limit=2)
    rows = [line.strip("| ").split(" | ") for line in calibration(predictor, prompts, 2).splitlines()[2:]]
    assert [row[0] for row in rows][0::7] == ["0 to 0.2", "0.99 to 1"]
    assert sum(int(row[1]) + int(row[3]) for row in rows) > 0
    for row in rows:
        assert all(share == "–" or 0 <= float(share.removesuffix(" %")) <= 100 for share in (row[2], row[4]))


def test_held_out_prompts_are_in_other_words_and_no_longer_than_trained():
    prompts = load_prompts(HELD_OUT, split="test", limit=60)
    assert {prompt.task for prompt in prompts} == {"story", "order", "short"}
    assert {json.loads(prompt.metadata)["wording"] for prompt in prompts} == {"held_out"}
    lists = [prompt.answer for prompt in prompts if prompt.task == "order"]
    assert max(len(answer.split(", ")) for answer in lists) <= 6
