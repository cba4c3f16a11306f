import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from agents.blocks import cut, minibatches
from agents.ppo import PPO, PPOConfig, ppo
from rlfeed.envs import make_envs
from rlfeed.errors import CheckpointError, ConfigError, SpaceError
from rlfeed.rollout import Rollout
from rlfeed.testing import IdentifiableEnv
from rlfeed.types import PolicyContext

BOX = spaces.Box(-10, 10, (2,), np.float32)


def make(actions=None, observation=BOX, total_steps=1000, **config):
    torch.set_num_threads(1)
    return PPO(
        PPOConfig(**{"widths": (16,), "epochs": 2, "minibatches": 4, **config}),
        observation,
        actions or spaces.Discrete(3),
        total_steps=total_steps,
        seed=0,
        device=torch.device("cpu"),
    )


def agent_of(envs, **config):
    return make(envs.action_space, envs.observation_space, **config)


def play(envs, steps=16, **config):
    """Make an agent for environments, and the first block that it plays in them."""
    envs = make_envs(envs, 3, mode="serial") if callable(envs) else envs
    agent = agent_of(envs, **config)
    return agent, next(Rollout(envs, agent.policy, seed=0, actions=agent.actions).blocks(steps))


def context(rows, mode="explore", mask=None, seed=0):
    first, generator = np.zeros(rows, bool), np.random.default_rng(seed)
    return PolicyContext(
        first, mode, np.arange(rows), 0, np.zeros(rows, int), np.zeros(rows, np.float32), mask, generator
    )


def parameters_of(agent):
    return torch.cat([parameter.detach().flatten() for parameter in agent.network.parameters()])


class Spaces(gymnasium.Env):
    """Episodes of 4 steps over any action space; the observation counts steps, rewards are 1."""

    observation_space = spaces.Box(-10, 10, (2,), np.float32)

    def __init__(self, action_space, masked=False):
        self.action_space, self.masked = action_space, masked

    def _info(self):
        return {"action_mask": np.array([True, False, True])} if self.masked else {}

    def reset(self, *, seed=None, options=None):
        self.count = 0
        return np.zeros(2, np.float32), self._info()

    def step(self, action):
        assert self.action_space.contains(np.asarray(action))
        self.count += 1
        return np.full(2, self.count, np.float32), 1.0, self.count == 4, False, self._info()


PLAYED = {
    "Discrete": spaces.Discrete(3),
    "Discrete from 5": spaces.Discrete(3, start=5),
    "MultiDiscrete": spaces.MultiDiscrete([2, 3], start=[1, 4]),
    "MultiBinary": spaces.MultiBinary(3),
    "Box": spaces.Box(-1, 3, (2,), np.float32),
    "Box of float64": spaces.Box(-1, 3, (2,), np.float64),
    "Box without bounds": spaces.Box(-np.inf, np.inf, (1,), np.float32),
    "Box of one number": spaces.Box(0, 1, (), np.float32),
}


@pytest.mark.parametrize("core", ["none", "lstm", "gru"])
@pytest.mark.parametrize("kind", PLAYED)
def test_first_minibatch_of_any_space_has_a_ratio_of_one(kind, core):
    """(d): the learner gives every action the probability with which it was drawn."""
    agent, batch = play(lambda: Spaces(PLAYED[kind]), core=core, core_width=8)
    block = cut(batch, agent.network.normalized, sequences=core != "none")
    minibatch = next(minibatches(block, agent.estimate(block), 2, agent.order))
    _, scalars = agent.loss(minibatch, torch.tensor(1e-5))
    assert scalars["train/approx_kl"].item() == pytest.approx(0, abs=1e-10)
    assert scalars["train/clip_fraction"].item() == 0
    assert agent.learn(batch, env_steps=0).updates == 8


@pytest.mark.parametrize("core", ["none", "lstm"])
def test_first_minibatch_of_the_second_block_has_a_ratio_of_one_again(core):
    """(d): the statistics of observations have moved; those who act and those who learn read the same ones."""
    envs = make_envs(lambda: Spaces(spaces.Discrete(3)), 3, mode="serial")
    agent = agent_of(envs, core=core, core_width=8)
    blocks = Rollout(envs, agent.policy, seed=0).blocks(16)
    agent.learn(next(blocks), env_steps=0)
    block = cut(next(blocks), agent.network.normalized, sequences=core != "none")
    minibatch = next(minibatches(block, agent.estimate(block), 2, agent.order))
    _, scalars = agent.loss(minibatch, torch.tensor(1e-5))
    assert scalars["train/approx_kl"].item() == pytest.approx(0, abs=1e-10)
    assert scalars["train/clip_fraction"].item() == 0


