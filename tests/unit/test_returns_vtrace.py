"""V-trace: golden values, identities, and what it converges to."""

import math

import pytest
import torch

from rlfeed.errors import ConfigError, FieldError
from rlfeed.returns import discounted_returns, gae, vtrace

# Two rows of rlax (Apache 2.0), rlax/_src/vtrace_test.py.
ACTOR = torch.tensor(
    [[[8.9, 0.7], [5.0, 1.0], [0.6, 0.1], [-0.9, -0.1]], [[0.3, -5.0], [1.0, -8.0], [0.3, 1.7], [4.7, 3.3]]]
)
LEARNER = torch.tensor(
    [[[0.4, 0.5], [9.2, 8.8], [0.7, 4.4], [7.9, 1.4]], [[1.0, 0.9], [1.0, -1.0], [-4.3, 8.7], [0.8, 0.3]]]
)
ACTION = torch.tensor([[0, 1, 0, 0], [1, 0, 0, 1]])[..., None]
REWARD = torch.tensor([[-1.3, -1.3, 2.3, 42.0], [1.3, 5.3, -3.3, -5.0]])
DISCOUNT = torch.tensor([[0.0, 0.89, 0.85, 0.99], [0.88, 1.0, 0.83, 0.95]])
VALUES = torch.tensor([[2.1, 1.1, -3.1, 0.0, 8.4], [3.1, 0.1, -1.1, 7.4, -1.2]])
VALUE, NEXT = VALUES[:, :-1], VALUES[:, 1:]
LOG_RHO = (LEARNER.log_softmax(-1) - ACTOR.log_softmax(-1)).gather(-1, ACTION)[..., 0]
RUNNING = DISCOUNT > 0


def test_vtrace_rlax_rows_equals_golden():
    """B20."""
    errors = [[-1.6155143, -3.4973226, 1.8670533, 50.316002], [1.4662437, 3.6116405, -8.3327293e-5, -13.54]]

    actual = vtrace(LOG_RHO, REWARD, DISCOUNT, VALUE, NEXT, RUNNING)

    torch.testing.assert_close(actual.targets - VALUE, torch.tensor(errors), rtol=1e-4, atol=2e-6)
    torch.testing.assert_close(actual.advantages, torch.tensor(errors), rtol=1e-4, atol=2e-6)


def test_vtrace_two_episodes_in_a_row_equals_each_alone():
    parts = [tensor[:1] for tensor in (LOG_RHO, REWARD, torch.full_like(DISCOUNT, 0.9), VALUE, NEXT)]
    continues = torch.tensor([[True, True, True, False]])
    twice = vtrace(*(torch.cat([part, part.flip(1)], 1) for part in parts), torch.cat([continues] * 2, 1), lam=0.8)

    for half, order in ((slice(None, 4), (0, 1, 2, 3)), (slice(4, None), (3, 2, 1, 0))):
        alone = vtrace(*(part[:, order] for part in parts), continues, lam=0.8)
        for both, one in zip(twice, alone, strict=True):
            assert torch.equal(both[:, half], one)


def test_vtrace_truncated_step_takes_nothing_of_the_next_episode():
    """B17: values 1 and 100, no rewards: the truncated step's advantage is 0, not 99."""
    value, nothing = torch.tensor([[1.0, 1.0, 100.0, 100.0]]), torch.zeros(1, 4)
    next_value = torch.tensor([[1.0, 1.0, 100.0, 100.0]])  # of the final observation of step 1: 1
    continues = torch.tensor([[True, False, True, False]])

    actual = vtrace(nothing, nothing, nothing + 1, value, next_value, continues)

    assert actual.advantages.tolist() == [[0.0] * 4]
    assert torch.equal(actual.targets, value)
    assert vtrace(nothing, nothing, nothing + 1, value, next_value, ~continues).advantages[0, 1] == 99  # it could be


def test_vtrace_on_policy_equals_gae():
    actual = vtrace(torch.zeros(2, 4), REWARD, DISCOUNT, VALUE, NEXT, RUNNING, lam=0.7)
    advantages = gae(REWARD, DISCOUNT, VALUE, NEXT, RUNNING, lam=0.7)

    torch.testing.assert_close(actual.targets, advantages + VALUE)
    torch.testing.assert_close(actual.advantages, advantages)


