"""The iterator through environments: a policy's outputs are fed back as its next inputs."""

import time
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import gymnasium
import numpy as np
from gymnasium.vector import VectorEnv
from jaxtyping import Bool, Float32, Float64, Int64
from numpy import ndarray

from rlfeed.envs.autoreset import Envs, Outcome, Ready
from rlfeed.envs.make import as_envs
from rlfeed.envs.normalize import NormalizedEnvs
from rlfeed.envs.resume import COMEBACKS, NONE_OPEN, REENACTED, UNSUPPORTED, Resumable, outlook
from rlfeed.errors import CheckpointError, ConfigError, suggest
from rlfeed.nest import Nest, leaves, map_nest
from rlfeed.rollout.actions import Actions, Handling
from rlfeed.rollout.blocks import Block
from rlfeed.rollout.policy import FunctionPolicy, adapt, check_carry, check_output
from rlfeed.rollout.rows import copy, pick, put, reset_rows
from rlfeed.rollout.statistics import EpisodeStatistics, Timing
from rlfeed.rollout.underway import Underway
from rlfeed.rollout.views import episode_batch, positive, quotas
from rlfeed.types import Batch, Mode, Policy, PolicyContext, PolicyOutput, Stateful, Step

MODES = ("explore", "greedy", "random")
STREAM = 1  # the rollout's generator, apart from every other stream of the same seed


@runtime_checkable
class Buffer(Protocol):
    """Take steps, as `ReplayBuffer` does."""

    def add(self, step: Step) -> Any:
        """Store a step.

        Args:
            step: The step.

        Returns:
            What the buffer returns for it.
        """
        ...


