"""What every command does with words, YAML files and errors: one line for each mistake, an exit status, each key once.

Nothing is imported that a decode does without, but for the parser and YAML in :func:`refuse_repeated_keys`.
"""

import os
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from decoding.heap import keep_freed_memory
from models.errors import InputError, did_you_mean

# How jsonargparse words what it does not know, misses, or cannot read.
_KEY = re.compile(r'^Parser key "([^"]+)": ?')
_INSIDE = re.compile(r"Problem with given class_path '([^']+)': (?:Parser key \"([^\"]+)\": ?)?")
_UNKNOWN = re.compile(
    r"Unrecognized arguments: (?:--)?([^\s=]+)|does not accept (?:option|nested key) '([^']+)'|Option '([^']+)' is not accepted"
)
_NOTHING = re.compile(r"(?:Option|Key) [\"']([^\"']+)[\"'] is required .*$")
_VERB = re.compile(r'expected "(\w+)" to be one of \{(.+)\}, but it was not provided\.?$')
_CHOICE = re.compile(r"argument (\S+): invalid choice: (.*?) \(choose from (.*)\)$")
_LINKED = re.compile(r"argument (\S+) --> (\S+): (?:.* is not callable|invalid .*)$")
_GROUP = re.compile(r"Not a valid subclass of \w+\. Got value: (.*?) Subclass types expect one of: .*$")
_FILE = re.compile(r"(File does not exist|Path is not a file|Path is not readable|File is not readable): ('.*')$")
_NO_CONFIG = re.compile(r"Unexpected config: ?(.*)$")
_YAML = re.compile(r"(?:Problems parsing config|config): (.*)$")
_LITERAL = re.compile(r"typing\.Literal\[([^\]]+)\]")
_TYPE = re.compile(r"Expected a (?:<class ')?(.+?)(?:'>)?\. Got value: ?(.*)$")
_NAMES = re.compile(r"found (\S+); accepted: ([^;]+)$")
# And how it hands on what pydantic says, and what each part of a union says.
_PYDANTIC = re.compile(
    r"1 validation error for (?:.*?(?:Input should be |Value error, )|\S+ )(.+?) \[type=.*?\]"
    r"(?: For further information visit https://\S+?)?(?=\.? Got value| Given value| - |$)"
)
_UNION = re.compile(
    r"Does not validate against any of the Union subtypes Subtypes: .*? Errors: - (.*) Given value type: .*? Given value: (.*)$"
)
_INNER = re.compile(r"(?:Problem with given class_path|Not a valid subclass) .*$")
# A setting of a group that may be null.
_NESTED = re.compile(r"(\S+): found NestedArg\(key='([^']+)', val='?(.*?)'?\); accepted: .*Parser key \"\2\": (.*)$")
_SETTINGS = "a mapping with at least one setting"


def one_line(message: str, settings: Iterable[str]) -> str:
    """A message of jsonargparse as ours are: the setting, what was found, what would be accepted.

    Args:
        message: What it says, on however many lines.
        settings: Names of the command's settings, for one that is unknown.
    """
    message = _KEY.sub(r"\1: ", " ".join(message.split()))
    if (union := _UNION.search(message)) and (inner := _INNER.search(union[1])):  # what the group or its entry says
        message = message[: union.start()] + inner[0]
    if inside := _INSIDE.search(message):  # an entry of a list, or a group
        settings = _settings_of(inside[1]) or settings
        field = message[: inside.start()].removesuffix(": ")
        rest = message[inside.end() :]
        if name := _UNKNOWN.search(rest):
            message = f"{field}.{name[3]}: found an unknown setting; accepted: {', '.join(settings)}"
        else:
            message = f"{field}.{inside[2]}: {rest}" if inside[2] else f"{field}.{rest}"
    message = _NOTHING.sub(r"\1: found nothing; accepted: a value", message)
    message = _LITERAL.sub(lambda found: found[1].replace("'", "").replace(", ", " | "), message)
    message = _PYDANTIC.sub(r"Expected a \1", message)
    message = re.sub(r"- Expected a path but \S+ either not accessible or invalid (?=- )", "", message)
    if " Given value" not in message:  # an entry of a list, and not one of several types
        message = re.sub(r"Expected a dot import path string: (.+)$", rf"found \1; accepted: {_SETTINGS}", message)
    message = re.sub(r"Expected a dot import path string: \S+", f"Expected a {_SETTINGS}", message)
    message = _GROUP.sub(rf"found \1; accepted: {_SETTINGS}", message)
    message = _VERB.sub(lambda part: f"{part[1]}: found nothing; accepted: {part[2].replace(',', ' | ')}", message)
    message = _LINKED.sub(r"\2: found a value of its own; accepted: none: it is \1", message)
    message = _CHOICE.sub(lambda part: f"{part[1]}: found {part[2]}; accepted: {part[3].replace(', ', ' | ')}", message)
    message = _FILE.sub(lambda part: f"found {part[2]} ({part[1].lower()}); accepted: a YAML file", message)
    message = _NO_CONFIG.sub(lambda part: f"config: found {part[1] or 'nothing'}; accepted: YAML, a mapping", message)
    if (bad := _YAML.match(message)) and "; accepted: " not in message:
        message = f"config: found {bad[1]}; accepted: YAML"
    if union := _UNION.search(message):
        parts = [_TYPE.sub(r"\1", f"{part}. Got value: ") for part in union[1].split(" - ")]
        message = f"{message[: union.start()]}found {union[2]}; accepted: {' | '.join(dict.fromkeys(parts))}"
    message = _TYPE.sub(lambda part: f"found {part[2] or repr('')}; accepted: {part[1]}", message)
    message = _NESTED.sub(r"\1.\2: found \3; accepted: \4", message.replace("NoneType", "null"))
    if names := _NAMES.search(message):
        message += did_you_mean(names[1], names[2].split(" | "))
    if unknown := _UNKNOWN.search(message):
        message += f"; accepted: {_accepted(next(filter(None, unknown.groups())), list(settings))}"
    return message


