"""Rainbow: distributions of returns, priorities and noise in the network, by hand and by a slow twin."""

import sys

import numpy as np
import pytest
import torch
from gymnasium import spaces

from agents.config import EnvConfig, ReplayTrainConfig
from agents.dqn import DQN, DQNConfig
from agents.networks import NoisyLinear, QNetwork
from agents.training import train
from rlfeed.replay import ReplayBuffer, Transition
from rlfeed.testing.probes import LotteryEnv
from rlfeed.types import Batch, PolicyContext, Step

BOX = spaces.Box(-10, 10, (2,))


def make(observation=BOX, actions=2, total_steps=100, seed=0, **config):
    settings = {"widths": (), "atoms": 3, "v_min": -1.0, "v_max": 1.0, **config}
    cpu = torch.device("cpu")
    return DQN(
        DQNConfig(**settings), observation, spaces.Discrete(actions), total_steps=total_steps, seed=seed, device=cpu
    )


def say(network, probabilities):
    """Have the network give these probabilities ``[actions, atoms]`` for any observation."""
    with torch.no_grad():
        network.advantage.weight.zero_()
        network.advantage.bias.copy_(torch.tensor(probabilities).log().flatten())


def context(mode="explore", seed=0, rows=1):
    rng = np.random.default_rng(seed)
    return PolicyContext(np.zeros(rows, bool), mode, np.arange(rows), 0, None, np.zeros(rows), None, rng)


def random_batch(rows, actions=2, seed=3):
    g = torch.Generator().manual_seed(seed)
    ended = torch.rand(rows, generator=g) < 0.3
    return Batch(
        observation=torch.randn(rows, 2, generator=g),
        action=torch.randint(0, actions, (rows,), generator=g),
        reward=torch.randn(rows, generator=g),
        terminated=ended,
        truncated=torch.zeros(rows, dtype=torch.bool),
        discount=torch.where(ended, 0.0, 0.9 ** torch.randint(1, 4, (rows,), generator=g)),
        next_observation=torch.randn(rows, 2, generator=g),
        weights=torch.rand(rows, generator=g),
    )


# Both networks say: action 0 is worth 0.3, action 1 is worth -0.3.
SAID = [[0.2, 0.3, 0.5], [0.5, 0.3, 0.2]]


@pytest.mark.parametrize(
    ("reward", "discount", "expected"),
    [
        (0.5, 1.0, [0.1, 0.25, 0.65]),
        (0.0, 1.0, [0.2, 0.3, 0.5]),  # where atoms meet atoms nothing is lost or doubled
        (0.3, 0.0, [0.0, 0.7, 0.3]),
        (5.0, 1.0, [0.0, 0.0, 1.0]),
        (0.5, 0.5, [0.0, 0.35, 0.65]),
    ],
)
def test_targets_by_hand_project_the_best_actions_distribution(reward, discount, expected):
    """B42, B43, B44."""
    agent = make()
    say(agent.network, SAID)
    say(agent.target, SAID)
    target = agent.targets(torch.tensor([reward]), torch.tensor([discount]), torch.zeros(1, 2))
    assert target.tolist() == [pytest.approx(expected, abs=1e-6)]
    assert target.sum().item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(("double", "expected"), [(True, SAID[1]), (False, SAID[0])])
def test_targets_choose_and_value_with_the_right_networks(double, expected):
    agent = make(double=double)
    say(agent.network, [SAID[1], SAID[0]])  # prefers action 1
    say(agent.target, SAID)  # prefers action 0
    target = agent.targets(torch.zeros(1), torch.ones(1), torch.zeros(1, 2))
    assert target.tolist() == [pytest.approx(expected)]


def test_targets_where_terminated_ignore_even_an_infinite_output():
    agent = make()
    with torch.no_grad():
        agent.target.advantage.bias.fill_(torch.inf)
    target = agent.targets(torch.tensor([0.5]), torch.zeros(1), torch.zeros(1, 2))
    assert target.tolist() == [[0.0, 0.5, 0.5]]


def test_targets_of_hl_gauss_are_a_histogram_around_the_mean():
    agent = make(hl_gauss=True, atoms=21, v_min=-10.0, v_max=10.0)
    target = agent.targets(torch.tensor([2.0, -3.0]), torch.zeros(2), torch.zeros(2, 2))
    assert agent.support.mean(target).tolist() == pytest.approx([2.0, -3.0], abs=1e-3)
    assert target.sum(dim=1).tolist() == pytest.approx([1.0, 1.0])
    assert target.argmax(dim=1).tolist() == [12, 7]
    assert target[0, 11].item() == pytest.approx(target[0, 13].item(), abs=1e-6)


def test_targets_of_hl_gauss_bootstrap_from_the_mean():
    agent = make(hl_gauss=True)
    say(agent.network, SAID)
    say(agent.target, SAID)
    found = agent.targets(torch.tensor([0.1]), torch.tensor([0.5]), torch.zeros(1, 2))
    assert torch.allclose(found, agent.support.hl_gauss(torch.tensor([0.1 + 0.5 * 0.3])))


