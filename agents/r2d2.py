"""R2D2: Q-learning with a memory, on replayed sequences that begin with the carry the actor had there.

What it computes, for the steps t of a sequence that `burn_in` steps before it have warmed the carry for:

    G_t     = r_t + gamma r_{t+1} + ... + gamma^k u(Q'(s_{t+k}, argmax_a Q(s_{t+k}, a)))    k = n_step, or less where
    delta_t = h(G_t) - Q(s_t, a_t)                                                          the sequence is over before
    loss    = mean over the batch of w * (sum over t of delta_t^2 / 2)
    priority of a sequence = eta max |delta| + (1 - eta) mean |delta|

The last term of G is 0 where s_{t+k} is terminal. h rescales values, u undoes it. Q and the target network's Q' are
both unrolled from the stored carry through the burn-in, without gradient there. Both see, beside the observation, the
action and the reward before it; zeros where an episode begins.

Sources: Kapturowski et al. 2019 (Recurrent experience replay in distributed reinforcement learning, sections 2.3 and
3), Pohlen et al. 2018 (Observe and look further, proposition A.2, for h), van Hasselt et al. 2016 (equation 4, double
estimates), Wang et al. 2016 (equation 9, dueling networks), Horgan et al. 2018 (section 4.1, the ladder of epsilons).

Departs from Kapturowski et al.: settings for small problems; epsilon falls from 1 to the ladder at first; the learning
rate falls linearly to 0; importance weights as in Acme, where the paper has none (`beta` 0); a new sequence has the
greatest priority that is stored, not one that its actor computed; the reward before is rescaled by h too, so that none
is so large that it hides the rest; truncated episodes bootstrap from their final observation.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from gymnasium import spaces
from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn

from agents.common import clip_gradients, epsilon_ladder
from agents.config import AgentConfig, EnvConfig, ReplayTrainConfig, check
from agents.networks import Encoder, Recurrent, linear, mlp
from rlfeed.errors import FieldError, SpaceError
from rlfeed.nest import Nest, map_nest
from rlfeed.replay import Prioritized, Sequence
from rlfeed.returns import masked_mean, n_step_returns, rescale, unrescale
from rlfeed.rollout.actions import MASK, Actions
from rlfeed.train.agent import Counter, Learned, ReplayAgent
from rlfeed.train.schedule import Linear
from rlfeed.types import Batch, PolicyContext, PolicyOutput


@dataclass(frozen=True, kw_only=True)
class R2D2Config(AgentConfig):
    """Hold R2D2's settings.

    Args:
        lr: Learning rate of Adam at the first env step; it falls in a straight line to 0 at the last one.
        adam_eps: What Adam adds to the root of the second moment.
        gamma: Discount per step, 0 to 1.
        n_step: Steps of reward summed before the value of what follows is used, at least 1.
        length: Steps of a sequence that are trained on; sequences overlap by half.
        burn_in: Steps before them that only warm the carry, 0 or more, below `length`.
        memory: What remembers: lstm, gru, or none for a feed-forward control.
        memory_width: Units of the memory.
        memory_steps: Steps for which the slowest unit keeps what it saw, before any training; the fastest forgets.
        widths: Units of the fully connected layers between the encoder and the memory.
        feed_back: Show the network the action and the reward before the observation.
        rescale: Learn h(value) in place of the value: rewards may be of any size then.
        alpha: Exponent of the priorities; 0 draws uniformly.
        beta: Exponent of the importance weights, 0 to 1; 0 has none, as in the paper.
        eta: Share of the greatest error in a sequence's priority; the rest is the mean's.
        target_every: Updates between copies of the network into the target network.
        max_grad_norm: The gradient's norm is scaled down to this.
        epsilon: Environment i of n explores with epsilon ** (1 + epsilon_power * i / (n - 1)).
        epsilon_power: See `epsilon`; 0 makes all alike.
        epsilon_fraction: Part of the run's env steps in which exploration falls from 1 to that ladder, 0 to 1.
    """

    lr: float = 1e-3
    adam_eps: float = 1e-3
    gamma: float = 0.99
    n_step: int = 5
    length: int = 20
    burn_in: int = 5
    memory: Literal["lstm", "gru", "none"] = "lstm"
    memory_width: int = 64
    memory_steps: int = 50
    widths: tuple[int, ...] = (64,)
    feed_back: bool = True
    rescale: bool = True
    alpha: float = 0.9
    beta: float = 0.6
    eta: float = 0.9
    target_every: int = 100
    max_grad_norm: float = 40.0
    epsilon: float = 0.4
    epsilon_power: float = 7.0
    epsilon_fraction: float = 0.1

    def __post_init__(self) -> None:
        check(self, {
            "compile": (not self.compile, "False: what takes the time is a single call, of the memory, as it is"),
            "lr": (self.lr > 0, "above 0"),
            "adam_eps": (self.adam_eps > 0, "above 0"),
            "gamma": (0 <= self.gamma <= 1, "0 to 1"),
            "n_step": (self.n_step >= 1, "at least 1"),
            "length": (self.length >= 1, "at least 1 step"),
            "burn_in": (0 <= self.burn_in < self.length, f"0 or more, and less than agent.length, {self.length}"),
            "memory": (self.memory in ("lstm", "gru", "none"), "lstm, gru or none"),
            "memory_width": (self.memory_width >= 1, "at least 1 unit"),
            "memory_steps": (self.memory_steps >= 1, "at least 1 step"),
            "widths": (all(width >= 1 for width in self.widths), "at least 1 unit each"),
            "alpha": (self.alpha >= 0, "0 or more"),
            "beta": (0 <= self.beta <= 1, "0 to 1"),
            "eta": (0 <= self.eta <= 1, "0 to 1"),
            "target_every": (self.target_every >= 1, "at least 1 update"),
            "max_grad_norm": (self.max_grad_norm > 0, "above 0"),
            "epsilon": (0 <= self.epsilon <= 1, "0 to 1"),
            "epsilon_power": (self.epsilon_power >= 0, "0 or more"),
            "epsilon_fraction": (0 <= self.epsilon_fraction <= 1, "0 to 1"),
        })  # fmt: skip

    def build(self, observation_space: Any, action_space: Any, **run: Any) -> "R2D2":
        """Make the agent; see `AgentConfig.build`."""
        return R2D2(self, observation_space, action_space, **run)


def r2d2() -> ReplayTrainConfig:
    """Give settings for small problems, with or without a need for memory.

    Returns:
        A whole run: environment, agent and budget.
    """
    env = EnvConfig(id="rlfeed.testing.masked:MaskedVelocityCartPole", num_envs=8)
    return ReplayTrainConfig(
        env=env, agent=R2D2Config(), total_steps=150_000, train_every=16, updates_per_round=1, batch_size=32
    )


class _Seen(NamedTuple):
    """What the network sees, ``[B, ...]`` or ``[B, T, ...]``; no action and no reward were before what is first."""

    observation: Nest
    prev_action: Any
    prev_reward: Any
    is_first: Any


class _Network(nn.Module):
    """Values of all actions, from all that was seen in the episode: encoder, layers, memory, dueling heads."""

    def __init__(
        self, config: R2D2Config, observation_space: Any, action_space: spaces.Discrete, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.actions, self.first_action = int(action_space.n), int(action_space.start)
        self.encoder = Encoder(observation_space, generator)
        self.trunk = mlp(self.encoder.features, config.widths, generator)
        features = config.widths[-1] if config.widths else self.encoder.features
        self.feed_back, self.narrow = config.feed_back, config.bfloat16
        features += self.actions + 1 if config.feed_back else 0
        self.core = None
        if config.memory != "none":
            self.core = Recurrent(features, config.memory_width, generator, kind=config.memory)
            _spread_memory(self.core, config.memory_steps)
            features = config.memory_width
        self.advantage = linear(features, self.actions, 1.0, generator)
        self.value = linear(features, 1, 1.0, generator)

    def step(self, seen: _Seen, carry: Nest) -> tuple[Float[Tensor, "B A"], Nest]:
        """Go on by one step, as actors do: ``[B, ...]``."""
        features = self._features(seen)
        if self.core is not None:
            features, carry = self.core.step(features, carry)
        return self._values(features), carry

    def forward(self, seen: _Seen, carry: Nest, burn_in: int) -> Float[Tensor, "B T A"]:
        """Go over ``[B, burn_in + T, ...]``, as the learner does; the burn-in is for the carry alone."""
        with torch.autocast(seen.is_first.device.type, torch.bfloat16, enabled=self.narrow):
            if burn_in and self.core is not None:
                with torch.no_grad():
                    _, carry = self._remembered(map_nest(lambda leaf: leaf[:, :burn_in], seen), carry)
            features, _ = self._remembered(map_nest(lambda leaf: leaf[:, burn_in:], seen), carry)
            return self._values(features).float()

    def count(self, action: Tensor) -> Integer[Tensor, "*rows"]:
        """Count actions from 0; in padding they are 0 whatever the environment's first one is."""
        return (action.long() - self.first_action).clamp(min=0)

    def _remembered(self, seen: _Seen, carry: Nest) -> tuple[Float[Tensor, "B T F"], Nest]:
        flat = map_nest(lambda leaf: leaf.flatten(0, 1), seen)
        features = self._features(flat).unflatten(0, seen.is_first.shape)
        return (features, carry) if self.core is None else self.core(features, carry, seen.is_first)

    def _features(self, seen: _Seen) -> Float[Tensor, "B F"]:
        features = self.trunk(self.encoder(seen.observation))
        if not self.feed_back:
            return features
        before = features.new_zeros(len(features), self.actions + 1)
        before.scatter_(1, self.count(seen.prev_action).unsqueeze(1), 1.0)
        before[:, -1] = rescale(seen.prev_reward)
        return torch.cat([features, before.masked_fill_(seen.is_first.unsqueeze(1), 0.0)], dim=1)

    def _values(self, features: Float[Tensor, "*rows F"]) -> Float[Tensor, "*rows A"]:
        advantage = self.advantage(features)
        return self.value(features) + advantage - advantage.mean(dim=-1, keepdim=True)


