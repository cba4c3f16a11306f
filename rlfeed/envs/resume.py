"""How open episodes come back after a process has ended: what is kept of them, and how they are played again.

An environment that offers ``get_state()`` and ``set_state(state)`` comes back *exact*. Any other is *re-enacted*: its
open episode is begun with its seed once more and its actions are repeated; it has come back if the observations are,
bit for bit, those of before. What does neither is *restarted* at its next episode.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import gymnasium
import numpy as np
from gymnasium.wrappers import OrderEnforcing, PassiveEnvChecker, TimeLimit
from jaxtyping import Bool, Float64, Int64, UInt64
from numpy import ndarray

from rlfeed.codec import encode
from rlfeed.envs.autoreset import Ready
from rlfeed.envs.group import EnvGroup, Faults, rows_of
from rlfeed.nest import Nest, leaves, map_nest

EXACT, REENACTED, TOO_LONG, DIFFERENT, FAILED, UNSUPPORTED, NONE_OPEN = range(7)
COMEBACKS = {
    EXACT: "exact",
    REENACTED: "re-enacted",
    TOO_LONG: "restarted (the episode had more steps than are kept)",
    DIFFERENT: "restarted (played again it was another one: it follows from more than its seed and actions)",
    FAILED: "restarted (it raised while it was played again)",
    UNSUPPORTED: "restarted (environments of this kind do not come back)",
    NONE_OPEN: "restarted (no episode was open)",
}
LONGEST = 16_384  # steps of an episode that can be re-enacted
_PENDING_BYTES = 1 << 20  # of observations that wait to be digested together: one by one costs more than a light step
_PENDING = 256  # steps
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


@runtime_checkable
class Resumable(Protocol):
    """Be environments whose open episodes may come back in another process."""

    def save_episodes(self) -> dict[str, Any] | None:
        """Give what brings the open episodes back.

        Returns:
            The state; None where nothing does.
        """
        ...

    def resume_episodes(self, state: Mapping[str, Any]) -> tuple[Ready, Int64[ndarray, " N"]] | None:
        """Bring open episodes back, or begin the next ones.

        Args:
            state: What `save_episodes` gave.

        Returns:
            What to act on next, in every environment, and how each has come back: a key of ``COMEBACKS``; None where
            none can.
        """
        ...


@dataclass(frozen=True, eq=False, slots=True)
class Past:
    """Hold what is known of one open episode.

    Args:
        length: Its steps.
        digest: Of its observations and rewards.
        observation: The last one, ``[1, ...]`` per leaf.
        actions: ``[length, ...]`` per leaf; None where there were too many to keep.
        state: What ``get_state`` gave; None where it is not offered.
        mask: The last action mask, ``[A]``; None where there are none.
    """

    length: int
    digest: int
    observation: Nest
    actions: Nest
    state: Any = None
    mask: ndarray | None = None


class Diary:
    """Keep the actions of open episodes, and a digest of what the environments returned.

    Args:
        num_envs: N.
        longest: Actions that are kept of an episode.
    """

    def __init__(self, num_envs: int, longest: int = LONGEST) -> None:
        self._num_envs, self._longest = num_envs, longest
        self._all = np.arange(num_envs)
        self.lengths: Int64[ndarray, " N"] = np.zeros(num_envs, np.int64)
        self.digests: UInt64[ndarray, " N"] = np.zeros(num_envs, np.uint64)
        self._kept = 0  # steps that the log has room for
        self._log: Nest = None  # [kept, N, ...]: step t of an episode
        self._pending: list[tuple[Nest, Nest, ndarray, ndarray | None]] = []
        self._enough = 0
        self._weights: list[UInt64[ndarray, " W"]] = []  # of each leaf
        self._powers: UInt64[ndarray, " kept"] = np.ones(1, np.uint64)

    def begin(self) -> None:
        """Forget everything: episodes begin in every environment."""
        self._pending.clear()
        self.lengths[:] = 0
        self.digests[:] = 0

    def note(
        self,
        observation: Nest,
        action: Nest,
        reward: Float64[ndarray, " k"],
        over: Bool[ndarray, " k"] | None,
        ids: Int64[ndarray, " k"] | None = None,
    ) -> None:
        """Note one step.

        Args:
            observation: What was acted on, ``[k, ...]`` per leaf; not written again by anybody.
            action: What the environments were given, ``[k, ...]`` per leaf; not written again either.
            reward: What they returned.
            over: True where the episode is over with it, however; None: nowhere.
            ids: The environments, where it is not all of them.
        """
        if ids is not None:
            self._flush()
            self._write([(observation, action, reward, over)], ids)
            return
        self._pending.append((observation, action, reward, over))
        if len(self._pending) >= self._enough:
            nbytes = sum(leaf.nbytes for _, leaf in leaves(observation))
            self._enough = max(1, min(_PENDING, _PENDING_BYTES // max(nbytes, 1)))
            self._flush()

    def forget(self, rows: Sequence[int]) -> None:
        """Let episodes begin in some environments.

        Args:
            rows: Which.
        """
        self._flush()
        self.lengths[rows] = 0
        self.digests[rows] = 0

    def save(self) -> dict[str, Any]:
        """Give everything.

        Returns:
            ``lengths``, ``digests``, and ``actions`` of all episodes whose actions are kept, one behind the other.
        """
        self._flush()
        kept = [slice(0, n if n <= self._longest else 0) for n in self.lengths.tolist()]
        log = () if self._log is None else self._log
        actions = map_nest(lambda leaf: np.concatenate([leaf[part, row] for row, part in enumerate(kept)]), log)
        return {"lengths": self.lengths.copy(), "digests": self.digests.copy(), "actions": actions}

    def load(self, state: Mapping[str, Any]) -> list[Nest]:
        """Take everything back.

        Args:
            state: What `save` gave.

        Returns:
            The actions of each episode, ``[length, ...]`` per leaf; None where they were not kept.
        """
        self.begin()
        self.lengths[:] = state["lengths"]
        self.digests[:] = state["digests"]
        ends = np.cumsum(np.where(self.lengths <= self._longest, self.lengths, 0)).tolist()
        self._grow(max(self.lengths.max(), 1), map_nest(lambda leaf: leaf[:0], state["actions"]))
        past: list[Nest] = []
        for row, length in enumerate(self.lengths.tolist()):
            if length > self._longest:
                past.append(None)
                continue
            actions = map_nest(lambda leaf, row=row, n=length: leaf[ends[row] - n : ends[row]], state["actions"])
            for (_, log), (_, part) in zip(leaves(self._log), leaves(actions), strict=True):
                log[:length, row] = part
            past.append(actions)
        return past

    def _flush(self) -> None:
        if self._pending:
            pending, self._pending = self._pending, []
            self._write(pending, self._all)

    def _write(self, steps: Sequence[tuple[Nest, Nest, ndarray, ndarray | None]], ids: Int64[ndarray, " k"]) -> None:
        """Take m steps of k environments into digests and log, all at once."""
        m, k = len(steps), len(ids)
        observations, actions, rewards, overs = zip(*steps, strict=True)
        hashed = self._hash(observations, rewards, m * k).reshape(m, k)
        t, lengths = np.arange(m)[:, None], self.lengths[ids]
        if all(over is None for over in overs):
            begun = np.zeros(k, np.int64)
        else:
            ends = np.array([np.zeros(k, bool) if over is None else over for over in overs])
            begun = np.where(ends, t + 1, 0).max(axis=0)  # where the open episode began; 0: before these steps
        positions, alive = np.where(begun == 0, lengths, 0) + t - begun, t >= begun
        self.lengths[ids] = np.where(begun == 0, lengths, 0) + m - begun
        self._grow(min(int(self.lengths.max()), self._longest), actions[0])
        inside = alive & (positions < self._kept)
        terms = np.where(inside, hashed * self._powers[np.where(inside, positions, 0)], np.uint64(0))
        self.digests[ids] = np.where(begun == 0, self.digests[ids], np.uint64(0)) + terms.sum(axis=0, dtype=np.uint64)
        at, row = inside.nonzero()
        for (_, log), given in zip(leaves(self._log), _by_leaf(actions), strict=True):
            side_by_side = np.concatenate(given).reshape(m, k, *log.shape[2:])
            log[positions[at, row], ids[row]] = side_by_side[at, row]

    def _hash(self, observations: Sequence[Nest], rewards: Sequence[ndarray], rows: int) -> UInt64[ndarray, " rows"]:
        """Reduce what came with each step to 64 bits: a sum of its words, each with a weight of its own."""
        parts = [*_by_leaf(observations), rewards]
        total = np.zeros(rows, np.uint64)
        for number, part in enumerate(part for part in parts if part[0].size):
            flat = np.ascontiguousarray(np.concatenate(part)).reshape(rows, -1)
            nbytes = flat.shape[1] * flat.itemsize
            width = next(size for size in (8, 4, 2, 1) if nbytes % size == 0)
            words = flat.view(f"u{width}").astype(np.uint64, copy=False)
            if number == len(self._weights):
                generator = np.random.Generator(np.random.Philox(key=number))
                weights = generator.integers(1 << 63, size=words.shape[1], dtype=np.uint64)
                self._weights.append(weights << np.uint64(1) | np.uint64(1))  # odd: no bit of a word is lost
            total += words @ self._weights[number]
        return total

    def _grow(self, steps: int, action: Nest) -> None:
        """Have room for so many steps of every environment."""
        if self._log is not None and steps <= self._kept:
            return
        kept = min(max(64, 1 << (int(steps) - 1).bit_length()), self._longest)

        def grown(old: ndarray | None, leaf: ndarray) -> ndarray:
            new = np.zeros((kept, self._num_envs, *leaf.shape[1:]), leaf.dtype)
            if old is not None:
                new[: self._kept] = old
            return new

        self._log = map_nest(lambda leaf: grown(None, leaf), action) if self._log is None else map_nest(
            grown, self._log, action
        )
        self._kept = kept
        self._powers = np.cumprod(np.full(kept, _FACTOR, np.uint64))



def _by_leaf(nests: Sequence[Nest]) -> list[Sequence[ndarray]]:
    """Sort the arrays of equal nests by their place; most nests are one array."""
    if isinstance(nests[0], ndarray):
        return [nests]
    return list(zip(*([leaf for _, leaf in leaves(nest)] for nest in nests), strict=True))


def outlook(state: Mapping[str, Any]) -> str:
    """Say how environments are to come back.

    Args:
        state: What `Resumable.save_episodes` gave.

    Returns:
        Such as ``"re-enacted"``, or where they differ, ``"re-enacted 7, restarted 1"``.
    """
    ways = [
        "exact" if kept is not None else "re-enacted" if length <= LONGEST else "restarted"
        for kept, length in zip(state["states"], state["lengths"].tolist(), strict=True)
    ]
    return told(ways)


def told(ways: Sequence[str]) -> str:
    """Say in a few words how environments come back.

    Args:
        ways: Of each environment.

    Returns:
        The way that all have in common, or how many have which.
    """
    ways = [way.split(" (")[0] for way in ways]
    counts = {way: ways.count(way) for way in ("exact", "re-enacted", "restarted") if way in ways}
    return next(iter(counts)) if len(counts) == 1 else ", ".join(f"{way} {count}" for way, count in counts.items())


def capture(envs: Sequence[gymnasium.Env]) -> list[Any]:
    """Ask environments for their states.

    Args:
        envs: The environments.

    Returns:
        What each gave, as arrays of its own; None where it offers none, or none that can be saved, which is warned of.
    """
    return [None if (found := _stateful(env)) is None else _captured(found) for env in envs]


def _captured(env: Any) -> Any:
    try:
        state = _own(env.get_state())
        encode(state, "get_state()")  # as a checkpoint will
    except Exception as error:  # whatever it raises: the run can do without
        warnings.warn(
            f"{type(env).__name__}.get_state(): {type(error).__name__}: {error} Until it gives what can be saved, its "
            "episodes are played again when a run goes on.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return state


def offers_state(env: gymnasium.Env) -> bool:
    """Say whether an environment can be saved.

    Args:
        env: The environment.

    Returns:
        True where it offers its state.
    """
    return _stateful(env) is not None


def resume_group(
    group: EnvGroup, seed: int, episodes: Sequence[int], pasts: Sequence[Past], target: Nest, mask: ndarray | None
) -> tuple[Faults, list[int]]:
    """Bring the open episodes of a group back, or begin the next ones.

    Args:
        group: The environments.
        seed: The run's seed.
        episodes: The numbers of the open episodes.
        pasts: What is known of them.
        target: Where the observations go, ``[k, ...]`` per leaf.
        mask: Where the action masks go, ``[k, A]``, if infos hold some.

    Returns:
        What went wrong, by row, and how each has come back: a key of ``COMEBACKS``.
    """
    faults = group.start(seed, episodes, target, mask)
    codes = [FAILED if row in faults else _come_back(group, row, past, target) for row, past in enumerate(pasts)]
    again = [r for r, code in enumerate(codes) if code > REENACTED and r not in faults and pasts[r].length]
    unmade = group.renew([row for row in again if codes[row] == FAILED])
    for row in again:
        group.episodes[row] += 1
    if again:
        begun = group.begin([row for row in again if row not in unmade], target, mask)
        faults = {**faults, **unmade, **begun}
    for row, past in enumerate(pasts):
        if mask is not None and past.mask is not None and codes[row] <= REENACTED:
            mask[row] = past.mask
    return faults, codes


def _come_back(group: EnvGroup, row: int, past: Past, target: Nest) -> int:
    here = rows_of(target, row)
    try:
        if past.state is not None and (found := _stateful(group.envs[row])) is not None:
            found.set_state(_own(past.state))
            _set_elapsed(group.envs[row], past.length)
            for (_, leaf), (_, last) in zip(leaves(here), leaves(past.observation), strict=True):
                leaf[:] = last
            return EXACT
        if past.actions is None:
            return TOO_LONG
        diary = Diary(1)
        for action in group.split(past.actions) if past.length else ():
            before = map_nest(np.copy, here)
            reward, over = group.repeat(row, action, target)
            if over:
                return DIFFERENT
            diary.note(before, (), np.array([reward]), None)
    except Exception:  # whatever it raises: what is played again is no step of the run
        return FAILED
    same = int(diary.save()["digests"][0]) == past.digest and all(
        leaf.tobytes() == last.tobytes()
        for (_, leaf), (_, last) in zip(leaves(here), leaves(past.observation), strict=True)
    )
    return REENACTED if same else DIFFERENT


def _stateful(env: Any) -> Any:
    """Find who offers a state that is all there is to know: a wrapper that keeps something of its own hides it."""
    while True:
        if callable(getattr(type(env), "get_state", None)) and callable(getattr(type(env), "set_state", None)):
            return env
        if type(env) not in (TimeLimit, OrderEnforcing, PassiveEnvChecker):
            return None
        env = env.env


def _set_elapsed(env: Any, steps: int) -> None:
    while isinstance(env, gymnasium.Wrapper):
        if type(env) is TimeLimit:
            env._elapsed_steps = steps  # it has no other way to be told
        env = env.env


def _own(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: _own(part) for key, part in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(_own(part) for part in state)
    return state.copy() if isinstance(state, ndarray) else state


def pasts_of(state: Mapping[str, Any], actions: Sequence[Nest]) -> list[Past]:
    """Put together what is known of each open episode.

    Args:
        state: What `Resumable.save_episodes` gave.
        actions: What `Diary.load` gave.

    Returns:
        One for each environment.
    """
    return [
        Past(
            int(state["lengths"][row]),
            int(state["digests"][row]),
            map_nest(lambda leaf, row=row: leaf[row : row + 1], state["observation"]),
            actions[row],
            state["states"][row],
            None if state["mask"] is None else state["mask"][row],
        )
        for row in range(len(actions))
    ]
