"""I10: a run that is stopped in the middle of episodes and resumed is the run that was never stopped, bit for bit."""

import pytest
import torch

from agents.dqn import DQNConfig
from rlfeed.codec import encode
from rlfeed.envs import make_envs
from rlfeed.replay import ReplayBuffer
from rlfeed.rollout import Rollout
from rlfeed.train.checkpoint import Checkpoints
from rlfeed.train.evaluate import evaluate
from rlfeed.train.replay_loop import ReplayLoop, ReplayLoopConfig

TOTAL = 400
CONFIG = ReplayLoopConfig(
    total_steps=TOTAL, learning_starts=40, train_every=16, updates_per_round=4, batch_size=16, capacity=400,
    eval_every=150, eval_episodes=2, checkpoint_every=200, log_every=200,
)  # fmt: skip
AGENTS = {
    "dqn": DQNConfig(),
    "rainbow": DQNConfig(widths=(16,), atoms=11, dueling=True, noisy=True, priority_exponent=0.6, n_step=3),
}


class Silent:
    def scalar(self, tag, value, env_steps):
        pass

    def flush(self):
        pass

    def close(self):
        pass


def play(directory, *, preset, num_envs, until=TOTAL, resume=False):
    """Train in ``directory`` until an env step; give the loop and how its environments came back."""
    envs, cpu = make_envs("CartPole-v1", num_envs), torch.device("cpu")
    spaces = envs.observation_space, envs.action_space
    agent = AGENTS[preset].build(*spaces, total_steps=TOTAL, seed=3, device=cpu)
    checkpoints = Checkpoints(directory)
    checkpoint = checkpoints.latest() if resume else None
    buffer = (
        ReplayBuffer.load(checkpoint.path / "replay")
        if checkpoint
        else ReplayBuffer(*spaces, capacity=CONFIG.capacity, num_envs=num_envs, sampler=agent.sampler)
    )
    loop = ReplayLoop(
        CONFIG, agent, Rollout(envs, agent.policy, seed=3), buffer, device=cpu, seed=3,
        evaluate=lambda policy: evaluate(make_envs("CartPole-v1"), policy, episodes=2, seed=5),
        checkpoints=checkpoints, logger=Silent(), stop=lambda: loop.env_steps >= until < TOTAL,
    )  # fmt: skip
    how = loop.restore(checkpoint) if checkpoint else None
    loop.run()
    return loop, how


def state_of(loop):
    rollout = loop.collector.state_dict()
    return [b"".join(map(bytes, encode(state))) for state in (loop.agent.state_dict(), rollout)]


@pytest.mark.parametrize(("preset", "num_envs"), [("dqn", 1), ("dqn", 3), ("rainbow", 1)])
def test_agent_stopped_and_resumed_twice_equals_the_uninterrupted_run(tmp_path, preset, num_envs):
    """Of rainbow: priorities, the exponent of importance weights and the network's noise go on too."""
    torch.set_num_threads(1)
    whole, _ = play(tmp_path / "whole", preset=preset, num_envs=num_envs)
    for until in (117, 304):
        play(tmp_path / "parts", preset=preset, num_envs=num_envs, until=until, resume=until > 117)
    assert Checkpoints(tmp_path / "parts").latest().info["environments"] == "re-enacted"
    resumed, how = play(tmp_path / "parts", preset=preset, num_envs=num_envs, resume=True)
    assert how == "re-enacted"
    assert state_of(resumed) == state_of(whole)
    assert resumed.buffer.stats().inserted == whole.buffer.stats().inserted
    assert resumed.evaluation.returns.tolist() == whole.evaluation.returns.tolist()
