"""The helper of APD: a small causal language model over the mask predictor's token ids (arXiv 2506.00413).

An export is what ``AutoModelForCausalLM`` or peft reads (``config.json`` and safetensors, or ``adapter_config.json`` and
safetensors) with our own description beside it in ``helper.json``, which is the same for both.
"""

import json
import math
import warnings
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from models.causal_lm import load_causal_lm, pretrained_folder, within
from models.checkpoint import CALIBRATION, check_finite, check_regular, current_eot_rule, read_json, replacing
from models.errors import InputError, first_line
from models.helper_cache import HelperCache, Place
from models.predictor import fingerprint
from models.rules import COUNT, FIGURES, FLAG, LENGTH, TEXT, Rule, check, is_number, whole

KIND = "helper"
SCHEMA_VERSION = 1
DESCRIPTION, CARD, ADAPTER = "helper.json", "README.md", "adapter_config.json"


@dataclass(frozen=True)
class HelperConfig:
    """Everything an exported helper says about itself.

    Attributes:
        vocab_size: Token ids of the mask predictor whose text it was trained on; its own logits may cover more or fewer.
        mask_id: The predictor's MASK id.
        eot_id: The predictor's EoT id.
        base_fingerprint: The predictor's fingerprint.
        gen_length: Tokens generated in the training rollouts.
        eot_rule: How those rollouts ended rows.
        source: Folder or hub id of the model it was tuned from; ``None`` where it was trained from scratch.
        source_fingerprint: Fingerprint of that model.
        adapter: The tensors are a peft adapter of ``source``, not a whole model.
        metrics: Figures of the validation.
        base_family: The predictor's ``model_type``; exports from before there was more than one family are LLaDA's.
        schema_version: Version of ``helper.json``.
    """

    vocab_size: int
    mask_id: int
    eot_id: int
    base_fingerprint: str
    gen_length: int
    eot_rule: str
    source: str | None = None
    source_fingerprint: str | None = None
    adapter: bool = False
    metrics: dict[str, float | None] = field(default_factory=dict)
    base_family: str = ""
    schema_version: int = SCHEMA_VERSION


_RULES: dict[str, Rule] = {
    "vocab_size": COUNT,
    "mask_id": whole(0),
    "eot_id": whole(0),
    "base_fingerprint": Rule("the base model's fingerprint, a string", TEXT.accepts),
    "gen_length": LENGTH,
    "eot_rule": TEXT,
    "source": Rule("a folder or a hub id", TEXT.accepts).or_null(),
    "source_fingerprint": Rule("a fingerprint", TEXT.accepts).or_null(),
    "adapter": FLAG,
    "metrics": FIGURES,
    "base_family": Rule("the base model's model_type, a string", TEXT.accepts),
    "schema_version": Rule(str(SCHEMA_VERSION), lambda v: v == SCHEMA_VERSION),
}


def _check(values: dict[str, Any], where: str) -> None:
    check(values, _RULES, f"{where}: ")
    if values["adapter"] and None in (values["source"], values["source_fingerprint"]):
        raise InputError(f"{where}: source", None, "the model that the adapter belongs to, and its fingerprint")