def test_masked_actions_are_never_drawn_and_the_mask_comes_back_to_the_learner():
    agent, batch = play(lambda: Spaces(spaces.Discrete(3), masked=True), steps=32)
    assert set(batch.action.unique().tolist()) == {0, 2}
    assert batch.extras["action_mask"].shape == (3, 32, 3)
    block = cut(batch, agent.network.normalized, sequences=False)
    minibatch = next(minibatches(block, agent.estimate(block), 1, agent.order))
    _, scalars = agent.loss(minibatch, torch.tensor(1e-5))
    assert scalars["train/clip_fraction"].item() == 0
    # Two allowed actions, nearly equally likely at first: log 2, where three would give log 3.
    assert -scalars["train/entropy_loss"].item() == pytest.approx(np.log(2), abs=0.01)


def test_loss_by_hand_is_the_clipped_surrogate_and_the_squared_error():
    agent, batch = play(lambda: Spaces(spaces.Discrete(3)), normalize_advantage=False, entropy_weight=0.1)
    block = cut(batch, agent.network.normalized, sequences=False)
    minibatch = next(minibatches(block, agent.estimate(block), 1, agent.order))
    steps = minibatch.steps
    steps["log_prob"] = steps["log_prob"] - torch.tensor(0.3).log() * (torch.arange(48) % 2)  # ratios of 1 and 0.3
    steps["advantage"] = torch.where(torch.arange(48) % 4 < 2, 2.0, -1.0)
    steps["target"] = steps["value"] + steps["advantage"]
    loss, scalars = agent.loss(minibatch, torch.tensor(0.2))
    # min(1 A, 1 A) = A and min(0.3 A, 0.8 A): 2, 0.6, -1, -0.8.
    assert scalars["train/policy_gradient_loss"].item() == pytest.approx(-(2 + 0.6 - 1 - 0.8) / 4, abs=1e-5)
    # Values are what they were: the error is the advantage, whose square is 4 or 1.
    assert scalars["train/value_loss"].item() == pytest.approx(2.5, abs=1e-4)
    assert scalars["train/clip_fraction"].item() == 0.5
    # k3 of a ratio of 0.3: 0.3 - 1 - log 0.3.
    assert scalars["train/approx_kl"].item() == pytest.approx((0.3 - 1 - np.log(0.3)) / 2, abs=1e-5)
    parts = [scalars[f"train/{name}"].item() for name in ("policy_gradient_loss", "value_loss", "entropy_loss")]
    assert loss.item() == pytest.approx(parts[0] + 0.5 * parts[1] + 0.1 * parts[2])


def test_loss_value_clip_takes_the_worse_of_both():
    agent, batch = play(lambda: Spaces(spaces.Discrete(3)), value_clip=0.5)
    block = cut(batch, agent.network.normalized, sequences=False)
    minibatch = next(minibatches(block, agent.estimate(block), 1, agent.order))
    minibatch.steps["value"] = minibatch.steps["value"] - 2.0  # the values have moved by 2 since
    minibatch.steps["target"] = minibatch.steps["value"] + 2.0  # and are right now; half a deviation on the way is not
    _, scalars = agent.loss(minibatch, torch.tensor(0.2))
    assert scalars["train/value_loss"].item() == pytest.approx(1.5**2, abs=1e-4)


def constant(value, agent):
    """Make the network's values a constant."""
    last = agent.network.value[-1]
    torch.nn.init.zeros_(last.weight)
    torch.nn.init.constant_(last.bias, value)


def test_estimates_of_terminated_and_truncated_steps_bootstrap_where_they_may():
    """B4, B13, B14, B15, B16, B22, B23: every reward counts where it was had, ends end what they should."""
    envs = make_envs(lambda: IdentifiableEnv(lengths=(3, 2), ends=("terminated", "truncated")), 1, mode="serial")
    agent, batch = play(envs, steps=6, gamma=0.5, lam=0.5)
    constant(10.0, agent)
    advantage = agent.estimate(cut(batch, agent.network.normalized, sequences=False))["advantage"][0]
    reward = [0.01, 0.02, 0.03, 10.01, 10.02, 20.01]
    assert batch.reward[0].tolist() == pytest.approx(reward)
    error = [r + 0.5 * 10 - 10 for r in reward]
    error[2] = reward[2] - 10  # terminated: nothing follows
    expected = [
        error[0] + 0.25 * (error[1] + 0.25 * error[2]), error[1] + 0.25 * error[2], error[2],
        error[3] + 0.25 * error[4], error[4],  # truncated: the final observation's value follows, no later reward
        error[5],  # the last step of the block has an advantage of its own
    ]  # fmt: skip
    assert advantage.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("core", ["none", "lstm"])
