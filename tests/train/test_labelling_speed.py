"""How much faster prompts are labelled than by a plain loop: ``python tests/train/test_labelling_speed.py --prompts 64``.

On a GPU, where there is one: ``--prompts 512 --batch_size 512``.

The loop is what one writes from the papers: one prompt at a time, transformers' forward on the whole sequence, first full_step,
then the oracle. Its labels are those of the rollouts, as the test below says.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import pytest
import torch
from torch import Tensor

from data.prompts import PromptSource
from data.provenance import environment
from data.rollout_data import RolloutSettings, waiting
from data.rollouts import load_records
from data.shards import Rollouts, ShardWriter
from decoding.config import DecodeConfig
from models.predictor import MaskPredictor
from train.roller import Roller

FIELDS = ("block", "masked", "token", "confidence", "margin", "entropy")


@dataclass
class Plain:
    """The two-pass loop.

    Args:
        predictor: The base model.
        config: Lengths; ``eot`` says whether a committed EoT ends the text or all of the region is decoded.
    """

    predictor: MaskPredictor
    config: DecodeConfig

    @torch.inference_mode()
    def label(self, tokens: Sequence[int]) -> dict[str, list[tuple[Tensor, ...]]]:
        """The states of both passes of a prompt, :data:`FIELDS` of each and its labels ``(K,)``, on the CPU."""
        text, full = self._decode(tokens, None)
        _, oracle = self._decode(tokens, text)
        length, found = self.config.block_length, {}
        for name, states in (("full_step", full), ("oracle", oracle)):
            found[name] = []
            for block, masked, token, *rest in states:
                final = masked & (token == text[block * length :][:length])
                found[name].append((block, *(value.cpu() for value in (masked, token, *rest, final))))
        return found

    def _decode(self, tokens: Sequence[int], reference: Tensor | None) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
        mask, eot, length = self.predictor.ids.mask, self.predictor.ids.eot, self.config.block_length
        row = torch.tensor([*tokens, *[mask] * self.config.gen_length], device=self.predictor.device)
        region, states = row[len(tokens) :], []
        for block in range(self.config.gen_length // length):
            part = region[block * length :][:length]
            while (masked := part == mask).any():
                logits = (
                    self.predictor.model(input_ids=row[None]).logits[0, len(tokens) + block * length :][:length].float()
                )
                shares = logits.softmax(-1)
                logits[:, mask] = -torch.inf
                best, guess = logits.topk(2, dim=-1)
                token = guess[:, 0]
                confidence = shares.gather(1, guess)[:, 0]
                margin, entropy = best[:, 0] - best[:, 1], torch.special.entr(shares).sum(-1)
                states.append((block, masked, token, confidence, margin, entropy))
                wanted = token if reference is None else reference[block * length :][:length]
                chosen = torch.zeros_like(masked) if reference is None else masked & (token == wanted)
                if not chosen.any():
                    chosen[confidence.masked_fill(~masked, -1).argmax()] = True
                    token = torch.where(chosen, wanted, token)
                part[chosen] = token[chosen]
                if self.config.eot == "commit" and (ends := (region == eot).nonzero()[:, 0]).numel():
                    region[ends[0] :] = eot
        return region, states


def rolled_out(settings: RolloutSettings, predictor: MaskPredictor) -> Rollouts:
    """Rolls out as a rank or an actor does: the same function, files and locks."""
    roller = Roller(settings, predictor)
    prompts, lengths, _ = settings.encode(settings.prompts(), predictor)
    shards = ShardWriter(settings.folder, roller.key, [settings.request()])
    for index in waiting(settings, prompts, lengths, shards):
        shards.write(roller.roll(settings.batch(prompts, index, predictor)))
    return shards.finish([])


def looped(settings: RolloutSettings, predictor: MaskPredictor, eot: Literal["commit", "off"]) -> int:
    """Labels by the loop, and saves it; returns the number of states."""
    plain = Plain(predictor, DecodeConfig(settings.gen_length, settings.block_length, eot=eot))
    found = [plain.label(settings.tokens(prompt, predictor)) for prompt in settings.prompts()]
    torch.save(found, settings.folder)
    return sum(len(states) for passes in found for states in passes.values())


def main(base: str, prompts: int, gen_length: int, batch_size: int, repeats: int) -> None:
    """Measures the loop and the rollouts in turn and prints the medians."""
    predictor = MaskPredictor.from_pretrained(base)
    seconds: dict[str, list[float]] = {}
    with TemporaryDirectory() as folder:
        asked = RolloutSettings(
            base,
            Path(folder),
            [PromptSource(split="train")],
            limit=prompts,
            gen_length=gen_length,
            batch_size=batch_size,
        )

        def ways(settings: RolloutSettings) -> dict[str, Callable[[], object]]:
            return {
                "loop": lambda: looped(settings, predictor, "off"),
                "loop that stops at EoT": lambda: looped(settings, predictor, "commit"),
                "rollout": lambda: rolled_out(settings, predictor),
            }

        for number in range(repeats + 1):  # the first time, on two prompts, warms up
            for place, name in enumerate(ways(asked)):
                own = replace(asked, folder=Path(folder, f"{number}-{place}"), limit=prompts if number else 2)
                began = time.perf_counter()
                ways(own)[name]()
                if number:
                    seconds.setdefault(name, []).append(time.perf_counter() - began)
                    print(f"{number} {name}: {seconds[name][-1]:.2f} s", file=sys.stderr)
    speed = {name: prompts / statistics.median(times) for name, times in seconds.items()}
    where = environment()
    print(f"{prompts} bundled prompts, gen_length {gen_length}, {torch.get_num_threads()} threads, {where['device']}")
    print("| way | labelled prompts/s | all times (s) |\n|---|---|---|")
    for name, times in seconds.items():
        print(f"| {name} | {speed[name]:.2f} | {', '.join(f'{one:.2f}' for one in times)} |")
    for name in list(speed)[:-1]:
        print(f"{speed['rollout'] / speed[name]:.2f} times the {name}")


@pytest.mark.parametrize("eot", ["off", "commit"])
def test_the_loop_gives_the_labels_that_rollouts_do(
    tiny_checkpoint: Path, tmp_path: Path, eot: Literal["commit", "off"]
) -> None:
    file = tmp_path / "sums.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": f"What is {n} plus {'1' * (n % 4 + 1)}?"}) for n in range(6)))
    settings = RolloutSettings(
        str(tiny_checkpoint), tmp_path / "set", [PromptSource(str(file))], batch_size=3, gen_length=16, block_length=4,
        eot=eot,
    )  # fmt: skip
    predictor = MaskPredictor.from_pretrained(tiny_checkpoint)
    records = load_records(rolled_out(settings, predictor))
    plain = Plain(predictor, settings.decoding)
    labelled = [plain.label(settings.tokens(prompt, predictor)) for prompt in settings.prompts()]
    states = [state for passes in labelled for states in passes.values() for state in states]
    block, masked, token, confidence, margin, entropy, final = zip(*states, strict=True)
    assert records.block.tolist() == list(block)
    assert torch.equal(records.evidence.masked, torch.stack(masked))
    assert torch.equal(records.final, torch.stack(final))
    shown = records.evidence.masked
    assert torch.equal(records.evidence.token[shown], torch.stack(token)[shown])
    for name, values in (("confidence", confidence), ("margin", margin), ("entropy", entropy)):
        assert torch.allclose(getattr(records.evidence, name)[shown], torch.stack(values)[shown], atol=1e-4), name


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Labelled prompts a second: rollouts against a plain loop, in turn.")
    parser.add_argument("--base", default="models/bundled/llada-tiny")
    for option, value in (("--prompts", 64), ("--gen_length", 128), ("--batch_size", 32), ("--repeats", 3)):
        parser.add_argument(option, type=int, default=value)
    main(**vars(parser.parse_args()))
