"""Filters: small networks that tell which of the predictor's guesses are already final (Learn2PD, arXiv 2509.25188)."""

import itertools
import pickle
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.checkpoint import CONFIG, TENSORS, current_eot_rule, load_component, load_tensors, save_component
from models.errors import InputError, first_line
from models.features import FEATURES, Evidence, feature_columns, needs_of
from models.rules import COUNT, FIGURES, FLAG, LENGTH, SHARE, TEXT, Rule, check, is_number, list_of, one_of, whole

KIND = "filter"
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class FilterConfig:
    """Everything an exported filter says about itself. What describes the base model starts unset and saving needs it.

    Attributes:
        architecture: ``conv`` or ``block_mlp``.
        features: Columns of :data:`models.features.FEATURES` the network reads, in order.
        block_length: Positions in a block: the only one that ``block_mlp`` can serve (shorter ones are padded), the one
            that ``conv`` was trained with.
        channels: Width of each convolution (``conv`` only).
        kernel: Positions each convolution sees (``conv`` only), odd.
        layers: Number of convolutions (``conv`` only).
        embedding: Width of the embedding through which the network reads the block's tokens, decoded ones and guesses
            (``conv`` only); 0 for one that reads no token.
        hidden: Width of the projection through which it reads the predictor's last hidden states (``conv`` only); 0 for one that
            reads logits alone.
        hidden_size: Width of these, the base model's; 0 where they are not read.
        needs_all_positions: The network reads confidences of decoded positions too, as the published one does, so the
            decoder has to compute them. False where the training records held masked positions only.
        threshold: A guess is committed where its probability of being final is above this.
        gen_length: Tokens generated in the training rollouts.
        eot_rule: How those rollouts ended rows.
        vocab_size: Token ids of the base model.
        mask_id: Its MASK id.
        base_fingerprint: Its fingerprint.
        base_family: Its ``model_type``; exports from before there was more than one family are LLaDA's.
        block_alignment: Where blocks are counted from; ``generation`` is the end of the prompt.
        confidence_dtype: What confidences were computed in.
        metrics: Figures measured before the export, by name; ``None`` where one is undefined.
        schema_version: Version of these fields.
    """

    architecture: str = "conv"
    features: tuple[str, ...] = tuple(FEATURES)
    block_length: int = 32
    channels: int = 32
    kernel: int = 5
    layers: int = 2
    embedding: int = 0
    hidden: int = 0
    hidden_size: int = 0
    needs_all_positions: bool = False
    threshold: float = 0.9
    gen_length: int = 0
    eot_rule: str = "off"
    vocab_size: int = 0
    mask_id: int = -1
    base_fingerprint: str = ""
    base_family: str = ""
    block_alignment: str = "generation"
    confidence_dtype: str = "float32"
    metrics: dict[str, float | None] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    @property
    def needs(self) -> frozenset[str]:
        """What the network reads beyond token and confidence, as a strategy asks for it."""
        beside = {"text": self.embedding, "hidden": self.hidden}
        return needs_of(self.features) | {name for name, width in beside.items() if width}

    @property
    def logits_only(self) -> bool:
        """True if logits and the block's tokens are all it reads: it then runs in engines that hand over no hidden states.

        An export's ``config.json`` says it under this name.
        """
        return "hidden" not in self.needs


class Filter(nn.Module):
    """What all filters share: ``forward(Evidence) -> (B, K)`` float32 logits of "this guess is final"."""

    needs_all_positions = False

    def probability(self, evidence: Evidence) -> Tensor:
        """Probability that each guess is final, ``(B, K)`` float32; meaningless at decoded positions."""
        return self(evidence).sigmoid()

    def fit_normalisation(self, evidence: Evidence) -> None:
        """Fits whatever the network standardises its input with; nothing by default."""


class BlockMLP(Filter):
    """The published network: confidences of a whole block through two linear layers; 2,112 parameters at K = 32."""

    def __init__(self, config: FilterConfig) -> None:
        super().__init__()
        self.needs_all_positions = config.needs_all_positions
        self.linear1 = nn.Linear(config.block_length, config.block_length)
        self.linear2 = nn.Linear(config.block_length, config.block_length)

    def forward(self, evidence: Evidence) -> Tensor:
        """Logits ``(B, K)`` float32; a block shorter than the trained one, or cut by the text's end, has zeros there."""
        confidence, room = evidence.confidence, self.linear1.in_features
        if not self.needs_all_positions:
            confidence = confidence.where(evidence.masked, 0.0)
        length = confidence.shape[1]
        if length > room:
            raise InputError("block_length", length, f"at most {room}, which this block_mlp filter is built for")
        padded = F.pad(confidence, (0, room - length))
        return self.linear2(self.linear1(padded).relu())[:, :length]