class _Window(NamedTuple):
    """A batch's W trained steps, in the same columns of every row."""

    seen: _Seen  # [B, burn_in + W + 1, ...]: the burn-in before them and what follows the last one too
    column: Integer[Tensor, "B W"]  # where they stand in the batch
    action: Integer[Tensor, "B W"]
    reward: Float[Tensor, "B W"]
    discount: Float[Tensor, "B W"]
    acted: Float[Tensor, "B W A"]  # values by which the actor chose, in the unit of rewards
    valid: Bool[Tensor, "B W"]  # whether there is such a step


class R2D2(ReplayAgent):
    """Learn values of actions and histories from replayed sequences, and act on them.

    Args:
        config: The settings.
        observation_space: The Gymnasium space of one environment's observations.
        action_space: The Gymnasium space of one environment's actions: Discrete.
        total_steps: Environment steps of the whole run, the end of schedules.
        seed: Seeds the network's weights.
        device: Where to learn and act.
        num_envs: Environments of one actor; each explores in its own way.

    Raises:
        SpaceError: If the actions are not Discrete, or a part of the observation space is not supported.
    """

    def __init__(
        self,
        config: R2D2Config,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        *,
        total_steps: int,
        seed: int,
        device: torch.device,
        num_envs: int = 1,
    ) -> None:
        if not isinstance(action_space, spaces.Discrete):
            raise SpaceError(
                f"action_space: is {action_space}; R2D2 plays Discrete ones only. Use ppo_rnn, which plays the others, "
                "or map a Discrete space onto this one in a wrapper."
            )
        self.config, self.device, self.num_envs, self.action_space = config, device, num_envs, action_space
        self.unit = Sequence(config.length, config.burn_in, config.gamma)
        self.sampler = Prioritized(config.alpha, config.beta, config.eta)
        self.network, self.target = (
            _Network(config, observation_space, action_space, torch.Generator().manual_seed(seed)).to(device)
            for _ in range(2)
        )
        self.target.requires_grad_(False)
        self.columns = {} if self.network.core is None else {"carry": self.network.core.carry_space}
        self.columns["values"] = spaces.Box(-np.inf, np.inf, (self.network.actions,))
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=config.lr, eps=config.adam_eps, fused=True)
        self.lr = Linear(config.lr, 0.0, total_steps)
        self.random = Linear(1.0, 0.0, max(1, round(config.epsilon_fraction * total_steps)))
        self.policy = self.actor(0, 1)[0]
        self.updates = Counter()

    def parts(self) -> Mapping[str, Any]:
        """Name everything that learning changes; see `Agent.parts`."""
        return {name: getattr(self, name) for name in ("network", "target", "optimizer", "updates")}

    def actor(self, number: int, count: int) -> tuple["Explorer", nn.Module]:
        """Give what an actor acts with, on its rungs of the ladder; see `Agent.actor`."""
        ladder = epsilon_ladder(count * self.num_envs, self.config.epsilon, self.config.epsilon_power)
        return Explorer(self, np.array(ladder[number * self.num_envs :][: self.num_envs])), self.network

    def scalars(self, env_steps: int) -> dict[str, float]:
        """Say where the schedules stand; see `Agent.scalars`."""
        epsilon = float(self.actor(0, 1)[0].epsilon(env_steps).mean())
        return {"rollout/exploration_rate": epsilon, "train/learning_rate": self.lr(env_steps)}

    def learn(self, batch: Batch, *, env_steps: int) -> Learned:
        """Take one optimiser step; every step's |delta| is its priority; see `Agent.learn`."""
        window = self._window(batch)
        values = self.network(window.seen, batch.carry, self.config.burn_in)
        value = values[:, :-1].gather(2, window.action.unsqueeze(2)).squeeze(2)
        target = self._targets(window, values, batch.carry)
        delta = torch.where(window.valid, target - value, 0.0)  # where, not a product: padding may hold anything
        losses = delta.square().sum(dim=1) / 2
        loss = losses.mean() if batch.weights is None else (batch.weights * losses).mean()
        self.optimizer.param_groups[0]["lr"] = self.lr(env_steps)
        self.optimizer.zero_grad()
        loss.backward()
        grad_norm = clip_gradients(self.network.parameters(), self.config.max_grad_norm)
        self.optimizer.step()
        self.updates.value += 1
        if self.updates.value % self.config.target_every == 0:
            self.target.load_state_dict(self.network.state_dict())
        scalars = {"train/loss": loss.detach(), "train/grad_norm": grad_norm}
        scalars |= self._told(window, self.unscaled(values[:, :-1].detach()))
        errors = torch.where(window.valid, delta.detach().abs() + 1e-6, 0.0)  # what has no error can still be drawn
        return Learned(scalars, torch.zeros_like(batch.reward).scatter_add_(1, window.column, errors))

    def _told(self, window: _Window, values: Float[Tensor, "B W A"]) -> dict[str, Tensor]:
        """Say how large the values are, and how far from those by which the actor chose: weights and carry get old."""
        greatest = torch.where(window.valid.unsqueeze(2), values.abs(), 0.0).amax(dim=(1, 2)).clamp(min=1e-6)
        drift = (values - window.acted).norm(dim=2) / greatest.unsqueeze(1)
        value = values.gather(2, window.action.unsqueeze(2)).squeeze(2)
        return {"train/q_mean": masked_mean(value, window.valid), "train/q_drift": masked_mean(drift, window.valid)}

    @torch.no_grad()
    def _targets(self, window: _Window, values: Float[Tensor, "B W1 A"], carry: Nest) -> Float[Tensor, "B W"]:
        """Compute h(G): the network's values choose the actions, the target network's count."""
        chooser = values[:, 1:]
        if isinstance(window.seen.observation, dict) and MASK in window.seen.observation:
            allowed = window.seen.observation[MASK][:, -chooser.shape[1] :]
            chooser = chooser.masked_fill(allowed == 0, -torch.inf)
        target_values = self.target(window.seen, carry, self.config.burn_in)[:, 1:]
        bootstrap = self.unscaled(target_values.gather(2, chooser.argmax(dim=2, keepdim=True)).squeeze(2))
        continues = nn.functional.pad(window.valid[:, 1:], (0, 1))
        returns = n_step_returns(window.reward, window.discount, bootstrap, continues, n=self.config.n_step)
        return rescale(returns) if self.config.rescale else returns

    def unscaled(self, values: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Give what the network says in the unit of rewards."""
        return unrescale(values) if self.config.rescale else values

    def _window(self, batch: Batch) -> _Window:
        """Shift the rows: the nearer a sequence is to the beginning of its episode, the less burn-in there is.

        The columns before that beginning repeat it; what they did to the carry is undone there, where it is first.
        """
        fields = batch.loss_mask, batch.is_first, batch.burn_in, batch.discount, batch.prev_action, batch.prev_reward
        if any(field is None for field in fields):
            raise FieldError("R2D2: the batch lacks burn_in or a field of its kind; expected batches of Sequence.")
        loss_mask, is_first, before, discount, prev_action, prev_reward = cast("tuple[Tensor, ...]", fields)
        steps, burn_in = batch.reward.shape[1], self.config.burn_in
        column = torch.arange(-burn_in, min(steps, self.config.length) + 1, device=self.device) + before.unsqueeze(1)
        shown, row = column.clamp(0, steps), torch.arange(len(column), device=self.device).unsqueeze(1)
        trained = column[:, burn_in:-1].clamp(max=steps - 1)
        actions = torch.cat([prev_action.unsqueeze(1), batch.action], dim=1)
        rewards = torch.cat([prev_reward.unsqueeze(1), batch.reward], dim=1)
        begins = nn.functional.pad(is_first, (0, 1)).gather(1, shown) & (column >= 0)
        observation = map_nest(lambda leaf: leaf[row, shown], batch.observation)
        return _Window(
            _Seen(observation, actions.gather(1, shown), rewards.gather(1, shown), begins),
            trained,
            self.network.count(batch.action.gather(1, trained)),
            batch.reward.gather(1, trained),
            discount.gather(1, trained),
            batch.extras["values"][row, trained],
            loss_mask.gather(1, trained) & (column[:, burn_in:-1] < steps),
        )


class Explorer:
    """Act on the values of what was seen, in each environment with an epsilon of its own.

    Args:
        agent: Whose network acts.
        ladder: Each environment's epsilon, once exploration has fallen.
    """

    def __init__(self, agent: R2D2, ladder: Float[np.ndarray, " N"]) -> None:
        self._agent, self._ladder, self._actions = agent, ladder, Actions(agent.action_space)

    def epsilon(self, env_steps: int) -> Float[np.ndarray, " N"]:
        """Give each environment's probability of a random action."""
        return np.maximum(self._ladder, self._agent.random(env_steps))

    def initial_carry(self, num_envs: int) -> Nest:
        """Give zeros; see `Policy`."""
        core = self._agent.network.core
        return () if core is None else map_nest(lambda leaf: leaf.numpy(force=True), core.initial_carry(num_envs))

    @torch.inference_mode()
    def __call__(self, observation: Nest, carry: Nest, context: PolicyContext) -> PolicyOutput:
        """Choose for every row, among the allowed actions where a mask says so; see `Policy`."""
        agent, mask = self._agent, context.action_mask
        seen = _Seen(observation, context.prev_action, context.prev_reward, context.is_first)
        seen, carry = map_nest(lambda leaf: torch.from_numpy(leaf).to(agent.device), (seen, carry))
        values, carry = agent.network.step(seen, carry)
        values, carry = map_nest(lambda leaf: leaf.numpy(force=True), (agent.unscaled(values), carry))
        chooser = values if mask is None else np.where(mask, values, -np.inf)
        action = chooser.argmax(axis=1) + agent.network.first_action
        if context.mode == "explore":
            drawn = self._actions.draw(len(action), context.generator, mask)
            epsilon = self.epsilon(context.env_steps)[context.env_ids % len(self._ladder)]
            action = np.where(context.generator.random(len(action)) < epsilon, drawn, action)
        return PolicyOutput(action, carry, {"values": values})


@torch.no_grad()
def _spread_memory(core: Recurrent, steps: int) -> None:
    """Let units begin with time scales from 1 to so many steps: with all gates half open none would reach far.

    Source: Tallec and Ollivier 2018 (Can recurrent neural networks warp time?), section 2; evenly in logarithms here.
    """
    scale = torch.linspace(0.0, math.log(steps), core.width)
    bias = dict(core.core.named_parameters())["bias_ih_l0"].view(-1, core.width)
    bias[1] = scale  # an LSTM's forget gate, a GRU's update gate: what they keep
    if core.kind == "lstm":
        bias[0] = -scale  # and what is let in
