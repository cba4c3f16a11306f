"""What the scripts share: typed flags, one way to report an error, and finding a run again."""

import ast
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(CHECKOUT))  # agents/ lives in the checkout, not in site-packages
sys.path.append(str(Path.cwd()))  # package.module:ClassName may lie where the script was called

from agents import PRESETS  # noqa: E402
from agents.config import BlockTrainConfig, ReplayTrainConfig, TrainConfig, from_dict  # noqa: E402
from rlfeed.envs.importing import import_module, load_file  # noqa: E402
from rlfeed.errors import ConfigError, RlfeedError, RunDirectoryError, suggest  # noqa: E402
from rlfeed.train.evaluate import Evaluation  # noqa: E402
from rlfeed.train.run import CONFIG, read_config  # noqa: E402

DEFAULT_PRESET = "dqn"
KWARGS_FLAG = "--env.kwargs"
WRAPPERS_FLAG = "--env.wrappers"
REGISTRY = ConstructorRegistry()


def parse(kind: Any, args: Sequence[str], *, prog: str, description: str, **default: Any) -> Any:
    """Read flags into a dataclass; exits where they are wrong or ask for help.

    Args:
        kind: The dataclass.
        args: The command line without the script's name.
        default: Its defaults, shown in the help.
        prog: What the help calls the script.
        description: What the help says first.
        **default: ``default=`` an instance of ``kind`` whose values are the flags' defaults.

    Returns:
        An instance of ``kind``.
    """
    with REGISTRY:
        joined = join_env_wrappers(join_env_kwargs(args))
        return tyro.cli(kind, args=joined, prog=prog, description=description, **default)


def guarded(run: Callable[[list[str]], int], argv: Sequence[str] | None) -> int:
    """Run a script and turn what went wrong into one message and an exit code; a bug of ours keeps its traceback.

    Args:
        run: Given the command line without the script's name, returns the exit code.
        argv: That command line; None for the process's own.

    Returns:
        0, 1 for a failure, 2 for input that cannot be used, or what the script exits with.
    """
    try:
        return run(list(sys.argv[1:] if argv is None else argv))
    except RlfeedError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    except SystemExit as request:
        if isinstance(request.code, str):
            print(request.code, file=sys.stderr)
            return 1
        return request.code or 0
    except KeyboardInterrupt:  # before the run began: there is nothing to save
        return 130


def split_preset(args: Sequence[str]) -> tuple[str | None, list[str]]:
    """Take the preset off a command line.

    Args:
        args: The command line: a preset first, or flags only.

    Returns:
        The preset, None where there is none, and the flags. One of the user's own, ``path/to/file.py:function`` or
        ``package.module:function``, comes with the file's absolute path.

    Raises:
        ConfigError: If there is no such preset.
    """
    if not args or args[0].startswith("-"):
        return None, list(args)
    name, rest = args[0], list(args[1:])
    if name in PRESETS:
        return name, rest
    if ":" in name:
        return absolute_file(name), rest
    raise ConfigError(
        f"preset: is {name!r}; expected one of {', '.join(PRESETS)}, or one of your own as path/to/file.py:function, "
        f"then flags.{suggest(name, PRESETS)}"
    )


def preset_of(name: str) -> TrainConfig:
    """Give the settings of a preset.

    Args:
        name: As `split_preset` gave it.

    Returns:
        Its defaults.

    Raises:
        ConfigError: If a preset of the user's own is none.
    """
    if name in PRESETS:
        return PRESETS[name]()
    place, _, attribute = name.rpartition(":")
    module = load_file(place) if place.endswith(".py") else import_module(place)
    function = getattr(module, attribute, None)
    if not callable(function):
        found = [n for n, value in vars(module).items() if callable(value)]
        raise ConfigError(f"preset: {place} has no function {attribute!r}; expected one.{suggest(attribute, found)}")
    settings = function()
    if not isinstance(settings, ReplayTrainConfig | BlockTrainConfig):
        raise ConfigError(
            f"preset: {name} gave a {type(settings).__name__}; expected a ReplayTrainConfig or a BlockTrainConfig of "
            "agents.config. Return one."
        )
    return settings


def absolute_file(name: str) -> str:
    """Name what is in a file from anywhere: a run may be resumed from another directory.

    Args:
        name: ``path/to/file.py:Name``, or anything else.

    Returns:
        The same, its path absolute where there is one.
    """
    file, colon, rest = name.partition(".py")
    return f"{Path(file + colon).resolve()}{rest}" if colon else name


