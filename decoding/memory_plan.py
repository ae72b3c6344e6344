"""What a decode of a given model takes in memory, counted without allocating anything: on shapes alone."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from decoding.config import DecodeConfig
from decoding.output import empty_output
from decoding.run import Request, Run
from decoding.strategies import Strategy
from models.errors import InputError
from models.predictor import MaskPredictor
from models.rules import DTYPES, LENGTH, check, one_of, whole

MOST_ROWS = 1024
"""Rows that are counted; each takes milliseconds, and what more of them take grows in proportion."""
_STEPS = 2  # a block's first forward, on the whole sequence, and one of those after it


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of a decode; all but ``peak`` add up to at least ``peak``, since not all are at their largest at once.

    Attributes:
        weights: The model's, and those of the strategy's component.
        keys: The keys and values that are kept, the predictor's and a helper's.
        state: The rows' own tensors, and what a strategy keeps of earlier steps.
        activations: Most that a forward holds beside these, the component's included.
        evidence: Most that the rest of a step holds beside these: logits and what is read from them.
        peak: Most of everything at one time.
    """

    weights: int
    keys: int
    state: int
    activations: int
    evidence: int
    peak: int

    def __str__(self) -> str:
        parts = [f"{name} {size / 2**30:.2f}" for name, size in vars(self).items() if name != "peak"]
        return f"peak {self.peak / 2**30:.2f} GiB: {', '.join(parts)}"


def plan_memory(
    config_file: str | Path,
    config: DecodeConfig,
    strategy: Strategy,
    *,
    dtype: str = "bfloat16",
    batch_size: int = 1,
    prompt_length: int = 256,
    record: bool = False,
    record_eot: bool = False,
    record_hidden: bool = False,
) -> MemoryPlan:
    """Counts the peak of a real decode step, in the loop itself, on tensors that have shapes and no contents.

    Attention counts as fused. What the allocator rounds up, kernels' workspaces and the device's context come on top.

    Args:
        config_file: ``config.json`` of a mask predictor, or its folder; weights are not needed.
        config: Decode settings.
        strategy: The strategy; of a helper that is not loaded the description suffices.
        dtype: Dtype of the weights.
        batch_size: Rows decoded together, at most 1024.
        prompt_length: Tokens of each prompt.
        record: Count what rollouts record.
        record_eot: Likewise.
        record_hidden: Likewise.

    Raises:
        InputError: No description of a model that can be read, an unknown dtype, or a strategy that does not fit the model or
            the settings.
    """
    given = {"dtype": dtype, "batch_size": batch_size, "prompt_length": prompt_length}
    check(given, {"dtype": one_of(DTYPES), "batch_size": whole(1, MOST_ROWS), "prompt_length": LENGTH})
    with FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode():
        predictor = MaskPredictor.fresh(config_file, dtype)
        outlined = strategy.outlined(predictor, config)
        request = _request(predictor, config, outlined, batch_size, prompt_length)
        return _measure(replace(request, record=record, record_eot=record_eot, record_hidden=record_hidden))


def _request(predictor: MaskPredictor, config: DecodeConfig, strategy: Strategy, rows: int, length: int) -> Request:
    if length + config.gen_length > predictor.max_length:
        raise InputError(
            "prompt_length and gen_length", length + config.gen_length, f"at most the model's {predictor.max_length} tokens"
        )  # fmt: skip
    references = torch.zeros(rows, config.gen_length, dtype=torch.long) if strategy.name == "oracle" else None
    output = empty_output(rows, config)
    return Request(predictor, [[4] * length] * rows, config, strategy, output, references)


def _measure(request: Request) -> MemoryPlan:
    """The bytes that the first steps of a request take."""
    networks = request.predictor.model, *request.strategy.networks
    storages = [weights.untyped_storage() for network in networks for weights in network.parameters()]
    weights = sum({storage._cdata: storage.nbytes() for storage in storages}.values())
    with MemoryMeter() as meter:
        meter.known.update(storages)  # views of them are no news
        run = request.strategy.start(request)
        state = meter.now - run.key_bytes
        activations = evidence = 0
        with _worst_case(run):
            for _ in range(_STEPS):
                # A helper's keys are made within its first forward.
                before, inside = meter.now - run.key_bytes, []
                with _forwards(run, meter, inside):
                    run.step()
                activations = max(activations, *inside)
                evidence = max(evidence, meter.outside - run.key_bytes - before)
    return MemoryPlan(weights, run.key_bytes, state, activations, evidence, weights + max(meter.peak, meter.outside))


class MemoryMeter(TorchDispatchMode):
    """Adds up the storages that operators make while it is on, each until it is freed.

    Attributes:
        now: Bytes alive.
        peak: Most so far.
        outside: Most so far while nothing is marked as a forward.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.outside = 0
        self.in_forward = False
        self.known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.ops.aten.logsumexp.default:
            with self:
                return _logsumexp(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._see, out)
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self.known:
            return
        self.known.add(storage)
        size = storage.nbytes()
        weakref.finalize(storage, self._free, size)
        self.now += size
        self.peak = max(self.peak, self.now)
        if not self.in_forward:
            self.outside = max(self.outside, self.now)

    def _free(self, size: int) -> None:
        self.now -= size


def _logsumexp(value: Tensor, dim: list[int], keepdim: bool = False) -> Tensor:
    """The operator as PyTorch composes it inside, where nobody sees the tensor of ``value``'s size that it makes."""
    most = value.amax(dim, keepdim=True)
    total = (value - most).exp_().sum(dim, keepdim=keepdim)
    return total.log_() + (most if keepdim else most.squeeze(tuple(dim)))


@contextmanager
def _forwards(run: Run, meter: MemoryMeter, inside: list[int]) -> Iterator[None]:
    """Marks all forwards, and appends to ``inside`` the most that each holds beside keys and what was there before it."""
    before = peak = 0

    def begins(*_: Any) -> None:
        nonlocal before, peak
        before, peak = meter.now - run.key_bytes, meter.peak
        meter.in_forward, meter.peak = True, meter.now

    def ends(*_: Any) -> None:
        inside.append(meter.peak - run.key_bytes - before)
        meter.in_forward, meter.peak = False, max(peak, meter.peak)

    components = (getattr(network, "base_model", network) for network in run.request.strategy.networks)
    hooks = []
    for module in (run.predictor.model, *components):
        hooks += [module.register_forward_pre_hook(begins), module.register_forward_hook(ends)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _worst_case(run: Run) -> Iterator[None]:
    """Has the host told, in place of what the device would say, that each step committed one position of every row."""
    region, size, steps = run.config.gen_length, run.config.block_length, iter(range(1, run.config.block_length))

    def told(known: Tensor) -> list[list[float]]:
        blocks, done = region // size, next(steps)
        others = [0.0] * (known.shape[1] - 1 - blocks)
        return [[size - done, *[size] * (blocks - 1), region, *others]] * len(known)

    run.state.read = told
    try:
        yield
    finally:
        del run.state.read