class ConvFilter(Filter):
    """Convolutions over the positions of a block; the same weights serve any block length.

    The input columns are standardised with the buffers ``mean`` and ``std``. Both sides of the block are padded with
    zeros, which after the standardisation is the average column and so differs from a decoded position. Beside the columns
    it may read the tokens themselves, since what is doubtful about a number is not what is doubtful about a word, and the
    predictor's hidden states, normalised to a mean square of 1.

    Attributes:
        dropout: Share of the embedding and of the projected hidden states that is left out in training.
    """

    mean: Tensor
    std: Tensor
    dropout: float = 0.0

    def __init__(self, config: FilterConfig) -> None:
        super().__init__()
        self.features = tuple(config.features)
        self.register_buffer("mean", torch.zeros(len(self.features)))
        self.register_buffer("std", torch.ones(len(self.features)))
        self.embedding = nn.Embedding(config.vocab_size, config.embedding) if config.embedding else None
        self.project = nn.Linear(config.hidden_size, config.hidden, bias=False) if config.hidden else None
        sizes = [len(self.features) + config.embedding + config.hidden] + [config.channels] * config.layers
        # Two-dimensional with a height of 1: oneDNN then takes the columns as they lie in memory, channels last, and a
        # training step on the CPU takes about half of what Conv1d needs (torch 2.13).
        self.convs = nn.ModuleList(
            nn.Conv2d(before, after, (1, config.kernel), padding=(0, config.kernel // 2))
            for before, after in itertools.pairwise(sizes)
        )
        self.head = nn.Conv2d(config.channels, 1, 1)

    def forward(self, evidence: Evidence) -> Tensor:
        """Logits ``(B, K)`` float32 for any K."""
        columns = (feature_columns(evidence, self.features) - self.mean) / self.std
        beside = []
        if self.embedding is not None:
            beside.append(self.embedding(evidence.text))
        if self.project is not None:
            states = evidence.hidden.float()  # zero where nothing is masked, and still so after this
            beside.append(self.project(F.rms_norm(states, states.shape[-1:])))
        if beside:
            words = torch.cat(beside, dim=-1)
            columns = torch.cat((columns, F.dropout(words, self.dropout, self.training)), dim=-1)
        value = columns.transpose(1, 2)[:, :, None]  # (B, F, 1, K)
        for conv in self.convs:
            value = conv(value).relu()
        return self.head(value)[:, 0, 0]

    @torch.no_grad()
    def fit_normalisation(self, evidence: Evidence) -> None:
        """Sets mean and standard deviation of each column over all positions of (at most 65,536 evenly spread) rows."""
        every = -(-evidence.masked.shape[0] // 65_536)
        columns = feature_columns(evidence.each(lambda value: value[::every]), self.features).flatten(0, 1)
        std = columns.std(0)
        self.mean.copy_(columns.mean(0))
        self.std.copy_(std.where(std > _LEAST_STD, 1.0))  # a constant column stays 0 and teaches nothing


def size(net: Filter) -> str:
    """How many parameters a filter has, in words: in all, and without what reads tokens or hidden states where it does."""
    counts = {name: weights.numel() for name, weights in net.named_parameters()}
    words = f"{sum(counts.values()):,} parameters"
    own = sum(count for name, count in counts.items() if not name.startswith(tuple(_READERS)))
    names = [_READERS[name] for name in _READERS if any(each.startswith(name) for each in counts)]
    return f"{words}, {own:,} without {' and '.join(names)}" if names else words


_READERS = {"embedding.": "the embedding of tokens", "project.": "the projection of hidden states"}
_NETWORKS: dict[str, type[BlockMLP] | type[ConvFilter]] = {"block_mlp": BlockMLP, "conv": ConvFilter}


_NETWORK_RULES: dict[str, Rule] = {
    "architecture": one_of(_NETWORKS),
    "features": Rule(
        f"a list of some of {', '.join(FEATURES)}, each once",
        lambda v: list_of(one_of(FEATURES), "").accepts(v) and len(set(v)) == len(v) > 0,
    ),
    "block_length": LENGTH,
    "channels": COUNT,
    "kernel": Rule("an odd whole number from 1 to 4095", lambda v: whole(1, 4095).accepts(v) and v % 2 == 1),
    "layers": whole(1, 256),
    "embedding": whole(0),
    "hidden": whole(0),
    "hidden_size": whole(0),
    "needs_all_positions": FLAG,
}  # fmt: skip
_EXPORT_RULES = _NETWORK_RULES | {
    "threshold": SHARE,
    "gen_length": LENGTH,
    "eot_rule": TEXT,
    "vocab_size": COUNT,
    "mask_id": whole(0),
    "base_fingerprint": Rule("the base model's fingerprint, a string", TEXT.accepts),
    "base_family": Rule("the base model's model_type, a string", TEXT.accepts),
    # Engines that let the first block hold prompt tokens would show the network blocks it has never seen.
    "block_alignment": one_of(["generation"]),
    "confidence_dtype": one_of(["float32"]),
    "metrics": FIGURES,
    "schema_version": Rule(str(SCHEMA_VERSION), lambda v: v == SCHEMA_VERSION),
}
_LEAST_STD = 1e-6
"""A column that varies less is constant, and not divided by what it varies."""
_MOST_WEIGHTS = 1 << 28
"""A filter of a gigabyte is a mistake in its sizes."""


def _check(values: dict[str, Any], rules: dict[str, Rule], where: str) -> None:
    for name in values["features"] if isinstance(values["features"], list | tuple) else ():
        check({"features": name}, {"features": one_of(FEATURES)}, f"{where}: ")
    check(values, rules, f"{where}: ")
    if values["architecture"] == "conv" and values["needs_all_positions"]:
        raise InputError(f"{where}: needs_all_positions", True, "false; conv reads masked positions only")
    if values["architecture"] == "block_mlp" and values["embedding"]:
        raise InputError(f"{where}: embedding", values["embedding"], "0; block_mlp reads confidences only")
    if values["architecture"] == "block_mlp" and values["hidden"]:
        raise InputError(f"{where}: hidden", values["hidden"], "0; block_mlp reads confidences only")
    if bool(values["hidden"]) != bool(values["hidden_size"]):
        accepted = "the width of the base model's hidden states for a filter that reads them, else 0"
        raise InputError(f"{where}: hidden_size", values["hidden_size"], accepted)
    if values["embedding"] and not COUNT.accepts(values["vocab_size"]):
        raise InputError(
            f"{where}: vocab_size", values["vocab_size"], "the base model's, for a filter that reads tokens"
        )
    if values["architecture"] == "conv":
        inputs, width = len(values["features"]) + values["embedding"] + values["hidden"], values["channels"]
        weights = (
            values["hidden"] * values["hidden_size"] + (inputs + width * values["layers"]) * width * values["kernel"]
        )
        weights += values["vocab_size"] * values["embedding"] if values["embedding"] else 0
    else:
        weights = 2 * values["block_length"] ** 2
    if weights > _MOST_WEIGHTS:
        raise InputError(f"{where}: sizes", f"{weights:,} weights", f"at most {_MOST_WEIGHTS:,}")


def build_filter(config: FilterConfig) -> BlockMLP | ConvFilter:
    """A network with fresh weights.

    Raises:
        InputError: The architecture, a feature or a size is not possible.
    """
    _check(asdict(config), _NETWORK_RULES, KIND)
    return _NETWORKS[config.architecture](config)


def save_filter(folder: str | Path, net: Filter, config: FilterConfig, card: str) -> None:
    """Exports a filter; metrics that are not finite are written as null.

    Args:
        folder: Where to; an earlier export there is replaced.
        net: The network that ``config`` describes.
        config: Its description, complete.
        card: Text of the model card; how many parameters the filter has and where it runs is said at its end.

    Raises:
        InputError: A field is unset or impossible, ``folder`` holds something else, or weights are not finite.
    """
    metrics = {name: value if is_number(value) else None for name, value in config.metrics.items()}
    values = asdict(replace(config, metrics=metrics))
    _check(values, _EXPORT_RULES, KIND)
    values["logits_only"] = config.logits_only
    # Into a fresh network first: what cannot be loaded again is not written.
    tensors = {name: tensor.detach().cpu() for name, tensor in net.state_dict().items()}
    load_tensors(build_filter(config), tensors, Path(folder) / TENSORS)
    where = "in SGLang and dInfer, too" if config.logits_only else "in this project's own loop alone"
    reads = "logits and the block's tokens alone" if config.logits_only else "hidden states, which other engines keep"
    card = f"{card.rstrip()}\n\n{size(net)}. Reads {reads}: it runs {where} (docs/serving.md).\n"
    save_component(folder, {"kind": KIND} | values, tensors, card)


def load_filter(folder: str | Path) -> tuple[BlockMLP | ConvFilter, FilterConfig]:
    """Reads an exported filter.

    Returns:
        The network in evaluation mode on the CPU, and its description.

    Raises:
        InputError: Anything is missing, unknown or impossible; names the file and the field.
    """
    folder = Path(folder)
    values, tensors = load_component(
        folder,
        KIND,
        SCHEMA_VERSION,
        [*(f.name for f in fields(FilterConfig)), "logits_only"],
        older={"embedding": 0, "hidden": 0, "hidden_size": 0, "base_family": "llada", "logits_only": None},
    )
    said = values.pop("logits_only")
    _check(values, _EXPORT_RULES, str(folder / CONFIG))
    values["eot_rule"] = current_eot_rule(values["eot_rule"], f"{folder / CONFIG}: eot_rule")
    values["features"] = tuple(values["features"])
    config = FilterConfig(**values)
    if said is not config.logits_only and said is not None:
        found = f"{folder / CONFIG}: logits_only"
        raise InputError(found, repr(said)[:80], f"{config.logits_only}".lower() + ", as its features have it")
    net = build_filter(config)
    load_tensors(net, tensors, folder / TENSORS)
    if isinstance(net, ConvFilter) and not (net.std >= _LEAST_STD).all():
        raise InputError(f"{folder / TENSORS}: std", net.std.tolist(), f"standard deviations of at least {_LEAST_STD}")
    return net.eval(), config


def import_official(
    path: str | Path,
    *,
    vocab_size: int,
    mask_id: int,
    fingerprint: str,
    gen_length: int,
    threshold: float = 0.96,
    family: str = "llada",
) -> tuple[BlockMLP, FilterConfig]:
    """Reads the ``.pth`` of the official Learn2PD code, which says nothing about itself: the caller says it.

    Args:
        path: The file; a state dict of ``linear1`` and ``linear2``, which tell the block length.
        vocab_size: Token ids of the base model the filter was trained for.
        mask_id: Its MASK id.
        fingerprint: Its fingerprint.
        gen_length: Tokens generated in the training rollouts.
        threshold: The authors' value for LLaDA is 0.96, for Dream 0.9.
        family: The base model's ``model_type``.

    Returns:
        The network in evaluation mode on the CPU, and its description, ready for :func:`save_filter`.

    Raises:
        InputError: The file cannot be read without running code from it, or is not such a state dict.
    """
    accepted = "a state dict of linear1.weight, linear1.bias, linear2.weight, linear2.bias"
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(str(path), "no such file", accepted) from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise InputError(str(path), f"unreadable ({first_line(error)})", accepted) from None
    if not isinstance(found, dict) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise InputError(str(path), f"a {type(found).__name__} that is not a state dict", accepted)
    weight = found.get("linear1.weight")
    if weight is None or weight.ndim != 2:
        shape = "no such tensor" if weight is None else f"shape {tuple(weight.shape)}"
        raise InputError(f"{path}: linear1.weight", shape, "a matrix (block_length, block_length)")
    config = FilterConfig(
        architecture="block_mlp", features=("confidence",), block_length=weight.shape[0], needs_all_positions=True,
        threshold=threshold, gen_length=gen_length, vocab_size=vocab_size, mask_id=mask_id,
        base_fingerprint=fingerprint, base_family=family,
    )  # fmt: skip
    _check(asdict(config), _EXPORT_RULES, str(path))
    net = BlockMLP(config)
    load_tensors(net, found, path)
    return net.eval(), config


def check_compatible(
    config: FilterConfig, *, family: str, vocab_size: int, mask_id: int, fingerprint: str, gen_length: int,
    block_length: int,
) -> list[str]:  # fmt: skip
    """Refuses a filter that was made for another base model or block; call it before decoding.

    Args:
        config: The filter's description. One that was never saved need not say its family.
        family: ``model_type`` of the model that will be decoded.
        vocab_size: Token ids of the model that will be decoded.
        mask_id: Its MASK id.
        fingerprint: Its fingerprint.
        gen_length: Tokens to generate.
        block_length: Positions in a block of the decode.

    Returns:
        Warnings: differences under which the filter works, but its threshold was not picked.

    Raises:
        InputError: Another family, vocabulary, MASK id, base model or schema, or a block that the network cannot take.
    """
    for name, ours in (
        ("schema_version", SCHEMA_VERSION),
        ("base_family", family if config.base_family else ""),
        ("vocab_size", vocab_size),
        ("mask_id", mask_id),
        ("base_fingerprint", fingerprint),
    ):
        if getattr(config, name) != ours:
            raise InputError(f"{KIND}: {name}", repr(getattr(config, name)), f"{ours!r}, that of the loaded model")
    if config.architecture == "block_mlp" and block_length > config.block_length:
        raise InputError("block_length", block_length, f"at most {config.block_length}, which this filter is built for")
    return [
        f"filter: trained with {name} {getattr(config, name)}, used with {ours}; its threshold was picked for the first"
        for name, ours in (("gen_length", gen_length), ("block_length", block_length))
        if getattr(config, name) != ours
    ]