def _settings_of(path: str) -> list[str]:
    """Names of a dataclass's fields, by the path that the parser prints; none where it is no such thing."""
    module, _, name = path.rpartition(".")
    kind = getattr(sys.modules.get(module), name, None)
    return [field.name for field in fields(kind)] if is_dataclass(kind) else []


def _accepted(unknown: str, settings: list[str]) -> str:
    """The settings most like ``unknown``, or all at the top level if none is."""
    return ", ".join(get_close_matches(unknown, settings, n=3) or [name for name in settings if "." not in name])


def entry(main: Callable[[], object]) -> None:
    """Runs a command; bad input ends it with one line on stderr and status 2, Ctrl-C with one line and status 130.

    A disk that is full, or a file that the system does not let it read or write, ends it with one line and status 74.

    Args:
        main: The command. A ``KeyboardInterrupt`` with a message replaces the line printed on Ctrl-C.

    Raises:
        SystemExit: The command failed; any other exception is a bug and keeps its traceback.
    """
    keep_freed_memory()
    if isinstance(sys.stdout, TextIOWrapper):  # a terminal or file of another encoding lacks ×, say
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
    except InputError as error:
        sys.stderr.write(f"{Path(sys.argv[0]).name}: {error}\n")
        raise SystemExit(2) from None
    except OSError as error:
        if error.errno is None:  # raised by a library, not by the system
            raise
        where = "" if error.filename is None else f"{error.filename}: "
        sys.stderr.write(f"{Path(sys.argv[0]).name}: {where}{error.strerror}\n")
        raise SystemExit(os.EX_IOERR) from None
    except KeyboardInterrupt as stop:
        sys.stderr.write(f"\n{stop or 'interrupted'}\n")
        raise SystemExit(130) from None


class ReadsConfigs:
    """For a parser of jsonargparse's: a config file that is not text is bad input, by name."""

    def parse_path(self, cfg_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Reads a config file.

        Raises:
            InputError: It is not UTF-8.
        """
        parser: Any = super()
        try:
            return parser.parse_path(cfg_path, *args, **kwargs)
        except UnicodeDecodeError as error:
            raise InputError(str(cfg_path), error, "YAML in UTF-8") from None


def refuse_repeated_keys() -> None:
    """From now on a key that is there twice is an error of jsonargparse's: the last would win and say nothing.

    Both libraries are imported here, since a decode does without them.
    """
    import yaml
    from jsonargparse import get_loader, set_loader

    usual = get_loader("yaml")
    if getattr(usual, "refuses", False):
        return

    def load(text: str) -> Any:
        waiting = [yaml.compose(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))]
        while waiting:
            node = waiting.pop()
            if isinstance(node, yaml.SequenceNode):
                waiting += node.value
            elif isinstance(node, yaml.MappingNode):
                keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
                for key in keys:
                    if keys.count(key) > 1:
                        problem = f"found {key!r} twice; accepted: each key once"
                        raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
                waiting += [value for _, value in node.value]
        return usual(text)

    load.refuses = True  # pyright: ignore[reportFunctionMemberAccess]
    set_loader("yaml", load, exceptions=(yaml.YAMLError,))
