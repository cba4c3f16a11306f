"""Returns of blocks and sequences against slow twins: sums written as the papers define them, in Python's numbers.

The twins look forward from each step, over what the environments say has happened; none of them knows a mask, and none
is a recursion. Values are known functions of the observation, so that a value of the wrong one is another number.
"""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.scripted_envs import EVENTS, ScriptedEnvs

from rlfeed.replay import ReplayBuffer, Sequence
from rlfeed.returns import (
    continuing,
    discounted_returns,
    gae,
    lambda_returns,
    masked_mean,
    n_step_returns,
    standardize,
    successors,
    vtrace,
)
from rlfeed.rollout import Rollout

GAMMA, LAM, N = 0.9, 0.7, 3
BOUNDS = {"rho_bar": 1.3, "c_bar": 0.8, "pg_rho_bar": 1.1}
SCRIPTS = st.lists(st.sampled_from((*EVENTS, "wait")), min_size=1, max_size=30)


def value_of(observation):
    return torch.as_tensor(observation, dtype=torch.float64) @ torch.tensor([37.0, 9.1, 0.53, 0.0], dtype=torch.float64)


def log_rho_of(observation):
    return (
        (torch.as_tensor(observation, dtype=torch.float64) @ torch.tensor([7.0, 5.0, 3.0, 0.0]).double()) % 11 - 5
    ) / 4


def play(num_envs, events):
    envs = ScriptedEnvs(num_envs, lambda call, env: events[(call * num_envs + env) % len(events)])
    return envs, Rollout(envs, lambda observation: (observation[:, 2] % 5).astype("int64"))


def run_from(account, keys, t):
    """The steps from column t on, of the same episode, as they happened: reward, discount, value, next value, rho."""
    found = []
    for place in range(t, len(keys)):
        if keys[place] is None or (found and keys[place] != (*keys[place - 1][:2], keys[place - 1][2] + 1)):
            break
        before, _, reward, after, terminated, truncated, lost, _ = account[keys[place]]
        if lost:
            break
        value, next_value, log_rho = value_of(before).item(), value_of(after).item(), log_rho_of(before).item()
        found.append((reward, 0.0 if terminated else GAMMA, value, next_value, math.exp(log_rho)))
        if terminated or truncated:
            break
    return found


def sum_of(steps, n):
    """n rewards and the value of what follows, or as many as there are."""
    total, weight = 0.0, 1.0
    for reward, discount, _, next_value, _ in steps[:n]:
        total, weight, following = total + weight * reward, weight * discount, next_value
    return total + weight * following


def twins(steps):
    """Every estimate for the first of the steps, by its definition."""
    count = len(steps)
    mixed = sum((1 - LAM) * LAM ** (n - 1) * sum_of(steps, n) for n in range(1, count))
    mixed += LAM ** (count - 1) * sum_of(steps, count)
    errors = [reward + discount * next_value - value for reward, discount, value, next_value, _ in steps]

    def corrected(first):
        weight, total = 1.0, steps[first][2]
        for t in range(first, count):
            total += weight * min(steps[t][4], BOUNDS["rho_bar"]) * errors[t]
            weight *= steps[t][1] * LAM * min(steps[t][4], BOUNDS["c_bar"])
        return total

    reward, discount, value, next_value, rho = steps[0]
    following = LAM * corrected(1) + (1 - LAM) * next_value if count > 1 else next_value
    return {
        "lambda": mixed,
        "discounted": sum_of(steps, count),
        "n_step": sum_of(steps, N),
        "gae": sum((GAMMA * LAM) ** t * error for t, error in enumerate(errors)),
        "targets": corrected(0),
        "advantages": min(rho, BOUNDS["pg_rho_bar"]) * (reward + discount * following - value),
    }


