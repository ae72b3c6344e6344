"""What has weights, and nothing else. Importing this package registers the model families with transformers."""

from models.llada import LLaDAConfig, LLaDAModelLM

__all__ = ["LLaDAConfig", "LLaDAModelLM"]