def slow_loss(agent, batch):
    """Compute losses and values one sample and one atom at a time."""
    z, n = agent.support.atoms.double().numpy(), len(agent.support.atoms)
    width = z[1] - z[0]

    def probabilities(network, observation):
        logits = network(observation[None])[0].detach().double().numpy()
        shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
        return shifted / shifted.sum(axis=1, keepdims=True)

    losses, values = [], []
    for row in range(len(batch.reward)):
        choice = (probabilities(agent.network, batch.next_observation[row]) @ z).argmax()
        following = probabilities(agent.target, batch.next_observation[row])[choice]
        target = np.zeros(n)
        for atom in range(n):
            moved = min(max(batch.reward[row].item() + batch.discount[row].item() * z[atom], z[0]), z[-1])
            for other in range(n):
                target[other] += following[atom] * max(0.0, 1 - abs(moved - z[other]) / width)
        taken = probabilities(agent.network, batch.observation[row])[batch.action[row]]
        losses.append(-(target * np.log(taken)).sum())
        values.append(taken @ z)
    return np.array(losses), np.array(values)


def test_learn_loss_and_priorities_equal_a_slow_twin():
    """B47: priorities are the losses before importance weights."""
    agent = make(actions=3, widths=(8,), dueling=True, atoms=7, v_min=-2.0, v_max=3.0, priority_exponent=0.5)
    agent.target.load_state_dict(make(actions=3, widths=(8,), dueling=True, atoms=7, seed=5).network.state_dict())
    batch = random_batch(16, actions=3)
    losses, values = slow_loss(agent, batch)
    learned = agent.learn(batch, env_steps=0)
    assert learned.priorities.numpy() == pytest.approx(losses, rel=1e-4)
    assert learned.scalars["train/loss"].item() == pytest.approx((losses * batch.weights.numpy()).mean(), rel=1e-4)
    assert learned.scalars["train/q_mean"].item() == pytest.approx(values.mean(), rel=1e-4)