def estimates(batch):
    value = value_of(batch.observation)
    finals = () if batch.final_observation is None else (value_of(batch.final_observation), batch.final_index)
    next_value, continues = successors(value, *finals), continuing(batch)
    reward, value = batch.reward.double(), value[:, :-1]
    discount = GAMMA * (~batch.terminated).double()
    parts = (reward, discount, next_value, continues)
    corrected = vtrace(log_rho_of(batch.observation[:, :-1]), reward, discount, value, *parts[2:], lam=LAM, **BOUNDS)
    return {
        "lambda": lambda_returns(*parts, lam=LAM),
        "discounted": discounted_returns(*parts),
        "n_step": n_step_returns(*parts, n=N),
        "gae": gae(reward, discount, value, next_value, continues, lam=LAM),
        "targets": corrected.targets,
        "advantages": corrected.advantages,
    }


def check(batch, account):
    """Every estimate of every step of the batch is its twin's."""
    found = estimates(batch)
    counted = 0
    for row in range(len(batch)):
        places = zip(batch.observation[row, :-1].tolist(), batch.mask[row].tolist(), strict=True)
        keys = [tuple(map(int, observation[:3])) if valid else None for observation, valid in places]
        for t, key in enumerate(keys):
            if key is not None:
                expected = twins(run_from(account, keys, t))
                actual = {name: tensor[row, t].item() for name, tensor in found.items()}
                assert all(math.isclose(actual[name], expected[name], rel_tol=1e-9, abs_tol=1e-6) for name in expected)
                counted += 1
    assert counted == batch.mask.sum()


def account_of(envs):
    return {tuple(map(int, entry[0][:3])): entry for log in envs.log for entry in log}


@settings(max_examples=25, deadline=None)
@given(num_envs=st.integers(1, 3), events=SCRIPTS, length=st.integers(1, 9))
def test_returns_of_blocks_equal_twins_whatever_happens(num_envs, events, length):
    """B4, B15, B16, B18, B19, B22, B23, B25: ends, cuts, losses and environments out of step, in any order."""
    envs, rollout = play(num_envs, events)
    for _, block in zip(range(2), rollout.blocks(length), strict=False):
        check(block, account_of(envs))


@settings(max_examples=15, deadline=None)
@given(
    events=SCRIPTS.filter(lambda events: set(events) - {"lost", "wait"}),
    length=st.integers(1, 6),
    burn_in=st.integers(0, 2),
    boundary=st.sampled_from(["pad", "cross"]),
)
def test_returns_of_stored_sequences_equal_twins_whatever_happened(events, length, burn_in, boundary):
    """B12, B29, B51: padded sequences, and those that run on into the next episode."""
    envs, rollout = play(2, events)
    buffer = ReplayBuffer(envs.observation_space, envs.action_space, capacity=128, num_envs=2, storage="private")
    rollout.collect(buffer, steps=40)

    batch = buffer.sample(12, Sequence(length, burn_in=burn_in, gamma=GAMMA, boundary=boundary))

    check(batch, account_of(envs))


def made(rows=3, steps=7, seed=0):
    """Random rows: reward, discount, value, next value; and a boundary here and there."""
    generator = torch.Generator().manual_seed(seed)
    numbers = list(torch.randn(4, rows, steps, generator=generator))
    numbers[1] = 0.9 * (torch.rand(rows, steps, generator=generator) > 0.2)
    continues = (torch.rand(rows, steps, generator=generator) > 0.2) & (numbers[1] > 0)
    continues[:, -1] = False
    return numbers, continues


FUNCTIONS = {
    "lambda_returns": lambda r, d, v, n, c: lambda_returns(r, d, n, c, lam=0.8),
    "n_step_returns": lambda r, d, v, n, c: n_step_returns(r, d, n, c, n=3),
    "gae": lambda r, d, v, n, c: gae(r, d, v, n, c, lam=0.8),
    "vtrace": lambda r, d, v, n, c: torch.stack(vtrace(v, r, d, v, n, c, lam=0.8)),
}


def each(test):
    """Run a test for every function, with a name that a failure shows."""

    def all_of_them():
        for name, function in FUNCTIONS.items():
            test(name, function)

    all_of_them.__name__, all_of_them.__doc__ = test.__name__, test.__doc__
    return all_of_them


