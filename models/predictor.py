"""The mask predictor that decoders talk to: token ids in, hidden states at the wanted positions out, and their logits."""

import copy
import functools
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import logging

from models.checkpoint import check_files, check_finite, check_regular
from models.errors import InputError, first_line
from models.families import Family, described
from models.layers import Elementwise, KVCache
from models.rules import DTYPES, FLAG, FOLDER, check, one_of


@dataclass(frozen=True)
class TokenIds:
    """Ids a decoder needs, read from the checkpoint.

    Attributes:
        mask: Id of an undecoded position.
        eot: Id that ends the generated text and fills the region after it.
        end_of_turn: Id that may precede ``eot``.
        pad: Id under the attention mask left of a shorter prompt.
        bos: Id that opens a prompt.
    """

    mask: int
    eot: int
    end_of_turn: int
    pad: int
    bos: int


class MaskPredictor:
    """A frozen mask predictor with everything a decoder must know about it.

    Args:
        model: Module with the ``forward`` and the ``head`` of :class:`models.layers.MaskedLM`.
        ids: Special token ids.
        vocab_size: Number of ids the logits cover.
        max_length: Longest sequence the model was trained for, in tokens.
        fingerprint: Identity of the weights; components trained for other weights are refused.
        tokenizer: Tokenizer, where text goes in or out.
    """

    def __init__(
        self, model: nn.Module, ids: TokenIds, vocab_size: int, max_length: int, fingerprint: str = "unsaved",
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:  # fmt: skip
        self.model = model.eval().requires_grad_(False)
        self.forward: Callable[..., Any] = self.model
        self.ids, self.vocab_size, self.max_length = ids, vocab_size, max_length
        self.fingerprint, self.tokenizer = fingerprint, tokenizer

    @property
    def family(self) -> str:
        """Key of :data:`models.families.FAMILIES`; components trained for another are refused."""
        return getattr(getattr(self.model, "config", None), "model_type", "unknown")

    @property
    def left_context(self) -> int:
        """Columns left of a position that its prediction needs: a forward of a part of a row takes them along."""
        return getattr(self.model, "left_context", 0)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def to_dtype(self, name: str) -> "MaskPredictor":
        """The same predictor with a copy of its weights in another dtype.

        Raises:
            InputError: Not the name of a floating-point dtype.
        """
        check({"dtype": name}, {"dtype": one_of(DTYPES)})
        model = copy.deepcopy(self.model).to(getattr(torch, name))
        return MaskPredictor(model, self.ids, self.vocab_size, self.max_length, self.fingerprint, self.tokenizer)

    @torch.inference_mode()
    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor, logits_at: Tensor, **cache: Any
    ) -> Tensor:
        """One forward, without the head.

        Args:
            input_ids: ``(B, T)`` int64.
            attention_mask: ``(B, S)`` bool, False where a key must not be attended to; ``S`` is ``T``, or the cache's
                length with one. ``None`` attends everywhere.
            position_ids: ``(B, T)`` int64, counted from each row's first real token.
            logits_at: ``(N,)`` int64 indices into the flattened ``(B * T)`` positions to be predicted, each with
                :attr:`left_context` columns left of it in its row, or as many as the row's text has.
            **cache: ``cache``, ``cache_index`` and ``cache_rows`` of :meth:`models.layers.MaskedLM.forward`.

        Returns:
            ``(N, D)`` hidden states in the weights' dtype, as the head reads them; row ``n`` is of position ``logits_at[n]``.
        """
        return self.forward(input_ids, attention_mask, position_ids, logits_at, head=False, **cache).hidden_states[0]

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits ``(N, vocab_size)`` in the weights' dtype of hidden states ``(N, D)``; the caller may overwrite them.

        At 8B sizes these are 500 KB a position in fp32: whoever asks for many reads them in parts.
        """
        return self.model.head(hidden)  # type: ignore[operator]

    def allocate_cache(self, batch: int, length: int) -> KVCache:
        """Storage for the keys and values of ``batch`` rows of ``length`` positions.

        Raises:
            InputError: A model that cannot keep them.
        """
        allocate = getattr(self.model, "allocate_cache", None)
        if allocate is None:
            raise InputError("cache", f"a {type(self.model).__name__}, which keeps no keys", "none")
        return allocate(batch, length)

    def compile(self, backend: str = "inductor") -> None:
        """Fuses what the forward does beside matrices and attention, for any batch and length, and checks it.

        Args:
            backend: Backend of ``torch.compile``.

        Raises:
            InputError: It cannot be compiled here, or gives other hidden states compiled.
        """
        from torch._dynamo.exc import TorchDynamoException  # seconds, which only this needs

        rows, length, part = 3, 24, 8
        ids = (torch.arange(rows * length, device=self.device) * 7919 % self.vocab_size).view(rows, length)
        mask = torch.arange(length, device=self.device) >= torch.tensor([[0], [3], [9]], device=self.device)
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
        columns = positions[:, :part] + 10
        at = torch.arange(0, rows * part, 5, device=self.device)

        def outputs() -> Tensor:
            cache = self.allocate_cache(rows, length)
            plain = self(ids, mask, positions, at + length)
            whole = self(ids, mask, positions, at + length, cache=cache)
            block = ids.gather(1, columns), mask, positions.gather(1, columns), at
            return torch.cat((plain, whole, self(*block, cache=cache, cache_index=columns))).float()

        expected = outputs()
        ops: Elementwise = self.model.model.ops  # type: ignore[assignment, union-attr]
        ops.compile(backend)
        try:
            compiled = outputs()
        except TorchDynamoException as error:
            ops.restore()
            found = first_line(getattr(error, "inner_exception", error))
            raise InputError(
                "compile", found, "false; or a C++ compiler (g++, or what CXX names) on a CPU, Triton on a GPU"
            ) from error
        difference = ((compiled - expected).abs().max() / expected.abs().max()).item()
        accepted = 1e-4 if self.dtype is torch.float32 else 0.05
        if not difference <= accepted:
            ops.restore()
            raise InputError(
                "compile", f"hidden states {difference:.1e} away from eager ones, relatively", f"at most {accepted:.1e}"
            )

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        compile: bool = False,
    ) -> "MaskPredictor":
        """Loads a checkpoint folder, or a hub id whose files are downloaded first; never runs code from it.

        Args:
            path: Folder or hub id.
            device: Where to put the weights; a GPU where there is one.
            dtype: Weights' dtype; the checkpoint's on a GPU, fp32 on a CPU.
            compile: Compile the forward, see :meth:`compile`.

        Raises:
            InputError: Not a checkpoint, an unknown family, a tensor missing, unexpected or of another shape, a special
                token missing, or logits that ignore the attention mask.
        """
        if not isinstance(dtype, torch.dtype):
            check({"dtype": dtype}, {"dtype": one_of([*DTYPES, "auto"]).or_null()})
        check({"compile": compile}, {"compile": FLAG})
        folder = checkpoint_folder(path)
        raw, family, known = described(folder / "config.json")
        device = usable_device(device)
        if dtype is None:
            dtype = torch.float32 if device.type == "cpu" else "auto"
        model = _load_model(folder, known, family, dtype, device)
        config: Any = model.config
        tokenizer = _load_tokenizer(folder, family)
        check_finite(folder, model.state_dict(), most=1 << 20)
        ids = _token_ids(folder, raw, family, tokenizer)
        predictor = cls(
            model,
            ids,
            config.vocab_size,
            getattr(config, family.max_length),
            fingerprint(folder),
            tokenizer,
        )
        predictor._probe(str(folder))
        if compile:
            predictor.compile()
        return predictor

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states, ``D``."""
        model: Any = self.model
        return model.get_input_embeddings().embedding_dim

    @classmethod
    def outline(cls, path: str | Path, *, dtype: torch.dtype | None = None) -> "MaskPredictor":
        """A checkpoint without its weights, on the device ``meta``: it knows all but what to predict.

        Args:
            path: Folder or hub id.
            dtype: Dtype of the weights; the checkpoint's by default.

        Raises:
            InputError: Not a checkpoint, an unknown family, or a special token missing.
        """
        folder = checkpoint_folder(path)
        raw, family, known = described(folder / "config.json")
        tokenizer = _load_tokenizer(folder, family)
        with torch.device("meta"):
            model = family.model(known).to(dtype or known.dtype or torch.float32)  # type: ignore[arg-type]
        ids = _token_ids(folder, raw, family, tokenizer)
        config: Any = model.config
        return cls(model, ids, config.vocab_size, getattr(config, family.max_length), fingerprint(folder), tokenizer)

    @classmethod
    def fresh(cls, config_file: str | Path, dtype: str) -> "MaskPredictor":
        """A predictor of a model's sizes with weights that nothing has trained, on PyTorch's default device, without a tokenizer.

        Its special tokens are the first ids, 0 to 3.

        Args:
            config_file: ``config.json`` of a mask predictor, or its folder.
            dtype: Name of the weights' dtype.

        Raises:
            InputError: No description of a model that can be read.
        """
        path = Path(config_file)
        _, family, known = described(path / "config.json" if path.is_dir() else path)
        model = AutoModel.from_config(known, dtype=getattr(torch, dtype))
        ids = TokenIds(mask=0, eot=1, end_of_turn=2, pad=1, bos=3)
        return cls(model, ids, model.config.vocab_size, getattr(known, family.max_length))

    def _probe(self, name: str) -> None:
        """Refuses a model whose logits do not change when a position is masked out (old public code did that)."""
        ids = torch.full((2, 4), self.ids.mask, device=self.device)
        ids[:, 0], ids[:, 1] = self.ids.bos, self.ids.end_of_turn
        mask = torch.ones(2, 4, dtype=torch.bool, device=self.device)
        mask[1, :2] = False
        positions = torch.arange(4, device=self.device).expand(2, 4)
        first, second = self(ids, mask, positions, torch.tensor([3, 7], device=self.device)).float()
        if not (first.isfinite().all() and second.isfinite().all()):
            raise InputError(
                f"{name}: logits", "values that are not finite", "weights and a dtype that give finite ones"
            )
        if torch.equal(first, second):
            raise InputError(
                f"{name}: attention_mask", "logits that ignore it", "a model that attends through the mask"
            )


