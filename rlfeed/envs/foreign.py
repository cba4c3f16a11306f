"""Environments that are no single `gymnasium.Env`: vectors by themselves, EnvPool's, PettingZoo's."""

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gymnasium
from gymnasium.envs.registration import EnvSpec, load_env_creator
from gymnasium.vector import AutoresetMode

from rlfeed.envs.autoreset import Envs
from rlfeed.envs.envpool import make_envpool
from rlfeed.envs.gym_vector import VectorEnvs
from rlfeed.envs.importing import import_module, load_file, own_traceback
from rlfeed.envs.pettingzoo import ParallelEnvs, is_parallel
from rlfeed.envs.source import EnvSource
from rlfeed.errors import ConfigError, EnvMakeError, EnvNotFoundError, RlfeedError, suggest

ENVPOOL, PETTINGZOO = "envpool:", "pettingzoo:"


def foreign_envs(
    target: Any,
    num_envs: int,
    kwargs: Mapping[str, Any],
    wrappers: Sequence[Callable[..., Any]],
    first_env_id: int = 0,
) -> Envs | None:
    """Make environments that are not Gymnasium's, where their name or class says that they are not.

    Args:
        target: ``envpool:Task-v1``, ``pettingzoo:butterfly/pistonball-v6``, ``pettingzoo:package.module`` (its function
            ``parallel_env``), ``pettingzoo:package.module:name``, ``pettingzoo:path/to/file.py:name``, a class of
            PettingZoo's parallel interface, or anything else.
        num_envs: How many; copies, where each has several agents.
        kwargs: Arguments of the constructor.
        wrappers: Applied to each copy, in order; EnvPool takes none.
        first_env_id: The number of the first row.

    Returns:
        The environments; None where it is for Gymnasium to make them.

    Raises:
        EnvNotFoundError: If a package, file, module or name is not there.
        EnvMakeError: If the constructor raised.
        ConfigError: If an argument is wrong.
    """
    if isinstance(target, str) and target.startswith(ENVPOOL):
        if wrappers:
            raise ConfigError(
                f"{target}: got wrappers {list(wrappers)}; expected none, since they are for single environments. Use "
                "the task's own settings as kwargs."
            )
        return make_envpool(target.removeprefix(ENVPOOL), num_envs, kwargs, first_env_id)
    if isinstance(target, str) and target.startswith(PETTINGZOO):
        maker, name = _find_parallel(target.removeprefix(PETTINGZOO)), target
    elif isinstance(target, type) and not issubclass(target, gymnasium.Env) and _has_spaces_by_agent(target):
        maker, name = target, target.__name__
    else:
        return None
    copies = [_make_parallel(maker, name, kwargs, wrappers) for _ in range(num_envs)]
    return ParallelEnvs(copies, first_env_id=first_env_id)


def native_envs(source: EnvSource, num_envs: int, autoreset: AutoresetMode) -> VectorEnvs:
    """Make an environment that is a vector by itself: the ``vector_entry_point`` of a Gymnasium id.

    Args:
        source: The id, such as ``CartPole-v1`` or ``ale_py:ALE/Pong-v5``, and arguments.
        num_envs: How many rows.
        autoreset: Its mode, where its constructor takes one.

    Returns:
        The environments.

    Raises:
        EnvNotFoundError: If there is no such id.
        EnvMakeError: If the constructor raised.
        ConfigError: If the id has no vector implementation, or wrappers are given.
    """
    spec = source.find()
    if not isinstance(spec, EnvSpec) or spec.vector_entry_point is None:
        have = sorted(name for name, each in gymnasium.registry.items() if each.vector_entry_point is not None)
        raise ConfigError(
            f"{source.name}: has no vector implementation of its own (vector_entry_point), as mode='vector' wants; "
            f"expected one of {have}. Use mode='auto'."
        )
    if source.wrappers:
        raise ConfigError(
            f"{source.name}: got wrappers with mode='vector'; expected none, since they are for single environments. "
            "Use mode='auto'."
        )
    entry: Any = spec.vector_entry_point
    try:
        parameters = inspect.signature(load_env_creator(entry) if isinstance(entry, str) else entry).parameters
        takes_mode = "autoreset_mode" in parameters and "autoreset_mode" not in source.kwargs
        given = {**source.kwargs, **({"autoreset_mode": autoreset} if takes_mode else {})}
        vector = gymnasium.make_vec(spec, num_envs, vectorization_mode="vector_entry_point", **given)
    except Exception as error:
        raise _make_error(source.name, source.kwargs, error) from error
    return VectorEnvs(vector, source.name)


def _find_parallel(place: str) -> Callable[..., Any]:
    module_name, colon, attribute = place.rpartition(":")
    if not colon or place.endswith(".py"):
        module_name, attribute = place, "parallel_env"
    if not module_name.endswith(".py") and "/" in module_name:
        return _registered_parallel(place)
    module = load_file(module_name) if module_name.endswith(".py") else import_module(module_name)
    if not hasattr(module, attribute):
        names = [name for name, value in vars(module).items() if callable(value)]
        raise EnvNotFoundError(
            f"{PETTINGZOO}{place}: {module_name} has no {attribute!r}; expected a function or class that makes a "
            f"parallel environment.{suggest(attribute, names)}"
        )
    return getattr(module, attribute)


def _registered_parallel(env_id: str) -> Callable[..., Any]:
    try:
        package: Any = importlib.import_module("pettingzoo")
    except ImportError as error:
        raise EnvNotFoundError(
            f"{PETTINGZOO}{env_id}: PettingZoo cannot be imported ({error}); expected it to be installed. "
            "Run pip install 'rlfeed[pettingzoo]'."
        ) from None
    known = list(package.parallel_registry)
    if env_id not in known:
        raise EnvNotFoundError(
            f"{PETTINGZOO}{env_id}: PettingZoo has no such parallel environment; expected one of {known}."
            f"{suggest(env_id, known)}"
        )
    return functools.partial(package.make, "parallel", env_id)


def _make_parallel(
    maker: Callable[..., Any], name: str, kwargs: Mapping[str, Any], wrappers: Sequence[Callable[..., Any]]
) -> Any:
    try:
        env = maker(**kwargs)
        for wrapper in wrappers:
            env = wrapper(env)
    except RlfeedError:
        raise
    except Exception as error:
        raise _make_error(name, kwargs, error) from error
    if not is_parallel(env):
        raise ConfigError(
            f"{name}: made a {type(env).__name__}; expected an environment of PettingZoo's parallel interface. "
            "Where agents take turns, pettingzoo.utils.aec_to_parallel makes one."
        )
    return env


def _has_spaces_by_agent(kind: type) -> bool:
    return callable(getattr(kind, "observation_space", None)) and callable(getattr(kind, "action_space", None))


def _make_error(name: str, kwargs: Mapping[str, Any], error: Exception) -> EnvMakeError:
    return EnvMakeError(
        f"{name}: its constructor raised {type(error).__name__}; expected an environment. Mend the constructor or its "
        f"arguments {dict(kwargs)}; this is its own traceback:\n{own_traceback(error)}"
    )
