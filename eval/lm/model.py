"""Our decoders as a model of lm-eval, registered as ``dlm-accel``; importing this needs the ``eval`` extra."""

import itertools
import time
import warnings
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string
from torch import Tensor
from tqdm import tqdm

import data
import decoding
import models
from data.prompts import tokenizer_hash
from data.provenance import code_digest, environment
from decoding.config import CacheRule, DecodeConfig, EotRule
from decoding.decoder import Decoder, cut
from decoding.strategies import STRATEGIES
from decoding.text import MARK, render, token_ids
from eval import lm
from eval.lm import processes
from eval.lm.answers import Answers, Sums, Tally, answer_key, summary
from eval.lm.likelihood import Pair, greedy_matches, log_likelihoods, pair_ids
from eval.lm.requests import Asked, Job, generation_arguments, groups, number, portions, positive
from models.errors import InputError

SCHEMA_VERSION = 1
BUNDLED = Path(__file__).resolve().parents[2] / "models" / "bundled"
BASE = str(BUNDLED / "llada-tiny")

SAVE_EVERY = 8
"""Batches of log-likelihoods between two savings."""


@register_model("dlm-accel")
class DiffusionLM(LM):
    """A diffusion language model and a strategy, as lm-eval's tasks see a model.

    What a request asks for (temperature, number of tokens) is used where the argument of that name is ``None``. An answer
    depends on the request and the settings alone: not on the batch, the order or the number of processes.

    Args:
        base: Folder or hub id of the base model.
        strategy: Any strategy but ``oracle``, which needs references.
        filter: Folder of the filter, for strategies with one; ``learn2pd`` on the bundled base has the bundled one.
        helper: Folder of the helper, for ``apd``; likewise.
        gen_length: Generated positions; ``None`` is the request's ``max_gen_toks``, rounded up to whole blocks.
        block_length: Positions of a block.
        steps: Denoising steps, for strategies with a quota; ``None`` is one token each.
        temperature: ``None`` is the request's: 0 unless it asks to sample.
        eot: End-of-text rule.
        eot_head: Folder of the EoT head, for the rule ``learned``.
        eot_risk: Probability of losing text below which that rule ends a text.
        cache: Which keys and values are reused.
        refresh: Forwards of a block from one on the whole sequence to the next.
        seed: Seed of the noise and of the likelihood's draws.
        dtype: Weights' dtype; the checkpoint's on a GPU, fp32 on a CPU.
        device: Device of the weights; a GPU where there is one, each process its own.
        compile: Compile the forward.
        batch_size: Rows of one forward.
        mc_samples: Draws for one log-likelihood.
        greedy_check: Also find out whether greedy decoding gives a continuation, at a forward for each of its tokens. ``None``
            does so where a question has one continuation only, as LAMBADA's do: lm-eval reads it there, and not where it
            picks one of several.
        add_bos: Put BOS before prompts that the chat template has not rendered, empty ones included. LLaDA's own evaluation
            of base models does not.
        truncate: Cut the left of a context that is too long, as lm-eval's other models do; by default it is an error.
        answers: Folder where finished answers are kept and looked for.
        **options: The strategy's settings, such as ``threshold=0.9``.

    Raises:
        InputError: Anything that does not load, does not fit or is unknown, by name.
    """

    def __init__(
        self, base: str = BASE, strategy: str = "full_step", filter: str | None = None, helper: str | None = None,
        gen_length: int | None = None, block_length: int = 32, steps: int | None = None, temperature: float | None = None,
        eot: EotRule = "commit", eot_head: str | None = None, eot_risk: float = 0.01,
        cache: CacheRule = "none", refresh: int | None = None, seed: int = 0,
        dtype: str | None = None, device: str | None = None, compile: bool = False, batch_size: int | str = 32,
        mc_samples: int = 128, greedy_check: bool | None = None, add_bos: bool = False, truncate: bool = False,
        answers: str | Path | None = None, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        counts = {
            "gen_length": gen_length, "block_length": block_length, "steps": steps, "refresh": refresh,
            "batch_size": batch_size, "mc_samples": mc_samples,
        }  # fmt: skip
        whole: dict[str, Any] = {n: None if value is None else positive(n, value) for n, value in counts.items()}
        self.gen_length, self.batch_size = whole["gen_length"], whole["batch_size"]
        self.mc_samples = whole["mc_samples"]
        self.temperature, self.seed = None if temperature is None else number("temperature", temperature), seed
        self.greedy_check, self.add_bos, self.truncate = greedy_check, add_bos, truncate
        self.decode: dict[str, Any] = {
            "eot": eot,
            "eot_head": eot_head,
            "eot_risk": eot_risk,
            "seed": seed,
            "cache": cache,
        }
        self.decode |= {name: whole[name] for name in ("block_length", "steps", "refresh")}
        if steps is not None and gen_length is None:
            raise InputError("steps", f"{steps} without gen_length", "null, or gen_length with it")
        config = self._config(generation_arguments({}))  # refuses wrong settings before anything is loaded
        options |= strategy_options(base, strategy, {"filter": filter, "helper": helper})
        self._rank, self._world_size = processes.join()
        self.base, device = base, processes.own_device(device)
        self.decoder = Decoder.from_pretrained(base, strategy, device=device, dtype=dtype, compile=compile, **options)
        predictor = self.decoder.predictor
        self.tokenizer: Any = predictor.tokenizer
        self._device, self.max_length = predictor.device, predictor.max_length
        self.settings = self.decoder.settings(config)  # once: fingerprints are read off the weights
        self.code = code_digest(models, decoding, data, lm)  # whatever an answer comes through
        self.answers = Answers(None if answers is None else Path(answers), self.rank)
        self.generation, self.likelihood = Tally(), Tally()
        self.everyone: list[tuple[Sums, Sums]] = []

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> "DiffusionLM":
        """As lm-eval's, but what ``--model_args`` says goes before ``--batch_size`` and ``--device``.

        lm-eval asks for ``cuda:0`` where the user asked for nothing; without a GPU that is the CPU.
        """
        extra = {name: value for name, value in (additional_config or {}).items() if value is not None}
        if extra.get("device") == "cuda:0" and not torch.cuda.is_available():
            del extra["device"]
        return cls(**extra | arg_dict)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> "DiffusionLM":
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    # Requests

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Decodes each request's context up to its stop sequences; special tokens are left out of the text.

        All requests are checked before the first is decoded; equal ones are decoded once.

        Raises:
            InputError: A generation argument that is not supported, or a context that leaves no room.
        """
        jobs = self._jobs(requests)
        todo = {job.key: job for job in jobs if job.key not in self.answers}
        with self._bar(len(todo), "generate_until", disable_tqdm) as bar:
            for group in groups(todo.values()):
                self._decode(group, bar)
        for job in {job.key: job for job in jobs}.values():
            answer = self.answers[job.key]
            self.generation.add(
                self._settings(job.config, job.stop), answers=1, reused=job.key not in todo, nfe=answer["nfe"],
                tokens=answer["tokens"], empty_answers=answer["tokens"] == 0,
            )  # fmt: skip
        return [self.answers[job.key]["text"] for job in jobs]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Estimates the log-probability of each continuation; see :mod:`eval.lm.likelihood`.

        Raises:
            InputError: A context or continuation that is too long.
        """
        pairs = []
        for context, continuation in map(_arguments, requests):
            prompt, answer = pair_ids(self.tokenizer, context, continuation)
            pairs.append(Pair(self._fit(self._bos(context) + prompt, len(answer), "continuation"), answer))
        alone = Counter((request.task_name, request.doc_id) for request in requests)
        found: list[Any] = [None] * len(pairs)
        for greedy in (False, True):
            chosen = [
                n
                for n, request in enumerate(requests)
                if self._greedy(request, alone[request.task_name, request.doc_id]) == greedy
            ]
            scored = self._score([pairs[n] for n in chosen], greedy, "loglikelihood", disable_tqdm) if chosen else []
            for n, result in zip(chosen, scored, strict=True):
                found[n] = result
        for request, result in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, result)
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Estimates the log-probability of whole texts, without a prompt.

        A text longer than the model is cut into windows as lm-eval cuts them: each but the first sees the token before it,
        and the last, which is shorter, as much as fits.
        """
        texts: list[list[Pair]] = []
        for (text,) in map(_arguments, requests):
            ids = token_ids(self.tokenizer, text)
            windows = get_rolling_token_windows(ids, self.decoder.predictor.ids.bos, self.max_length - 1, context_len=1)
            pairs = [Pair(prompt, answer) for prompt, answer in map(make_disjoint_window, windows)]
            texts.append([replace(pair, prompt=self._bos(text)) for pair in pairs[:1]] + pairs[1:])
        every = list(itertools.chain.from_iterable(texts))
        values = iter(self._score(every, False, "loglikelihood_rolling", disable_tqdm))
        found = [sum(value for value, _ in itertools.islice(values, len(pairs))) for pairs in texts]
        for request, result in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, result)
        return found

    def _greedy(self, request: Instance, continuations: int) -> bool:
        if self.greedy_check is None:
            return request.doc_id is not None and continuations == 1
        return self.greedy_check

    def _jobs(self, requests: Sequence[Instance]) -> list[Job]:
        jobs: list[Job] = []
        seen: dict[str, int] = {}
        for request in requests:
            context, arguments = _arguments(request)
            asked = generation_arguments(arguments)
            config, stop = self._config(asked), asked.stop
            prompt = self._bos(context) + token_ids(self.tokenizer, context)
            prompt = self._fit(prompt, config.gen_length, "gen_length")
            most = asked.max_gen_toks if self.gen_length is None else config.gen_length
            parts = {"prompt": prompt, "settings": self._settings(config, stop), "most": most, "code": self.code}
            key = answer_key(**parts)
            if config.temperature:  # a request that is repeated wants another draw each time
                seen[key] = seen.get(key, 0) + 1
                key = answer_key(**parts, repeat=seen[key])
            jobs.append(Job(key, prompt, config, stop, most, request.args))
        return jobs

    def _config(self, asked: Asked) -> DecodeConfig:
        """Decode settings of a request: what the model's arguments leave open is the request's."""
        block = self.decode["block_length"]
        length = -(-asked.max_gen_toks // block) * block if self.gen_length is None else self.gen_length
        temperature = asked.temperature if self.temperature is None else self.temperature
        return DecodeConfig(length, temperature=temperature, **self.decode)

    def _decode(self, jobs: Sequence[Job], bar: tqdm) -> None:
        """Decodes requests of equal settings; every answer is kept as soon as it is there."""
        config, stop = jobs[0].config, jobs[0].stop

        def finished(index: int, tokens: list[int], nfe: int) -> None:
            tokens = tokens[: jobs[index].most]  # the last block may reach further than was asked for
            text = self.decoder.decode_text(tokens)
            if (end := cut(text, stop)) is not None:  # what follows a stop sequence is no part of the answer
                text = text[:end]
                reach = range(len(tokens) + 1)
                tokens = tokens[: bisect_left(reach, end, key=lambda n: len(self.decoder.decode_text(tokens[:n])))]
            self.answers.add({jobs[index].key: {"text": text, "tokens": len(tokens), "nfe": nfe}})
            self.cache_hook.add_partial("generate_until", jobs[index].arguments, text)
            bar.update()

        out = self.decoder.generate(
            [job.prompt for job in jobs], stop=stop, batch_size=self.batch_size, finished=finished,
            seeds=[int(job.key[:8], 16) for job in jobs], **asdict(config),
        )  # fmt: skip
        self.generation.add(
            self._settings(config, stop), forward_calls=out.forward_calls, seconds=out.seconds,
            predictor_seconds=out.predictor_seconds, helper_seconds=out.helper_seconds,
        )  # fmt: skip

    def _score(self, pairs: Sequence[Pair], greedy: bool, name: str, disable_tqdm: bool) -> list[tuple[float, bool]]:
        fingerprint = self.decoder.predictor.fingerprint
        settings = {
            "mc_samples": self.mc_samples, "seed": self.seed, "greedy_check": greedy, "dtype": self.settings["dtype"],
            "fingerprints": {"base": fingerprint},
        }  # fmt: skip
        keys = [answer_key(prompt=pair.prompt, answer=pair.answer, settings=settings, code=self.code) for pair in pairs]
        todo = {key: pair for key, pair in zip(keys, pairs, strict=True) if key not in self.answers}
        longest_first = sorted(todo.items(), key=lambda item: -len(item[1].prompt))
        started = time.perf_counter()
        with self._bar(len(todo), name, disable_tqdm) as bar:
            for chunk in portions(longest_first, SAVE_EVERY * self.batch_size):
                self._score_chunk(dict(chunk), greedy, bar)
        self.likelihood.add(
            settings, answers=len(set(keys)), reused=len(set(keys)) - len(todo), seconds=time.perf_counter() - started
        )
        return [(self.answers[key]["log_likelihood"], self.answers[key]["greedy"]) for key in keys]

    def _score_chunk(self, pairs: dict[str, Pair], greedy: bool, bar: tqdm) -> None:
        predictor, chosen = self.decoder.predictor, list(pairs.values())
        values = log_likelihoods(predictor, chosen, self.mc_samples, self.seed, self.batch_size, _advance(bar))
        matches = greedy_matches(predictor, chosen, self.batch_size) if greedy else [False] * len(chosen)
        found = zip(pairs, values, matches, strict=True)
        self.answers.add({key: {"log_likelihood": value, "greedy": match} for key, value, match in found})

    def _settings(self, config: DecodeConfig, stop: Sequence[str]) -> dict[str, Any]:
        return self.settings | config.settings() | {"stop": list(stop)}

    def _bos(self, text: str) -> list[int]:
        return [self.decoder.predictor.ids.bos] if self.add_bos and not text.startswith(MARK) else []

    def _fit(self, ids: list[int], follows: int, what: str) -> list[int]:
        """A context that leaves room for the ``follows`` positions of ``what``."""
        room = self.max_length - follows
        if len(ids) <= room:
            return ids
        if room < 1:
            raise InputError(what, f"{follows} tokens", f"fewer than the model's {self.max_length}")
        if not self.truncate:
            accepted = (
                f"at most {room}: the model's {self.max_length} less {what} {follows}; fewer shots, or truncate=true"
            )
            raise InputError("context", f"{len(ids)} tokens", accepted)
        warnings.warn("contexts that are too long lose their beginning (truncate=true)", stacklevel=2)
        return ids[-room:]

    def _bar(self, total: int, name: str, disable: bool) -> tqdm:
        return tqdm(total=total, desc=f"dlm-accel {name}", disable=disable or self.rank != 0, smoothing=0)

    # Chat template

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The rendered prompt, with the marks of :mod:`decoding.text` in it.

        Raises:
            InputError: The tokenizer has no chat template.
        """
        return render(self.tokenizer, chat_history, add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.tokenizer.chat_template if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        return f"{Path(self.base).name}-{tokenizer_hash(self.tokenizer)}"

    # Several processes

    def all_gather(self, tensor: Tensor) -> Tensor:
        return torch.cat([part.reshape(-1) for part in processes.gather(tensor.cpu())])

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        every = processes.gather(obj)
        return every if self.rank == dst else None

    def barrier(self) -> None:
        """Waits for all processes; lm-eval calls it after each kind of request, so the sums are brought together here."""
        self.everyone = processes.gather((self.generation.sums, self.likelihood.sums))

    # Results

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval adds to ``config`` in its results: complete settings, cost and environment."""
        everyone = self.everyone or [(self.generation.sums, self.likelihood.sums)]
        return {
            "dlm_accel": {
                "schema_version": SCHEMA_VERSION,
                "base": self.base,
                "batch_size": self.batch_size,
                "processes": self.world_size,
                "generation": summary(generation for generation, _ in everyone),
                "likelihood": summary(likelihood for _, likelihood in everyone),
                "environment": environment(),
            }
        }


def strategy_options(base: str, strategy: str, components: dict[str, str | None]) -> dict[str, Any]:
    """The strategy's components that are given, and the bundled ones where the bundled base needs one.

    Raises:
        InputError: The oracle, which decodes from references that no task has.
    """
    if strategy == "oracle":
        accepted = " | ".join(name for name in STRATEGIES if name != "oracle")
        raise InputError("strategy", "'oracle', which needs references", accepted)
    options = {name: folder for name, folder in components.items() if folder is not None}
    needed = {"learn2pd": "filter", "apd": "helper"}.get(strategy)
    if needed and base == BASE:
        options.setdefault(needed, str(BUNDLED / f"{needed}-llada-tiny"))
    return options


def _arguments(request: Instance) -> Any:
    return request.args


def _advance(bar: tqdm) -> Callable[[int], None]:
    """Moves a bar on by what of the next portion is finished."""
    before = bar.n

    def advance(finished: int) -> None:
        bar.update(before + finished - bar.n)

    return advance
