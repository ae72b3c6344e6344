"""Rollouts by Ray Data, where one machine or a fixed number of ranks is not enough: actors come, go and die as they like."""

import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from data.manifest import Rollouts
from data.prompt import Prompt
from data.prompts import prompt_hash
from data.rollout_data import PromptBatch, RolloutSettings, waiting
from data.shards import ShardWriter
from models.errors import InputError
from models.predictor import MaskPredictor
from train.roller import Roller

if TYPE_CHECKING:
    import pyarrow as pa

_AT_ONCE = 2048  # shards whose prompts are with Ray at one time
_PAUSE = 2.0  # seconds before what others had taken is looked at again


class RolloutActor:
    """Decodes and writes shards on one device: as a rank of Lightning does, by the same :class:`train.roller.Roller`.

    Args:
        settings: What is rolled out.
    """

    def __init__(self, settings: RolloutSettings) -> None:
        dtype = getattr(torch, settings.dtype) if settings.dtype else None
        self.roller = Roller(settings, MaskPredictor.from_pretrained(settings.base, dtype=dtype))
        self.shards = ShardWriter(settings.folder, self.roller.key, [settings.request()])
        self.size = settings.batch_size

    def __call__(self, table: "pa.Table") -> "pa.Table":
        """Decodes the shards in a table of :func:`_row`; returns their names, and whether each was decoded here."""
        import pyarrow as pa

        names, decoded = [], []
        for row in table.to_pylist():
            batch = PromptBatch(row["index"], [Prompt(**prompt) for prompt in row["prompts"]], row["tokens"], self.size)
            hashes = (prompt_hash(prompt.prompt) for prompt in batch.prompts)
            name = self.shards.name(batch.index[0], hashes)
            with self.shards.claim(name) as mine:
                if mine:
                    self.shards.write(self.roller.roll(batch))
            names.append(name)
            decoded.append(len(batch.index) if mine else 0)
        return pa.table({"name": names, "decoded": decoded})


def _row(batch: PromptBatch) -> dict[str, Any]:
    return {"index": batch.index, "prompts": [vars(prompt) for prompt in batch.prompts], "tokens": batch.tokens}


def rollout_by_ray(
    settings: RolloutSettings, actors: tuple[int, int] = (1, 1), address: str | None = None
) -> Rollouts | None:
    """Rolls out what is missing in a folder with a pool of Ray actors, one GPU each where the cluster has any.

    The driver loads no weights. An actor that dies is replaced and its shard decoded again; a driver that dies loses nothing
    that is written, and the same call continues.

    Args:
        settings: What is rolled out. The folder, and the base where it is one, must be seen by all machines under this path.
        actors: Fewest and most actors; between the two Ray takes as many as there is work and room for.
        address: Address of a running cluster, such as ``auto``; by default what RAY_ADDRESS says, or this machine alone.

    Returns:
        The finished set; ``None`` where other runs still decode a part of it.

    Raises:
        InputError: Ray is not installed or not reached, there is no room for the fewest actors, bad prompts, or a folder with
            rollouts of another model or other settings.
    """
    ray, started = _started(actors, address)
    try:
        gpus = ray.cluster_resources().get("GPU", 0)
        settings = _everywhere(settings, bool(gpus))
        outline = MaskPredictor.outline(settings.base, dtype=getattr(torch, str(settings.dtype)))
        prompts, lengths, skipped = settings.encode(settings.prompts(), outline)
        shards = ShardWriter(settings.folder, Roller(settings, outline).key, [settings.request()])
        shards.skip(skipped)
        while batches := waiting(settings, prompts, lengths, shards):
            rows = [_row(settings.batch(prompts, index, outline)) for index in batches[:_AT_ONCE]]
            # A block for each shard: what an actor that dies was at is all that is done again.
            done = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
                RolloutActor, fn_constructor_args=(settings,), batch_size=1, batch_format="pyarrow",
                compute=ray.data.ActorPoolStrategy(min_size=actors[0], max_size=actors[1]), num_gpus=1 if gpus else 0,
            )  # fmt: skip
            decoded = sum(row["decoded"] for row in done.iter_rows())
            if not decoded and shards.claimed():
                return None
            time.sleep(0 if decoded else _PAUSE)
        return shards.finish(prompts.hashes())
    finally:
        if started:
            ray.shutdown()


def _started(actors: tuple[int, int], address: str | None) -> tuple[Any, bool]:
    """Ray, connected, and whether it was this call that did so."""
    try:
        import ray  # pyright: ignore[reportMissingImports]
        import ray.data  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError(
            "ray", f"not installed ({error})", "the extra `cluster`: pip install -e '.[cluster]'"
        ) from None
    few, many = actors
    if few > many:
        raise InputError("actors", f"{few} to {many}", "at least as many at most as at least")
    if started := not ray.is_initialized():
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except ConnectionError as error:
            raise InputError("address", f"{address} ({error})", "a running cluster, or null for this machine") from None
    kind = "GPU" if ray.cluster_resources().get("GPU") else "CPU"
    # A cluster that grows has the room later; a single machine never.
    if len(ray.nodes()) == 1 and few > (room := ray.cluster_resources().get(kind, 0)):
        raise InputError("actors", few, f"at most {room:g}, one for each {kind} of this machine")
    return ray, started


def _everywhere(settings: RolloutSettings, gpus: bool) -> RolloutSettings:
    """The settings as an actor takes them, whose working directory is another and which has a GPU where the driver may not."""
    base = Path(settings.base)
    dtype = settings.dtype
    if dtype is None:
        dtype = str(MaskPredictor.outline(settings.base).dtype).removeprefix("torch.") if gpus else "float32"
    paths = {name: getattr(settings, name) for name in ("folder", "filter", "references")}
    paths = {name: path.absolute() for name, path in paths.items() if path is not None}
    return replace(settings, base=str(base.absolute()) if base.is_dir() else settings.base, dtype=dtype, **paths)  # type: ignore[arg-type]
