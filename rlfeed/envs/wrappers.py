"""Wrappers by name: Gymnasium's own, those of files and modules, and Atari as in the published protocols."""

import ast
import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import gymnasium
from gymnasium import wrappers as gymnasium_wrappers
from gymnasium.wrappers import AtariPreprocessing

from rlfeed.envs.importing import import_module, load_file, own_traceback
from rlfeed.envs.source import Wrapper
from rlfeed.errors import ConfigError, EnvMakeError, EnvNotFoundError, RlfeedError, suggest

_FORM = re.compile(r"(?:(?P<place>[^:=]+\.py|[\w.]+):)?(?P<name>[A-Za-z_]\w*)(?::(?P<kwargs>\s*\w+\s*=.*))?", re.DOTALL)
_KNOWN = ("atari", *(name for name in gymnasium_wrappers.__all__ if name != "vector"))
_WORDS = {"true": True, "false": False, "null": None, "none": None}
_FORGETFUL = {"NormalizeObservation": "observation", "NormalizeReward": "reward"}
_EXAMPLE = "TimeLimit:max_episode_steps=500"

Protocol = Literal["machado", "dqn"]
_PROTOCOLS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "machado": {"repeat_action_probability": 0.25, "full_action_space": True, "noop_max": 0},
        "dqn": {"repeat_action_probability": 0.0, "full_action_space": False, "noop_max": 30},
    }
)


@dataclasses.dataclass(frozen=True)
class NamedWrapper:
    """Say how to wrap an environment; calling it does. It is found again by its name in every process.

    Args:
        place: ``path/to/file.py`` or ``package.module``; empty for Gymnasium's wrappers and `atari`.
        name: The class or function.
        kwargs: Its arguments beside the environment.
    """

    place: str
    name: str
    kwargs: Mapping[str, Any]

    @classmethod
    def parse(cls, text: str) -> "NamedWrapper":
        """Read a wrapper as it is typed, and check its name and arguments.

        Args:
            text: ``NAME`` or ``NAME:key=value,key=value``. The name is one of ``gymnasium.wrappers``, ``atari``,
                ``package.module:Name``, or ``path/to/file.py:Name``. Values are Python literals; words are text.

        Returns:
            The wrapper.

        Raises:
            ConfigError: If it is written otherwise, or does not take these arguments.
            EnvNotFoundError: If there is none of that name; the nearest are suggested.
        """
        form = _FORM.fullmatch(text.strip())
        if form is None or form["place"] in _KNOWN:  # such as TimeLimit:5
            raise ConfigError(
                f"wrapper {text!r}: cannot be read; expected NAME, package.module:NAME or path/to/file.py:NAME, then "
                f"arguments such as {_EXAMPLE}. Write it like that."
            )
        wrapper = cls(form["place"] or "", form["name"], _arguments(text, form["kwargs"] or ""))
        wrapper._check()
        return wrapper

    def __call__(self, env: gymnasium.Env) -> gymnasium.Env:
        """Wrap an environment.

        Args:
            env: The environment.

        Returns:
            The environment in the wrapper.

        Raises:
            EnvMakeError: If the wrapper raised.
        """
        wrap = self._find()
        try:
            return wrap(env, **self.kwargs)
        except RlfeedError:
            raise
        except Exception as error:
            raise EnvMakeError(
                f"wrapper {self.name!r}: raised {type(error).__name__}: {error}; expected it to wrap {env}. Mend its "
                f"arguments {dict(self.kwargs)}; this is its own traceback:\n{own_traceback(error)}"
            ) from error

    def _find(self) -> Callable[..., gymnasium.Env]:
        if (self.place, self.name) == ("", "atari"):
            return atari
        if self.place:
            module = load_file(self.place) if self.place.endswith(".py") else import_module(self.place)
            known = [name for name, value in vars(module).items() if callable(value) and name[0] != "_"]
            problem = f"{self.place}: has no {self.name!r}; expected a wrapper of that name."
        else:
            module, known = gymnasium_wrappers, _KNOWN
            problem = f"wrapper {self.name!r}: is not there; expected one of {', '.join(sorted(known))}."
        if self.name not in known:
            raise EnvNotFoundError(f"{problem}{suggest(self.name, known)}")
        try:
            return getattr(module, self.name)
        except (ImportError, gymnasium.error.Error) as error:  # Gymnasium imports some of its own when they are named
            raise EnvMakeError(
                f"wrapper {self.name!r}: needs a package that is not installed: {error}. Install it, then try again."
            ) from error

    def _check(self) -> None:
        found = self._find()
        if not self.place and self.name in _FORGETFUL:
            raise ConfigError(
                f"wrapper {self.name!r}: keeps its statistics to itself, so that no checkpoint and no evaluation would "
                f"have them; expected NormalizedEnvs. On a command line: --env.normalize-{_FORGETFUL[self.name]}."
            )
        _, *parameters = inspect.signature(found).parameters.values()
        if any(p.kind is p.VAR_KEYWORD for p in parameters):
            return
        known = [p.name for p in parameters]
        unknown = [key for key in self.kwargs if key not in known]
        missing = [p.name for p in parameters if p.default is p.empty and p.name not in self.kwargs]
        if unknown or missing:
            wrong = f"has no parameter {', '.join(map(repr, unknown))}" if unknown else f"needs {', '.join(missing)}"
            hints = "".join(suggest(key, known) for key in unknown)
            raise ConfigError(
                f"wrapper {self.name!r}: {wrong}; expected arguments of {known or 'none'}, written as in "
                f"{_EXAMPLE}.{hints}"
            )


