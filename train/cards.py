"""What model cards have in common: the metadata at their top, as the Hugging Face hub reads it, and what a filter costs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from data.manifest import read_manifest
from data.provenance import environment

LIBRARY = "dlm-accel"


def made_from(base: str, rollouts: Path) -> dict[str, Any]:
    """The settings that :func:`metadata` reads, where only a folder of rollouts is at hand."""
    requests = read_manifest(rollouts)["sources"]
    return {"base": base, "sources": [source for request in requests for source in request["sources"]]}


def metadata(kind: str, rollout: Mapping[str, Any]) -> str:
    """YAML between dashes: what an export is, and which base model and data sets of the hub it was made from.

    Args:
        kind: ``filter`` or ``helper``.
        rollout: Resolved settings of the rollouts. Local folders and files, and generators, have no name on the hub.
    """
    base = None if Path(rollout["base"]).exists() else rollout["base"]
    paths = [source["path"] for source in rollout["sources"]]
    data = [path for path in dict.fromkeys(paths) if "/" in path and not Path(path).exists()]
    card = ModelCardData(
        library_name=LIBRARY, base_model=base, datasets=data or None, metrics=["exact_match"],
        tags=["diffusion-language-model", "parallel-decoding", {"filter": "learn2pd", "helper": "apd"}[kind]],
        ignore_metadata_errors=True,
    )  # fmt: skip
    return f"---\n{card.to_yaml()}\n---\n"


def filter_time(rows: Sequence[Mapping[str, Any]], threshold: float) -> str:
    """What a filter costs, as it was measured inside the decode with this threshold: a sentence.

    Args:
        rows: Rows of a comparison (:func:`eval.measure.measure`), the filter's among them.
        threshold: The filter's.
    """
    own = (row for row in rows if row["settings"]["strategy"] == "learn2pd")
    row = next(row for row in own if row["settings"]["threshold"] == threshold)
    share, batch = row["component"]["share_of_forward"], row["settings"]["batch_size"]
    where = environment()["device"]
    return f"In the decode the filter took {100 * share:.1f} % of a forward's time (batch {batch}, {where})."
