"""Sets of very many prompts: how often a folder is listed and files are opened, and as a script what a million take.

``python tests/data/test_many.py --prompts 1000000``
"""

import argparse
import json
import os
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import torch

from data.manifest import RolloutKey
from data.prompt import Prompt
from data.prompts import PromptSource
from data.rollout_data import SHARD, PromptBatches, RolloutSettings, waiting
from data.shards import RolloutBatch, ShardWriter
from models.predictor import MaskPredictor

KEY = RolloutKey("f" * 16, "a" * 16, {"gen_length": 16, "block_length": 4, "passes": ["full_step"], "eot_id": 62})
EVENTS = {"os.listdir": "listings", "os.scandir": "listings", "open": "opens"}
counts: Counter[str] | None = None


def heard(event: str, given: tuple) -> None:
    if counts is not None and event in EVENTS and isinstance(given[0], str | Path) and "many-set" in str(given[0]):
        counts[EVENTS[event]] += 1


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Counts listings of the set's folder and opened files in it, whatever asks the system for them."""
    global counts
    if not hasattr(sys, "_many_hook"):  # a hook stays for good
        sys._many_hook = True  # type: ignore[attr-defined]
        sys.addaudithook(heard)
    counts = Counter()
    try:
        yield counts
    finally:
        counts = None


def write_prompts(file: Path, number: int) -> PromptSource:
    text = "What is {} plus {}? Say how you come to it, step by step, and end with the number alone."
    with file.open("w") as stream:
        for n in range(number):
            stream.write(json.dumps({"prompt": text.format(n, n * n % 977)}) + "\n")
    return PromptSource(str(file))


def write_all(shards: ShardWriter, batches: PromptBatches) -> None:
    """Writes what a rank writes, with tables of one row in place of those of a decode."""
    table = pa.table({"pass": ["full_step"]})
    nothing = {"full_step": torch.ones(1, dtype=torch.long)}
    # The disk is not what is counted or measured.
    with (
        patch("data.shards.steps_table", lambda *_: table),
        patch("data.shards.sequences_table", lambda *_: table),
        patch.object(os, "fsync", lambda _: None),
    ):
        for index, prompts in batches:  # type: ignore[misc]
            shards.write(RolloutBatch(index, prompts, [], torch.empty(0), nothing, {}))


def handed_out(settings: RolloutSettings, shards: ShardWriter, lengths: np.ndarray, verify: bool) -> PromptBatches:
    """The batches of a rank."""
    prompts = settings.prompts()
    left = waiting(settings, prompts, lengths, shards, verify)
    names = [shards.name(index[0], map(prompts.hash, index)) for index in left]

    def make(index: list[int]) -> tuple[list[int], list[Prompt]]:
        return index, [prompts[n] for n in index]

    return PromptBatches(left, names, make, 0, 1, shards)  # type: ignore[arg-type]


def test_files_are_opened_in_proportion_and_folders_listed_a_few_times(tmp_path: Path) -> None:
    number, size = 20_000, 5
    settings = RolloutSettings(
        folder=tmp_path / "many-set", sources=[write_prompts(tmp_path / "p.jsonl", number)], batch_size=size
    )
    lengths, total = np.full(number, 20), number // (size * SHARD)
    shards = ShardWriter(settings.folder, KEY, [settings.request()])
    with counted() as first:
        write_all(shards, handed_out(settings, shards, lengths, verify=True))
        manifest = shards.finish(settings.prompts().hashes())
    assert (len(manifest["shards"]), manifest["counts"]["prompts"]) == (total, number)
    assert first["listings"] <= 6
    # A claim, and each of the three files aside and once more for the disk; then each of them is not read again.
    assert first["opens"] <= 7 * total + 10

    for verify, most in ((False, 1), (True, 3)):  # a rank that believes the sizes reads the records alone
        other = ShardWriter(settings.folder, KEY, [settings.request()])
        with counted() as again:
            assert len(handed_out(settings, other, lengths, verify)) == 0
        assert again["listings"] <= 2
        assert total <= again["opens"] <= most * total + 10

    # What others have written needs no claim.
    names = [record["name"] for record in shards.written()]
    with counted() as passed:
        for name in names:
            with shards.claim(name) as mine:
                assert not mine
    assert passed["opens"] == 0


def main(number: int, base: str, batch_size: int) -> None:
    """Prints what each step of a run over very many prompts takes, without its decodes."""

    def told(what: str) -> None:
        nonlocal started, cpu
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        taken, busy = time.perf_counter() - started, time.process_time() - cpu
        print(f"{what}: {taken:.1f} s, {busy:.1f} s of them CPU time, peak {peak - before:.0f} MiB more", flush=True)
        started, cpu = time.perf_counter(), time.process_time()

    with TemporaryDirectory() as folder:
        source = write_prompts(Path(folder, "prompts.jsonl"), number)
        settings = RolloutSettings(base, Path(folder, "set"), [source], batch_size=batch_size)
        outline = MaskPredictor.outline(base)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        started, cpu = time.perf_counter(), time.process_time()
        prompts = settings.prompts()
        told(f"{number} prompts read")
        lengths = settings.encode(prompts, outline)[1]
        told("encoded")
        shards = ShardWriter(settings.folder, KEY, [settings.request()])
        left = waiting(settings, prompts, lengths, shards)
        told(f"{len(left)} shards planned")
        del left
        write_all(shards, handed_out(settings, shards, lengths, verify=True))
        told("claimed and written, with empty tables")
        shards.finish(prompts.hashes())
        told("finished")
        other = ShardWriter(settings.folder, KEY, [settings.request()])
        assert not waiting(settings, prompts, lengths, other, verify=False)
        told("looked at by another rank")


if __name__ == "__main__":
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--prompts", type=int, default=1_000_000)
    arguments.add_argument("--base", default="models/bundled/llada-tiny")
    arguments.add_argument("--batch_size", type=int, default=16)
    given = arguments.parse_args()
    main(given.prompts, given.base, given.batch_size)