def as_wrapper(wrapper: str | Wrapper) -> Wrapper:
    """Take a wrapper by name or as it is.

    Args:
        wrapper: What `NamedWrapper.parse` reads, or a function from environment to environment.

    Returns:
        The function.

    Raises:
        ConfigError: If it is neither, or cannot be read.
        EnvNotFoundError: If there is none of that name.
    """
    if isinstance(wrapper, str):
        return NamedWrapper.parse(wrapper)
    if not callable(wrapper):
        raise ConfigError(f"wrappers: has {wrapper!r}; expected names, or functions from environment to environment.")
    return wrapper


def absolute_wrapper(text: str) -> str:
    """Name a wrapper's file from anywhere: a run may be resumed from another directory.

    Args:
        text: As `NamedWrapper.parse` reads it.

    Returns:
        The same, with the path of its file made absolute where there is one.
    """
    form = _FORM.fullmatch(text.strip())
    if form is None or not (form["place"] or "").endswith(".py"):
        return text
    return f"{Path(form['place']).expanduser().resolve()}{text.strip()[form.end('place') :]}"


def atari(
    env: gymnasium.Env,
    *,
    protocol: Protocol = "machado",
    frame_skip: int = 4,
    screen_size: int = 84,
    terminal_on_life_loss: bool = False,
) -> gymnasium.Env:
    """Make an Atari game of ale-py the environment that papers report on; stacking frames is `StackFrames`' part.

    The game is made anew, since ale-py's own frame skip would add to this one: every step takes ``frame_skip`` frames,
    each repeats the action before with the protocol's probability, and shows the greater of the last two, gray.

    Args:
        env: A game such as ``ALE/Pong-v5``, in no other wrapper.
        protocol: ``"machado"``: sticky actions with probability 0.25, all 18 actions. ``"dqn"``: no sticky actions, the
            game's minimal actions, episodes begin with up to 30 steps without action.
        frame_skip: Frames per step.
        screen_size: Height and width of the picture, in pixels.
        terminal_on_life_loss: Whether losing a life terminates; neither protocol recommends it.

    Returns:
        The environment: uint8 ``[screen_size, screen_size]``.

    Raises:
        ConfigError: If this is no such game, or there is no such protocol.

    Source: Machado et al. 2018 (Revisiting the Arcade Learning Environment), Mnih et al. 2015 (Human-level control).
    """
    if protocol not in _PROTOCOLS:
        names = tuple(_PROTOCOLS)
        raise ConfigError(f"atari: protocol is {protocol!r}; expected one of {names}.{suggest(str(protocol), names)}")
    spec = env.spec
    if spec is None or "AtariEnv" not in str(spec.entry_point) or spec.additional_wrappers:
        raise ConfigError(
            f"atari: got {env}; expected a game of ale-py in no other wrapper, such as ale_py:ALE/Pong-v5. Name this "
            "wrapper first."
        )
    settings = dict(_PROTOCOLS[protocol])
    noop_max = settings.pop("noop_max")
    env.close()
    spec = dataclasses.replace(spec, order_enforce=False, kwargs={**spec.kwargs, **settings, "frameskip": 1})
    return AtariPreprocessing(
        gymnasium.make(spec, disable_env_checker=True),
        noop_max=noop_max,
        frame_skip=frame_skip,
        screen_size=screen_size,
        terminal_on_life_loss=terminal_on_life_loss,
    )


def _arguments(text: str, kwargs: str) -> dict[str, Any]:
    problem = ConfigError(
        f"wrapper {text!r}: its arguments cannot be read; expected key=value,key=value, the values Python literals or "
        f"words, as in {_EXAMPLE}. Quote other text: path='/a/b'."
    )
    try:
        call = ast.parse(f"f({kwargs})", mode="eval").body
    except SyntaxError:
        raise problem from None
    if not isinstance(call, ast.Call) or call.args or any(keyword.arg is None for keyword in call.keywords):
        raise problem
    try:
        return {str(keyword.arg): _literal(keyword.value) for keyword in call.keywords}
    except (ValueError, TypeError, SyntaxError):
        raise problem from None


def _literal(node: ast.expr) -> Any:
    if isinstance(node, ast.Name):
        return _WORDS.get(node.id, node.id)
    return ast.literal_eval(node)
