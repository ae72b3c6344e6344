"""The metadata at the top of a model card, as the Hugging Face hub reads it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from data.manifest import read_manifest

LIBRARY = "dlm-accel"


def made_from(base: str, rollouts: str | Path) -> dict[str, Any]:
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