def test_estimates_at_a_truncation_take_the_value_of_the_final_observation(core):
    """B4, B16, B23, B24: not the value of the step itself, nor that of the next episode's first observation."""
    envs = make_envs(lambda: IdentifiableEnv(lengths=(3,), ends=("truncated",)), 2, mode="serial")
    agent, batch = play(envs, steps=5, gamma=1.0, lam=0.0, core=core)
    block = cut(batch, agent.network.normalized, sequences=core != "none")
    estimates = agent.estimate(block)
    rows = {(row, step): n for n, (row, step) in enumerate(batch.final_index.tolist())}
    found = (estimates["advantage"] + estimates["value"] - block.batch.reward)[block.mask]
    twin = []
    for env in range(2):
        carry, network = agent.network.initial_carry(1), agent.network
        before = torch.zeros(1, dtype=torch.int64), torch.zeros(1)
        for t in range(5):
            first = batch.is_first[env, t : t + 1]
            carry = agent.network.initial_carry(1) if first else carry
            now = type(block.inputs)(batch.observation[env, t : t + 1], first, *before)
            _, carry = network.step(now, carry)
            before = batch.action[env, t : t + 1], batch.reward[env, t : t + 1]
            at = rows.get((env, t))
            successor = batch.observation[env, t + 1] if at is None else batch.final_observation[at]
            after = type(block.inputs)(successor[None], torch.zeros(1, dtype=torch.bool), *before)
            twin.append(network.values(network.step(after, carry)[0]).item())
    assert found.tolist() == pytest.approx(twin, abs=2e-3)  # of rewards of up to 1000, in float32


def test_minibatches_hold_every_step_once():
    envs = make_envs(lambda: IdentifiableEnv(lengths=(3, 1, 5)), 3, mode="serial")
    for core in ("none", "gru"):
        agent, batch = play(envs, steps=8, core=core)
        block = cut(batch, agent.network.normalized, sequences=core != "none")
        parts = list(minibatches(block, {"reward": block.batch.reward}, 5, agent.order))
        seen = torch.cat([part.steps["reward"] for part in parts])
        assert sorted(seen.tolist()) == sorted(batch.reward.flatten().tolist())
        for part in parts:
            shown = part.inputs.observation if part.mask is None else part.inputs.observation[part.mask]
            # Row, episode and step of the observation are those of the reward that followed on it.
            told = 1000 * shown[:, 0] + 10 * shown[:, 1] + (shown[:, 2] + 1) / 100
            assert part.steps["reward"].tolist() == pytest.approx(told.tolist())


def test_estimates_of_permuted_environments_are_permuted():
    """(c): environments are alike."""
    agent, batch = play(make_envs(lambda: IdentifiableEnv(lengths=(20,)), 4, mode="serial"), steps=12)
    order = torch.tensor([2, 0, 3, 1])
    moved = batch.map(lambda leaf: leaf[order] if len(leaf) == 4 else leaf)
    one, other = (agent.estimate(cut(b, agent.network.normalized, sequences=False)) for b in (batch, moved))
    for name, value in one.items():
        assert torch.allclose(other[name], value[order])


def test_learn_from_one_step_at_a_time_stays_finite():
    agent, batch = play(lambda: Spaces(spaces.Discrete(3)), steps=1, minibatches=3, epochs=2)
    learned = agent.learn(batch, env_steps=0)
    assert learned.updates == 6
    assert all(torch.isfinite(value) for value in learned.scalars.values())
    assert torch.isfinite(parameters_of(agent)).all()


def test_learn_with_target_kl_stops_and_counts_the_updates_taken():
    agent, batch = play(make_envs("CartPole-v1", 3, mode="serial"), lr=0.05, target_kl=0.001)
    learned = agent.learn(batch, env_steps=0)
    assert 1 <= learned.updates < 8
    assert agent.updates.value == learned.updates


def test_learn_without_estimating_anew_differs():
    ends = []
    for recompute in (True, False):
        agent, batch = play(make_envs("CartPole-v1", 3, mode="serial"), recompute=recompute)
        agent.learn(batch, env_steps=0)
        ends.append(parameters_of(agent))
    assert not torch.equal(*ends)