@each
def test_returns_of_padded_rows_are_the_same_bits(name, function):
    """(a): padded to L and to 2L, whatever stands in the padding."""
    numbers, continues = made()
    nan = torch.full((3, 9), math.nan)

    padded = function(*(torch.cat([part, nan], 1) for part in numbers), torch.cat([continues, nan > 0], 1))

    assert torch.equal(padded[..., :7], function(*numbers, continues)), name


@each
def test_returns_of_joined_rows_are_those_of_each(name, function):
    """(b): one long row with a boundary equals its episodes, each alone."""
    (numbers, continues), (others, more) = made(seed=1), made(seed=2)

    joined = function(
        *(torch.cat(pair, 1) for pair in zip(numbers, others, strict=True)), torch.cat([continues, more], 1)
    )

    assert torch.equal(joined[..., :7], function(*numbers, continues)), name
    assert torch.equal(joined[..., 7:], function(*others, more)), name


@each
def test_returns_of_permuted_rows_are_permuted(name, function):
    """(c)."""
    (numbers, continues), order = made(), torch.tensor([2, 0, 1])

    permuted = function(*(part[order] for part in numbers), continues[order])

    assert torch.equal(permuted, function(*numbers, continues)[..., order, :]), name


def test_masked_loss_of_longer_padding_has_the_same_gradients():
    """(a), B33: losses and normalised advantages know nothing of padding."""
    (reward, discount, value, next_value), continues = made()
    results = []
    for padding in (0, 7, 14):
        weight = torch.tensor(0.5, requires_grad=True)
        parts = [torch.nn.functional.pad(part, (0, padding)) for part in (reward, discount, weight * value, next_value)]
        mask = torch.nn.functional.pad(torch.ones(3, 7, dtype=torch.bool), (0, padding))
        advantages = gae(*parts, torch.nn.functional.pad(continues, (0, padding)), lam=0.9)
        loss = masked_mean(advantages.square(), mask) + masked_mean(standardize(advantages, mask).exp(), mask)
        loss.backward()
        results.append((loss.item(), weight.grad.item()))

    assert all(
        math.isclose(a, b, rel_tol=1e-6) for other in results[1:] for a, b in zip(results[0], other, strict=True)
    )


def test_returns_of_one_lambda_equal_those_of_one_a_step():
    """B18: the same bits whether lambda is a number or a tensor."""
    (reward, discount, value, next_value), continues = made()
    lam = torch.full((3, 7), 0.8)

    assert torch.equal(
        gae(reward, discount, value, next_value, continues, lam=lam),
        gae(reward, discount, value, next_value, continues, lam=0.8),
    )
    assert torch.equal(
        lambda_returns(reward, discount, next_value, continues, lam=lam),
        lambda_returns(reward, discount, next_value, continues, lam=0.8),
    )
    for number, each_step in zip(
        vtrace(value, reward, discount, value, next_value, continues, lam=0.8),
        vtrace(value, reward, discount, value, next_value, continues, lam=lam),
        strict=True,
    ):
        assert torch.equal(number, each_step)


def test_lambda_returns_bounds_are_n_step_returns():
    (reward, discount, _, next_value), continues = made()
    parts = (reward, discount, next_value, continues)

    assert torch.equal(lambda_returns(*parts, lam=0.0), n_step_returns(*parts, n=1))
    torch.testing.assert_close(lambda_returns(*parts, lam=1.0), n_step_returns(*parts, n=7))


def test_lambda_returns_gradients_equal_differences():
    (reward, discount, _, next_value), continues = made(rows=2, steps=5)
    inputs = tuple(part.double().requires_grad_() for part in (reward, discount + 0.05, next_value))

    assert torch.autograd.gradcheck(lambda r, d, n: lambda_returns(r, d, n, continues, lam=0.8), inputs)
    assert torch.autograd.gradcheck(lambda r, d, n: n_step_returns(r, d, n, continues, n=3), inputs)
    assert torch.autograd.gradcheck(lambda r, d, n: gae(r, d, n * 2, n, continues, lam=0.8), inputs)
