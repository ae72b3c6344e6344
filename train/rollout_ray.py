"""Rollouts by Ray Data, where one machine or a fixed number of ranks is not enough: actors come, go and die as they like."""

import logging
import os
import random
import time
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from data.prompts import prompt_hash
from data.rollout_data import PromptBatch, RolloutSettings, waiting
from data.shards import ShardWriter
from data.store import absolute
from data.typed import Count, check_fields
from models.errors import InputError
from models.predictor import MaskPredictor
from train.roller import Roller
from train.rollout_module import finish

if TYPE_CHECKING:
    import pyarrow as pa

_PAUSE = 2.0  # seconds before what others had taken is looked at again


@dataclass
class RaySettings:
    """The pool of actors: the group ``ray``, for ``--engine ray``.

    Args:
        actors: Fewest and most actors, one GPU each where there are any; between the two Ray takes as many as there is work and
            room for.
        address: Address of a running cluster, such as auto; null for RAY_ADDRESS, or this machine alone.

    Raises:
        InputError: A value that is not accepted.
    """

    actors: tuple[Count, Count] = (1, 1)
    address: str | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        few, many = self.actors
        if few > many:
            raise InputError("ray.actors", f"{few} to {many}", "at least as many at most as at least")


class Prompts:
    """Hands out the prompts of a shard when an actor is about to decode it; an actor itself, where the driver's files are.

    Args:
        settings: What is rolled out.
        folder: The driver's working directory.
        skipped: Hashes of the prompts that are left out.
    """

    def __init__(self, settings: RolloutSettings, folder: Path, skipped: Collection[str]) -> None:
        os.chdir(folder)
        self.settings, self.outline = settings, MaskPredictor.outline(settings.base)
        prompts = settings.prompts()
        keep = (place for place, text in enumerate(prompts.hashes()) if text not in skipped)
        self.prompts = prompts.take(np.fromiter(keep, np.int64))

    def batch(self, index: list[int]) -> PromptBatch:
        """The prompts at ``index``, ready to be decoded."""
        return self.settings.batch(self.prompts, index, self.outline)


class RolloutActor:
    """Decodes and writes shards on one device: as a rank of Lightning does, by the same :class:`train.roller.Roller`.

    Args:
        settings: What is rolled out.
        prompts: Handle of the actor :class:`Prompts`.
    """

    def __init__(self, settings: RolloutSettings, prompts: Any) -> None:
        dtype = getattr(torch, settings.dtype) if settings.dtype else None
        self.roller = Roller(settings, MaskPredictor.from_pretrained(settings.base, dtype=dtype))
        self.shards = ShardWriter(settings.folder, self.roller.key, [settings.request()])
        self.prompts = prompts

    def __call__(self, table: "pa.Table") -> "pa.Table":
        """Decodes the shards whose prompts' places are in a table's column ``index``; returns how many prompts of each."""
        import pyarrow as pa
        import ray  # pyright: ignore[reportMissingImports]

        decoded = []
        for index in table["index"].to_pylist():
            batch: Any = ray.get(self.prompts.batch.remote(index))
            name = self.shards.name(index[0], (prompt_hash(prompt.prompt) for prompt in batch.prompts))
            with self.shards.claim(name) as mine:
                if mine:
                    self.shards.write(self.roller.roll(batch))
            decoded.append(len(index) if mine else 0)
        return pa.table({"decoded": decoded})


def rollout_by_ray(settings: RolloutSettings, pool: RaySettings | None = None) -> int:
    """Rolls out what is missing in a folder with a pool of Ray actors, one GPU each where the cluster has any.

    The driver loads no weights. An actor that dies is replaced and its shard decoded again; a driver that dies loses nothing
    that is written, and the same call continues. What others are decoding at the end is left to them.

    Args:
        settings: What is rolled out. The folder, and the base where it is one, must be seen by all machines under this path.
        pool: How many actors, and where; one on this machine by default.

    Returns:
        How many prompts were decoded.

    Raises:
        InputError: Ray is not installed or not reached, there is no room for the fewest actors, bad prompts, or a folder with
            rollouts of another model or other settings.
    """
    pool = pool or RaySettings()
    ray, started = _started(pool)
    try:
        gpus = ray.cluster_resources().get("GPU", 0)
        settings = _everywhere(settings, bool(gpus))
        outline = MaskPredictor.outline(settings.base, dtype=getattr(torch, str(settings.dtype)))
        prompts, lengths, skipped = settings.encode(settings.prompts(), outline)
        shards = ShardWriter(settings.folder, Roller(settings, outline).key, [settings.request()])
        shards.skip(skipped)
        few, many = pool.actors
        decoded, batches, source = 0, waiting(settings, prompts, lengths, shards), None
        while batches:
            if source is None:
                source = _beside_us(ray, Prompts).remote(settings, Path.cwd(), set(skipped))
            if shards.remote:
                random.SystemRandom().shuffle(batches)  # another run would meet us at every one of them
            # A block for each shard: what an actor that dies was at is all that is done again.
            rows = ray.data.from_items([{"index": index} for index in batches], override_num_blocks=len(batches))
            found = rows.map_batches(
                RolloutActor, fn_constructor_args=(settings, source), batch_size=1, batch_format="pyarrow",
                compute=ray.data.ActorPoolStrategy(min_size=few, max_size=many), num_gpus=1 if gpus else 0,
            )  # fmt: skip
            new = sum(row["decoded"] for row in found.iter_rows())
            if not new and shards.claimed():
                break
            decoded += new
            time.sleep(0 if new else _PAUSE)
            batches = waiting(settings, prompts, lengths, shards, verify=False)
        finish(shards, list(prompts.hashes()))
        return decoded
    finally:
        if started:
            ray.shutdown()


def _beside_us(ray: Any, kind: type) -> Any:
    """An actor class on the driver's machine that takes no core of it, and comes back if it dies."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # pyright: ignore[reportMissingImports]

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=here)(kind)


def _started(pool: RaySettings) -> tuple[Any, bool]:
    """Ray, connected, and whether it was this call that did so."""
    try:
        import ray  # pyright: ignore[reportMissingImports]
        import ray.data  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError(
            "ray", f"not installed ({error})", "the extra `cluster`: pip install -e '.[cluster]'"
        ) from None
    if started := not ray.is_initialized():
        try:
            ray.init(address=pool.address, log_to_driver=False, logging_level=logging.ERROR)
        except ConnectionError as error:
            accepted = "a running cluster, or null for this machine"
            raise InputError("ray.address", f"{pool.address} ({error})", accepted) from None
    kind = "GPU" if ray.cluster_resources().get("GPU") else "CPU"
    # A cluster that grows has the room later; a single machine never.
    if len(ray.nodes()) == 1 and (few := pool.actors[0]) > (room := ray.cluster_resources().get(kind, 0)):
        raise InputError("ray.actors", few, f"at most {room:g}, one for each {kind} of this machine")
    return ray, started


def _everywhere(settings: RolloutSettings, gpus: bool) -> RolloutSettings:
    """The settings as an actor takes them, whose working directory is another and which has a GPU where the driver may not."""
    base = Path(settings.base)
    dtype = settings.dtype
    if dtype is None:
        dtype = str(MaskPredictor.outline(settings.base).dtype).removeprefix("torch.") if gpus else "float32"
    paths = {name: getattr(settings, name) for name in ("folder", "filter", "references")}
    paths = {name: absolute(path) for name, path in paths.items() if path is not None}
    return replace(settings, base=str(base.absolute()) if base.is_dir() else settings.base, dtype=dtype, **paths)  # type: ignore[arg-type]
