"""Whether a busy learner slows actors: their env steps per second while it sleeps and while it learns, in turns.

    python scripts/actors_benchmark.py [--actors 1] [--num-envs 8] [--rounds 10]

Env steps per second of the actors' processor time say what a step costs; those by the clock also say how many
processors there were. In the second part one process does the same steps.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import command_line  # noqa: F401 - puts the checkout on the path
import numpy as np
import torch
from torch import nn

from agents.dqn import DQN, DQNConfig
from rlfeed.envs import Envs, make_envs
from rlfeed.feed import DeviceFeed, make_loader
from rlfeed.replay import ReplayBuffer
from rlfeed.rollout import Actors, Rollout, Weights
from rlfeed.specs import ArraySpec

ENV = "CartPole-v1"
PUBLISH_EVERY = 20
ROUND_S = 1.0
VERSIONS = {"policy_version": ArraySpec((), np.dtype(np.int64))}


def make_actor_envs(num_envs: int, first_env_id: int) -> Envs:
    """Make an actor's environments."""
    return make_envs(ENV, num_envs, mode="serial", first_env_id=first_env_id)


def make_agent() -> DQN:
    """Make the agent of the learner and of each actor."""
    env = make_envs(ENV, mode="serial")
    cpu = torch.device("cpu")
    return DQN(DQNConfig(), env.observation_space, env.action_space, total_steps=10**6, seed=0, device=cpu)


def make_actor_policy(actor: int, num_actors: int) -> tuple[Any, nn.Module]:
    """Make what an actor acts with."""
    return make_agent().actor(actor, num_actors)


def make_buffer(num_envs: int, extras: dict[str, Any]) -> ReplayBuffer:
    """Make a replay for so many environments."""
    env = make_envs(ENV, mode="serial")
    return ReplayBuffer(env.observation_space, env.action_space, capacity=500_000, num_envs=num_envs, extras=extras)


def learn(agent: DQN, batches: Iterator[Any], weights: Weights) -> int:
    """Learn for one round and publish now and then; gives the updates made."""
    end, first = time.perf_counter() + ROUND_S, agent.updates
    while time.perf_counter() < end:
        agent.learn(next(batches), env_steps=0)
        if agent.updates % PUBLISH_EVERY == 0:
            weights.publish(agent.network, agent.updates)
    return agent.updates - first


def processor_s(processes: list[int | None]) -> float:
    """Sum up the processor time of processes, in seconds."""
    fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in processes]
    return sum(int(each[11]) + int(each[12]) for each in fields) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--actors", type=int, default=1)
    parser.add_argument("--num-envs", type=int, default=8, help="environments of each actor")
    parser.add_argument("--rounds", type=int, default=10, help="of each kind, a second each")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    agent, buffer = make_agent(), make_buffer(flags.actors * flags.num_envs, VERSIONS)
    weights = Weights(agent.network)
    rates: dict[str, list[tuple[float, float]]] = {"asleep": [], "learning": []}
    updates = 0
    with Actors(
        partial(make_actor_envs, flags.num_envs),
        make_actor_policy,
        buffer,
        weights,
        num_actors=flags.actors,
        envs_per_actor=flags.num_envs,
    ) as actors:
        while actors.env_steps < 5_000:
            actors.wait(actors.env_steps)
        batches = iter(DeviceFeed(make_loader(buffer, agent.unit, batch_size=256), "cpu"))
        rounds: dict[str, Callable[[], int]] = {
            "asleep": lambda: time.sleep(ROUND_S) or 0,
            "learning": lambda: learn(agent, batches, weights),
        }
        for _ in range(flags.rounds):
            for what, spend in rounds.items():
                begin_s, steps, used_s = time.perf_counter(), actors.env_steps, processor_s(actors.processes)
                updates += spend()
                taken = actors.env_steps - steps
                used_s = max(processor_s(actors.processes) - used_s, 1e-9)
                rates[what].append((taken / (time.perf_counter() - begin_s), taken / used_s))
                actors.poll()
        waited_s = sum(stats.waited_s for stats in actors.stats())
    for what, pairs in rates.items():
        clock, processor = (statistics.median(values) for values in zip(*pairs, strict=True))
        print(f"learner {what}: {clock:,.0f} env steps/s, {processor:,.0f} per processor-second of the actors")
    print(f"updates/s: {updates / flags.rounds / ROUND_S:,.0f}; actors waited {waited_s:.3f} s")
    rollout, alone = Rollout(make_actor_envs(flags.num_envs, 0), agent.policy), make_buffer(flags.num_envs, {})
    costs = []
    for _ in range(flags.rounds):
        begin_s = time.process_time()
        costs.append(rollout.collect(alone, steps=flags.num_envs * 500) / (time.process_time() - begin_s))
    print(f"one process, which only collects: {statistics.median(costs):,.0f} env steps per processor-second")


if __name__ == "__main__":
    main()
