"""Action masks: from infos or observations, of every kind of discrete space, obeyed by all and enforced."""

import itertools

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from rlfeed.envs import EnvSource, make_envs
from rlfeed.envs.vector import PoolEnvs
from rlfeed.errors import EnvContractError, PolicyError
from rlfeed.rollout import Actions, EpsilonGreedy, Rollout
from rlfeed.types import PolicyOutput

SPACES = {
    "discrete": spaces.Discrete(4, start=3),
    "multidiscrete": spaces.MultiDiscrete([2, 3], start=[1, -1]),
    "multidiscrete-2d": spaces.MultiDiscrete([[2, 3], [4, 2]]),
    "multibinary": spaces.MultiBinary((2, 2)),
}
SIZES = {"discrete": [4], "multidiscrete": [2, 3], "multidiscrete-2d": [2, 3, 4, 2], "multibinary": [2] * 4}
LAYOUTS = [{"mode": "serial"}, *({"mode": "sync", "autoreset": a} for a in ("same_step", "next_step", "disabled"))]


class Masked(gymnasium.Env):
    """Has another mask in every episode and step, in the info or the observation, and dies of a masked action."""

    def __init__(self, kind="discrete", place="info", form="array"):
        self.kind, self.place, self.form = kind, place, form
        self.action_space = SPACES[kind]
        self.entries = sum(SIZES[kind])
        vector = spaces.Box(-np.inf, np.inf, (2,), np.float32)
        keys = {"vector": vector, "action_mask": spaces.MultiBinary(self.entries)}
        self.observation_space = spaces.Dict(keys) if place == "observation" else vector
        self.episode = -1

    def reset(self, *, seed=None, options=None):
        self.episode, self.t = self.episode + 1, 0
        return self._tell()

    def step(self, action):
        if not allows(self.kind, mask_at(self.kind, self.episode, self.t), action):
            raise ValueError(f"{action} is masked")
        self.t += 1
        observation, info = self._tell()
        return observation, 1.0, self.t == 3 and self.episode % 2 == 0, self.t == 3 and self.episode % 2 == 1, info

    def _tell(self):
        mask, vector = mask_at(self.kind, self.episode, self.t), np.array([self.episode, self.t], np.float32)
        if self.place == "observation":
            return {"vector": vector, "action_mask": mask.astype(np.int8)}, {}
        if self.form == "tuple":
            mask = tuple(np.split(mask, np.cumsum(SIZES[self.kind])[:-1]))
        return vector, {"action_mask": mask}


def mask_at(kind, episode, t):
    """Allow in component c the values (episode + t + c) % size, and one more where there are four."""
    parts = []
    for c, size in enumerate(SIZES[kind]):
        part = np.zeros(size, bool)
        part[(episode + t + c) % size] = True
        part[(episode + t + c + 2) % size] |= size == 4
        parts.append(part)
    return np.concatenate(parts)


def allows(kind, mask, action):
    space = SPACES[kind]
    low = getattr(space, "start", 0)
    values = np.ravel(np.asarray(action) - low)
    begins = np.cumsum(SIZES[kind]) - SIZES[kind]
    return all(mask[begin + value] for begin, value in zip(begins, values, strict=True))


class ObeysContext:
    """Takes the first allowed action, as the context's mask says, and notes what it was shown."""

    def __init__(self, kind):
        self.kind, self.seen = kind, []

    def initial_carry(self, num_envs):
        return ()

    def __call__(self, observation, carry, context):
        vector = observation["vector"] if isinstance(observation, dict) else observation
        self.seen += [
            (mask.tolist(), mask_at(self.kind, *row).tolist())
            for mask, row in zip(context.action_mask, vector.astype(int), strict=True)
        ]
        space, sizes = SPACES[self.kind], SIZES[self.kind]
        parts = np.split(context.action_mask, np.cumsum(sizes)[:-1], axis=1)
        values = np.stack([part.argmax(1) for part in parts], axis=1).reshape(-1, *space.shape)
        return PolicyOutput(values + getattr(space, "start", 0))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("place", ["info", "observation"])
@pytest.mark.parametrize("kind", SPACES)
def test_masks_no_masked_action_is_ever_taken(kind, place, layout):
    """rollout 3A.41: the policy sees the mask of the observation it acts on, random actions obey it, ends included."""
    policy = ObeysContext(kind)
    rollout = Rollout(make_envs(Masked, 2, kwargs={"kind": kind, "place": place}, **layout), policy)
    list(itertools.islice(rollout, 12))
    rollout.mode = "random"
    list(itertools.islice(rollout, 12))
    assert rollout.statistics.episodes >= 8
    assert all(shown == true for shown, true in policy.seen)


