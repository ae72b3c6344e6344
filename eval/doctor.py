"""Checks what a decode needs, from versions to a decode of two prompts: ``python eval/doctor.py --base folder``."""

import platform
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from data.typed import Length
from decoding.config import CacheRule, DecodeConfig
from decoding.decoder import Decoder
from decoding.generate import BUNDLED
from decoding.memory_plan import plan_memory
from decoding.strategies import Strategy, make_strategy
from decoding.text import encode
from eval.command import command
from models.errors import InputError, first_line
from models.families import FAMILIES, described
from models.predictor import MaskPredictor, checkpoint_folder, usable_device
from models.rules import DTYPES, check, one_of

PYTHON = ">=3.11"
PROMPTS = (
    "Tom starts with 18 coins. Tom gives away 3 coins. Tom sells 12 of the coins. How many coins does Tom have now?",
    "Mia starts with 9 coins. Mia finds 4 coins. How many coins does Mia have now?",
)


def main(
    base: str = str(BUNDLED / "llada-tiny"),
    filter: str | None = None,
    helper: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    gen_length: Length = 128,
    block_length: Length = 32,
    batch_size: Length = 1,
    prompt_length: Length = 256,
    cache: CacheRule = "none",
    chat_template: bool = True,
) -> None:
    """Prints a list of checks, a line each, and stops at the first thing that is wrong, with exit status 2.

    Args:
        base: Folder or hub id of the base model.
        filter: Folder of a filter, to check that it fits the base and decodes.
        helper: Folder or hub id of a helper for apd, likewise.
        device: Where to decode; a GPU where there is one.
        dtype: Dtype of the weights; the checkpoint's on a GPU, float32 on a CPU.
        gen_length: Generated positions, in tokens.
        block_length: Positions of a block, in tokens.
        batch_size: Rows of the decode that has to fit in memory.
        prompt_length: Tokens of each of its prompts.
        cache: Its cache.
        chat_template: Wrap prompts in the chat template; false for a base without one.

    Raises:
        InputError: The first thing that is wrong.
    """
    config = DecodeConfig(gen_length=gen_length, block_length=block_length, cache=cache)
    check({"dtype": dtype}, {"dtype": one_of([*DTYPES, "auto"]).or_null()})
    with _checked("versions") as found:
        found.append(_versions())
    with _checked("device") as found:
        place = usable_device(device)
        found.append(_described(place))
    with _checked("base") as found:
        folder = checkpoint_folder(base)
        _, family, known = described(folder / "config.json")
        found.append(f"{known.model_type}, at most {getattr(known, family.max_length)} tokens, {folder}")
    with _checked("dtype") as found:
        chosen = dtype
        if dtype in (None, "auto"):
            own = str(known.dtype or torch.float32).removeprefix("torch.")
            chosen = "float32" if dtype is None and place.type == "cpu" else own
        usable = [name for name in DTYPES if computes(place, name)]
        if chosen not in usable:
            raise InputError(
                "dtype", f"{chosen}, which {place} does not compute", " | ".join(usable) or "another device"
            )
        found.append(f"{chosen}; {place} computes {', '.join(usable)}")
    rules = {"": make_strategy("threshold")}
    if asked := {name: each for name, each in (("filter", filter), ("helper", helper)) if each is not None}:
        with _checked("components") as found:
            for option, given in asked.items():
                rules[option] = make_strategy({"filter": "learn2pd", "helper": "apd"}[option], **{option: given})
                found.append(f"{option} {given}")
    with _checked("memory") as found:
        for rule in rules.values():
            found.append(_fits(folder, config, rule, place, str(chosen), batch_size, prompt_length))
    with _checked("weights") as found:
        predictor = MaskPredictor.from_pretrained(folder, device=place, dtype=getattr(torch, str(chosen)))
        count = sum(each.numel() for each in predictor.model.parameters())
        found.append(f"{count:,} parameters, all tensors there and finite, fingerprint {predictor.fingerprint}")
    with _checked("special tokens") as found:
        found.append(_special(predictor))
    with _checked("tokenizer fence") as found:
        found.append(_fence(predictor, chat_template))
    with _checked("attention mask") as found:
        found.append(_padding(predictor, chat_template))
    for option, rule in rules.items():
        settings = rule.taken(config)
        if option:
            with _checked(option) as found:
                rule.prepare(predictor, settings)
                found.append("fits this base")
        with _checked(f"decode, {rule.name}") as found:
            found += _decode(predictor, rule, settings, chat_template)
    print("all is well")


