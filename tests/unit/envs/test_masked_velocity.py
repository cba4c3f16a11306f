import gymnasium
import numpy as np
import pytest

from rlfeed.envs import make_envs
from rlfeed.rollout import Rollout
from rlfeed.testing.masked import MaskedVelocityCartPole, MaskedVelocityPendulum


@pytest.mark.parametrize(
    ("make", "id", "kept", "steps"),
    [
        (MaskedVelocityCartPole, "CartPole-v1", [0, 2], 500),
        (MaskedVelocityPendulum, "Pendulum-v1", [0, 1], 200),
    ],
)
def test_masked_environment_is_the_original_without_its_velocities(make, id, kept, steps):
    masked, whole = make(), gymnasium.make(id)
    first, _ = masked.reset(seed=3)
    assert np.array_equal(first, whole.reset(seed=3)[0][kept])
    whole.action_space.seed(0)
    for _ in range(8):
        action = whole.action_space.sample()
        (seen, *rest), (shown, *expected) = masked.step(action), whole.step(action)
        assert np.array_equal(seen, shown[kept])
        assert masked.observation_space.contains(seen)
        assert rest == expected
    assert masked.spec.max_episode_steps == steps


def test_masked_environment_is_found_by_its_name():
    envs = make_envs("rlfeed.testing.masked:MaskedVelocityCartPole", 2)
    step = next(Rollout(envs, lambda observation: np.zeros(2, np.int64), seed=0))
    assert step.observation.shape == (2, 2)
