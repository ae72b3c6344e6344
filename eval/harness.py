"""Evaluates a decoder on lm-eval's tasks: ``python eval/harness.py --tasks short`` (needs the ``eval`` extra).

lm-eval's own command line works as well; behind the word ``lm-eval`` come its own arguments, and our model is ``dlm-accel``:
``python eval/harness.py lm-eval --model dlm-accel --model_args strategy=threshold,threshold=0.8 --tasks short
--include_path eval/tasks --apply_chat_template``.
"""

import contextlib
import difflib
import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.disk import check_writable
from data.provenance import write_aside, write_run_file
from data.typed import Count, Length, Positive, Share, Temperature, Whole
from decoding.command_line import entry
from decoding.config import CacheRule, EotRule
from eval.command import command, raised_by, wandb_mode
from eval.lm import processes
from eval.lm.presets import PRESETS, resolve
from eval.tracking import USUAL, WandbSettings, evaluation_run
from models.errors import InputError, first_line
from models.rules import SETTINGS, check

if TYPE_CHECKING:  # an extra, imported when it is needed
    from lm_eval.tasks import TaskManager

TASKS = Path(__file__).resolve().parent / "tasks"
"""Tasks over the bundled prompts; always found."""

MODEL_SETTINGS = (
    "base", "strategy", "filter", "helper", "gen_length", "block_length", "steps", "temperature", "eot", "eot_head",
    "eot_risk", "cache", "refresh", "seed", "dtype", "device", "compile", "batch_size", "mc_samples", "greedy_check",
    "add_bos", "truncate",
)  # fmt: skip

LM_EVAL_SETTINGS = (
    "num_fewshot", "limit", "system_instruction", "apply_chat_template", "fewshot_as_multiturn", "log_samples",
    "confirm_run_unsafe_code",
)  # fmt: skip


