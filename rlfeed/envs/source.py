"""Find what makes an environment: by Gymnasium id, by file, by module, or a class or function itself.

An `EnvSource` is what travels to worker processes, where the module or file is imported again.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import gymnasium
from gymnasium.envs.registration import EnvSpec, load_env_creator
from gymnasium.vector.utils import CloudpickleWrapper

from rlfeed.envs.importing import import_module, load_file, loaded_files, own_traceback
from rlfeed.envs.packages import how_to_get
from rlfeed.errors import ConfigError, EnvMakeError, EnvNotFoundError, RlfeedError, suggest

Wrapper = Callable[[gymnasium.Env], gymnasium.Env]
GYMNASIUM_KWARGS = ("max_episode_steps", "render_mode")  # gymnasium.make takes these for every environment


@dataclass(frozen=True)
class EnvSource:
    """Say how to make one environment; calling it does.

    Args:
        target: A Gymnasium id, ``path/to/file.py:ClassName``, ``path/to/file.py``, ``package.module:ClassName``,
            ``package.module:Env-v0``, an environment class, or a function that returns an environment.
        kwargs: Arguments of the constructor.
        wrappers: Applied in order.
    """

    target: str | Callable[..., gymnasium.Env]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    wrappers: tuple[Wrapper, ...] = ()

    def __post_init__(self) -> None:
        # Environments may change the folder they run in, and the next one is made there.
        file, ending, rest = self.target.rpartition(".py") if isinstance(self.target, str) else ("", "", "")
        path = Path(file + ending).expanduser()
        if ending and rest[:1] in ("", ":") and path.is_file():
            object.__setattr__(self, "target", f"{path.absolute()}{rest}")

    @property
    def name(self) -> str:
        """Name the environment, for errors and directories.

        Returns:
            Such as ``CartPole-v1`` or ``MyEnv``.
        """
        if not isinstance(self.target, str):
            return getattr(self.target, "__name__", type(self.target).__name__)
        tail = self.target.rpartition(":")[2]
        return Path(tail).stem if tail.endswith(".py") else tail

    def __call__(self) -> gymnasium.Env:
        """Make the environment.

        Returns:
            The environment in its wrappers.

        Raises:
            EnvNotFoundError: If the id, file, module or class is not there.
            ConfigError: If it is no `gymnasium.Env`, or does not take the arguments.
            EnvMakeError: If the constructor or a wrapper raised; its traceback is in the message.
        """
        return self.checked(self.make())

    def checked(self, env: Any) -> gymnasium.Env:
        """Check that what was made is an environment.

        Args:
            env: What was made.

        Returns:
            The same.

        Raises:
            ConfigError: If it is no `gymnasium.Env`.
        """
        if not isinstance(env, gymnasium.Env):
            raise ConfigError(_no_env(self.name, type(env)))
        return env

    def make(self) -> Any:
        """Make what the target makes, whatever that is. See `EnvSource.__call__`."""
        maker = self.find()
        self._check_kwargs(maker)
        try:
            env = self._build(maker)
            for wrapper in self.wrappers:
                env = wrapper(env)
        except RlfeedError:  # a wrapper of ours has said it already
            raise
        except gymnasium.error.DependencyNotInstalled as error:
            raise EnvMakeError(
                f"{self.name}: needs a package that is not installed: {error}. Install it, then try again."
            ) from error
        except Exception as error:
            raise EnvMakeError(
                f"{self.name}: its constructor raised {type(error).__name__}; expected an environment. "
                f"Mend the constructor or its arguments {dict(self.kwargs)}; this is its own traceback:\n"
                f"{own_traceback(error)}"
            ) from error
        return env

    def find(self) -> Any:
        """Find what makes the environment, without making it.

        Returns:
            A Gymnasium spec, a class, or a function.

        Raises:
            EnvNotFoundError: If the id, file, module or class is not there.
            EnvMakeError: If importing it raised.
            ConfigError: If it makes no `gymnasium.Env`.
        """
        target = self.target
        if callable(target):
            if isinstance(target, type) and not issubclass(target, gymnasium.Env):
                raise ConfigError(_no_env(target.__name__, target))
            return target
        if isinstance(target, gymnasium.Env):
            raise ConfigError(
                f"make_envs: got the environment {target}; expected an id, a class or a function that makes one. "
                "Pass its class, or give the environment itself to Rollout."
            )
        if not isinstance(target, str) or not target:
            raise ConfigError(
                f"make_envs: the environment is {target!r}; expected a Gymnasium id, path/to/file.py:ClassName, "
                "package.module:ClassName, a class or a function."
            )
        place, colon, attribute = target.rpartition(":")  # the last one: C:/x/y.py:MyEnv has two
        if target.endswith(".py"):
            place, attribute = target, ""
        elif not colon:
            return _registered(target)
        module = load_file(place) if place.endswith(".py") else import_module(place)
        if attribute in gymnasium.registry:
            return gymnasium.registry[attribute]
        return _from_module(module, place, attribute)

    def _build(self, maker: Any) -> gymnasium.Env:
        if not isinstance(maker, EnvSpec):
            return maker(**self.kwargs)
        # Gymnasium's checkers cost half of a CartPole step and only warn; what comes out is checked by rlfeed itself.
        return gymnasium.make(dataclasses.replace(maker, order_enforce=False), disable_env_checker=True, **self.kwargs)

    def _check_kwargs(self, maker: Any) -> None:
        function, extra = maker, ()
        if isinstance(maker, EnvSpec):
            entry = maker.entry_point
            try:
                function = load_env_creator(entry) if isinstance(entry, str) else entry
            except (ImportError, gymnasium.error.Error):
                return  # gymnasium.make raises the same, with its hint what to install
            extra = (*GYMNASIUM_KWARGS, *maker.kwargs)
        try:
            parameters = list(inspect.signature(function).parameters.values())  # pyright: ignore[reportArgumentType]
        except (TypeError, ValueError):  # a constructor written in C says nothing; it will speak for itself
            return
        if any(p.kind is p.VAR_KEYWORD for p in parameters):
            return
        named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        known = list(dict.fromkeys((*named, *extra)))
        unknown = [key for key in self.kwargs if key not in known]
        if unknown:
            hints = "".join(suggest(key, known) for key in unknown)
            raise ConfigError(
                f"{self.name}: its constructor has no parameter {', '.join(map(repr, unknown))}; "
                f"expected some of {known}.{hints}"
            )
        for parameter in parameters:
            self._check_type(parameter)

    def _check_type(self, parameter: inspect.Parameter) -> None:
        """Tell text from numbers, which a command line confuses, where the parameter says which of the two it is."""
        wanted, value = parameter.annotation, self.kwargs.get(parameter.name)
        wanted = getattr(wanted, "__name__", wanted)  # a name where annotations are postponed
        number = isinstance(value, bool | int | float)
        if (wanted == "str" and number) or (wanted in ("int", "float", "bool") and isinstance(value, str)):
            raise ConfigError(
                f"{self.name}: {parameter.name} is {value!r}, {'a number' if number else 'text'}; expected "
                f"{wanted}. Give one; on a command line '\"5\"' is text and 5 a number."
            )

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker that is started afresh knows neither the files that were loaded here nor the ids that were
        # registered here; what is local, a lambda, or of the script that runs goes by value.
        packed = _by_value((self.target, self.kwargs, self.wrappers, self._registration()))
        try:
            packed.__getstate__()
        except Exception as error:
            raise ConfigError(
                f"{self.name}: {self._unsendable()} cannot be sent to a worker process ({type(error).__name__}: "
                f"{error}); expected what can be pickled. Pass what it can be made from there, such as a path, and "
                "make it in the constructor; or step the environments in this process, with mode='serial'."
            ) from error
        return _received, (_Loading(loaded_files()), packed)

    def _registration(self) -> EnvSpec | None:
        return gymnasium.registry.get(self.target) if isinstance(self.target, str) else None

    def _unsendable(self) -> str:
        parts = {f"kwargs[{key!r}]": value for key, value in self.kwargs.items()}
        parts |= {f"wrappers[{index}]": wrapper for index, wrapper in enumerate(self.wrappers)}
        if inspect.isfunction(self.target):
            seen = inspect.getclosurevars(self.target)
            used = {**seen.globals, **seen.nonlocals}
            parts |= {f"in {self.name} the variable {name}": value for name, value in used.items()}
        for name, value in parts.items():
            try:
                _by_value(value).__getstate__()
            except Exception:
                return f"{name} = {value!r}"
        return repr(self.target)


@dataclass(frozen=True)
class _Loading:
    """Load files before what comes after them in a pickle is unpacked: classes of theirs are found by name then."""

    files: tuple[str, ...]

    def __reduce__(self) -> tuple[Any, ...]:
        return _load, self.files


def _load(*files: str) -> None:
    for file in files:
        load_file(file)


def _by_value(value: Any) -> Any:
    return CloudpickleWrapper(lambda: value)  # pyright: ignore[reportArgumentType] (made for functions; any will do)


def _received(_: None, packed: Any) -> EnvSource:
    target, kwargs, wrappers, registration = packed()
    if registration is not None:
        gymnasium.registry.setdefault(registration.id, registration)
    return EnvSource(target, kwargs, wrappers)


def _registered(env_id: str) -> EnvSpec:
    try:
        return gymnasium.spec(env_id)
    except gymnasium.error.Error as error:
        raise EnvNotFoundError(
            f"{env_id}: no environment of that id is registered; expected a Gymnasium id, path/to/file.py:ClassName "
            f"or package.module:ClassName.{how_to_get(env_id, error)}"
        ) from None


def _from_module(module: ModuleType, place: str, attribute: str) -> Any:
    classes = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, gymnasium.Env) and value.__module__ == module.__name__
    }
    if not attribute:
        if len(classes) != 1:
            found = f"the environments {sorted(classes)}" if classes else "no gymnasium.Env class"
            raise EnvNotFoundError(f"{place}: has {found}; expected one. Say which: {place}:ClassName.")
        return next(iter(classes.values()))
    if not hasattr(module, attribute):
        names = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        known = f" It has {sorted(classes)}." if classes else " It has no gymnasium.Env class."
        near = suggest(attribute, [*names, *gymnasium.registry]) or known
        raise EnvNotFoundError(f"{place}: has no {attribute!r}; expected a class or a registered id.{near}")
    found = getattr(module, attribute)
    if not callable(found) or (isinstance(found, type) and not issubclass(found, gymnasium.Env)):
        raise ConfigError(_no_env(f"{place}:{attribute}", found if isinstance(found, type) else type(found)))
    return found


def _no_env(name: str, found: type) -> str:
    if callable(getattr(found, "observation_space", None)):  # a function of the agent, as PettingZoo has it
        return (
            f"{name}: is a {found.__name__} of PettingZoo; expected a gymnasium.Env. Write make_envs('pettingzoo:...') "
            "with the module that makes it, or give ParallelEnvs([...]) to Rollout."
        )
    old = any(base.__module__.partition(".")[0] == "gym" for base in found.__mro__)
    bases = "the old gym.Env" if old else ", ".join(base.__name__ for base in found.__bases__)
    return (
        f"{name}: is a {found.__name__}, which derives from {bases}; expected a gymnasium.Env. "
        "Derive the class from gymnasium.Env, with reset(seed, options) and a step of five values."
    )