@pytest.mark.parametrize("min_ready", [None, 2])
@pytest.mark.parametrize("place", ["info", "observation"])
def test_masks_of_worker_processes_are_those_of_the_observation_acted_on(place, min_ready):
    kind = "multidiscrete-2d"
    policy = ObeysContext(kind)
    source = EnvSource(Masked, {"kind": kind, "place": place})
    rollout = Rollout(PoolEnvs(source, 4, 2, min_ready=min_ready, context="fork"), policy)
    list(itertools.islice(rollout, 16))
    rollout.mode = "random"
    list(itertools.islice(rollout, 16))
    rollout.close()
    assert rollout.statistics.episodes >= 8
    assert rollout.statistics.lost == 0  # a masked action raises, which would lose the row
    assert all(shown == true for shown, true in policy.seen)


@pytest.mark.parametrize("kind", SPACES)
def test_masks_epsilon_greedy_explores_what_is_allowed_only(kind):
    policy = EpsilonGreedy(ObeysContext(kind), lambda steps: 1.0, SPACES[kind])
    rollout = Rollout(make_envs(Masked, 2, mode="serial", kwargs={"kind": kind}), policy)
    taken = {tuple(np.ravel(row)) for step in itertools.islice(rollout, 60) for row in step.action}
    assert len(taken) > 1  # none of which the environment has refused


@pytest.mark.parametrize(
    ("kind", "action", "message"),
    [
        ("discrete", [3, 5], r"env 1: action is 5.*expected one of \[4, 6\]"),
        ("multidiscrete", [[1, 0], [2, -1]], r"env 1: action\[1\] is -1.*expected one of \[1\]"),
        ("multidiscrete-2d", [[[0, 1], [2, 1]], [[1, 2], [2, 0]]], r"env 1: action\[1\]\[0\] is 2.*\[1, 3\]"),
        ("multibinary", [[[0, 1], [0, 1]], [[1, 0], [0, 0]]], r"env 1: action\[1\]\[0\] is 0.*expected one of \[1\]"),
    ],
)
def test_masks_policy_that_takes_a_masked_action_is_named_with_what_is_allowed(kind, action, message):
    mask = np.stack([mask_at(kind, 0, 0), mask_at(kind, 1, 0)])
    with pytest.raises(PolicyError, match=message):
        Actions(SPACES[kind]).fit(np.array(action), np.arange(2), mask)


def test_masks_function_that_ignores_them_fails_at_the_masked_action_and_not_before():
    rollout = Rollout(Masked(place="observation"), lambda o: np.array([3]))
    assert next(rollout).action.tolist() == [3]
    with pytest.raises(PolicyError, match="env 0: action is 3, which its action mask forbids"):
        next(rollout)


def test_masks_one_for_each_component_as_gymnasium_samples_with_are_joined():
    envs = make_envs(Masked, 2, mode="serial", kwargs={"kind": "multidiscrete", "form": "tuple"})
    rollout = Rollout(envs, ObeysContext("multidiscrete"))
    list(itertools.islice(rollout, 8))
    assert rollout.statistics.episodes == 4


def test_masks_that_leave_one_component_no_value_are_refused_from_both_places():
    class Stuck(Masked):
        def _tell(self):
            observation, info = super()._tell()
            mask = np.array([1, 1, 0, 0, 0], np.int8)
            if self.place == "observation":
                return {**observation, "action_mask": mask}, info
            return observation, {"action_mask": mask}

    for place in ("info", "observation"):
        with pytest.raises(EnvContractError, match=r"at least one .*for each component"):
            next(Rollout(Stuck("multidiscrete", place), ObeysContext("multidiscrete")))


def test_masks_observation_of_another_space_is_left_to_the_policy():
    class Boxed(Masked):
        def __init__(self):
            super().__init__("discrete", "observation")
            self.action_space = spaces.Box(-1, 1, (1,))

        def step(self, action):
            return self._tell()[0], 0.0, False, False, {}

    step = next(Rollout(Boxed(), lambda o: np.zeros((1, 1))))
    assert step.action.tolist() == [[0.0]]