def main(
    tasks: str | None = None,
    preset: str | None = None,
    base: str | None = None,
    strategy: str = "full_step",
    filter: str | None = None,
    helper: str | None = None,
    options: dict[str, Any] | None = None,
    gen_length: Length | None = None,
    block_length: Length | None = None,
    steps: Length | None = None,
    temperature: Temperature | None = None,
    eot: EotRule = "commit",
    eot_head: str | None = None,
    eot_risk: Share = 0.001,
    cache: CacheRule = "none",
    refresh: Count | None = None,
    seed: Whole = 0,
    dtype: str | None = None,
    device: str | None = None,
    devices: Count = 1,
    compile: bool = False,
    batch_size: Length = 32,
    mc_samples: Length = 128,
    greedy_check: bool | None = None,
    add_bos: bool = False,
    truncate: bool = False,
    num_fewshot: Whole | None = None,
    apply_chat_template: bool | None = None,
    fewshot_as_multiturn: bool | None = None,
    system_instruction: str | None = None,
    limit: Positive | None = None,
    include_path: Path | None = None,
    confirm_run_unsafe_code: bool = False,
    log_samples: bool = False,
    resume: bool = True,
    out: Path | None = None,
    wandb: WandbSettings = USUAL,
) -> None:
    """Runs tasks, prints lm-eval's table, and writes ``results.json`` and ``run.yaml``.

    Finished answers are kept in ``out``; an interrupted run continues there, and other settings never reuse them.

    Args:
        tasks: Names of lm-eval's tasks or groups, with commas between them; ``bundled`` is what the bundled model knows.
        preset: Published settings of a benchmark, ``gsm8k_256`` say; what is given beside it goes before it.
        base: Folder or hub id of the base model; the bundled one by default.
        strategy: Name of the strategy.
        filter: Folder of the filter, for strategies with one; learn2pd on the bundled base has the bundled one.
        helper: Folder of the helper, for apd; likewise.
        options: Further settings of the strategy, such as {"threshold": 0.9}.
        gen_length: Generated positions; by default what the task asks for, rounded up to whole blocks.
        block_length: Positions of a block; 32 by default.
        steps: Denoising steps, for strategies with a quota; by default one token each.
        temperature: By default what the task asks for, which is mostly 0.
        eot: End-of-text rule.
        eot_head: Folder of the EoT head, for the rule learned.
        eot_risk: Probability of losing text below which that rule ends a text.
        cache: Keys and values that later forwards of a block take from its first one.
        refresh: Forwards of a block from one on the whole sequence to the next.
        seed: Seed of the noise and of the draws for log-likelihoods.
        dtype: Dtype of the weights.
        device: Device of the weights; a GPU where there is one.
        devices: Number of processes, one on each GPU, that share the requests.
        compile: Compile the predictor's forward.
        batch_size: Rows of one forward.
        mc_samples: Draws for each log-likelihood.
        greedy_check: Find out whether greedy decoding gives a continuation, a forward for each token; by default where a
            question has only one, as LAMBADA's do.
        add_bos: Put BOS before prompts without a chat template.
        truncate: Cut the left of a context that is too long instead of refusing it.
        num_fewshot: Solved examples before the question; by default the task's own number.
        apply_chat_template: Wrap prompts in the chat template; the default. A base model wants false.
        fewshot_as_multiturn: Give every example a turn of its own; by default where there is a chat template.
        system_instruction: System message.
        limit: So many prompts of each task; below 1, this share of them.
        include_path: A further folder of lm-eval tasks.
        confirm_run_unsafe_code: Let tasks run the code that the model writes.
        log_samples: Also write samples_<task>.jsonl.
        resume: Keep answers in out, and use those that are there.
        out: Folder of the results; runs/harness/<preset or tasks>-<strategy> by default.
        wandb: Where W&B files the run.
    """
    settings, overrides = resolve(preset, {name: value for name, value in locals().items() if name != "wandb"})
    mode = wandb_mode()
    check_settings(settings)
    check_installed()
    logging.getLogger("lm_eval").setLevel(os.environ.get("LMEVAL_LOG_LEVEL", "error").upper())
    manager, names = find_tasks(settings["tasks"], include_path)
    check_consent(manager, names, confirm_run_unsafe_code)
    folder = Path("runs/harness", f"{preset or '+'.join(names)}-{strategy}")
    settings |= {"tasks": names, "out": out or folder}
    check_writable("out", settings["out"])
    processes.launch(devices, device)
    try:
        results = evaluate(settings, manager)
        if results is not None:  # the first process has them
            write_results(results, settings, overrides)
            if mode != "disabled":
                log(results, settings, wandb, mode)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; the same command continues from the answers that are saved") from None
    finally:
        processes.leave()


def check_settings(settings: dict[str, Any]) -> None:
    """Raises an InputError for what would be misread later."""
    limit = settings["limit"]
    if limit is not None and limit > 1 and limit != int(limit):
        raise InputError("limit", limit, "a whole number of prompts, or a share of them below 1")
    check({"options": settings["options"]}, {"options": SETTINGS.or_null()})
    try:
        (settings["system_instruction"] or "").encode()
    except UnicodeEncodeError:
        raise InputError("system_instruction", repr(settings["system_instruction"])[:80], "text in UTF-8") from None
    for name, value in (settings["options"] or {}).items():
        if name in MODEL_SETTINGS:
            raise InputError(f"options.{name}", value, f"--{name}, which is no setting of a strategy alone")


