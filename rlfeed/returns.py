"""Returns, advantages and their corrections: the equations that learners share, on rows of steps ``[B, T]``.

For step t of a row: r_t its ``reward``, d_t its ``discount`` (gamma, or 0 where it terminated), v_t the ``value`` of
what was acted on, v'_t the ``next_value`` of the step's true successor (the final observation where an episode ended),
and c_t ``continues``: whether column t+1 is the next step of the same episode. What is bootstrapped from (d_t v'_t) and
where sums stop (c_t) are thus two things, as a truncated step needs. `continuing` and `successors` read them from a
block of a rollout or from sequences of the replay.

Every sum over the future is G_t = x_t + w_t G_{t+1}: `_sums` adds it up in log2(T) rounds over whole rows, in place of
T over columns (Blelloch 1990, Prefix sums and their applications, section 1.4). What a mask leaves out is chosen away,
never multiplied by zero: there, a value may be NaN. The last column counts as one that nothing follows.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from rlfeed.errors import ConfigError, FieldError
from rlfeed.types import Batch

EPSILON = 1e-3  # of `rescale`: keeps it invertible


class VTrace(NamedTuple):
    """Hold what `vtrace` gives: ``targets`` of the values and ``advantages`` of the actions, ``[B, T]`` each."""

    targets: Float[Tensor, "B T"]
    advantages: Float[Tensor, "B T"]


def continuing(batch: Batch) -> Bool[Tensor, "B T"]:
    """Tell where the next column is the next step of the same episode.

    Args:
        batch: ``[B, T]``: a block of a rollout, or sequences or episodes from the replay, padded by any rule.

    Returns:
        ``[B, T]``: False where an episode ended or was cut, where there is no step, before that, and in the last
        column.

    Raises:
        FieldError: If the batch has no axis of steps.
    """
    if batch.reward.ndim != 2:
        raise FieldError(
            f"continuing: the batch's reward has shape {tuple(batch.reward.shape)}; expected [B, T]. Give a block of "
            "Rollout.blocks, or sequences."
        )
    ends = batch.terminated | batch.truncated
    if batch.mask is not None:
        ends |= ~batch.mask
        ends[:, :-1] |= ~batch.mask[:, 1:]
    if batch.is_first is not None:  # a cut episode's last step has no flag: the next one tells
        ends[:, :-1] |= batch.is_first[:, 1:]
    if batch.final_index is not None:
        ends = ends.index_put(tuple(batch.final_index.T), ends.new_ones(()))
    return _without_last(~ends)


def successors(
    value: Float[Tensor, "B T1 ..."],
    final_value: Float[Tensor, "K ..."] | None = None,
    final_index: Int64[Tensor, "K 2"] | None = None,
) -> Float[Tensor, "B T ..."]:
    """Give the value of every step's true successor.

    Args:
        value: ``[B, T+1, ...]`` of ``observation``.
        final_value: ``[K, ...]`` of ``final_observation``; None where there is none.
        final_index: ``[K, 2]``, the (row, step) of each.

    Returns:
        ``[B, T, ...]``: ``value[:, t + 1]``, and the final observation's where step t led to one.

    Raises:
        FieldError: If the shapes do not fit, or one of the two is missing.
    """
    if final_value is None and final_index is None:
        return value[:, 1:]
    if final_value is None or final_index is None:
        missing = "final_value" if final_value is None else "final_index"
        raise FieldError(f"successors: {missing} is None; expected both or neither. Give the batch's own.")
    expected = (len(final_index), *value.shape[2:])
    if final_value.shape != expected:
        raise FieldError(f"successors: final_value has shape {tuple(final_value.shape)}; expected {expected}.")
    return value[:, 1:].index_put(tuple(final_index.T), final_value)


def lambda_returns(
    reward: Float[Tensor, "B T"],
    discount: Float[Tensor, "B T"],
    next_value: Float[Tensor, "B T"],
    continues: Bool[Tensor, "B T"],
    *,
    lam: float | Float[Tensor, "B T"],
) -> Float[Tensor, "B T"]:
    """Mix the n-step returns of all n.

        G_t = r_t + d_t ((1 - lam) v'_t + lam G_{t+1})    where c_t, else    r_t + d_t v'_t

    Q(lambda) is this with v'_t = max_a Q(s'_t, a).

    Args:
        reward: r.
        discount: d, 0 to 1.
        next_value: v'.
        continues: c.
        lam: 0 (one step) to 1 (all there are); one number, or one a step.

    Returns:
        ``[B, T]``; gradients flow to whatever asks for them.

    Raises:
        FieldError: If shapes or dtypes differ; all findings at once.

    Source:
        Sutton and Barto 2018 (Reinforcement learning), equation 12.18; Daley and Amato 2019 (Reconciling
        lambda-returns with experience replay), equation 5, for Q(lambda) as Gallici et al. 2024 (PQN) use it.
    """
    _check("lambda_returns", reward=reward, discount=discount, next_value=next_value, continues=continues, lam=lam)
    onward = _where_continuing(continues, discount * lam)
    return _sums(reward + _times(discount - onward, next_value), onward)


def discounted_returns(
    reward: Float[Tensor, "B T"],
    discount: Float[Tensor, "B T"],
    next_value: Float[Tensor, "B T"],
    continues: Bool[Tensor, "B T"],
) -> Float[Tensor, "B T"]:
    """Sum the rewards to the end of the episode, or of the row: there the value of what follows is added.

    Args:
        reward: r.
        discount: d, 0 to 1.
        next_value: v'; zeros give sums of rewards alone.
        continues: c.

    Returns:
        ``[B, T]``; gradients flow to whatever asks for them.

    Raises:
        FieldError: If shapes or dtypes differ; all findings at once.

    Source:
        Sutton and Barto 2018 (Reinforcement learning), equation 3.9.
    """
    return lambda_returns(reward, discount, next_value, continues, lam=1.0)


def n_step_returns(
    reward: Float[Tensor, "B T"],
    discount: Float[Tensor, "B T"],
    next_value: Float[Tensor, "B T"],
    continues: Bool[Tensor, "B T"],
    *,
    n: int,
) -> Float[Tensor, "B T"]:
    """Sum n rewards and the value of what follows; fewer where an episode or the row is over before.

        G_t^1 = r_t + d_t v'_t        G_t^n = r_t + d_t G_{t+1}^{n-1}    where c_t, else    G_t^1

    Args:
        reward: r.
        discount: d, 0 to 1.
        next_value: v'.
        continues: c.
        n: At least 1.

    Returns:
        ``[B, T]``; gradients flow to whatever asks for them.

    Raises:
        ConfigError: If ``n`` is less than 1.
        FieldError: If shapes or dtypes differ; all findings at once.

    Source:
        Sutton and Barto 2018 (Reinforcement learning), equation 7.1.
    """
    if n < 1:
        raise ConfigError(f"n_step_returns: n is {n}; expected at least 1.")
    _check("n_step_returns", reward=reward, discount=discount, next_value=next_value, continues=continues)
    ahead = _without_last(continues)[:, :-1]
    shortest = total = reward + _times(discount, next_value)
    for _ in range(min(n, reward.shape[1]) - 1):
        longer = torch.where(ahead, reward[:, :-1] + _times(discount[:, :-1], total[:, 1:]), shortest[:, :-1])
        total = torch.cat([longer, shortest[:, -1:]], dim=1)
    return total


def gae(
    reward: Float[Tensor, "B T"],
    discount: Float[Tensor, "B T"],
    value: Float[Tensor, "B T"],
    next_value: Float[Tensor, "B T"],
    continues: Bool[Tensor, "B T"],
    *,
    lam: float | Float[Tensor, "B T"],
) -> Float[Tensor, "B T"]:
    """Estimate advantages from temporal differences (GAE).

        A_t = r_t + d_t v'_t - v_t + d_t lam A_{t+1}    the last term where c_t

    ``A_t + v_t`` is the lambda-return.

    Args:
        reward: r.
        discount: d, 0 to 1.
        value: v.
        next_value: v'.
        continues: c.
        lam: 0 (one step) to 1 (all there are); one number, or one a step.

    Returns:
        ``[B, T]``; gradients flow to whatever asks for them.

    Raises:
        FieldError: If shapes or dtypes differ; all findings at once.

    Source:
        Schulman et al. 2016 (High-dimensional continuous control using generalized advantage estimation), equation 16.
    """
    found = {"reward": reward, "discount": discount, "value": value, "next_value": next_value}
    _check("gae", **found, continues=continues, lam=lam)
    error = reward + _times(discount, next_value) - value
    return _sums(error, _where_continuing(continues, discount * lam))


@torch.no_grad()
def vtrace(
    log_rho: Float[Tensor, "B T"],
    reward: Float[Tensor, "B T"],
    discount: Float[Tensor, "B T"],
    value: Float[Tensor, "B T"],
    next_value: Float[Tensor, "B T"],
    continues: Bool[Tensor, "B T"],
    *,
    lam: float | Float[Tensor, "B T"] = 1.0,
    rho_bar: float = 1.0,
    c_bar: float = 1.0,
    pg_rho_bar: float = 1.0,
) -> VTrace:
    """Correct values and advantages for actions of another policy than the one that learns (V-trace).

        E_t = min(rho_bar, rho_t) (r_t + d_t v'_t - v_t) + d_t lam min(c_bar, rho_t) E_{t+1}    the last term where c_t
        target_t = v_t + E_t
        advantage_t = min(pg_rho_bar, rho_t) (r_t + d_t ((1 - lam) v'_t + lam target_{t+1}) - v_t)    v'_t where not c_t

    Args:
        log_rho: log of rho = pi(a) / mu(a): joint log-probabilities, of the learner less the actor's.
        reward: r.
        discount: d, 0 to 1.
        value: v.
        next_value: v'.
        continues: c.
        lam: 0 to 1; one number, or one a step.
        rho_bar: Bounds the weight of a temporal difference: decides which policy's values are learnt. Above 0.
        c_bar: Bounds how far later differences reach back. Above 0.
        pg_rho_bar: Bounds the weight of an advantage. Above 0.

    Returns:
        Targets and advantages, constants: no gradient flows through.

    Raises:
        ConfigError: If a bound is not above 0.
        FieldError: If shapes or dtypes differ; all findings at once.

    Source:
        Espeholt et al. 2018 (IMPALA), equations 1 and 4 and remark 2; the mixed advantage as in rlax.
    """
    bounds = {"rho_bar": rho_bar, "c_bar": c_bar, "pg_rho_bar": pg_rho_bar}
    wrong = [f"{name} is {bound}" for name, bound in bounds.items() if not bound > 0]
    if wrong:
        raise ConfigError(f"vtrace: {', '.join(wrong)}; expected above 0.")
    found = {"log_rho": log_rho, "reward": reward, "discount": discount, "value": value, "next_value": next_value}
    _check("vtrace", **found, continues=continues, lam=lam)
    rho = log_rho.exp()
    onward = discount * lam
    error = rho.clamp(max=rho_bar) * (reward + _times(discount, next_value) - value)
    target = value + _sums(error, _where_continuing(continues, onward * rho.clamp(max=c_bar)))
    onward = _where_continuing(continues, onward)
    following = torch.cat([target[:, 1:], next_value[:, -1:]], dim=1)
    estimate = reward + _times(discount - onward, next_value) + _times(onward, following)
    return VTrace(target, rho.clamp(max=pg_rho_bar) * (estimate - value))


def rescale(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Bring values of any size to similar sizes: h(x) = sign(x) (sqrt(|x| + 1) - 1) + 0.001 x.

    Args:
        x: Values in the unit of rewards.

    Returns:
        h(x), to the last digit also where x is small.

    Source:
        Pohlen et al. 2018 (Observe and look further), proposition A.2; Kapturowski et al. 2019 (R2D2).
    """
    wide = _wide(x)
    return (wide / ((wide.abs() + 1).sqrt() + 1) + EPSILON * wide).to(x.dtype)


def unrescale(y: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Undo `rescale`.

    With x = u (|u| + 2) it is y = u + 0.001 x, a quadratic in u. Its root is taken in the form that subtracts nothing:
    in float32 the textbook's is wrong by 5 % for x = 0.001, and by more below.

    Args:
        y: Values as `rescale` gave them.

    Returns:
        x.

    Source:
        Pohlen et al. 2018 (Observe and look further), proposition A.2.
    """
    wide, b = _wide(y), 1 + 2 * EPSILON
    u = 2 * wide / (b + (b * b + 4 * EPSILON * wide.abs()).sqrt())
    return (u * (u.abs() + 2)).to(y.dtype)


def masked_mean(values: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"] | None) -> Float[Tensor, ""]:
    """Take the mean of what a mask keeps.

    Args:
        values: Any shape.
        mask: True where a value counts, of the same shape; None: everywhere.

    Returns:
        A 0-dim tensor; 0 where nothing counts.

    Raises:
        FieldError: If the shapes differ.
    """
    if mask is None:
        return values.mean()
    if mask.shape != values.shape:
        raise FieldError(
            f"masked_mean: mask has shape {tuple(mask.shape)} and values {tuple(values.shape)}; expected the same."
        )
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)


def standardize(
    values: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"] | None, *, epsilon: float = 1e-8
) -> Float[Tensor, "*shape"]:
    """Bring what a mask keeps to mean 0 and deviation 1, such as the advantages of a minibatch.

    Args:
        values: Any shape.
        mask: True where a value counts, of the same shape; None: everywhere.
        epsilon: Added to the deviation.

    Returns:
        The values, 0 where the mask is False; a single value stays as it is, since it has no deviation.

    Raises:
        FieldError: If the shapes differ.
    """
    mask = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
    centred = values - masked_mean(values, mask)
    centred = centred - masked_mean(centred, mask)  # again: a mean is rounded, and equal values have no deviation
    centred = torch.where(mask, centred, 0.0)
    count = mask.sum()
    deviation = (centred.square().sum() / (count - 1).clamp(min=1)).sqrt()  # of a sample, as in stable-baselines3
    return torch.where(count > 1, centred / (deviation + epsilon), torch.where(mask, values, 0.0))


def _wide(x: Tensor) -> Tensor:
    """Take float64 where the device has it: there and back costs 5e-7 of a value in float32 alone, and 1.3e-7 so."""
    return x if x.device.type == "mps" else x.double()


def _sums(step: Float[Tensor, "B T"], weight: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Solve G_t = step_t + weight_t G_{t+1}; the last weight is 0.

    After each round step_t holds the sum over the next ``reach`` columns, and weight_t the product of their weights.
    """
    reach = 1
    while reach < step.shape[1]:
        near, through = step[:, :-reach], weight[:, :-reach]
        near = near + _times(through, step[:, reach:])
        through = through * weight[:, reach:]
        step = torch.cat([near, step[:, -reach:]], dim=1)
        weight = torch.cat([through, weight[:, -reach:]], dim=1)
        reach *= 2
    return step


def _times(weight: Tensor, value: Tensor) -> Tensor:
    """Multiply; 0 times anything is 0, also NaN, in the gradient too."""
    return weight * torch.where(weight == 0, 0.0, value)


def _where_continuing(continues: Tensor, weight: Tensor) -> Float[Tensor, "B T"]:
    return torch.where(_without_last(continues), weight, 0.0)


def _without_last(continues: Bool[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
    return torch.nn.functional.pad(continues[:, :-1], (0, 1))


def _check(where: str, **tensors: Tensor | float) -> None:
    """Raise every finding about tensors that are to be ``[B, T]`` of one shape, bool for continues and float else."""
    reward = tensors["reward"]
    shape, wrong = tuple(reward.shape) if isinstance(reward, Tensor) else (), []
    if len(shape) != 2 or 0 in shape:
        wrong.append(f"reward has shape {shape}; expected [B, T], at least one of each")
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            continue
        if tuple(tensor.shape) != shape:
            wrong.append(f"{name} has shape {tuple(tensor.shape)}; expected {shape}, as reward")
        if (tensor.dtype == torch.bool) != (name == "continues") or not (
            tensor.dtype == torch.bool or tensor.is_floating_point()
        ):
            wrong.append(f"{name} is {tensor.dtype}; expected {'bool' if name == 'continues' else 'floats'}")
    if wrong:
        raise FieldError(f"{where}: {'. '.join(wrong)}.")