def join_env_kwargs(args: Sequence[str]) -> list[str]:
    """Gather every ``--env.kwargs.NAME VALUE`` into one ``--env.kwargs JSON``, which is a flag like the others.

    Args:
        args: The command line.

    Returns:
        The command line with at most one such flag, at the end.

    Raises:
        ConfigError: If a name is no identifier or has no value.
    """
    rest: list[str] = []
    kwargs: dict[str, Any] = {}
    pending = iter(args)
    for arg in pending:
        if not arg.startswith(f"{KWARGS_FLAG}."):
            rest.append(arg)
            continue
        flag, equals, text = arg.partition("=")
        name = flag.removeprefix(f"{KWARGS_FLAG}.")
        if not name.isidentifier():
            raise ConfigError(
                f"{flag}: {name!r} is no name of an argument; expected {KWARGS_FLAG}.NAME VALUE. "
                f"Give a nested value as JSON: {KWARGS_FLAG}.NAME '{{\"size\": 5}}'."
            )
        value = text if equals else next(pending, None)
        if value is None or (not equals and value.startswith("--")):
            raise ConfigError(f"{flag}: has no value; expected {KWARGS_FLAG}.{name} VALUE.")
        kwargs[name] = literal(value)
    return [*rest, KWARGS_FLAG, json.dumps(kwargs)] if kwargs else rest


def join_env_wrappers(args: Sequence[str]) -> list[str]:
    """Gather every ``--env.wrappers NAME`` into one flag, in the order in which they were given.

    Args:
        args: The command line.

    Returns:
        The command line with at most one such flag, at the end.

    Raises:
        ConfigError: If it has no value.
    """
    rest: list[str] = []
    wrappers: list[str] = []
    pending = list(args)
    while pending:
        flag, equals, text = pending.pop(0).partition("=")
        if flag != WRAPPERS_FLAG:
            rest.append(flag + equals + text)
            continue
        given = [text] if equals else []
        while not equals and pending and not pending[0].startswith("--"):
            given.append(pending.pop(0))
        if not given:
            raise ConfigError(f"{flag}: has no value; expected {WRAPPERS_FLAG} NAME, such as TimeAwareObservation.")
        wrappers += given
    return [*rest, WRAPPERS_FLAG, *wrappers] if wrappers else rest


def literal(text: str) -> Any:
    """Read a value as JSON or a Python literal if it is one, else as the text itself.

    Args:
        text: What was typed: ``5``, ``0.1``, ``true``, ``None``, ``[1, 2]``, ``"5"``, ``north``.

    Returns:
        A number, bool, None, list, dict or string: what JSON can hold.
    """
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        return json.loads(json.dumps(ast.literal_eval(text), allow_nan=False))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def find_run(path: str) -> Path:
    """Find the run directory that a path belongs to.

    Args:
        path: The run directory, or anything inside it.

    Returns:
        The run directory.

    Raises:
        RunDirectoryError: If there is none around the path.
    """
    start = Path(path).resolve()
    for directory in (start, *start.parents):
        if start.exists() and (directory / CONFIG).is_file() and "preset" in read_config(directory):
            return directory
    problem = "holds no run and lies in none" if start.exists() else "is not there"
    raise RunDirectoryError(f"run directory {path}: {problem}; expected one that scripts/train.py made.")


def load_config(run: Path) -> tuple[str, TrainConfig]:
    """Read what a run was made of.

    Args:
        run: The run directory.

    Returns:
        The preset's name and the resolved settings.

    Raises:
        ConfigError: If they are of a preset or have settings that this version does not know.
    """
    saved = read_config(run)
    preset, _ = split_preset([saved["preset"]])
    return str(preset), from_dict(preset_of(str(preset)), saved["config"], where=f"{run / CONFIG}: config")


def summary(result: Evaluation) -> str:
    """Say in one line what an evaluation found.

    Args:
        result: The evaluation.

    Returns:
        ``evaluation: mean 500.0 std 0.0 episodes 20``; small returns are given with more digits.
    """
    digits = 1 if abs(result.mean) >= 10 else 4
    return f"evaluation: mean {result.mean:.{digits}f} std {result.std:.{digits}f} episodes {len(result.returns)}"


@REGISTRY.primitive_rule
def _whole_number(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[int] | None:
    """Accept ``1e5`` and ``100_000`` for integers."""
    if info.type is not int:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT",
        instance_from_str=lambda args: whole_number(args[0]),
        is_instance=lambda value: isinstance(value, int) and not isinstance(value, bool),
        str_from_instance=lambda value: [str(value)],
    )


def whole_number(text: str) -> int:
    """Read an integer as people write them.

    Args:
        text: ``100000``, ``100_000`` or ``1e5``.

    Returns:
        The integer, exact at any size.

    Raises:
        ValueError: If it is no integer.
    """
    try:
        return int(text)
    except ValueError:
        pass
    try:
        value = float(text)
    except ValueError:
        value = 0.5
    if not value.is_integer():
        raise ValueError(f"is {text!r}; expected a whole number, such as 100000, 100_000 or 1e5")
    return int(value)


@REGISTRY.primitive_rule
def _mapping(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[dict[str, Any]] | None:
    if info.type != dict[str, Any]:
        return None

    def read(args: list[str]) -> dict[str, Any]:
        value = literal(args[0])
        if not isinstance(value, dict):
            raise ValueError(f"is {args[0]!r}; expected a JSON object, such as '{{\"size\": 5}}'")
        return value

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="JSON",
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [json.dumps(value)],
    )