def check_installed() -> None:
    """Raises an InputError where the ``eval`` extra is not installed."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise InputError("lm-eval", "not installed", "pip install -e '.[eval]'") from error


def find_tasks(asked: str | None, include_path: Path | None) -> tuple["TaskManager", list[str]]:
    """lm-eval's index of tasks, and the names in it that were asked for.

    Args:
        asked: Names or patterns, with commas between them.
        include_path: A further folder of tasks.

    Raises:
        InputError: No such folder or task.
    """
    from lm_eval.tasks import TaskManager

    if not asked:
        raise InputError(
            "tasks", repr(asked), f"names of lm-eval's tasks, such as bundled; or a preset: {' | '.join(PRESETS)}"
        )
    if include_path is not None and not include_path.is_dir():
        raise InputError("include_path", include_path, "a folder with task files")
    wanted = [name.strip() for name in asked.split(",")]
    folders: list[str | Path] = [TASKS, *([include_path] if include_path else [])]
    for everything in (False, True):  # to read lm-eval's 10,000 files takes seconds, and is not always needed
        manager = TaskManager(include_path=folders, include_defaults=everything)
        found = {name: manager.match_tasks([name]) for name in wanted}
        if all(found.values()):
            return manager, list(dict.fromkeys(name for names in found.values() for name in names))
    unknown = next(name for name, names in found.items() if not names)
    close = difflib.get_close_matches(unknown, manager.all_tasks, n=5) or ["a task that `lm-eval ls tasks` shows"]
    raise InputError("tasks", repr(unknown), " | ".join(close))


def check_consent(manager: "TaskManager", names: list[str], consent: bool) -> None:
    """Raises an InputError if a task would run the model's code without consent; no data is loaded for it."""
    unsafe = [name for name in names if any(config.get("unsafe_code") for config in _configs(manager, name))]
    if unsafe and not consent:
        raise InputError(
            "confirm_run_unsafe_code", f"false, but {', '.join(unsafe)} runs code that the model writes",
            "true, where that can do no harm",
        )  # fmt: skip