def checkpoint_folder(path: str | Path) -> Path:
    """The folder of a checkpoint; a hub id's files are downloaded first, never its code.

    Raises:
        InputError: Neither an existing folder nor a reachable hub id.
    """
    check({"base checkpoint": path}, {"base checkpoint": FOLDER})
    folder = Path(path)
    if folder.is_dir():
        check_regular(folder)
        return folder
    if folder.exists() or folder.is_absolute() or str(path).count("/") != 1:
        raise InputError("base checkpoint", repr(str(path)), "a folder with config.json and safetensors, or a hub id")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.jinja", "tokenizer*", "merges.txt"]
    try:
        return Path(snapshot_download(str(path), allow_patterns=patterns))
    except Exception as error:
        first = first_line(error)
        raise InputError(
            "base checkpoint", f"{path!r} ({first})", "an existing folder or a reachable hub id"
        ) from error


def token_embeddings(path: str | Path) -> Tensor:
    """The token embeddings of a checkpoint, ``(vocab_size, D)`` float32 on the CPU, without the rest of its weights.

    Args:
        path: Folder or hub id.

    Raises:
        InputError: Not a checkpoint of a known family, or none of its files holds the tensor.
    """
    folder = checkpoint_folder(path)
    raw, family, _ = described(folder / "config.json")
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as stream:
                if family.embeddings in stream.keys():  # noqa: SIM118 - not a mapping
                    return stream.get_tensor(family.embeddings)[: raw["vocab_size"]].float()
        except SafetensorError as error:
            raise InputError(str(file), f"unreadable ({error})", "safetensors") from None
    raise InputError(f"{folder}: safetensors", f"no tensor {family.embeddings}", "a checkpoint with token embeddings")


