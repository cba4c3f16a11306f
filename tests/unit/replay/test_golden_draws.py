"""Golden values of what the replay computes as it draws: n-step sums, prioritized weights, priorities of sequences."""

import numpy as np
import pytest
from gymnasium.spaces import Box, Discrete

from rlfeed.replay import Prioritized, ReplayBuffer, Transition, sequence_priorities
from rlfeed.types import Step


def filled(*, terminated=None, truncated=None, **options):
    """Rewards 1, 2, 3, 4 of one episode; the observation is the number of the step; an end begins the next episode."""
    buffer = ReplayBuffer(Box(-9, 9, (1,), np.float32), Discrete(2), storage="private", **{"capacity": 64, **options})
    first, ids = True, []
    for t in range(4):
        ends = np.array([t == terminated]), np.array([t == truncated])
        now, following = np.array([[t]], np.float32), np.array([[t + 1]], np.float32)
        step = Step(
            now, np.zeros(1, np.int64), np.full(1, t + 1, np.float32), following, *ends, is_first=np.array([first])
        )
        ids += buffer.add(step).tolist()
        first = bool(ends[0] | ends[1])
    return buffer, ids


@pytest.mark.parametrize(
    ("end", "reward", "discount", "successor"),
    [
        ({}, 5.23, 0.729, 3),
        ({"terminated": 1}, 2.8, 0.0, 2),
        ({"truncated": 1}, 2.8, 0.81, 2),
    ],
)
def test_n_step_sums_from_the_first_step_equal_golden(end, reward, discount, successor):
    """B7, B9: gamma^k of the k steps that were summed, and the observation after those."""
    buffer, ids = filled(**end)
    batch = buffer.sample(64, Transition(n_step=3, gamma=0.9))
    row = batch.ids.tolist().index(ids[0])

    assert batch.reward[row].item() == pytest.approx(reward)
    assert batch.discount[row].item() == pytest.approx(discount)
    assert batch.next_observation[row].item() == successor


@pytest.mark.parametrize(
    ("alpha", "beta", "probabilities", "weights"),
    [
        (1.0, 1.0, [0.1, 0.2, 0.3, 0.4], [1, 0.5, 1 / 3, 0.25]),
        (1.0, 0.4, [0.1, 0.2, 0.3, 0.4], [1, 0.757858, 0.644394, 0.574349]),
        (0.6, 0.4, [0.14823, 0.224674, 0.286555, 0.340542], [1, 0.846745, 0.768229, 0.716978]),
    ],
)
def test_prioritized_draws_and_weights_equal_golden(alpha, beta, probabilities, weights):
    """B47: priorities 1, 2, 3, 4; chi-squared of the draws with 3 degrees of freedom below its 1 - 1e-6 quantile."""
    buffer, ids = filled(sampler=Prioritized(alpha=alpha, beta=beta))
    buffer.update_priorities(np.array(ids), [1.0, 2.0, 3.0, 4.0])

    batch = buffer.sample(100_000, Transition())
    place = np.searchsorted(ids, batch.ids.numpy())

    np.testing.assert_allclose(batch.weights.numpy(), np.array(weights)[place], rtol=2e-6)
    expected = 100_000 * np.array(probabilities)
    assert (((np.bincount(place, minlength=4) - expected) ** 2) / expected).sum() < 30.7


def test_sequence_priority_equals_golden():
    """What the mask leaves out enters neither the maximum nor the mean."""
    values, mask = np.array([[0.5, 1.0, 2.0, 70.0]]), np.array([[True, True, True, False]])

    assert sequence_priorities(values, mask, 0.9).tolist() == pytest.approx([1.916667], rel=1e-6)
