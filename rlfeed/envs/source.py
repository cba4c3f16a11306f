"""Find what makes an environment: by Gymnasium id, by file, by module, or a class or function itself.

An `EnvSource` is what travels to worker processes, where the module or file is imported again.
"""

import dataclasses
import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import gymnasium
from gymnasium.envs.registration import EnvSpec, load_env_creator

from rlfeed.errors import ConfigError, EnvMakeError, EnvNotFoundError, suggest

Wrapper = Callable[[gymnasium.Env], gymnasium.Env]
_OURS = (str(Path(__file__).parents[1]), str(Path(gymnasium.__file__).parent), "<frozen importlib")
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
        maker = self._find()
        self._check_kwargs(maker)
        try:
            env = self._build(maker)
            for wrapper in self.wrappers:
                env = wrapper(env)
        except Exception as error:
            raise EnvMakeError(
                f"{self.name}: its constructor raised {type(error).__name__}; expected an environment. "
                f"Mend the constructor or its arguments {dict(self.kwargs)}; this is its own traceback:\n"
                f"{own_traceback(error)}"
            ) from error
        if not isinstance(env, gymnasium.Env):
            raise ConfigError(_no_env(self.name, type(env)))
        return env

    def _find(self) -> Any:
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
        place, colon, attribute = target.rpartition(":")
        if target.endswith(".py"):
            place, attribute = target, ""
        if place.endswith(".py"):
            return _from_module(load_file(place), place, attribute)
        if not colon:
            return _registered(target)
        module = _import(place)
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
            parameters = inspect.signature(function).parameters.values()  # pyright: ignore[reportArgumentType]
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


def load_file(path: str) -> ModuleType:
    """Import a Python file by its path, under a name that is the same in every process.

    Args:
        path: The file.

    Returns:
        The module; the same one when asked again.

    Raises:
        EnvNotFoundError: If there is no such file.
        EnvMakeError: If importing it raised.
    """
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        folder = file.parent
        near = sorted(p.name for p in folder.glob("*.py")) if folder.is_dir() else []
        what = f"{folder} holds no file of that name" if folder.is_dir() else f"the folder {folder} does not exist"
        raise EnvNotFoundError(f"{path}: {what}; expected a Python file.{suggest(file.name, near)}")
    name = f"rlfeed_file_{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise EnvNotFoundError(f"{path}: cannot be imported; expected a Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(file.parent))  # as `python file.py` does: the file may import its neighbours
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a script without a guard may call sys.exit
        del sys.modules[name]
        raise EnvMakeError(_import_failed(path, error)) from error
    finally:
        sys.path.remove(str(file.parent))
    return module


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(error.name + ".")):
            raise EnvNotFoundError(
                f"{name}: there is no module {error.name!r}; expected an importable module. Install it, set "
                "PYTHONPATH, or give the file as path/to/file.py:ClassName."
            ) from None
        raise EnvMakeError(_import_failed(name, error)) from error
    except Exception as error:
        raise EnvMakeError(_import_failed(name, error)) from error


def _registered(env_id: str) -> EnvSpec:
    try:
        return gymnasium.spec(env_id)
    except gymnasium.error.Error as error:
        namespace = env_id.partition("/")[0] if "/" in env_id else ""
        hint = suggest(env_id, gymnasium.registry) or f" Gymnasium says: {error}"
        if namespace == "ALE":
            hint = f" Install ale-py and write ale_py:{env_id}."
        raise EnvNotFoundError(
            f"{env_id}: no environment of that id is registered; expected a Gymnasium id, path/to/file.py:ClassName "
            f"or package.module:ClassName.{hint}"
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
    old = any(base.__module__.partition(".")[0] == "gym" for base in found.__mro__)
    bases = "the old gym.Env" if old else ", ".join(base.__name__ for base in found.__bases__)
    return (
        f"{name}: is a {found.__name__}, which derives from {bases}; expected a gymnasium.Env. "
        "Derive the class from gymnasium.Env, with reset(seed, options) and a step of five values."
    )


def _import_failed(place: str, error: BaseException) -> str:
    return (
        f"{place}: importing it raised {type(error).__name__}; expected a module that imports. "
        f"This is its own traceback:\n{own_traceback(error)}"
    )


def own_traceback(error: BaseException) -> str:
    """Format a traceback without the frames of rlfeed, Gymnasium and the import machinery.

    Args:
        error: What user code raised.

    Returns:
        The traceback, from the user's code on; whole where nothing of it is left.
    """
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not f.filename.startswith(_OURS)]
    lines = traceback.format_list(own or frames) + traceback.format_exception_only(error)
    return "Traceback (most recent call last):\n" + "".join(lines).rstrip()
