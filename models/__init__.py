"""What has weights, and nothing else. Importing this package registers the model families with transformers."""

from models.dream import DreamConfig, DreamModel
from models.llada import LLaDAConfig, LLaDAModelLM

__all__ = ["DreamConfig", "DreamModel", "LLaDAConfig", "LLaDAModelLM"]