def test_learn_rates_follow_the_clock():
    agent, batch = play(
        make_envs("CartPole-v1", 3, mode="serial"), lr=0.1, lr_end=0.02, clip=0.3, clip_end=0.1, epochs=1
    )
    for env_steps, lr, clip in ((0, 0.1, 0.3), (500, 0.06, 0.2), (1000, 0.02, 0.1)):
        agent.learn(batch, env_steps=env_steps)
        told = agent.scalars(env_steps)
        assert agent.optimizer.param_groups[0]["lr"] == told["train/learning_rate"] == pytest.approx(lr)
        assert told["train/clip_range"] == pytest.approx(clip)


def test_count_targets_leaves_values_as_they_are():
    agent = make()
    observation = torch.randn(5, 2, generator=torch.Generator().manual_seed(1))
    before = agent.values(observation)
    agent.network.count_targets(torch.tensor([100.0, 300.0, -50.0]))
    assert agent.network.value_moments.mean.item() == pytest.approx(350 / 3)
    assert torch.allclose(agent.values(observation), before, atol=1e-4)


def test_observation_statistics_are_those_of_all_steps_and_frozen_while_acting():
    agent, batch = play(make_envs("CartPole-v1", 3, mode="serial"), steps=40)
    moments = agent.network.moments[0]
    assert moments.count.item() == 0  # playing counts nothing
    agent.learn(batch, env_steps=0)
    agent.learn(batch, env_steps=0)
    seen = batch.observation[:, :-1].flatten(0, 1)
    assert torch.allclose(moments.mean, seen.mean(dim=0), atol=1e-6)
    assert torch.allclose(moments.variance, seen.var(dim=0, correction=0), rtol=1e-4)
    assert torch.allclose(moments(seen).mean(dim=0), torch.zeros(4), atol=1e-3)


def test_policy_greedy_takes_the_most_probable_and_draws_nothing():
    agent = make()
    observation = np.random.default_rng(0).normal(size=(64, 2)).astype(np.float32)
    told = context(64, "greedy")
    state = told.generator.bit_generator.state["state"]
    action = agent.policy(observation, (), told).action
    logits = agent.network.policy(agent.network.encoder(torch.from_numpy(observation)))
    assert action.tolist() == logits.argmax(-1).tolist()
    assert told.generator.bit_generator.state["state"] == state


def test_policy_explores_from_the_rollouts_generator_alone():
    agent, observation = make(), np.zeros((500, 2), np.float32)
    draws = [agent.policy(observation, (), context(500, seed=seed)).action.tolist() for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    assert np.bincount(draws[0]).tolist() == pytest.approx([167] * 3, abs=45)


def test_policy_log_prob_is_of_the_action_before_it_is_clipped():
    agent, batch = play(lambda: Spaces(spaces.Box(-1, 3, (2,), np.float32)), steps=64)
    assert agent.actions == "rescale"
    assert batch.action.abs().max() > 1  # the policy's own, beyond -1 .. 1
    assert batch.extras["env_action"].min() >= -1
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(batch.action).sum(-1)
    assert torch.allclose(batch.extras["log_prob"], expected, atol=0.1)  # the mean is near 0 at first


def test_ppo_with_actions_in_parts_is_refused():
    with pytest.raises(SpaceError, match=r"action_space"):
        make(spaces.Dict({"a": spaces.Discrete(2)}))


def test_config_with_several_wrong_values_names_all():
    with pytest.raises(ConfigError, match=r"agent\.gamma: is 2.*agent\.epochs: is 0.*agent\.core: is rnn"):
        PPOConfig(gamma=2, epochs=0, core="rnn")


def test_config_with_minibatches_that_do_not_divide_the_block_is_refused():
    preset = ppo()
    with pytest.raises(ConfigError, match=r"agent\.minibatches: is 7, which does not divide the 1024 steps"):
        type(preset)(env=preset.env, block_length=128, agent=PPOConfig(minibatches=7))


def test_load_state_dict_of_another_network_is_a_checkpoint_error():
    with pytest.raises(CheckpointError, match="does not fit this PPO"):
        make().load_state_dict(make(widths=(3,)).state_dict())
    with pytest.raises(CheckpointError, match="PPO"):
        make().load_state_dict(make(core="lstm").state_dict())


def test_state_dict_loaded_into_another_agent_learns_on_bit_equal():
    one, batch = play(make_envs("CartPole-v1", 3, mode="serial"))
    other = agent_of(make_envs("CartPole-v1", 3, mode="serial"))
    one.learn(batch, env_steps=0)
    saved = one.state_dict()
    one.learn(batch, env_steps=48)
    other.load_state_dict(saved)
    other.learn(batch, env_steps=48)
    assert torch.equal(parameters_of(one), parameters_of(other))
    assert one.updates.value == other.updates.value == 16