@pytest.mark.parametrize("estimate", ["gae", "vtrace"])
def test_on_policy_advantage_telescopes_to_return_less_value(estimate):
    """B21: with lambda 1 every value but the last cancels; the value at the end of the row counts once.

    The return is summed here by hand: an oracle that bootstraps has had the same bug.
    """
    if estimate == "gae":
        actual = gae(REWARD, DISCOUNT, VALUE, NEXT, RUNNING, lam=1.0)
    else:
        actual = vtrace(torch.zeros(2, 4), REWARD, DISCOUNT, VALUE, NEXT, RUNNING).advantages

    for row in range(2):
        for t in range(4):
            total, weight = 0.0, 1.0
            for reward, discount in zip(REWARD[row, t:].tolist(), DISCOUNT[row, t:].tolist(), strict=True):
                total += weight * reward
                weight *= discount
            total += weight * VALUES[row, -1].item()
            assert math.isclose(actual[row, t].item(), total - VALUES[row, t].item(), rel_tol=1e-5, abs_tol=1e-5)


@pytest.mark.parametrize(("rho_bar", "value"), [(1.0, 5 / 6), (1.5, 15 / 17), (1.8, 0.9), (5.0, 0.9)])
def test_vtrace_of_a_bandit_converges_to_the_clipped_policys_value(rho_bar, value):
    """Rewards 1 and 0, mu = (.5, .5), pi = (.9, .1): the fixed point is the policy's that min(rho_bar mu, pi) gives."""
    log_rho, reward = torch.tensor([[0.9 / 0.5], [0.1 / 0.5]]).log(), torch.tensor([[1.0], [0.0]])
    nothing, found = torch.zeros(2, 1), 0.0

    for _ in range(200):  # each action half of the time, as mu has it
        known = torch.full((2, 1), found)
        found = vtrace(log_rho, reward, nothing, known, nothing, nothing > 0, rho_bar=rho_bar).targets.mean().item()

    assert math.isclose(found, value, abs_tol=1e-6)


def test_vtrace_bounds_act_each_on_its_own():
    log_rho = torch.full((1, 2), 4.0).log()
    reward, discount, value, next_value = torch.tensor([[[1.0, 2.0]], [[0.5, 0.5]], [[0.0, 0.0]], [[0.0, 4.0]]])
    continues = torch.tensor([[True, False]])

    actual = vtrace(log_rho, reward, discount, value, next_value, continues, rho_bar=2.0, c_bar=3.0, pg_rho_bar=1.5)

    # Errors: 2 (2 + 2) = 8 and 2 (1 + 0) + 0.5 * 3 * 8 = 14. Advantages: 1.5 (2 + 2) and 1.5 (1 + 0.5 * 8).
    assert actual.targets.tolist() == [[14.0, 8.0]]
    assert actual.advantages.tolist() == [[7.5, 6.0]]


def test_vtrace_improbable_actions_stay_finite():
    log_rho = torch.tensor([[-1e9, 1e9, 0.0]])
    reward, discount, value, next_value = torch.ones(4, 1, 3)

    actual = vtrace(log_rho, reward, discount, value, next_value, torch.tensor([[True, True, False]]))

    assert actual.targets.tolist() == [[1.0, 3.0, 2.0]]
    assert actual.advantages.tolist() == [[0.0, 2.0, 1.0]]


def test_vtrace_gives_constants():
    value = VALUE.clone().requires_grad_()

    assert not vtrace(LOG_RHO, REWARD, DISCOUNT, value, NEXT, RUNNING).targets.requires_grad


def test_vtrace_wrong_bounds_and_shapes_are_refused():
    with pytest.raises(ConfigError, match=r"rho_bar is 0.0, c_bar is -1.0; expected above 0"):
        vtrace(LOG_RHO, REWARD, DISCOUNT, VALUE, NEXT, RUNNING, rho_bar=0.0, c_bar=-1.0)
    with pytest.raises(FieldError, match=r"log_rho has shape \(2, 3\); expected \(2, 4\).*value has shape \(2, 5\)"):
        vtrace(LOG_RHO[:, 1:], REWARD, DISCOUNT, VALUES, NEXT, RUNNING)


def test_discounted_returns_on_policy_equals_vtrace_targets():
    actual = vtrace(torch.zeros(2, 4), REWARD, DISCOUNT, VALUE, NEXT, RUNNING)

    torch.testing.assert_close(actual.targets, discounted_returns(REWARD, DISCOUNT, NEXT, RUNNING))
