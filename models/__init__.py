"""What has weights, and nothing else. Importing this package registers the model families with transformers."""

from models.dream import DreamConfig, DreamModel
from models.llada import LLaDAConfig, LLaDAModelLM
from models.llada_moe import LLaDAMoEConfig, LLaDAMoEModelLM

__all__ = ["DreamConfig", "DreamModel", "LLaDAConfig", "LLaDAMoEConfig", "LLaDAMoEModelLM", "LLaDAModelLM"]
