"""I10: a run that is stopped in the middle of episodes and resumed is the run that was never stopped, bit for bit."""

import torch

from agents.sac import SACConfig
from rlfeed.codec import encode
from rlfeed.envs import make_envs
from rlfeed.replay import ReplayBuffer
from rlfeed.rollout import Rollout
from rlfeed.train.checkpoint import Checkpoints
from rlfeed.train.evaluate import evaluate
from rlfeed.train.replay_loop import ReplayLoop, ReplayLoopConfig

TOTAL = 400
CONFIG = ReplayLoopConfig(
    total_steps=TOTAL, learning_starts=40, train_every=16, updates_per_round=4, batch_size=16, capacity=500,
    eval_every=10**6, checkpoint_every=10**6, log_every=200,
)  # fmt: skip
# Everything that has a state: correlated noise, returns so far, batch statistics, a delay of 3, target networks.
AGENT = SACConfig(
    actor_widths=(8,), critic_widths=(8,), norm="batch", unit_weights=True, atoms=11, scale_rewards=True,
    policy_delay=3, noise_correlation=0.5,
)  # fmt: skip


class Silent:
    def scalar(self, tag, value, env_steps):
        pass

    def flush(self):
        pass

    def close(self):
        pass


def play(directory, *, until=TOTAL, resume=False):
    envs, cpu = make_envs("Pendulum-v1", 2), torch.device("cpu")
    spaces = envs.observation_space, envs.action_space
    agent = AGENT.build(*spaces, total_steps=TOTAL, seed=3, device=cpu)
    checkpoints = Checkpoints(directory)
    checkpoint = checkpoints.latest() if resume else None
    buffer = (
        ReplayBuffer.load(checkpoint.path / "replay")
        if checkpoint
        else ReplayBuffer(*spaces, capacity=CONFIG.capacity, num_envs=2, extras=agent.columns)
    )
    loop = ReplayLoop(
        CONFIG, agent, Rollout(envs, agent.policy, seed=3, actions="rescale"), buffer, device=cpu, seed=3,
        evaluate=lambda policy: evaluate(make_envs("Pendulum-v1"), policy, episodes=1, seed=5, actions="rescale"),
        checkpoints=checkpoints, logger=Silent(), stop=lambda: loop.env_steps >= until < TOTAL,
    )  # fmt: skip
    if checkpoint:
        assert loop.restore(checkpoint) == "re-enacted"
    loop.run()
    return loop


def state_of(loop):
    rollout = loop.collector.state_dict()
    return [b"".join(map(bytes, encode(state))) for state in (loop.agent.state_dict(), rollout)]


def test_sac_stopped_and_resumed_equals_the_uninterrupted_run(tmp_path):
    torch.set_num_threads(1)
    whole = play(tmp_path / "whole")
    play(tmp_path / "parts", until=234)
    resumed = play(tmp_path / "parts", resume=True)
    assert state_of(resumed) == state_of(whole)
    assert resumed.evaluation.returns.tolist() == whole.evaluation.returns.tolist()