@contextmanager
def _checked(name: str) -> Iterator[list[str]]:
    """Prints a line for a check: what the block has put into the list, and what it was warned of."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always", UserWarning)
        try:
            yield found
        except torch.OutOfMemoryError as error:
            print(f"WRONG  {name}")
            raise InputError(name, first_line(error), "a device with more free memory, or smaller settings") from error
        except InputError:
            print(f"WRONG  {name}")
            raise
    for number, line in enumerate(found):
        print(f"{'ok' if not number else '':<7}{name if not number else '':<20}{line}", flush=True)
    for note in dict.fromkeys(str(each.message) for each in notes if issubclass(each.category, UserWarning)):
        print(f"{'note':<7}{'':<20}{note}", flush=True)


def _versions() -> str:
    """What is installed of what this package asks for.

    Raises:
        InputError: A Python or package that is missing or too old.
    """
    if platform.python_version() not in SpecifierSet(PYTHON, prereleases=True):
        raise InputError("python", platform.python_version(), PYTHON)
    try:
        asked = [need for need in map(Requirement, requires("dlm-accel") or ()) if need.marker is None]
    except PackageNotFoundError:  # run from its folder, without having been installed
        asked = []
    for need in asked:
        accepted = f"{need.name}{need.specifier}: pip install -c constraints.txt -e ."
        try:
            installed = version(need.name)
        except PackageNotFoundError:
            raise InputError(need.name, "not installed", accepted) from None
        if not need.specifier.contains(installed, prereleases=True):
            raise InputError(need.name, installed, accepted)
    names = ("torch", "transformers", "tokenizers", "safetensors")
    return ", ".join([f"python {platform.python_version()}", *(f"{name} {version(name)}" for name in names)])


def _described(device: torch.device) -> str:
    if device.type != "cuda":
        return f"{device}, {torch.get_num_threads()} threads"
    capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    return f"{device}, {torch.cuda.get_device_name(device)}, compute capability {capability}, CUDA {torch.version.cuda}"


def computes(device: torch.device, dtype: str) -> bool:
    """Whether a device multiplies and attends in a dtype, to finite values."""
    try:
        value = torch.ones(1, 2, 16, 16, device=device, dtype=getattr(torch, dtype))
        mask = torch.ones(1, 1, 16, 16, device=device, dtype=torch.bool)
        return bool(scaled_dot_product_attention(value @ value, value, value, attn_mask=mask).isfinite().all())
    except (RuntimeError, TypeError):  # as torch says that there is no such kernel
        return False


def free_memory(device: torch.device) -> int | None:
    """Bytes that a process may still take on a device; ``None`` where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo")
    if device.type != "cpu" or not lines.is_file():
        return None
    free = next(int(line.split()[1]) * 1024 for line in lines.read_text().splitlines() if line.startswith("MemAvail"))
    try:  # a container's limit
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text().strip() for name in ("max", "current"))
        return min(free, int(limit) - int(used))
    except (OSError, ValueError):  # none, or "max"
        return free


def _fits(
    folder: Path, config: DecodeConfig, rule: Strategy, device: torch.device, dtype: str, rows: int, length: int
) -> str:
    """The plan of a decode beside the memory that is free for it.

    Raises:
        InputError: It does not fit.
    """
    plan = plan_memory(folder, rule.taken(config), rule, dtype=dtype, batch_size=rows, prompt_length=length)
    free = free_memory(device)
    if free is not None and plan.peak > free:
        fewer = "another device, dtype, batch_size, prompt_length or gen_length"
        raise InputError("memory", f"{free / 2**30:.2f} GiB free on {device}", f"{rule.name}, {plan}, or {fewer}")
    known = "unknown" if free is None else f"{free / 2**30:.2f} GiB"
    return f"{rule.name}: free {known}; batch {rows}, prompts of {length}, gen_length {config.gen_length}: {plan}"


def _special(predictor: MaskPredictor) -> str:
    """The special tokens' ids.

    Raises:
        InputError: Two that must differ are one, or one has no embedding.
    """
    family, ids = FAMILIES[predictor.family], predictor.ids
    named = {"mask": (ids.mask, family.mask), "EoT": (ids.eot, family.eot)}
    named |= {"end of turn": (ids.end_of_turn, family.end_of_turn), "bos": (ids.bos, family.bos)}
    for name, (number, text) in named.items():
        if not 0 <= number < predictor.vocab_size:
            raise InputError(f"{name}, {text}", f"id {number}", f"one of the model's {predictor.vocab_size}")
        if name != "mask" and number == ids.mask:
            raise InputError(f"{name}, {text}", f"id {number}, the mask's", "an id of its own")
    return ", ".join(f"{name} {number} {text}" for name, (number, text) in named.items())