_DEVICES = "cpu, or where there is one: cuda, cuda:<n> or mps"


def usable_device(device: str | torch.device | None) -> torch.device:
    """A device by name; a GPU where there is one by default.

    Raises:
        InputError: There is no such device here.
    """
    try:
        found = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=found)
    except Exception as error:  # torch raises anything from RuntimeError to ImportError
        raise InputError("device", repr(device), _DEVICES) from error
    if found.type not in ("cpu", "cuda", "mps"):  # meta, say, which computes nothing
        raise InputError("device", repr(device), _DEVICES)
    return found


def _load_tokenizer(folder: Path, family: Family) -> PreTrainedTokenizerBase:
    kind = family.tokenizer or AutoTokenizer
    if family.tokenizer and (folder / "tokenizer.json").is_file():  # which leaves nothing to a class
        kind = PreTrainedTokenizerFast
    try:
        return kind.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises plain exceptions
        raise InputError(f"{folder}: tokenizer", first_line(error), "tokenizer.json") from error


def _load_model(
    folder: Path, config: PreTrainedConfig, family: Family, dtype: torch.dtype | str, device: torch.device
) -> nn.Module:
    # Straight to the device, tensor by tensor: eight ranks do not hold eight copies of the weights in the host's memory.
    there: dict[str, Any] = {"device_map": {"": device}} if find_spec("accelerate") else {}
    check_files(folder)
    try:
        family.model.check_names(config, _tensor_names(folder))
        with quiet_loading():
            # The family's own classes by name, not by what the checkpoint's auto_map says.
            model, info = family.model.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
                folder, config=config, dtype=dtype, output_loading_info=True, use_safetensors=True,
                ignore_mismatched_sizes=True, **there,
            )  # fmt: skip
    except InputError:
        raise
    except Exception as error:
        raise InputError(str(folder), first_line(error), "a config.json and safetensors that fit it") from error
    check_tensors(folder, info)
    return model.to(device)


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Keeps transformers from printing its progress and its report of tensors: a command has its own, and one line an error."""
    logging.disable_progress_bar()
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _tensor_names(folder: Path) -> list[str]:
    names: list[str] = []
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as stream:
            names += stream.keys()
    return names


def check_tensors(folder: Path, info: dict[str, Any]) -> None:
    """Raises an InputError if loading left a tensor out, met one too many, or one of another shape.

    Args:
        folder: Where from.
        info: What transformers returns with ``output_loading_info``.
    """
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(name if isinstance(name, str) else name[0] for name in info[kind]):
            problem = f"{kind.replace('_keys', '')} tensors {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}"
            raise InputError(f"{folder}: safetensors", problem, "exactly the tensors config.json asks for")


def _token_ids(folder: Path, raw: dict, family: Family, tokenizer: PreTrainedTokenizerBase) -> TokenIds:
    vocabulary = tokenizer.get_vocab()
    for text in (family.mask, family.eot, family.end_of_turn, family.bos):
        if text not in vocabulary:
            raise InputError(f"{folder}: tokenizer", f"no token {text!r}", f"the special tokens of {family}")
    ids = TokenIds(
        mask=vocabulary[family.mask],
        eot=vocabulary[family.eot],
        end_of_turn=vocabulary[family.end_of_turn],
        pad=vocabulary[family.eot],
        bos=vocabulary[family.bos],
    )
    for name, value in (("mask_token_id", ids.mask), ("eos_token_id", ids.eot)):
        if raw.get(name) not in (None, value):
            raise InputError(f"{folder}/config.json: {name}", raw[name], f"{value}, the tokenizer's id of that token")
    return ids


def fingerprint(folder: Path) -> str:
    """Identity of a checkpoint's weights: 16 hex digits of a SHA-256 over all bytes of its safetensors files.

    A process reads each file once while its size and time of change stay the same; 16 GB take some ten seconds.
    """
    files = [file.resolve() for file in sorted(folder.glob("*.safetensors"))]
    return _digest(tuple((file, file.stat().st_size, file.stat().st_mtime_ns) for file in files))


def fingerprint_in_memory(net: nn.Module) -> str:
    """Identity of weights that are not saved: 16 hex digits of a SHA-256 over names and values of the state dict."""
    digest = hashlib.sha256()
    for name, tensor in net.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


@functools.lru_cache(maxsize=64)
def _digest(files: tuple[tuple[Path, int, int], ...]) -> str:
    """Digest of files' sizes and contents; path, size and time of change tell one state of a file from another."""
    digest = hashlib.sha256()
    for file, size, _ in files:
        digest.update(str(size).encode())
        with file.open("rb") as stream:
            while part := stream.read(1 << 24):
                digest.update(part)
    return digest.hexdigest()[:16]
