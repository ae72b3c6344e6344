"""Settings of one decode, validated before any work is done."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from decoding.eot import RULES
from decoding.plan import CACHES
from models.errors import InputError
from models.rules import COUNT, FOLDER, LENGTH, SEED, check, number, one_of

if TYPE_CHECKING:
    EotRule = CacheRule = str
else:  # what a command line accepts
    EotRule, CacheRule = Literal[tuple(RULES)], Literal[tuple(CACHES)]
_RULES = {
    "gen_length": LENGTH, "block_length": LENGTH, "steps": LENGTH.or_null(), "seed": SEED,
    "temperature": number("a number from 0 to 1000", lambda value: 0 <= value <= 1000),
    "eot": one_of(RULES), "cache": one_of(CACHES), "refresh": COUNT.or_null(),
    "eot_head": FOLDER.or_null(), "eot_risk": number("a number above 0 and below 1", lambda value: 0 < value < 1),
}  # fmt: skip


@dataclass(frozen=True)
class DecodeConfig:
    """How a batch is decoded, whatever the strategy.

    Args:
        gen_length: Generated positions of every row, in tokens.
        block_length: Positions of one block; blocks are decoded left to right from the end of the prompt.
        steps: Denoising steps of the whole decode, which set the quota of strategies that have one; ``None`` means
            ``gen_length``: one token a step.
        temperature: 0 takes the argmax; above, tokens are drawn by Gumbel-max.
        eot: What happens at the end of the text. ``off``: nothing, every position is decoded. ``commit``: a committed EoT
            ends the row: everything to its right becomes EoT and is no longer attended to. ``published``: Learn2PD's rule,
            which in addition cuts the row at the most confident EoT guess the forward made, whatever its confidence.
            ``learned``: as ``commit``, and a trained head cuts the row where little enough text can be lost.
        seed: Seed of the noise; row ``i`` of a call draws from its own generator, seeded by ``(seed, i)``.
        cache: Which keys and values later forwards of a block take from its first one (Fast-dLLM, arXiv 2505.22618).
            ``none``: every forward runs on the whole sequence, and is exact. ``prefix``: those left of the block.
            ``dual``: all outside the block.
        refresh: Forwards of a block from one on the whole sequence to the next; ``None``: only a block's first is.
        eot_head: Folder of an exported EoT head, for the rule ``learned``.
        eot_risk: Probability of losing text, from 0 to 1, below which that rule cuts.

    Raises:
        InputError: A value out of range, or lengths and steps that do not divide.
    """

    gen_length: int = 128
    block_length: int = 32
    steps: int | None = None
    temperature: float = 0.0
    eot: EotRule = "commit"
    seed: int = 0
    cache: CacheRule = "none"
    refresh: int | None = None
    eot_head: str | Path | None = None
    eot_risk: float = 0.001

    def __post_init__(self) -> None:
        check(vars(self), _RULES)
        if self.gen_length % self.block_length:
            divisors = [n for n in range(1, self.gen_length + 1) if self.gen_length % n == 0]
            raise InputError(
                "block_length", self.block_length, f"a divisor of gen_length {self.gen_length}: {_listed(divisors)}"
            )
        if self.steps is not None:
            allowed = [self.blocks * n for n in range(1, self.block_length + 1)]
            if self.steps not in allowed:
                raise InputError(
                    "steps",
                    self.steps,
                    f"a multiple of the {self.blocks} blocks, at most gen_length: {_listed(allowed)}",
                )
        if self.refresh is not None and not CACHES[self.cache].keeps_keys:
            keeping = " | ".join(name for name, policy in CACHES.items() if policy.keeps_keys)
            raise InputError("refresh", f"{self.refresh} with cache {self.cache}", f"null, or cache {keeping}")
        if (self.eot == "learned") != (self.eot_head is not None):
            accepted = "the folder of an exported EoT head" if self.eot == "learned" else "null, or eot learned"
            raise InputError("eot_head", self.eot_head, accepted)

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "DecodeConfig":
        """The settings by name.

        Raises:
            InputError: One that there is not.
        """
        names = [field.name for field in fields(cls)]
        for name in settings:
            if name not in names:
                raise InputError(name, "an unknown setting", ", ".join(names))
        return cls(**settings)

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return self.gen_length // self.block_length

    @property
    def steps_per_block(self) -> int:
        """Denoising steps of one block."""
        return (self.steps or self.gen_length) // self.blocks

    def settings(self) -> dict[str, Any]:
        """The complete settings, for result rows and manifests; those of an EoT head only where there is one."""
        own = asdict(self) | {"steps": self.steps or self.gen_length, "eot_head": str(self.eot_head)}
        return own if self.eot == "learned" else {name: own[name] for name in own if not name.startswith("eot_")}


def _listed(values: list[int]) -> str:
    return ", ".join(map(str, values if len(values) <= 12 else [*values[:6], "...", *values[-5:]]))