def test_learn_from_sums_made_at_insertion_equals_sums_made_when_sampled():
    """(g): three steps of rewards 1, 2, 3 stored as one of 1 + 2 gamma + 3 gamma^2."""

    def stored(rewards, unit):
        buffer = ReplayBuffer(BOX, spaces.Discrete(2), capacity=16)
        for step, reward in enumerate(rewards):
            buffer.add(
                Step(
                    np.full((1, 2), step * 3 / len(rewards), np.float32), np.zeros(1, np.int64),
                    np.array([reward], np.float32),
                    np.full((1, 2), (step + 1) * 3 / len(rewards), np.float32), np.zeros(1, bool),
                    np.array([step == len(rewards) - 1]), is_first=np.array([step == 0]),
                )
            )  # fmt: skip
        batch = buffer.sample(64, unit)
        return batch.map(lambda leaf: leaf[(batch.observation[:, 0] == 0).nonzero()[:1, 0]])

    sampled = stored([1.0, 2.0, 3.0], Transition(n_step=3, gamma=0.9))
    inserted = stored([1 + 0.9 * 2 + 0.81 * 3], Transition(n_step=1, gamma=0.9**3))
    losses = [make(seed=4).learn(batch, env_steps=0).scalars["train/loss"].item() for batch in (sampled, inserted)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_q_network_dueling_with_atoms_centres_the_advantages_of_each():
    net = QNetwork(BOX, 4, (8,), dueling=True, atoms=5, generator=torch.Generator().manual_seed(1))
    observation = torch.randn(6, 2, generator=torch.Generator().manual_seed(2))
    out = net(observation)
    value = net.value(net.trunk[0](net.encoder(observation)).relu())
    assert out.shape == (6, 4, 5)
    assert torch.allclose(out.mean(dim=1), value, atol=1e-6)


def test_noisy_linear_by_hand():
    """B45: noise of the square root's kind, and sigma 0.5 over the square root of the inputs."""
    layer = NoisyLinear(2, 1, 1.0, torch.Generator().manual_seed(0))
    assert layer.weight_sigma.flatten().tolist() == pytest.approx([0.5 / 2**0.5] * 2)
    assert layer.bias_sigma.tolist() == pytest.approx([0.5 / 2**0.5])
    with torch.no_grad():
        layer.mean.weight.copy_(torch.tensor([[1.0, 2.0]]))
        layer.mean.bias.fill_(3.0)
        layer.weight_sigma.copy_(torch.tensor([[0.1, 0.2]]))
        layer.bias_sigma.fill_(0.3)
    features = torch.tensor([[1.0, 1.0]])
    assert layer(features).item() == 6.0
    # f(4) = 2, f(-9) = -3, f(1) = 1: weights 1 + 0.1 * 2 and 2 - 0.2 * 3, bias 3.3.
    assert layer(features, torch.tensor([4.0, -9.0, 1.0])).item() == pytest.approx(1.2 + 1.4 + 3.3)


@pytest.mark.parametrize("training", [True, False])
def test_noise_is_a_matter_of_the_mode_and_not_of_training(training):
    """B45: each step while exploring has noise of its own; evaluations have none."""
    agent = make(actions=20, noisy=True, widths=(16,))
    agent.network.train(training)
    observation = np.ones((1, 2), np.float32)

    def actions(mode):
        ctx = context(mode)
        return [agent.policy(observation, (), ctx).action.item() for _ in range(20)]

    assert len(set(actions("greedy"))) == 1
    assert len(set(actions("explore"))) > 2
    assert actions("explore") == actions("explore")  # from the rollout's generator, which is saved


def test_noise_of_values_targets_and_choice_are_drawn_apart_and_anew():
    """B45, B52."""
    agent = make(noisy=True, widths=(4,), dueling=True)
    first, second = agent._noise(), agent._noise()
    assert len(first) == 3
    assert all(part.shape == (2 + 4 + 4 + 6 + 4 + 3,) for part in first)
    drawn = torch.stack([*first, *second])
    assert len(drawn.unique(dim=0)) == 6


def test_evaluation_takes_nothing_from_the_learners_noise():
    """B52."""
    agent = make(noisy=True)
    before = agent.noise.get_state()
    agent.policy(np.ones((1, 2), np.float32), (), context("greedy"))
    agent.values(torch.ones(1, 2))
    assert torch.equal(agent.noise.get_state(), before)


def test_learn_moves_the_noises_scale():
    agent = make(noisy=True, lr=0.01)
    before = agent.network.advantage.weight_sigma.detach().clone()
    agent.learn(random_batch(8), env_steps=0)
    assert not torch.equal(agent.network.advantage.weight_sigma, before)


def test_noisy_agent_takes_no_random_actions():
    agent = make(noisy=True, epsilon_start=1.0)
    assert agent.scalars(0)["rollout/exploration_rate"] == 0.0
    with torch.no_grad():
        for part in agent.network.modules():
            if isinstance(part, NoisyLinear):
                part.weight_sigma.zero_()
                part.bias_sigma.zero_()
    observation = np.tile(np.ones((1, 2), np.float32), (50, 1))
    assert len(set(agent.policy(observation, (), context(rows=50)).action.tolist())) == 1


def test_state_of_a_noisy_agent_goes_on_bit_equal():
    one, other = (make(noisy=True, widths=(4,), priority_exponent=0.5, seed=seed) for seed in (1, 2))
    one.learn(random_batch(8), env_steps=0)
    other.load_state_dict(one.state_dict())
    for agent in (one, other):
        agent.learn(random_batch(8, seed=9), env_steps=10)
    assert torch.equal(one.noise.get_state(), other.noise.get_state())
    assert all(torch.equal(a, b) for a, b in zip(one.network.parameters(), other.network.parameters(), strict=True))


def test_values_are_the_means_of_the_best_actions():
    agent = make()
    say(agent.network, [SAID[1], SAID[0]])
    assert agent.values(torch.zeros(2, 2)).tolist() == pytest.approx([0.3, 0.3])


def run(env, *, num_envs=1, **agent):
    settings = DQNConfig(**{"widths": (), "atoms": 3, "v_min": -1.0, "v_max": 1.0, "epsilon_end": 0.2, **agent})
    config = ReplayTrainConfig(
        env=EnvConfig(num_envs=num_envs, mode="serial"), agent=settings, device="cpu", total_steps=480,
        learning_starts=32, train_every=8, updates_per_round=8, batch_size=32, eval_every=10**6, eval_episodes=1,
    )  # fmt: skip
    return train(config, env=env)[0]


def test_distribution_of_a_lottery_is_learned():
    """P19: a reward of 1 with probability 0.3, else of 0."""
    agent = run(LotteryEnv, lr=0.05, priority_exponent=0.0)
    observation = torch.zeros(1, *LotteryEnv.observation_space.shape)
    mass = agent.network(observation)[0, 0].softmax(dim=-1)
    assert mass.tolist() == pytest.approx([0.0, 0.7, 0.3], abs=0.07)


@pytest.mark.parametrize("num_envs", [1, 4])
def test_target_network_is_copied_every_so_many_updates_with_any_number_of_environments(num_envs, monkeypatch):
    """B50."""
    copies = []
    monkeypatch.setattr(sys.modules[DQN.__module__], "polyak", lambda target, online, tau: copies.append(tau))
    agent = run(LotteryEnv, num_envs=num_envs, target_every=50, priority_exponent=0.5)
    assert agent.updates.value == 8 * ((480 - 32) // 8 + 1)
    assert copies == [1.0] * (agent.updates.value // 50)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"atoms": 1}, {"dueling": True, "noisy": True, "priority_exponent": 0.5}])
def test_learn_compiled_equals_eager(settings):
    eager, compiled = (make(widths=(8,), compile=compile, **settings) for compile in (False, True))
    for seed in range(3):
        batch = random_batch(16, seed=seed)
        losses = [agent.learn(batch, env_steps=0).scalars["train/loss"].item() for agent in (eager, compiled)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