def _fence(predictor: MaskPredictor, chat_template: bool) -> str:
    """Encodes a message that holds the texts of special tokens.

    Raises:
        InputError: One of them became the token, or the message did not survive.
    """
    tokenizer, family, ids = predictor.tokenizer, FAMILIES[predictor.family], predictor.ids
    assert tokenizer is not None
    special = {ids.mask: family.mask, ids.eot: family.eot, ids.end_of_turn: family.end_of_turn, ids.bos: family.bos}
    message = f"Write {' and '.join(special.values())} backwards."
    written, usual = (encode(tokenizer, text, chat_template) for text in (message, "Write it backwards."))
    for number, text in special.items():
        if written.count(number) != usual.count(number):
            raise InputError(
                "tokenizer", f"{text!r} in a message becomes token {number}", "plain text, as it was written"
            )
    if message not in str(tokenizer.decode(written)):
        raise InputError("tokenizer", f"{tokenizer.decode(written)[:80]!r}", f"a prompt that holds {message!r}")
    return "texts of special tokens in a message stay text"


def _padding(predictor: MaskPredictor, chat_template: bool) -> str:
    """Compares the logits of a row beside a longer one, padded, with those of the row alone.

    Raises:
        InputError: They differ by more than rounding.
    """
    assert predictor.tokenizer is not None
    long, short = (encode(predictor.tokenizer, text, chat_template) + [predictor.ids.mask] * 8 for text in PROMPTS)
    pad = len(long) - len(short)
    rows = torch.tensor([long, [predictor.ids.pad] * pad + short], device=predictor.device)
    mask = torch.arange(len(long), device=predictor.device) >= torch.tensor([[0], [pad]], device=predictor.device)

    def logits(ids: Tensor, mask: Tensor) -> Tensor:
        last = torch.arange(ids.numel() - 8, ids.numel(), device=ids.device)
        return predictor.logits(predictor(ids, mask, (mask.long().cumsum(1) - 1).clamp(min=0), last)).float()

    padded, alone = logits(rows, mask), logits(rows[1:, pad:], mask[1:, pad:])
    difference = ((padded - alone).abs().max() / alone.abs().max()).item()
    accepted = 1e-4 if predictor.dtype is torch.float32 else 0.05
    if not difference <= accepted:
        raise InputError(
            "attention_mask", f"a padded row {difference:.1e} away from the row alone, relatively", f"at most {accepted:.0e}"
        )  # fmt: skip
    return f"a padded row equals the row alone, up to {difference:.0e} of the largest logit"


def _decode(predictor: MaskPredictor, rule: Strategy, config: DecodeConfig, chat_template: bool) -> list[str]:
    """Decodes two prompts together and apart.

    Raises:
        InputError: A MASK is left, or fp32 rows decode differently together.
    """
    decoder, began = Decoder(predictor, rule), time.monotonic()
    settings = config.settings() | {"steps": None, "chat_template": chat_template}
    out = decoder.generate(PROMPTS, **settings)
    seconds = time.monotonic() - began
    if (out.sequences == predictor.ids.mask).any():
        raise InputError("decode", "a masked position", "none")
    together = out.sequences.tolist()
    if together != [decoder.generate([text], **settings).sequences[0].tolist() for text in PROMPTS]:
        if predictor.dtype is torch.float32:
            raise InputError("decode", "a row that decodes to other tokens in a batch than alone", "the same tokens")
        warnings.warn(
            f"rows decode to other tokens in a batch than alone, as rounding in {predictor.dtype} may have it",
            stacklevel=2,
        )
    component = f", {rule.component} {out.counts[rule.component].tolist()}" if rule.component else ""
    lines = [
        f"{out.nfe.tolist()} forwards for {[len(each) for each in out.tokens]} tokens in {seconds:.1f} s{component}"
    ]
    for text in out.text:
        flat = " ".join(text.split())
        lines.append(f"{flat[:80]!r}{' ...' if len(flat) > 80 else ''}")
    return lines


if __name__ == "__main__":
    command(main)
