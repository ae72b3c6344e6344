"""The inference module: token ids in, token ids out, and a text front end."""

from decoding.config import DecodeConfig
from decoding.decoder import Decoder, Generation
from decoding.strategies import STRATEGIES, make_strategy

__all__ = ["STRATEGIES", "DecodeConfig", "Decoder", "Generation", "make_strategy"]
