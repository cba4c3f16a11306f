"""PQN through the whole path: values that are known, and I10: stopped and resumed it goes on bit for bit."""

from dataclasses import replace

import pytest
import torch
from support.recorder import Recorder

from agents.config import EnvConfig
from agents.pqn import PQNConfig, pqn
from agents.training import train
from rlfeed.codec import encode
from rlfeed.envs import make_envs
from rlfeed.rollout import Rollout
from rlfeed.testing.probes import PROBES
from rlfeed.train.block_loop import BlockLoop, BlockLoopConfig
from rlfeed.train.checkpoint import Checkpoints
from rlfeed.train.evaluate import evaluate


@pytest.mark.parametrize(("number", "gamma"), [("P6", 0.9), ("P7", 0.9)])
def test_pqn_finds_the_values_of_probes_whose_episodes_end_inside_its_blocks(number, gamma):
    """B1 to B4, P6 and P7: blocks of 5 steps in episodes of 8, which terminate or are truncated."""
    probe = PROBES[number]
    run = replace(
        pqn(),
        env=EnvConfig(num_envs=8, mode="serial"),
        agent=PQNConfig(gamma=gamma, lr=5e-3, widths=(64,), epochs=4, minibatches=2),
        total_steps=4_000,
        block_length=5,
        eval_episodes=2,
    )
    agent, _ = train(run, env=probe.make)
    observations, values = probe.answers(gamma)
    found = agent.values(torch.from_numpy(observations)).numpy()
    assert found == pytest.approx(values, abs=0.1 if number == "P6" else 0.2)


CONFIG = BlockLoopConfig(total_steps=320, block_length=8, eval_every=10**6, checkpoint_every=10**6, log_every=100)


def play(directory, core, *, until=320, resume=False):
    envs, cpu = make_envs("CartPole-v1", 4), torch.device("cpu")
    agent = PQNConfig(core=core, core_width=8, widths=(8,), epochs=2, minibatches=2).build(
        envs.observation_space, envs.action_space, total_steps=320, seed=3, device=cpu
    )
    checkpoints = Checkpoints(directory)
    loop = BlockLoop(
        CONFIG, agent, Rollout(envs, agent.policy, seed=3), device=cpu, logger=Recorder(), checkpoints=checkpoints,
        evaluate=lambda policy: evaluate(make_envs("CartPole-v1"), policy, episodes=2, seed=5),
        stop=lambda: loop.env_steps >= until < 320,
    )  # fmt: skip
    if resume:
        assert loop.restore(checkpoints.latest()) == "re-enacted"
    loop.run()
    return loop


@pytest.mark.parametrize("core", ["none", "lstm"])
def test_pqn_stopped_and_resumed_equals_the_uninterrupted_run(tmp_path, core):
    torch.set_num_threads(1)
    whole = play(tmp_path / "whole", core)
    play(tmp_path / "parts", core, until=150)
    resumed = play(tmp_path / "parts", core, resume=True)
    states = [[loop.agent.state_dict(), loop.collector.state_dict()] for loop in (whole, resumed)]
    assert len({b"".join(map(bytes, encode(state))) for state in states}) == 1
    assert resumed.evaluation.returns.tolist() == whole.evaluation.returns.tolist()
    assert resumed.updates == whole.updates == 40
