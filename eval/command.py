"""What the commands of ``eval/`` and ``train/`` share: one-line errors, exit statuses, default config files, the W&B mode."""

import netrc
import os
import re
import sys
from argparse import Action
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace, UnionType
from typing import Annotated, Any, NoReturn, Union, get_args, get_origin
from urllib.parse import urlsplit

from jsonargparse import SUPPRESS, ArgumentParser, DefaultHelpFormatter, Namespace, auto_cli
from jsonargparse._typehints import type_to_str  # what the formatter itself uses

from decoding.command_line import ReadsConfigs, entry, one_line, refuse_repeated_keys
from models.errors import InputError

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
"""The YAML files, one folder for each command, wherever the command is started from."""


_WANDB_MODES = ("online", "offline", "disabled", "dryrun", "run", "shared")
"""Those of W&B itself."""


class _Help(DefaultHelpFormatter):
    """Help that says ``int`` where a declared type says how many as well."""

    def _get_type_str(self, action: Action) -> str | None:
        found = super()._get_type_str(action)
        hint = action.type or getattr(action, "_typehint", None)
        return type_to_str(_bare(hint)) if found is not None and "Annotated" in found else found


def _bare(hint: Any) -> Any:
    """A type without its annotations."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return parts[0]
    if origin in (Union, UnionType):
        return Union[tuple(_bare(part) for part in parts)]  # noqa: UP007 - made of what is found
    return list[_bare(parts[0])] if origin is list and parts else hint


class CommandParser(ReadsConfigs, ArgumentParser):
    """A parser whose errors are one line: the key, what was found, what would be accepted; exit status 2.

    Attributes:
        first: Settings that its help tells of before all others.
    """

    first: Sequence[str] = ()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", _Help)
        kwargs.setdefault("allow_abbrev", False)  # a shortened option would not be found again in the saved config
        refuse_repeated_keys()
        super().__init__(*args, **kwargs)

    def validate(self, cfg: Namespace, *args: Any, **kwargs: Any) -> None:
        super().validate(cfg, *args, **kwargs)
        for action in self._actions:  # jsonargparse takes null for any setting, whatever its type
            if action.default not in (None, SUPPRESS) and action.dest in cfg and cfg[action.dest] is None:
                self._check_value_key(action, None, action.dest, cfg)

    def format_help(self) -> str:
        if not self.first:
            return super().format_help()
        groups: Any = self._action_groups
        usual, before = list(groups), [list(group._group_actions) for group in groups]
        first: Any = [action for name in self.first for action in self._actions if action.dest == name]
        for group in usual:
            group._group_actions = [action for action in group._group_actions if action not in first]
        title = "what matters first (then everything there is)"
        groups.insert(0, SimpleNamespace(title=title, description=None, _group_actions=first))
        self.usage = "%(prog)s [--config FILE] [--SETTING VALUE ...]"
        try:
            return super().format_help()
        finally:
            groups[:] = usual
            for group, actions in zip(usual, before, strict=True):
                group._group_actions = actions

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:
            super().error(message, ex)
        parser: ArgumentParser = getattr(ex, "subcommand_parser", None) or self
        options = (option for action in parser._actions for option in action.option_strings)
        settings = [name[2:] for name in options if name.startswith("--") and not name.endswith(("help", "config"))]
        message = one_line(message, settings)
        prog = re.sub(r" \[options\]", "", parser.prog)
        sys.stderr.write(f"{prog}: {message} (see {prog} --help)\n")
        raise SystemExit(2)


def command(
    functions: Callable[..., object] | Mapping[str, Callable[..., object]],
    config: str | None = None,
    args: Sequence[str] | None = None,
) -> None:
    """Runs a typed function, or one of several by name, from the command line: its signature is the interface.

    Args:
        functions: The function, or verb to function.
        config: Default settings: ``configs/<config>.yaml``, for instance ``"eval/bench"``; need not exist.
        args: Words of the command line; ``None`` takes those the script was started with.

    Raises:
        SystemExit: See :func:`decoding.command_line.entry`.
    """
    components: Any = functions if callable(functions) else dict(functions)
    files = [] if config is None else [CONFIGS / f"{config}.yaml"]
    entry(
        lambda: auto_cli(
            components,
            args=None if args is None else list(args),
            as_positional=False,
            parser_class=CommandParser,
            default_config_files=files,
        )
    )


def raised_by(error: BaseException, package: str) -> bool:
    """Whether it was a package's own code that raised an error."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return frame is not None and str(frame.tb_frame.f_globals.get("__name__", "")).startswith(f"{package}.")


def wandb_mode() -> str:
    """``online``, ``offline`` or ``disabled``: what ``WANDB_MODE`` says, else offline unless there is a key.

    Asked before W&B starts, so that it never stops at a login prompt.

    Raises:
        InputError: Another mode, or ``WANDB_MODE=online`` without a key.
    """
    mode = os.environ.get("WANDB_MODE", "")  # W&B itself reads it as it is written
    if mode not in ("", *_WANDB_MODES):
        raise InputError("WANDB_MODE", mode, "online | offline | disabled")
    if mode in ("disabled", "offline", "dryrun"):
        return mode.replace("dryrun", "offline")
    if _has_wandb_key():
        return "online"
    if mode == "online":
        raise InputError("WANDB_MODE", "online, but no API key", "WANDB_API_KEY or a ~/.netrc entry; offline; disabled")
    return "offline"


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    file = os.environ.get("NETRC") or Path("~/.netrc").expanduser()
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    try:
        return netrc.netrc(file).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