def _configs(manager: "TaskManager", item: str | dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The config of a task, or those of all tasks in a group or tag."""
    entry = manager.task_index.get(item) if isinstance(item, str) else None
    config = item if isinstance(item, dict) else entry.cfg or {} if entry else {}
    inside = config.get("task")
    if entry is not None and entry.cfg is None:
        inside = sorted(entry.tags)
    if isinstance(inside, list):
        for child in inside:
            yield from _configs(manager, child)
        return
    yield config
    if isinstance(item, dict) and isinstance(inside, str):  # a group's own version of a task
        yield from _configs(manager, inside)


def load_tasks(manager: "TaskManager", names: list[str], num_fewshot: int | None = None) -> list[Any]:
    """The tasks and groups themselves, with their data.

    Raises:
        InputError: Data or a metric that cannot be loaded, or examples asked of a task that is without, which lm-eval ignores.
    """
    try:
        loaded = manager.load(names)
    except Exception as error:  # the hub's, the data set's, the task's own
        accepted = "tasks whose data and metrics can be loaded"
        raise InputError(f"tasks {', '.join(names)}", first_line(error), accepted) from error
    groups, tasks = loaded.get("groups", {}), loaded["tasks"]
    without = [name for name, task in tasks.items() if task.get_config("num_fewshot") == 0]
    if num_fewshot and without:
        raise InputError("num_fewshot", num_fewshot, f"0 or null with {', '.join(without)}, which has no examples")
    inside = {name for children in loaded.get("group_map", {}).values() for name in children}
    return [item for name, item in (groups | tasks).items() if name not in inside]


def evaluate(settings: dict[str, Any], manager: "TaskManager") -> dict[str, Any] | None:
    """Runs lm-eval; its results, in the first process only.

    Args:
        settings: The command's arguments, resolved.
        manager: lm-eval's index of tasks.

    Raises:
        InputError: A setting that the model, the strategy or lm-eval does not take.
    """
    import lm_eval

    from eval.lm.model import DiffusionLM

    model = {name: settings[name] for name in MODEL_SETTINGS if settings[name] is not None}
    model |= settings["options"] or {}
    model["answers"] = settings["out"] if settings["resume"] else None
    task = {name: settings[name] for name in LM_EVAL_SETTINGS}
    with only_first_speaks():
        task |= {"tasks": load_tasks(manager, settings["tasks"], settings["num_fewshot"]), "task_manager": manager}
        evaluation: Any = lm_eval.simple_evaluate  # its wrapper hides the signature
        return evaluation(model=DiffusionLM(**model), **task)


@contextlib.contextmanager
def only_first_speaks() -> Iterator[None]:
    """Drops what other processes than the first print; their errors are raised all the same."""
    if processes.join()[0] == 0:
        yield
        return
    with (
        Path(os.devnull).open("w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


def write_results(results: dict[str, Any], settings: dict[str, Any], overrides: dict[str, Any]) -> None:
    """Writes what was found, and prints lm-eval's tables and what the decodes cost.

    Args:
        results: lm-eval's results.
        settings: The command's arguments, resolved.
        overrides: Those that were given otherwise than the preset has them.
    """
    from lm_eval.utils import handle_non_serializable, make_table

    from eval.lm.model import SCHEMA_VERSION

    def text(value: Any, **layout: Any) -> str:
        return json.dumps(value, default=handle_non_serializable, ensure_ascii=False, **layout)

    out, samples = settings["out"], results.pop("samples", None) or {}
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}
    preset = settings["preset"]
    if preset is not None:
        table = results["results"] | results.get("groups", {})
        published = {name: {key: table[name].get(key) for key in PRESETS[preset].metrics} for name in settings["tasks"]}
        results = {"preset": preset, "overrides": overrides, "published_metrics": published} | results
    results = {"schema_version": SCHEMA_VERSION, "settings": settings} | results
    write_aside(out / "results.json", text(results, indent=2))
    for task, rows in samples.items():
        rows.sort(key=lambda row: row["doc_id"])  # processes take turns
        write_aside(out / f"samples_{task}.jsonl", "".join(f"{text(row)}\n" for row in rows))
    write_run_file(out / "run.yaml", settings)
    print(make_table(results) + (make_table(results, "groups") if "groups" in results else ""))
    for row in results["config"]["dlm_accel"]["generation"]:
        print(
            f"{row['settings']['strategy']}, gen_length {row['settings']['gen_length']}: {row['answers']} answers "
            f"({row['reused']} from an earlier run), NFE {row['nfe_mean']:.1f}, {row['tokens_per_forward']:.2f} tokens a "
            f"forward, {row['empty_answers']} empty"
        )
    print(f"wrote results.json{' and samples' if samples else ''} to {out}")


def log(results: dict[str, Any], settings: dict[str, Any], where: WandbSettings, mode: str) -> None:
    """Logs lm-eval's figures and what the decodes cost to W&B."""
    plain = json.loads(json.dumps(settings, default=str))
    run = evaluation_run(where, plain, settings["out"], mode)
    for task, figures in results["results"].items():
        run.summary.update(
            {f"{task}/{name}": value for name, value in figures.items() if isinstance(value, int | float)}
        )
    for row in results["config"]["dlm_accel"]["generation"]:
        cost = {name: value for name, value in row.items() if isinstance(value, int | float)}
        run.summary.update({f"cost/gen_length {row['settings']['gen_length']}/{name}": cost[name] for name in cost})
    run.finish()


def lm_eval_command(args: list[str]) -> None:
    """Runs lm-eval's own command line, with our model known to it.

    Args:
        args: lm-eval's words.
    """
    check_installed()
    from lm_eval.__main__ import cli_evaluate

    import eval.lm.model  # noqa: F401 - registers the model

    sys.argv = ["lm-eval", *args]
    try:
        cli_evaluate()
    except InputError:
        raise
    except Exception as error:
        if not raised_by(error, "lm_eval"):
            raise
        raise InputError(
            "arguments", " ".join(str(error).split()), "arguments that `lm-eval run --help` tells of"
        ) from error
    finally:
        processes.leave()


if __name__ == "__main__":
    if sys.argv[1:2] == ["lm-eval"]:
        entry(lambda: lm_eval_command(sys.argv[2:]))
    else:
        command(main)
