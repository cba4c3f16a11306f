"""The loop with actors, which are forked."""

import dataclasses
import os
import signal

import numpy as np
import pytest
import torch
from support.recorder import Recorder
from torch import nn

from rlfeed.envs.serial import SerialEnvs
from rlfeed.errors import ConfigError, UnsupportedError
from rlfeed.feed import epoch
from rlfeed.replay import ReplayBuffer, Transition
from rlfeed.rollout import Actors, Weights
from rlfeed.specs import ArraySpec
from rlfeed.testing import IdentifiableEnv
from rlfeed.train.agent import Learned, ReplayAgent
from rlfeed.train.checkpoint import Checkpoints
from rlfeed.train.evaluate import Evaluation
from rlfeed.train.replay_loop import ReplayLoop, ReplayLoopConfig

CPU = torch.device("cpu")
CONFIG = ReplayLoopConfig(
    total_steps=2000,
    learning_starts=100,
    train_every=100,
    updates_per_round=4,
    batch_size=8,
    capacity=20_000,
    actors=2,
    actors_ahead=300,
    publish_every=3,
    eval_every=1000,
    eval_episodes=2,
    checkpoint_every=900,
    log_every=500,
)


class Counter(nn.Module):
    """Acts by the updates that it has been through; they are its weights."""

    def __init__(self):
        super().__init__()
        self.updates = nn.Parameter(torch.zeros(()), requires_grad=False)

    def forward(self, observation):
        return torch.full((len(observation),), int(self.updates) % 5)


class CountingAgent(ReplayAgent):
    """Counts its updates, and notes what it was shown."""

    unit = Transition()

    def __init__(self):
        self.policy = Counter()
        self.versions = []

    def actor(self, number, count):
        return self.policy, self.policy

    def learn(self, batch, *, env_steps):
        self.policy.updates += 1
        self.versions.append(batch.extras["policy_version"].max().item())
        return Learned({"train/loss": torch.tensor(0.5)})

    def parts(self):
        return {}

    def scalars(self, env_steps):
        return {}

    def state_dict(self):
        return {"updates": self.policy.updates.clone()}

    def load_state_dict(self, state):
        self.policy.updates.copy_(state["updates"])


class Run:
    """A loop, its actors, and a way to look at everything."""

    def __init__(self, directory, *, config=CONFIG, stop=lambda loop: False, checkpoint=None):
        self.agent, self.logger = CountingAgent(), Recorder()
        env = IdentifiableEnv()
        self.buffer = (
            ReplayBuffer.load(checkpoint.path / "replay")
            if checkpoint
            else ReplayBuffer(
                env.observation_space,
                env.action_space,
                capacity=config.capacity,
                num_envs=4,
                extras={"policy_version": ArraySpec((), np.dtype(np.int64))},
            )
        )
        self.actors = Actors(
            lambda first: SerialEnvs([IdentifiableEnv(first), IdentifiableEnv(first + 1)]),
            lambda actor, num_actors: CountingAgent().actor(actor, num_actors),
            self.buffer,
            Weights(self.agent.actor(0, 1)[1]),
            num_actors=2,
            envs_per_actor=2,
            pull_every=1,
            seed=3,
            start_method="fork",
        )
        self.loop = ReplayLoop(
            config,
            self.agent,
            self.actors,
            self.buffer,
            device=CPU,
            seed=3,
            evaluate=lambda policy: Evaluation(np.array([2.0]), np.array([5]), 2.0, 0.0),
            checkpoints=Checkpoints(directory),
            logger=self.logger,
            stop=lambda: stop(self),
        )
        if checkpoint:
            self.loop.restore(checkpoint)

    def run(self):
        try:
            return self.loop.run()
        finally:
            self.actors.close()

    def stored(self):
        """(lane, id, observation, action, successor, version) of every step, in the order of each lane."""
        rows = []
        for batch in epoch(self.buffer, Transition(), 64, shuffle=False):
            columns = (batch.ids, batch.observation, batch.action, batch.next_observation)
            columns = (*columns, batch.extras["policy_version"])
            rows += [(row[0] >> 44, *row) for row in zip(*(column.tolist() for column in columns), strict=True)]
        return sorted(rows)


