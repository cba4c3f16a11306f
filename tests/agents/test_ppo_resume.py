"""I10: a run that is stopped in the middle of episodes and resumed is the run that was never stopped, bit for bit."""

import pytest
import torch

from agents.ppo import PPOConfig
from rlfeed.codec import encode
from rlfeed.envs import make_envs
from rlfeed.rollout import Rollout
from rlfeed.train.block_loop import BlockLoop, BlockLoopConfig
from rlfeed.train.checkpoint import Checkpoints
from rlfeed.train.evaluate import evaluate

TOTAL = 400
CONFIG = BlockLoopConfig(
    total_steps=TOTAL, block_length=16, eval_every=150, eval_episodes=2, checkpoint_every=200, log_every=200
)


class Silent:
    def scalar(self, tag, value, env_steps):
        pass

    def flush(self):
        pass

    def close(self):
        pass


def play(directory, *, core, until=TOTAL, resume=False):
    """Train in ``directory`` until an env step; give the loop and how its environments came back."""
    envs, cpu = make_envs("CartPole-v1", 2, mode="serial"), torch.device("cpu")
    config = PPOConfig(widths=(8,), core=core, core_width=8, epochs=2, minibatches=2)
    agent = config.build(envs.observation_space, envs.action_space, total_steps=TOTAL, seed=3, device=cpu, num_envs=2)
    checkpoints = Checkpoints(directory)
    checkpoint = checkpoints.latest() if resume else None
    loop = BlockLoop(
        CONFIG, agent, Rollout(envs, agent.policy, seed=3), device=cpu,
        evaluate=lambda policy: evaluate(make_envs("CartPole-v1", mode="serial"), policy, episodes=2, seed=5),
        checkpoints=checkpoints, logger=Silent(), stop=lambda: loop.env_steps >= until < TOTAL,
    )  # fmt: skip
    how = loop.restore(checkpoint) if checkpoint else None
    loop.run()
    return loop, how


def state_of(loop):
    rollout = loop.collector.state_dict()
    return [b"".join(map(bytes, encode(state))) for state in (loop.agent.state_dict(), rollout)]


@pytest.mark.parametrize("core", ["none", "lstm"])
def test_ppo_stopped_and_resumed_twice_equals_the_uninterrupted_run(tmp_path, core):
    torch.set_num_threads(1)
    whole, _ = play(tmp_path / "whole", core=core)
    for until in (117, 304):
        play(tmp_path / "parts", core=core, until=until, resume=until > 117)
    resumed, how = play(tmp_path / "parts", core=core, resume=True)
    assert how == "re-enacted"
    assert state_of(resumed) == state_of(whole)
    assert resumed.evaluation.returns.tolist() == whole.evaluation.returns.tolist()
