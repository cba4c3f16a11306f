"""The public names and their signatures: code outside this repository is written against them."""

import inspect
import itertools

import pytest

import rlfeed
from rlfeed.errors import ConfigError, UnsupportedError
from rlfeed.log import tags
from rlfeed.rollout import Rollout

SIGNATURES = {
    "make_envs": "(id_or_callable, num_envs=1, *, kwargs=None, wrappers=(), mode='auto', autoreset='same_step', "
    "layout='auto', min_ready=None, on_fault=None, max_restarts=5, step_timeout_s=60.0, first_env_id=0)",
    "Step": "(observation, action, reward, next_observation, terminated, truncated, *, is_first, env_ids=None, "
    "lost=None, carry=(), extras=<factory>, env_action=None)",
    "PolicyContext": "(is_first, mode, env_ids, env_steps, prev_action, prev_reward, action_mask, generator)",
    "PolicyOutput": "(action, carry=(), extras=<factory>)",
    "Feedback": "(cell, x0, carry=(), *, feed=None, stop=None, max_steps=None, check='raise', "
    "check_every=1, grad=False, detach_every=None, compact=False, batched=True)",
    "ModelEnvs": "(model, *, observation_space, action_space, initial, reward_fn, termination_fn, horizon=None, "
    "num_envs=1, initial_carry=None, on_fault='raise', max_restarts=5, name=None)",
    "Rollout": "(envs, policy, *, seed=0, mode='explore', actions='strict')",
    "evaluate": "(envs, policy, *, episodes=20, seed=0, mode='greedy', actions='strict')",
    "Evaluation": "(returns, lengths, mean, std, *, success=None)",
    "ReplayBuffer": "(observation_space, action_space, *, capacity, num_envs=1, sampler=Uniform(), extras={}, "
    "frame_stack=1, carry_every=1, storage='shared', path=None, seed=0)",
    "Hindsight": "(strategy, fraction, reward_fn)",
    "Finding": "(where, problem, expected, fix, *, severity='error')",
    "check_env": "(env_or_factory, *, episodes=3, max_steps=1000, call_timeout_s=60.0, workers=True)",
    "load_policy": "(run_dir)",
    "epoch": "(buffer, unit, batch_size, *, shuffle=True, drop_last=False, num_workers=0, seed=0, transform=None, "
    "bucket=1)",
    "stream": "(factory, *, transform=None, shuffle_buffer=0, seed=0)",
    "cycle": "(loader)",
    "Transition": "(n_step=1, gamma=0.99, relabel=None)",
    "Sequence": "(length, burn_in=0, gamma=0.99, boundary='pad', stride=None)",
    "Episode": "(max_length=None, gamma=0.99)",
    "Uniform": "()",
    "Prioritized": "(alpha=0.6, beta=0.4, eta=0.9, scale='batch')",
    "Recent": "(half_life)",
    "Mixture": "(samplers)",
    "Limiter": "(samples_per_insert, min_size, tolerance)",
    "ReplayDataset": "(buffer, unit, *, batch_size=None, transform=None, limiter=None, seed=0)",
    "pad_collate": "(samples, *, padding_value=0.0, pad_to_multiple_of=None, layout='padded')",
    "make_loader": "(buffer, unit, *, batch_size, num_workers=0, lookahead=4, limiter=None, transform=None, "
    "on_worker_death='raise', timeout_s=60.0, seed=0, rank=0)",
    "DeviceFeed": "(loader, device='auto', *, depth=2, static_buffers=False)",
}
METHODS = {
    "Rollout.episodes": "(self, n, per_env=True)",
    "Rollout.collect": "(self, buffer, *, steps)",
    "Rollout.blocks": "(self, T)",
    "Rollout.state_dict": "(self)",
    "Rollout.load_state_dict": "(self, state)",
    "Rollout.close": "(self)",
    "ReplayBuffer.add": "(self, step)",
    "ReplayBuffer.extend": "(self, batch)",
    "ReplayBuffer.sample": "(self, batch_size, unit)",
    "ReplayBuffer.update_priorities": "(self, ids, values)",
    "ReplayBuffer.update": "(self, ids, **columns)",
    "ReplayBuffer.stats": "(self)",
    "ReplayBuffer.save": "(self, directory)",
    "ReplayBuffer.load": "(directory, *, observation_space=None, action_space=None)",
    "ReplayBuffer.writer": "(self, env_ids)",
    "ReplayBuffer.cut": "(self, env_ids=None)",
    "ReplayBuffer.release": "(self, env_ids)",
    "ReplayLoader.update_priorities": "(self, batch, values)",
    "ReplayLoader.stats": "(self)",
    "ReplayLoader.state_dict": "(self)",
    "ReplayLoader.load_state_dict": "(self, state)",
    "ReplayLoader.close": "(self)",
    "DeviceFeed.update_priorities": "(self, batch, values)",
    "Batch.to": "(self, device, non_blocking=False)",
    "Batch.pin_memory": "(self)",
    "Batch.clone": "(self)",
    "Batch.padded": "(self, *, multiple_of=1, padding_value=0.0)",
    "Batch.packed": "(self)",
    "Batch.jagged": "(self, name)",
}


def plain(function):
    """A signature without its annotations."""
    signature = inspect.signature(function)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))


@pytest.mark.parametrize("name", SIGNATURES)
def test_public_signature_is_the_fixed_one(name):
    assert plain(getattr(rlfeed, name)) == SIGNATURES[name]


@pytest.mark.parametrize("name", METHODS)
def test_public_method_is_the_fixed_one(name):
    home, method = name.split(".")
    assert plain(getattr(getattr(rlfeed, home), method)) == METHODS[name]


def test_tags_register_is_the_fixed_one():
    assert plain(tags.register) == "(name, unit, meaning)"


def test_public_names_are_sorted_and_all_there():
    assert rlfeed.__all__ == sorted(rlfeed.__all__)
    assert set(SIGNATURES) <= set(rlfeed.__all__)
    assert all(inspect.getdoc(getattr(rlfeed, name)) for name in rlfeed.__all__)


def test_what_is_not_served_yet_says_so():
    with pytest.raises(UnsupportedError, match="this version"):
        rlfeed.load_policy("runs/x")


def test_cycle_goes_on_for_ever_and_refuses_what_is_empty():
    assert list(itertools.islice(rlfeed.cycle([1, 2]), 5)) == [1, 2, 1, 2, 1]
    used_up = iter([1])
    with pytest.raises(ConfigError, match="give the loader itself"):
        list(rlfeed.cycle(used_up))


def test_rollout_and_dataset_are_iterators():
    assert callable(Rollout.__next__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = rlfeed.nonsense
