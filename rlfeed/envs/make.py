"""Make environments that a `Rollout` can step: `make_envs`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import gymnasium
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv

from rlfeed.envs.autoreset import Envs
from rlfeed.envs.envpool import EnvPoolEnvs, is_envpool
from rlfeed.envs.faults import MAX_RESTARTS, OnFault
from rlfeed.envs.foreign import foreign_envs, native_envs
from rlfeed.envs.gym_async import start_async
from rlfeed.envs.gym_vector import VectorEnvs
from rlfeed.envs.layouts import Layout, choose_layout
from rlfeed.envs.pettingzoo import ParallelEnvs, is_parallel
from rlfeed.envs.seeds import NumberedEpisodes
from rlfeed.envs.serial import SerialEnvs
from rlfeed.envs.source import EnvSource, Wrapper
from rlfeed.envs.vector import PoolEnvs
from rlfeed.envs.wrappers import as_wrapper
from rlfeed.errors import ConfigError, suggest

EnvsMode = Literal["auto", "serial", "pool", "sync", "async", "vector"]
Autoreset = Literal["same_step", "next_step", "disabled"]
MODES = ("auto", "serial", "pool", "sync", "async", "vector")
AUTORESETS = {
    "same_step": AutoresetMode.SAME_STEP,
    "next_step": AutoresetMode.NEXT_STEP,
    "disabled": AutoresetMode.DISABLED,
}


@dataclass(frozen=True)
class _NumberedSource:
    source: EnvSource
    env_id: int
    num_envs: int

    def __call__(self) -> gymnasium.Env:
        return NumberedEpisodes(self.source(), self.env_id, self.num_envs)


def make_envs(
    id_or_callable: str | Callable[..., gymnasium.Env],
    num_envs: int = 1,
    *,
    kwargs: Mapping[str, Any] | None = None,
    wrappers: Sequence[str | Wrapper] = (),
    mode: EnvsMode = "auto",
    autoreset: Autoreset = "same_step",
    layout: Layout = "auto",
    min_ready: int | None = None,
    on_fault: OnFault | None = None,
    max_restarts: int = MAX_RESTARTS,
    step_timeout_s: float = 60.0,
    first_env_id: int = 0,
) -> Envs:
    """Make environments, found by name, file, module or given as a class or function.

    Every episode begins with a seed of its own, derived from (run seed, environment, episode number): the episodes
    are the same in every mode.

    Args:
        id_or_callable: A Gymnasium id, ``path/to/file.py:ClassName`` (or ``path/to/file.py`` when it has one
            environment class), ``package.module:ClassName``, ``package.module:Env-v0``, an environment class, or a
            function that returns an environment; ``envpool:Task-v1``; ``pettingzoo:package.module``, whose agents are
            rows, or a class or function that makes one of PettingZoo's parallel environments.
        num_envs: How many, at least 1.
        kwargs: Arguments of the constructor.
        wrappers: Applied in order: functions from environment to environment, or names such as
            ``"TimeLimit:max_episode_steps=500"``, ``"package.module:Name"`` or ``"path/to/file.py:Name"``; see
            `NamedWrapper.parse`.
        mode: ``"serial"`` steps them in this process, ``"pool"`` in worker processes, several in each; ``"auto"``
            decides between these two by a short measurement, and the environments' ``choice`` says why. ``"sync"`` and
            ``"async"`` go through Gymnasium's vector environments, the latter with one process each. ``"vector"`` is
            the id's own vector implementation: all rows begin with one seed, later episodes have none, and rollouts of
            one seed are alike all the same. A script that starts processes needs ``if __name__ == "__main__":``.
        autoreset: How Gymnasium's vector environments reset; what comes out is the same.
        layout: Of a pool: ``"auto"``, a number of workers, or (workers, environments in each), also as ``"2x4"``.
        min_ready: Of a pool: how many environments a step waits for, the others follow later; None waits for all.
        on_fault: What to do when an environment raises, hangs, breaks the contract, or takes its process with it:
            ``"restart"`` loses the step in flight, warns, and begins a new episode; ``"raise"`` ends the run. None:
            ``"restart"`` in a pool, else ``"raise"``. Gymnasium's vector environments always raise.
        max_restarts: How often in a row one environment is begun anew before it is given up.
        step_timeout_s: Of a pool and ``"async"``: seconds that one call of an environment may take.
        first_env_id: Where several processes have environments of one run: the number of the first one here.

    Returns:
        The environments.

    Raises:
        EnvNotFoundError: If the id, file, module or class is not there; the nearest names are in the message.
        EnvMakeError: If the constructor raised; its traceback is in the message.
        ConfigError: If an argument is wrong, or what was found is no `gymnasium.Env`.
        SpaceError: If the observation space cannot be stored.
    """
    if isinstance(num_envs, bool) or not isinstance(num_envs, int) or num_envs < 1:
        raise ConfigError(f"make_envs: num_envs is {num_envs!r}; expected an integer of at least 1.")
    if mode not in MODES:
        raise ConfigError(f"make_envs: mode is {mode!r}; expected one of {MODES}.{suggest(str(mode), MODES)}")
    if autoreset not in AUTORESETS:
        raise ConfigError(
            f"make_envs: autoreset is {autoreset!r}; expected one of {tuple(AUTORESETS)}."
            f"{suggest(str(autoreset), AUTORESETS)}"
        )
    if isinstance(first_env_id, bool) or not isinstance(first_env_id, int) or first_env_id < 0:
        raise ConfigError(f"make_envs: first_env_id is {first_env_id!r}; expected an integer of at least 0.")
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise ConfigError(f"make_envs: kwargs is {kwargs!r}; expected the constructor's arguments by name, in a dict.")
    if isinstance(wrappers, str) or not isinstance(wrappers, Sequence):
        raise ConfigError(f"make_envs: wrappers is {wrappers!r}; expected a list of them. Write [{wrappers!r}].")
    applied = tuple(map(as_wrapper, wrappers))
    foreign = foreign_envs(id_or_callable, num_envs, dict(kwargs or {}), applied, first_env_id)
    if foreign is not None:
        if mode not in ("auto", "serial") or layout != "auto" or min_ready is not None:
            raise ConfigError(
                f"make_envs: mode is {mode!r}, layout {layout!r} and min_ready {min_ready!r}; expected none of them "
                f"for {foreign.name}. Leave them out."
            )
        return foreign
    if first_env_id and mode not in ("auto", "serial", "pool"):
        raise ConfigError(f"make_envs: first_env_id is {first_env_id} in mode {mode!r}; expected it of ours only.")
    if layout != "auto" or min_ready is not None:
        if mode not in ("auto", "pool"):
            raise ConfigError(
                f"make_envs: layout is {layout!r} and min_ready {min_ready!r} in mode {mode!r}; expected them of a "
                "pool only. Write mode='pool'."
            )
        mode = "pool"
    source = EnvSource(id_or_callable, dict(kwargs or {}), applied)
    if mode == "vector":
        return native_envs(source, num_envs, AUTORESETS[autoreset])
    if mode in ("auto", "serial", "pool"):
        ours: dict[str, Any] = {"max_restarts": max_restarts, "first_env_id": first_env_id}
        if on_fault is not None:
            ours["on_fault"] = on_fault
        choice = choose_layout(source, num_envs, layout, mode=mode)
        if choice.workers:
            waits: dict[str, Any] = {"min_ready": min_ready, "step_timeout_s": step_timeout_s}
            return PoolEnvs(source, num_envs, choice.workers, choice=choice.why, **waits, **ours)
        envs = [_made(source) for _ in range(num_envs)]
        if is_parallel(envs[0]):
            return ParallelEnvs(envs, first_env_id=first_env_id)
        return SerialEnvs(envs, source.name, makers=[source] * num_envs, choice=choice.why, **ours)
    makers = [_NumberedSource(source, env_id, num_envs) for env_id in range(num_envs)]
    if mode == "async":
        workers = start_async(makers, AUTORESETS[autoreset], source.name)
        return VectorEnvs(workers, source.name, numbered=True, step_timeout_s=step_timeout_s)
    vector = SyncVectorEnv(makers, autoreset_mode=AUTORESETS[autoreset])
    return VectorEnvs(vector, source.name, numbered=True)


def _made(source: EnvSource) -> Any:
    """Make an environment, or one whose agents are rows where that is what a function makes."""
    env = source.make()
    return env if is_parallel(env) else source.checked(env)


def as_envs(envs: Envs | gymnasium.Env | VectorEnv) -> Envs:
    """Take environments in any of the forms that `Rollout` accepts.

    Args:
        envs: `Envs`, one `gymnasium.Env`, a `gymnasium.vector.VectorEnv`, an environment of EnvPool, or one of
            PettingZoo's parallel interface.

    Returns:
        The same as `Envs`.

    Raises:
        ConfigError: If it is none of these.
    """
    if is_envpool(envs):
        return EnvPoolEnvs(envs)  # pyright: ignore[reportArgumentType]
    if isinstance(envs, VectorEnv):  # before Env: some are both
        return VectorEnvs(envs)
    if isinstance(envs, gymnasium.Env):
        return SerialEnvs([envs])
    if isinstance(envs, Envs):
        return envs
    if is_parallel(envs):
        return ParallelEnvs([envs])
    raise ConfigError(
        f"envs: is {envs!r}; expected what make_envs gives, a gymnasium.Env or a gymnasium.vector.VectorEnv. "
        f"Write make_envs({envs!r})."
    )
