"""Random spaces, as actions and observations: what was chosen is what arrives, is stored and is drawn again."""

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.spaces import Box, Discrete, MultiBinary, MultiDiscrete
from hypothesis import given, settings
from hypothesis import strategies as st

from rlfeed.envs import EnvSource, make_envs
from rlfeed.envs.vector import PoolEnvs
from rlfeed.nest import leaves, map_nest
from rlfeed.replay import ReplayBuffer, Transition
from rlfeed.rollout import Rollout

starts = st.integers(-3, 3)
counts = st.integers(1, 4)
shapes = st.lists(st.integers(1, 3), min_size=1, max_size=3)


@st.composite
def boxes(draw):
    shape = tuple(draw(shapes))
    dtype = draw(st.sampled_from([np.float16, np.float32, np.float64, np.uint8, np.int64]))
    low = draw(st.integers(0, 5))
    if np.dtype(dtype).kind == "f" and draw(st.booleans()):
        return Box(-np.inf, draw(st.sampled_from([low, np.inf])), shape, dtype)
    return Box(low, low + draw(st.integers(0, 9)), shape, dtype)


@st.composite
def multi_discretes(draw):
    nvec = np.full(draw(shapes), draw(counts))
    nvec.flat[0] = draw(counts)
    return MultiDiscrete(nvec, start=np.full(nvec.shape, draw(starts)))


plain = st.one_of(
    boxes(),
    st.builds(Discrete, counts, start=starts),
    multi_discretes(),
    st.builds(MultiBinary, st.one_of(counts, shapes.map(tuple))),
)
nested = st.recursive(
    plain,
    lambda parts: st.one_of(
        st.lists(parts, min_size=1, max_size=3).map(spaces.Tuple),
        st.dictionaries(st.sampled_from("zab"), parts, min_size=1, max_size=3).map(spaces.Dict),
    ),
    max_leaves=5,
)


class Echoes(gymnasium.Env):
    """Shows the action it got, after it has compared it with what its space samples: kind and dtype in every part."""

    def __init__(self, space):
        self.action_space = self.observation_space = space
        self.steps = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.action_space.seed(seed)
        self.steps = 0
        return self.action_space.sample(), {}

    def step(self, action):
        if not self.action_space.contains(action):
            raise ValueError(action)
        parts = dict(leaves(action))
        for path, sampled in leaves(self.action_space.sample()):
            if (type(sampled), sampled.dtype) != (type(parts[path]), parts[path].dtype):
                raise TypeError(f"{path}: {parts[path]!r}, where the space samples {sampled!r}")
        self.steps += 1
        return action, 0.0, False, self.steps == 3, {}


LAYOUTS = [{"mode": "serial"}, *({"mode": "sync", "autoreset": a} for a in ("same_step", "next_step", "disabled"))]
EVERYTHING = spaces.Dict(
    z=spaces.Tuple([Discrete(3, start=-1), MultiBinary((2, 2))]),
    a=spaces.Dict(half=Box(-1, 1, (2, 1), np.float16), wide=Box(-np.inf, np.inf, (3,), np.float64)),
    b=MultiDiscrete([[2, 3], [4, 1]], start=[[5, 0], [-2, 1]]),
    c=Box(0, 255, (2, 2, 1), np.uint8),
)


@pytest.mark.parametrize("min_ready", [None, 1])
def test_spaces_of_every_kind_arrive_in_worker_processes_as_chosen(min_ready):
    envs = PoolEnvs(EnvSource(Echoes, {"space": EVERYTHING}), 4, 2, min_ready=min_ready, context="fork")
    rollout = Rollout(envs, lambda o: 1 / 0, mode="random")
    for _ in range(12):
        step = next(rollout)
        same(step.next_observation, step.action)
    rollout.close()
    assert rollout.statistics.lost == 0


@settings(max_examples=40, deadline=None)
@given(
    space=nested,
    layout=st.sampled_from(LAYOUTS),
)
def test_spaces_any_action_arrives_and_is_drawn_again_as_it_was_chosen(space, layout):
    """rollout 3A.21."""
    rollout = Rollout(make_envs(Echoes, 2, kwargs={"space": space}, **layout), lambda o: 1 / 0, mode="random")
    buffer = ReplayBuffer(space, space, capacity=32, num_envs=2, storage="private")
    chosen = {}
    for _ in range(5):
        step = next(rollout)
        same(step.next_observation, step.action)
        for row, identity in enumerate(buffer.add(step).tolist()):
            chosen[identity] = map_nest(lambda leaf, row=row: leaf[row], step.action)
    batch = buffer.sample(16, Transition())
    for row, identity in enumerate(batch.ids.tolist()):
        for nest in (batch.action, batch.next_observation):
            same(map_nest(lambda leaf, row=row: leaf[row].numpy(), nest), chosen[identity])


def same(nest, other):
    assert [path for path, _ in leaves(nest)] == [path for path, _ in leaves(other)]
    for (path, a), (_, b) in zip(leaves(nest), leaves(other), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=str(path), strict=True)
