import copy
import multiprocessing
import os
import signal

import numpy as np
import pytest
import torch
from torch import nn

from rlfeed.errors import ConfigError
from rlfeed.rollout.weights import Weights

FORK = multiprocessing.get_context("fork")


def network(value=0.0):
    module = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            tensor.fill_(value)
    return module


def values(module):
    return {float(x) for tensor in [*module.parameters(), *module.buffers()] for x in tensor.detach().reshape(-1)}


def test_weights_pulled_are_those_published_last_with_buffers_of_every_dtype():
    weights, actor = Weights(network(1.0)), network()
    assert weights.pull(actor) == 0
    assert values(actor) == {1.0}

    assert not weights.is_new
    weights.publish(network(7.0), 40)
    weights.publish(network(8.0), 60)
    assert weights.is_new
    assert weights.version == 60
    assert weights.pull(actor) == 60
    assert values(actor) == {8.0}
    assert actor[1].num_batches_tracked.dtype == torch.int64


def test_weights_nothing_new_leaves_the_module_alone():
    weights, actor = Weights(network(1.0), 5), network()
    weights.pull(actor)
    with torch.no_grad():
        actor[0].weight.fill_(3.0)

    assert weights.pull(actor) == 5
    assert values(actor) == {1.0, 3.0}


def test_weights_of_a_nest_hold_arrays_and_tensors_by_their_place():
    given = {"a": np.arange(3.0), "b": (torch.ones(2, dtype=torch.bfloat16), np.array([True]))}
    target = {"a": np.zeros(3), "b": (torch.zeros(2, dtype=torch.bfloat16), np.array([False]))}

    assert Weights(given, 9).pull(target) == 9
    assert target["a"].tolist() == [0.0, 1.0, 2.0]
    assert target["b"][0].tolist() == [1.0, 1.0]
    assert target["b"][1].tolist() == [True]


def test_weights_of_another_module_are_refused_with_every_difference():
    weights = Weights(network())
    with pytest.raises(ConfigError, match=r"0\.weight is .*\(4, 3\)\); expected .*\(5, 3\)\); .*1\.bias is missing"):
        weights.pull(nn.Sequential(nn.Linear(3, 4)))
    with pytest.raises(ConfigError, match="version is 1; expected at least 2"):
        [weights.publish(network(), version) for version in (2, 1)]


def test_weights_being_overwritten_are_not_taken():
    weights, actor = Weights(network(1.0)), network(4.0)
    other = copy.copy(weights)  # what another process has
    half = other._halves[1]
    half[100] += 1  # as a processor that shows a publication's bytes later than its number

    assert other.pull(actor) == -1
    assert values(actor) == {4.0}
    half[100] -= 1
    other._words[32] = 0  # it is being written
    assert other.pull(actor) == -1
    other._words[32] = 1
    assert other.pull(actor) == 0
    assert values(actor) == {1.0}


def publish_for_ever(weights, size):
    for version in range(1, 1 << 40):
        weights.publish(torch.full((size,), float(version), dtype=torch.float64), version)


@pytest.mark.parametrize("pulls", [300, pytest.param(100_000, marks=pytest.mark.slow)])
def test_weights_beside_a_publisher_at_full_speed_are_never_torn_and_survive_it(pulls):
    size = 20_000
    weights, target = Weights(torch.zeros(size, dtype=torch.float64)), torch.full((size,), -1.0, dtype=torch.float64)
    learner = FORK.Process(target=publish_for_ever, args=(weights, size), daemon=True)
    learner.start()
    seen = []
    try:
        while len(seen) < pulls:
            version = weights.pull(target)
            if not seen or version > seen[-1]:
                assert bool((target == version).all())
                seen.append(version)
    finally:
        os.kill(learner.pid, signal.SIGKILL)
        learner.join()

    assert len(set(seen)) == pulls
    last = weights.pull(target)  # killed anywhere, perhaps while it wrote: what was whole before is still there
    assert last >= seen[-1]
    assert bool((target == last).all())