class Rollout:
    """Iterate over the steps a policy takes in environments.

    The rollout, not the policy, resets the carry where an episode begins, and keeps it per environment. Episodes
    begin with seeds derived from (seed, environment, episode number); two rollouts of one seed play the same episodes.
    `collect`, `episodes` and `blocks` are views on the same loop. The iterator never ends; `itertools.islice`
    bounds it. Steps may be kept; writing into one's arrays is not allowed, the next step shares them.

    Args:
        envs: What `make_envs` gives, a ``gymnasium.Env``, or a ``gymnasium.vector.VectorEnv``.
        policy: A `Policy`, an ``nn.Module`` or a function ``observation -> action``.
        seed: At least 0.
        mode: ``"explore"``, ``"greedy"``, or ``"random"``: actions are drawn uniformly (a `Policy` is called all the
            same, for its carry and extras); may be assigned at any time.
        actions: ``"strict"``: the policy acts inside the action space. ``"clip"``: in Boxes it may act outside, the
            environment gets the nearest action inside; ``"rescale"``: there it acts in -1 .. 1, which is mapped onto
            low .. high. A step's ``action`` is the policy's, its ``env_action`` the environment's.

    Raises:
        ConfigError: If an argument is wrong.
        SpaceError: If a space cannot be played.
    """

    def __init__(
        self,
        envs: Envs | gymnasium.Env | VectorEnv,
        policy: Any,
        *,
        seed: int = 0,
        mode: Mode = "explore",
        actions: Handling = "strict",
    ) -> None:
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise ConfigError(f"Rollout: seed is {seed!r}; expected an integer of at least 0.")
        self.envs: Envs = as_envs(envs)
        self._normalized = self.envs if isinstance(self.envs, NormalizedEnvs) else None  # told the mode
        self.policy: Policy = adapt(policy)
        self.mode = mode
        self.seed = seed
        self.env_steps = 0
        self.num_envs = self.envs.num_envs
        self.statistics = EpisodeStatistics(self.num_envs)
        self.comebacks: tuple[str, ...] = ()  # once a state was loaded: how each environment came back
        self._actions = Actions(self.envs.action_space, actions)
        self._underway = Underway(self.num_envs)
        self._generator = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=(STREAM,))))
        self._initial = check_carry(self.policy, self.num_envs)
        self._blank = (self._initial, self._actions.zeros(1), np.zeros(1, np.float32))  # the memory of no step before
        self._nowhere = np.zeros(self.num_envs, bool)
        self._recurrent = any(True for _ in leaves(self._initial))
        self._next_episodes = np.zeros(self.num_envs, np.int64)
        self._ready: Ready | None = None
        # One row per environment: what the next step of each needs to know of the step before.
        self._memory: Nest = (np.ones(self.num_envs, bool), (), None, None)  # is_first, carry, prev_action, prev_reward
        self._any_first = False  # whether an episode begins with the next step
        self._quiet = False  # whether none began with the last one, and none ended
        self._policy_s = self._environments_s = 0.0
        self._made_s = time.perf_counter()

    @property
    def mode(self) -> Mode:
        """Say how the policy acts.

        Returns:
            The mode.
        """
        return self._mode

    @mode.setter
    def mode(self, mode: Mode) -> None:
        if mode not in MODES:
            raise ConfigError(f"Rollout: mode is {mode!r}; expected one of {MODES}.{suggest(str(mode), MODES)}")
        self._mode: Mode = mode

    def __iter__(self) -> "Rollout":
        return self

    def __next__(self) -> Step:
        began_s = time.perf_counter()
        if self._normalized is not None:
            self._normalized.mode = self._mode
        ready = self._ready or self._begin()
        observation, ids = ready.observation, ready.env_ids
        every = len(ids) == self.num_envs
        is_first, carry, prev_action, prev_reward = self._memory if every else pick(self._memory, ids)
        kept = carry
        if self._recurrent:
            kept = copy(carry)  # for the step, and for another try: policies may update their carry in place, and fail
            if every:
                self._memory = (is_first, kept, prev_action, prev_reward)
        mask = self._actions.mask(ready.action_mask, observation)
        context = PolicyContext(
            is_first, self._mode, ids, self.env_steps, prev_action, prev_reward, mask, self._generator
        )
        out = self._decide(observation, carry, context)
        action, extras = self._actions.fit(out.action, ids, mask), out.extras
        env_action = self._actions.executed(action)
        self._ready = None  # an environment that raises is begun anew, at the next episode
        decided_s = time.perf_counter()
        outcome = self.envs.step(action if env_action is None else env_action)
        stepped_s = time.perf_counter()
        self._policy_s += decided_s - began_s
        self._environments_s += stepped_s - decided_s
        reward = outcome.reward.astype(np.float32)
        if self._came_back(outcome, ids):
            rows = (self._nowhere[: len(ids)], out.carry, action, reward)
            self._memory = rows if every else put(self._memory, ids, rows, self.num_envs)
        else:
            every = False
            executed = () if env_action is None else env_action
            decided = (observation, action, executed, is_first, kept, extras, prev_action, prev_reward)
            decided = self._exchange(outcome, ids, decided, out.carry, reward)
            observation, action, executed, is_first, kept, extras, *_ = decided
            env_action = None if env_action is None else executed
            ids: Any = outcome.env_ids
        lost = outcome.lost
        self.env_steps += len(ids) if lost is None else len(ids) - int(lost.sum())
        self._quiet = not self._any_first
        # Where no episode ended, what to act on is what came back: the contract spares a reduction in every step.
        if lost is None and outcome.cut is None and outcome.ready.observation is outcome.next_observation:
            self.statistics.update(ids, _raw(outcome), None, None, self.env_steps)
            self._any_first = not every and bool(self._memory[0].any())
        else:
            self._begin_episodes(outcome, ids)
        self._ready = outcome.ready
        return Step(
            observation,
            action,
            reward,
            outcome.next_observation,
            outcome.terminated,
            outcome.truncated,
            is_first=is_first,
            env_ids=ids,
            lost=lost,
            carry=kept,
            extras=extras,
            env_action=env_action,
        )

    def collect(self, buffer: Buffer, *, steps: int) -> int:
        """Put the next steps into a buffer.

        Args:
            buffer: What has ``add(step)``, such as a `ReplayBuffer`.
            steps: Env steps, summed over environments: a multiple of their number.

        Returns:
            Env steps stored: exactly ``steps``; a few more where environments are not in step (NEXT_STEP autoreset).

        Raises:
            ConfigError: If ``steps`` is no positive multiple of the number of environments.
        """
        num_envs = self.num_envs
        if positive("Rollout.collect: steps", steps) % num_envs:
            above = -(-steps // num_envs) * num_envs
            raise ConfigError(
                f"Rollout.collect: steps is {steps}; expected a multiple of {num_envs}, the number of environments. "
                f"Take {above}."
            )
        before = self.env_steps
        while self.env_steps - before < steps:
            buffer.add(next(self))
        return self.env_steps - before

    def episodes(self, n: int, per_env: bool = True) -> Iterator[Batch]:
        """Play whole episodes, a fixed quota in each environment: short episodes are not preferred.

        Every environment begins a new episode first.

        Args:
            n: How many in each environment, or in all together.
            per_env: Whether ``n`` counts for each environment; otherwise it is shared out, the first ones get more.

        Returns:
            An iterator over one `Batch` for each episode, in the order they end: B = 1, ``observation``
            ``[1, T+1, ...]``, no padding.

        Raises:
            ConfigError: If ``n`` is no positive integer.
        """
        return self._episodes(quotas(positive("Rollout.episodes: n", n), self.num_envs, per_env))

    def blocks(self, T: int) -> Iterator[Batch]:  # noqa: N803 - the axis is called T everywhere
        """Cut the steps of all environments into blocks, for learners that learn from what one policy did.

        Args:
            T: Steps per environment and block.

        Returns:
            An endless iterator over `Batch` ``[N, T]``, each in one piece of memory: ``observation[:, t + 1]`` is what
            was acted on after step t; where an episode ended or was cut there, what the step led to,
            ``final_observation`` ``[K, ...]``, stands at ``final_index`` ``[K, 2]``. ``mask`` is False where a step was
            lost. Environments out of step (NEXT_STEP autoreset, first-ready batches) have ``lengths`` of at most T, and
            padding behind.

        Raises:
            ConfigError: If ``T`` is no positive integer.
        """
        return _Blocks(self, positive("Rollout.blocks: T", T))

    def restart(self) -> None:
        """Let every environment begin its next episode with the next step; running episodes are cut."""
        if self._ready is not None:
            self._next_episodes = self._open_episodes()
        self._next_episodes = self._next_episodes + ~self._memory[0]
        self._memory = (np.ones(self.num_envs, bool), *self._memory[1:])
        self.statistics.discard(np.arange(self.num_envs))
        self._underway = Underway(self.num_envs)
        self._ready = None

    def state_dict(self) -> dict[str, Any]:
        """Give what a later process needs to go on.

        Environments that cannot be saved are played again, from the seeds and actions of their open episodes, where
        they are `make_envs`'s own; others begin their next episode, with the seed it would have had.

        Returns:
            The state; ``"environments"`` says in a word how they are to come back.
        """
        envs, playing = self.envs, self._ready is not None
        episodes = envs.save_episodes() if playing and isinstance(envs, Resumable) else None
        memory = self._before() if playing else None
        return {
            "environments": "restarted" if episodes is None else outlook(episodes),
            "seed": self.seed,
            "env_steps": self.env_steps,
            "next_episodes": self._open_episodes() + ~memory[0] if memory else self._next_episodes + ~self._memory[0],
            "generator": self._generator.bit_generator.state,
            "statistics": self.statistics.state_dict(),
            "envs": envs.state_dict() if isinstance(envs, Stateful) else None,
            "memory": memory,
            "episodes": episodes,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state, as far as the environments can; `comebacks` says how each has come back.

        Args:
            state: What `state_dict` gave.

        Raises:
            CheckpointError: If it is of another seed or number of environments.
        """
        episodes = np.asarray(state["next_episodes"], np.int64)
        if state["seed"] != self.seed or episodes.shape != (self.num_envs,):
            raise CheckpointError(
                f"Rollout: the state is of seed {state['seed']} and {episodes.size} environments; this rollout has "
                f"seed {self.seed} and {self.num_envs}. Make it with the recorded ones."
            )
        self.env_steps = int(state["env_steps"])
        self._generator.bit_generator.state = state["generator"]
        self.statistics.load_state_dict(state["statistics"])
        saved = state.get("envs")
        if isinstance(self.envs, Stateful) != (saved is not None):
            raise CheckpointError(
                f"Rollout: the state has {'none' if saved is None else 'one'} of its environments; these "
                f"{'keep none' if saved is not None else 'expect one'}. Make them as they were, such as NormalizedEnvs."
            )
        if isinstance(self.envs, Stateful) and saved is not None:
            self.envs.load_state_dict(saved)
        self._next_episodes, self._ready, self._underway = episodes.copy(), None, Underway(self.num_envs)
        self._memory = (np.ones(self.num_envs, bool), *self._memory[1:])
        back = None
        if state["episodes"] is not None and isinstance(self.envs, Resumable):
            back = self.envs.resume_episodes(state["episodes"])
        if back is None:
            why, cut = NONE_OPEN, np.zeros(self.num_envs, bool)
            if state["memory"] is not None:
                why, cut = UNSUPPORTED, ~np.asarray(state["memory"][0])
            self._tell_gone(np.full(self.num_envs, why), cut)
        else:
            self._come_back(*back, state["memory"])

    def timing(self) -> Timing:
        """Say where the time went.

        Returns:
            Seconds by stage, since the rollout was made.
        """
        rest_s = time.perf_counter() - self._made_s - self._policy_s - self._environments_s
        return Timing(self._policy_s, self._environments_s, rest_s, self.env_steps)

    def close(self) -> None:
        """Close the environments."""
        self.envs.close()

    def _episodes(self, left: list[int]) -> Iterator[Batch]:
        self.restart()
        running: list[list[tuple[Step, int]]] = [[] for _ in left]
        while any(left):
            step = next(self)
            for row, env_id in enumerate(step.env_ids if step.env_ids is not None else range(len(step))):
                if not left[env_id]:
                    continue
                if step.is_first[row]:
                    running[env_id] = []  # an episode that was lost or cut is none; another one is played
                running[env_id].append((step, row))
                if step.terminated[row] or step.truncated[row]:
                    whole, running[env_id] = running[env_id], []
                    left[env_id] -= 1
                    yield episode_batch(whole)

    def _begin(self) -> Ready:
        if self._normalized is not None:
            self._normalized.mode = self._mode
        self.restart()
        self._any_first = True
        carry, action = self.policy.initial_carry(self.num_envs), self._actions.zeros(self.num_envs)
        self._memory = (self._memory[0], carry, action, np.zeros(self.num_envs, np.float32))
        self._ready = self.envs.reset(self.seed, self._next_episodes.tolist())
        return self._ready

    def _come_back(self, ready: Ready, codes: Int64[ndarray, " N"], memory: Nest) -> None:
        """Go on in environments that have come back, and begin anew in the others."""
        self._ready, gone = ready, codes > REENACTED
        is_first, carry, prev_action, prev_reward = memory
        carry = map_nest(lambda leaf, like: leaf.to(like.device) if hasattr(leaf, "to") else leaf, carry, self._initial)
        self._memory = (is_first | gone, *reset_rows((carry, prev_action, prev_reward), gone, self._blank))
        self._next_episodes, self._any_first = self._open_episodes(), bool(self._memory[0].any())
        self._tell_gone(codes, gone & ~is_first)

    def _tell_gone(self, codes: Int64[ndarray, " N"], cut: Bool[ndarray, " N"]) -> None:
        """Note how each environment has come back, and say which episodes are cut because it has not."""
        self.statistics.discard((codes > REENACTED).nonzero()[0])
        self.comebacks = tuple(COMEBACKS[code] for code in codes.tolist())
        lost = [f"env {row}: {self.comebacks[row]}" for row in cut.nonzero()[0]]
        if lost:
            warnings.warn(
                f"{self.envs.name}: {len(lost)} of {self.num_envs} open episodes did not come back and are cut. "
                f"{'; '.join(lost[:4])}{'; ...' if len(lost) > 4 else ''}. Give the environment get_state() and "
                "set_state(state), or let everything follow from its seed and actions.",
                RuntimeWarning,
                stacklevel=4,
            )

    def _open_episodes(self) -> Int64[ndarray, " N"]:
        """Number the episodes that are played: environments that broke may have passed some over."""
        return getattr(self.envs, "episodes", self._next_episodes)

    def _decide(self, observation: Nest, carry: Nest, context: PolicyContext) -> PolicyOutput:
        drawn = self._mode == "random"
        if drawn and isinstance(self.policy, FunctionPolicy):
            return PolicyOutput(self._draw(context))
        out = check_output(self.policy(observation, carry, context), carry, len(context.env_ids))
        return PolicyOutput(self._draw(context), out.carry, out.extras) if drawn else out

    def _draw(self, context: PolicyContext) -> Nest:
        return self._actions.draw(len(context.env_ids), self._generator, context.action_mask)

    def _came_back(self, outcome: Outcome, ids: Int64[ndarray, " k"]) -> bool:
        """Say whether those that were acted on came back, these and no others."""
        came = outcome.env_ids
        return came is None or (not len(self._underway) and np.array_equal(came, ids))

    def _exchange(
        self, outcome: Outcome, ids: Int64[ndarray, " k"], decided: Nest, carry: Nest, reward: Float32[ndarray, " k"]
    ) -> Nest:
        """Note what was decided for those that were acted on, and take what had been for those that came back."""
        came: Any = outcome.env_ids
        is_first, carries, actions, rewards = self._memory
        carries, actions = put((carries, actions), ids, (carry, decided[1]), self.num_envs)
        is_first, rewards = put((is_first, rewards), came, (self._nowhere[: len(came)], reward), self.num_envs)
        self._memory = (is_first, carries, actions, rewards)
        self._underway.put(ids, decided)
        return self._underway.take(came)

    def _begin_episodes(self, outcome: Outcome, ids: Int64[ndarray, " k"]) -> None:
        """Count a step in which episodes are over, and let the next ones begin."""
        over = outcome.terminated | outcome.truncated
        for more in (outcome.lost, outcome.cut):
            over = over if more is None else over | more
        self.statistics.update(
            ids, _raw(outcome), over, outcome.lost, self.env_steps, cut=outcome.cut, success=outcome.success
        )
        over = put(self._nowhere, ids, over, self.num_envs)
        is_first, *memory = self._memory
        self._memory = (is_first | over, *reset_rows(tuple(memory), over, self._blank))
        self._next_episodes += over
        self._any_first = True
        self._quiet = False

    def _before(self) -> tuple[Bool[ndarray, " N"], Nest, Nest, Float32[ndarray, " N"]]:
        """Give what the policy is told in every environment before its next step to come out."""
        if self._ready is None:
            self._begin()
        memory = self._memory
        if len(self._underway):
            ids, (*_, is_first, carry, _, prev_action, prev_reward) = self._underway.look()
            memory = put(memory, ids, (is_first, carry, prev_action, prev_reward), self.num_envs)
        return memory

    def _after(self) -> list[tuple[Int64[ndarray, " k"], Nest]]:
        """Give the observation of every environment at its next step to come out, where it is known."""
        ready = self._ready or self._begin()
        known = [(ready.env_ids, ready.observation)]
        if len(self._underway):
            ids, (observation, *_) = self._underway.look()
            known.append((ids, observation))
        return known


def _raw(outcome: Outcome) -> Float64[ndarray, " k"]:
    return outcome.reward if outcome.raw_reward is None else outcome.raw_reward


class _Blocks:
    """Cut a rollout into blocks; after an error of the policy or an environment it goes on where it was."""

    def __init__(self, rollout: Rollout, length: int) -> None:
        self._rollout, self._length = rollout, length
        self._block: Block | None = None
        self._finals = rollout.num_envs

    def __iter__(self) -> "_Blocks":
        return self

    def __next__(self) -> Batch:
        rollout = self._rollout
        while self._block is None or not self._block.full:
            if self._block is None:
                before = rollout._before()[1:]
                step = next(rollout)
                self._block = Block(self._length, step, before, self._finals)
            else:
                step = next(rollout)
            self._block.write(step, quiet=rollout._quiet)
        block, self._block = self._block, None
        batch = block.batch(rollout._after(), rollout._memory[0])
        self._finals = max(self._finals, block.finals + rollout.num_envs)
        return batch