class Helper:
    """A frozen causal language model over the predictor's token ids.

    Args:
        model: A ``transformers`` causal language model with rotary positions.
        config: Its description.

    Raises:
        InputError: The model has layers other than attention.
    """

    def __init__(self, model: PreTrainedModel, config: HelperConfig) -> None:
        self.model, self.config = model.eval().requires_grad_(False), config
        kinds = set(getattr(model.config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
        if kinds:
            raise InputError("helper: layer_types", ", ".join(sorted(kinds)), "full_attention | sliding_attention")

    @property
    def vocab_size(self) -> int:
        """Token ids that the logits cover."""
        return self.model.config.vocab_size

    @property
    def max_length(self) -> int:
        """Longest row, in tokens: the model's limit, or its attention window, since the cache keeps no windows."""
        window = getattr(self.model.config, "sliding_window", None)
        return min(self.model.config.max_position_embeddings, window or math.inf)  # type: ignore[return-value]

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def to(self, device: torch.device | str) -> "Helper":
        """Moves the weights; returns itself."""
        self.model.to(device)  # type: ignore[arg-type]
        return self

    def allocate_cache(self, batch: int, length: int) -> HelperCache:
        """A cache of ``batch`` rows of up to ``length`` tokens.

        Raises:
            InputError: Longer than the model can be used at.
        """
        if length > self.max_length:
            raise InputError("helper: length", length, f"at most {self.max_length} tokens, prompt included")
        return HelperCache(self.model.config.num_hidden_layers, batch, length)

    @torch.inference_mode()
    def __call__(self, ids: Tensor, columns: Tensor, cache: HelperCache, rows: Tensor | None = None) -> Tensor:
        """One forward of some tokens of each row; what the cache holds left of them is their context.

        Args:
            ids: ``(n, T)`` int64. An id beyond the helper's vocabulary counts as EoT (as id 0 where that is beyond too).
            columns: ``(n, T)`` int64, the tokens' places in their rows, which are position ids and cache columns at once.
                A short row may repeat its last column with the same token.
            cache: From :meth:`allocate_cache`.
            rows: ``(n,)`` int64 rows of the cache, each once; ``None`` for the first ``n`` in order.

        Returns:
            ``(n, T, vocab_size)`` logits in the weights' dtype; row ``t`` predicts the token at ``columns[:, t] + 1``.
        """
        return self.logits(self.hidden(ids, columns, cache, rows))

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits ``(..., vocab_size)`` in the weights' dtype of hidden states ``(..., D)``."""
        return self.model.get_output_embeddings()(hidden)[..., : self.vocab_size]  # type: ignore[misc]

    @torch.inference_mode()
    def hidden(
        self, ids: Tensor, columns: Tensor, cache: HelperCache, rows: Tensor | None = None, stop: int | None = None
    ) -> Tensor:
        """The same forward without its head: ``(n, T, D)``; most of the vocabulary's rows are never looked at.

        Args:
            ids: See :meth:`__call__`, as for ``columns``, ``cache`` and ``rows``.
            columns: ``(n, T)`` int64.
            cache: Likewise.
            rows: ``(n,)`` int64, or ``None``.
            stop: A number above all ``columns``: keys from there on are not looked at; ``None`` for the cache's length.
        """
        stop = cache.length if stop is None else stop
        cache.put(Place(rows, columns, stop))
        visible = torch.arange(stop, device=ids.device) <= columns[:, None, :, None]
        # An adapter that is not merged wraps the model; its layers stand in the model's own.
        whole: Any = getattr(self.model, "get_base_model", lambda: self.model)()
        return whole.base_model(
            input_ids=within(ids, self.vocab_size, self.config.eot_id), attention_mask=visible, position_ids=columns,
            past_key_values=cache, use_cache=True,
        ).last_hidden_state  # fmt: skip

    def probe(self, name: str) -> None:
        """Refuses an architecture that gives other logits with the cache than without, or scales what its head says."""
        ids = torch.arange(6, device=self.device)[None] % self.vocab_size
        columns = torch.arange(6, device=self.device)[None]
        cache = self.allocate_cache(1, 8)
        with torch.inference_mode():
            whole = self.model(input_ids=ids, position_ids=columns, use_cache=False).logits[0].float()
        self(ids, columns, cache)  # a draft, whose end is then overwritten
        parts = [self(ids[:, cut], columns[:, cut], cache)[0] for cut in (slice(0, 4), slice(4, 6))]
        difference = ((torch.cat(parts).float() - whole).abs().max() / whole.abs().max()).item()
        accepted = 1e-3 if self.dtype is torch.float32 else 0.05
        if not difference <= accepted:
            raise InputError(
                f"{name}: cache", f"logits {difference:.1e} away from those without", "an architecture that keeps to it"
            )


def load_helper(
    folder: str | Path, *, device: str | torch.device | None = None, dtype: torch.dtype | str | None = None
) -> Helper:
    """Reads an exported helper; an adapter is merged into the model it belongs to.

    Args:
        folder: An export.
        device: Where to put the weights; a GPU where there is one.
        dtype: Weights' dtype; the export's on a GPU, fp32 on a CPU.

    Raises:
        InputError: Anything is missing, unknown or impossible; names the file and the field.
    """
    folder = Path(folder)
    config = read_description(folder)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else "auto"
    model = _with_adapter(folder, config, dtype) if config.adapter else load_causal_lm(folder, dtype)
    check_finite(folder, model.state_dict())
    helper = Helper(model, config).to(device)
    helper.probe(str(folder))
    return helper


def check_helper(
    config: HelperConfig, *, family: str, vocab_size: int, mask_id: int, eot_id: int, fingerprint: str, gen_length: int
) -> list[str]:
    """Refuses a helper that was made for another mask predictor; call it before decoding.

    Args:
        config: The helper's description. One that was never saved need not say its family.
        family: ``model_type`` of the predictor that will be decoded.
        vocab_size: Token ids of the predictor that will be decoded.
        mask_id: Its MASK id.
        eot_id: Its EoT id.
        fingerprint: Its fingerprint.
        gen_length: Tokens to generate.

    Returns:
        Warnings: differences under which the helper works, but less well than it was measured to.

    Raises:
        InputError: Another family, vocabulary, MASK or EoT id, base model or schema.
    """
    for name, ours in (
        ("schema_version", SCHEMA_VERSION), ("base_family", family if config.base_family else ""),
        ("vocab_size", vocab_size), ("mask_id", mask_id), ("eot_id", eot_id),
        ("base_fingerprint", fingerprint),
    ):  # fmt: skip
        if getattr(config, name) != ours:
            raise InputError(f"{KIND}: {name}", repr(getattr(config, name)), f"{ours!r}, that of the loaded model")
    if gen_length > config.gen_length:
        return [f"helper: trained on gen_length {config.gen_length}, used with {gen_length}"]
    return []


def save_helper(folder: str | Path, model: Any, config: HelperConfig, card: str) -> None:
    """Exports a helper; metrics that are not finite are written as null. ``folder`` holds the old export or the new one.

    Args:
        folder: Where to; an earlier export there is replaced.
        model: A causal language model, or a peft model of one where ``config.adapter``.
        config: Its description.
        card: Text of the model card.

    Raises:
        InputError: A field is impossible, ``folder`` holds something else, or weights are not finite.
    """
    folder = Path(folder).absolute()
    check_replaceable(folder)
    metrics = {name: value if is_number(value) else None for name, value in config.metrics.items()}
    values = asdict(replace(config, metrics=metrics))
    _check(values, KIND)
    check_finite(folder, model.state_dict())
    disable_progress_bar()
    with replacing(folder) as aside:
        # peft would ask the hub about the vocabulary otherwise, and saves no embeddings of ours in any case.
        model.save_pretrained(aside, **({"save_embedding_layers": False} if config.adapter else {}))
        (aside / DESCRIPTION).write_text(json.dumps({"kind": KIND} | values, indent=2) + "\n", encoding="utf-8")
        (aside / CARD).write_text(card, encoding="utf-8")  # over peft's own


def read_description(folder: str | Path) -> HelperConfig:
    """Reads what describes an exported helper, without its weights.

    Raises:
        InputError: Anything is missing, unknown or impossible; names the file and the field.
    """
    folder = Path(folder)
    file = folder / DESCRIPTION
    if not file.is_file():
        raise InputError(f"{KIND} folder", f"{folder} without {DESCRIPTION}", "the folder of an exported helper")
    check_regular(folder)
    values = read_json(file)
    names = {"kind", *(f.name for f in fields(HelperConfig))}
    if not isinstance(values, dict) or values.pop("kind", None) != KIND:
        raise InputError(f"{file}: kind", "something else", repr(KIND))
    values.setdefault("base_family", "llada")
    for name in sorted(names - {"kind"} ^ values.keys()):
        found = "an unknown key" if name in values else "nothing"
        raise InputError(f"{file}: {name}", found, f"the keys {', '.join(sorted(names))}")
    _check(values, str(file))
    return HelperConfig(**values | {"eot_rule": current_eot_rule(values["eot_rule"], f"{file}: eot_rule")})


def _with_adapter(folder: Path, config: HelperConfig, dtype: torch.dtype | str) -> PreTrainedModel:
    from peft import PeftModel, get_peft_model_state_dict

    assert config.source is not None
    source = pretrained_folder(config.source)
    if (found := fingerprint(source)) != config.source_fingerprint:
        where = f"{folder / DESCRIPTION}: source_fingerprint"
        raise InputError(where, f"{found} in {source}", f"{config.source_fingerprint}, the adapter's")
    file = folder / "adapter_model.safetensors"
    try:
        with safe_open(file, "pt") as stream:
            there = set(stream.keys())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft on transformers' names; what it misses is checked below
            model: Any = PeftModel.from_pretrained(load_causal_lm(source, dtype), folder, local_files_only=True)  # type: ignore[arg-type]
    except (OSError, SafetensorError, ValueError, RuntimeError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(str(file), first_line(error), f"an adapter of {source}") from error
    wanted = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    if there != wanted:  # peft would only warn, and the adapter would do nothing
        raise InputError(
            f"{file}: {min(there ^ wanted)}", "a missing or unexpected tensor", f"the tensors of {ADAPTER}"
        )
    return model.merge_and_unload()


def check_replaceable(folder: Path) -> None:
    """Raises an InputError if a folder holds anything but what an earlier export of a helper wrote: it will be deleted."""
    if not folder.exists():
        return
    accepted = "a new folder, or one that an earlier export of a helper wrote"
    if not folder.is_dir() or folder.is_symlink():
        raise InputError(f"{KIND} folder", f"{folder}, not a plain folder", accepted)
    names = {entry.name for entry in folder.iterdir()}
    known = {
        DESCRIPTION,
        CARD,
        ADAPTER,
        CALIBRATION,
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
    }
    if foreign := sorted(name for name in names - known if not name.endswith(".safetensors")):
        raise InputError(f"{KIND} folder", f"{folder} with {foreign[0]} in it", accepted)
    if names:
        read_description(folder)
