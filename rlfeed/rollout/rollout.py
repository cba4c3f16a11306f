"""The iterator through environments: a policy's outputs are fed back as its next inputs."""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import gymnasium
import numpy as np
from gymnasium.vector import VectorEnv

from rlfeed.envs.autoreset import Envs, Ready
from rlfeed.envs.make import as_envs
from rlfeed.envs.normalize import NormalizedEnvs
from rlfeed.errors import CheckpointError, ConfigError, UnsupportedError, suggest
from rlfeed.nest import Nest, leaves
from rlfeed.rollout.actions import Actions, Handling
from rlfeed.rollout.policy import FunctionPolicy, adapt, check_output
from rlfeed.rollout.rows import copy, put, reset_rows, take
from rlfeed.rollout.statistics import EpisodeStatistics
from rlfeed.rollout.views import block_batch, episode_batch, positive, quotas
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
        self.policy: Policy = adapt(policy)
        self.mode = mode
        self.seed = seed
        self.env_steps = 0
        self.num_envs = self.envs.num_envs
        self.statistics = EpisodeStatistics(self.num_envs)
        self._actions = Actions(self.envs.action_space, actions)
        self._generator = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=(STREAM,))))
        self._initial: Nest = self.policy.initial_carry(1)
        self._recurrent = any(True for _ in leaves(self._initial))
        self._next_episodes = np.zeros(self.num_envs, np.int64)
        self._ready: Ready | None = None
        # One row per environment: what the next step of each needs to know of the step before.
        self._is_first = np.ones(self.num_envs, bool)
        self._carry: Nest = ()
        self._prev_action: Nest = None
        self._prev_reward = np.zeros(self.num_envs, np.float32)

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
        ready = self._upcoming()
        ids, num_envs = ready.env_ids, self.num_envs
        is_first = take(self._is_first, ids, num_envs)
        carry = take(self._carry, ids, num_envs)
        prev_action = take(self._prev_action, ids, num_envs)
        prev_reward = take(self._prev_reward, ids, num_envs)
        if self._any_first:
            carry = reset_rows(carry, is_first, self._initial)
            prev_action = reset_rows(prev_action, is_first, self._actions.zeros(1))
            prev_reward = np.where(is_first, np.float32(0), prev_reward)
        mask = self._actions.mask(ready.action_mask, ready.observation)
        context = self._context = PolicyContext(
            is_first, self._mode, ids, self.env_steps, prev_action, prev_reward, mask, self._generator
        )
        # The step keeps a copy of the carry: policies may update theirs in place.
        kept = copy(carry) if self._recurrent else ()
        out = self._decide(ready.observation, carry, context)
        action = self._actions.fit(out.action, ids, mask)
        env_action = self._actions.executed(action)
        self._ready = None  # an environment that raises is begun anew, at the next episode
        outcome = self.envs.step(action if env_action is None else env_action)
        reward = outcome.reward.astype(np.float32)
        step = Step(
            ready.observation,
            action,
            reward,
            outcome.next_observation,
            outcome.terminated,
            outcome.truncated,
            is_first=is_first,
            env_ids=ids,
            lost=outcome.lost,
            carry=kept,
            extras=out.extras,
            env_action=env_action,
        )
        ended = outcome.terminated | outcome.truncated
        if outcome.lost is not None:
            ended = ended | outcome.lost
        self.env_steps += len(ids) if outcome.lost is None else len(ids) - int(outcome.lost.sum())
        # Where no episode ended, what to act on is what came back: the contract spares a reduction in every step.
        any_ended = outcome.lost is not None or outcome.ready.observation is not outcome.next_observation
        raw_reward = outcome.reward if outcome.raw_reward is None else outcome.raw_reward
        self.statistics.update(ids, raw_reward, ended if any_ended else None, outcome.lost, self.env_steps)
        self._is_first = put(self._is_first, ids, ended, num_envs)
        self._carry = put(self._carry, ids, out.carry, num_envs)
        self._prev_action = put(self._prev_action, ids, action, num_envs)
        self._prev_reward = put(self._prev_reward, ids, reward, num_envs)
        self._any_first = any_ended
        if any_ended:
            self._next_episodes[ids[ended]] += 1
        self._ready = outcome.ready
        return step

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
            An endless iterator over `Batch` ``[N, T]``: ``observation[:, t + 1]`` is what was acted on after step t;
            where an episode ended, its ``final_observation`` ``[K, ...]`` stands at ``final_index`` ``[K, 2]``.

        Raises:
            ConfigError: If ``T`` is no positive integer.
            UnsupportedError: While iterating, if the environments are not in step (NEXT_STEP autoreset).
        """
        return self._blocks(positive("Rollout.blocks: T", T))

    def restart(self) -> None:
        """Let every environment begin its next episode with the next step; running episodes are cut."""
        self._next_episodes += ~self._is_first
        self._is_first = np.ones(self.num_envs, bool)
        self.statistics.discard(np.arange(self.num_envs))
        self._ready = None

    def state_dict(self) -> dict[str, Any]:
        """Give what a later process needs to go on.

        Environments are not saved: ``"environments": "restarted"`` says that each begins its next episode, with the
        seed it would have had.

        Returns:
            The state, with that of environments which have one, such as `NormalizedEnvs`.
        """
        return {
            "environments": "restarted",
            "seed": self.seed,
            "env_steps": self.env_steps,
            "next_episodes": self._next_episodes + ~self._is_first,
            "generator": self._generator.bit_generator.state,
            "statistics": self.statistics.state_dict(),
            "envs": self.envs.state_dict() if isinstance(self.envs, Stateful) else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state: every environment begins its next episode.

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
        self._next_episodes = episodes.copy()
        self._is_first = np.ones(self.num_envs, bool)
        self._ready = None

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
                running[env_id].append((step, row))
                if step.lost is not None and step.lost[row]:
                    running[env_id] = []  # a cut episode is none; another one is played
                elif step.terminated[row] or step.truncated[row]:
                    whole, running[env_id] = running[env_id], []
                    left[env_id] -= 1
                    yield episode_batch(whole)

    def _blocks(self, length: int) -> Iterator[Batch]:
        while True:
            steps = [next(self)]
            context = self._context
            steps += [next(self) for _ in range(length - 1)]
            if any(len(step) < self.num_envs for step in steps):
                raise UnsupportedError(
                    f"Rollout.blocks: {self.envs.name} skips rows after an episode's end (NEXT_STEP autoreset); "
                    "expected environments in step. Make them with autoreset='same_step' or 'disabled'."
                )
            yield block_batch(steps, context, self._upcoming())

    def _upcoming(self) -> Ready:
        if isinstance(self.envs, NormalizedEnvs):
            self.envs.mode = self._mode
        if self._ready is None:
            self._ready = self._begin()
        return self._ready

    def _begin(self) -> Ready:
        self.restart()
        self._any_first = True
        self._carry = self.policy.initial_carry(self.num_envs)
        self._prev_action = self._actions.zeros(self.num_envs)
        self._prev_reward = np.zeros(self.num_envs, np.float32)
        return self.envs.reset(self.seed, self._next_episodes.tolist())

    def _decide(self, observation: Nest, carry: Nest, context: PolicyContext) -> PolicyOutput:
        drawn = self._mode == "random"
        if drawn and isinstance(self.policy, FunctionPolicy):
            return PolicyOutput(self._draw(context))
        out = check_output(self.policy(observation, carry, context), carry, len(context.env_ids))
        return PolicyOutput(self._draw(context), out.carry, out.extras) if drawn else out

    def _draw(self, context: PolicyContext) -> Nest:
        return self._actions.draw(len(context.env_ids), self._generator, context.action_mask)