def test_loop_with_actors_does_all_that_is_due_on_steps_that_are_all_right(tmp_path):
    run = Run(tmp_path)
    assert run.run() is True
    loop, rows = run.loop, run.stored()

    assert 2000 <= loop.env_steps < 2000 + 4
    assert loop.env_steps == len(rows) == run.buffer.stats().inserted
    assert loop.updates == 4 * ((loop.env_steps - 100) // 100 + 1)  # rounds at 100, 200, ...
    for lane, _, observation, action, successor, version in rows:
        assert observation[0] == lane
        assert successor == [lane, observation[1], observation[2] + 1, action]
        assert version % 3 == 0
        assert action == version % 5 or version == 0  # or at random, at first
    for lane in range(4):
        versions = [row[5] for row in rows if row[0] == lane]
        assert versions == sorted(versions)
    # An actor was ahead of the learner by no more than it may be: what it was shown is not of the future.
    assert all(version <= update for update, version in enumerate(run.agent.versions))
    assert max(run.agent.versions) > 0

    points = run.logger.points
    assert [at // 1000 for at, _ in points["eval/mean_reward"]] == [1, 2]
    assert all(0 <= lag <= loop.updates for _, lag in points["replay/policy_lag"])
    assert all(lag >= 0 for _, lag in points["actors/policy_lag"])
    assert all(0 <= waited <= 1.01 for _, waited in points["actors/waited"])
    assert {"actors/steps_per_s/0", "actors/steps_per_s/1"} <= set(points)
    at = [env_steps for env_steps, _ in points["charts/episodic_return"]]
    assert at == sorted(at)
    assert Checkpoints(tmp_path).latest().env_steps == loop.env_steps


def test_loop_with_actors_random_actions_come_first(tmp_path):
    config = dataclasses.replace(CONFIG, total_steps=1000, learning_starts=100, publish_every=1000)
    run = Run(tmp_path, config=config)
    run.run()
    random = [row for row in run.stored() if row[3] != 0]  # the policy's actions are all 0
    assert 30 < len(random) <= 100 + 4


def test_loop_with_actors_resumed_goes_on_with_steps_versions_and_episodes(tmp_path):
    first = Run(tmp_path, stop=lambda run: run.loop.updates >= 30)
    assert first.run() is False
    checkpoint = Checkpoints(tmp_path).latest()
    assert checkpoint.env_steps == first.loop.env_steps == first.buffer.stats().inserted

    second = Run(tmp_path, checkpoint=checkpoint)
    assert second.loop.env_steps == checkpoint.env_steps
    assert second.run() is True
    rows = second.stored()
    assert second.loop.env_steps == len(rows) >= 2000
    assert second.loop.updates == 4 * ((second.loop.env_steps - 100) // 100 + 1)
    for lane in range(4):
        versions = [row[5] for row in rows if row[0] == lane]
        assert versions == sorted(versions)
    assert max(row[5] for row in rows) > 30
    for _, _, observation, action, successor, _ in rows:  # no step joins what was before and what came after
        assert successor == [observation[0], observation[1], observation[2] + 1, action]


def test_loop_whose_actor_is_killed_trains_to_the_end(tmp_path):
    killed = []

    def kill(run):
        if run.loop.updates >= 20 and not killed:
            killed.append(run.actors.processes[0])
            os.kill(killed[0], signal.SIGKILL)
        return False

    run = Run(tmp_path, stop=kill)
    with pytest.warns(RuntimeWarning, match="actor 0 .* was killed by SIGKILL"):
        assert run.run() is True
    assert run.logger.points["actors/restarts"][-1][1] == 1.0
    assert [row[4][2] for row in run.stored()] == [row[2][2] + 1 for row in run.stored()]


def test_loop_of_an_agent_without_actors_says_so():
    class Still(CountingAgent):
        actor = ReplayAgent.actor

    with pytest.raises(UnsupportedError, match="Still: has no method actor"):
        Still().actor(0, 1)
    with pytest.raises(ConfigError, match="actors: is -1"):
        ReplayLoopConfig(actors=-1)
