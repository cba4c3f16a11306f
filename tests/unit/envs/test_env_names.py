"""Naming an environment: all forms, hints, and that a worker process which starts afresh makes the same one."""

import pickle
import subprocess
import sys
import threading
from pathlib import Path

import gymnasium
import pytest

from rlfeed.envs import EnvSource, make_envs
from rlfeed.errors import ConfigError, EnvMakeError, EnvNotFoundError
from rlfeed.testing import ConstantRewardEnv

ROOT = Path(__file__).parents[3]
FILE = """
import gymnasium, numpy as np

class PondEnv(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, size: int = 3, depth: float = 1.0, name: str = "pond"):
        self.size = size

    def reset(self, *, seed=None, options=None):
        return np.zeros(2, np.float32), {}

    def step(self, action):
        return np.zeros(2, np.float32), 0.0, False, False, {}

gymnasium.register("Pond-v0", PondEnv, max_episode_steps=9)

def small():
    return PondEnv(size=1)
"""


@pytest.fixture
def pond(tmp_path):
    file = tmp_path / "pond.py"
    file.write_text(FILE)
    yield file
    gymnasium.registry.pop("Pond-v0", None)


def made_afresh(source, expression, tmp_path, setup=""):
    """Unpickle a source in an interpreter that has seen nothing, make the environment and evaluate something of it."""
    (tmp_path / "source.pickle").write_bytes(source if isinstance(source, bytes) else pickle.dumps(source))
    code = f"""
import pickle, pathlib
{setup}
env = pickle.loads(pathlib.Path({str(tmp_path / "source.pickle")!r}).read_bytes())()
print({expression})
"""
    child = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert child.returncode == 0, child.stderr
    return child.stdout.strip()


@pytest.mark.parametrize(
    ("target", "size"), [("{}", 3), ("{}:PondEnv", 3), ("{}:small", 1), ("{}:Pond-v0", 3)]
)
def test_env_source_every_form_of_a_file_makes_its_environment(pond, target, size):
    """rollout 3A.28"""
    env = EnvSource(target.format(pond))()
    assert (type(env.unwrapped).__name__, env.unwrapped.size) == ("PondEnv", size)


def test_env_source_id_that_a_file_registers_keeps_its_time_limit(pond):
    assert EnvSource(f"{pond}:Pond-v0")()._max_episode_steps == 9


def test_env_source_path_with_a_drive_is_split_at_its_last_colon():
    """rollout 3A.31"""
    with pytest.raises(EnvNotFoundError) as error:
        EnvSource("C:/x/y.py:Env")()
    assert str(error.value).startswith("C:/x/y.py: the folder ")


@pytest.mark.parametrize(
    ("env_id", "words"),
    [
        ("ALE/Pongg-v5", "ale_py:ALE/Pongg-v5"),
        ("MiniGrid-Empty-1x1-v9", "minigrid:MiniGrid-Empty-1x1-v9"),
        ("dm_control/cartpole-swingup-v9", "pip install 'shimmy[dm-control]', then write shimmy:dm_control/"),
        ("MinAtar/Breakout-v9", "minatar.gym.register_envs()"),
        ("Nowhere/Maze-v0", "Gymnasium says: "),
    ],
)
def test_env_source_unknown_id_names_the_package_that_registers_it(env_id, words):
    """rollout 3A.30"""
    with pytest.raises(EnvNotFoundError) as error:
        EnvSource(env_id)()
    assert words in str(error.value)


def test_env_source_missing_extra_says_what_to_install():
    def needs_physics():
        raise gymnasium.error.DependencyNotInstalled("no box, run `pip install box`")

    with pytest.raises(EnvMakeError, match=r"needs a package that is not installed: no box, run `pip install box`"):
        EnvSource(needs_physics)()


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"size": "5"}, "size is '5', text; expected int"),
        ({"depth": "deep"}, "depth is 'deep', text; expected float"),
        ({"name": 5}, "name is 5, a number; expected str"),
    ],
)
def test_env_source_text_for_a_number_is_refused_and_the_reverse(pond, kwargs, words):
    with pytest.raises(ConfigError) as error:
        EnvSource(f"{pond}:PondEnv", kwargs)()
    assert words in str(error.value)


@pytest.mark.parametrize("kwargs", [{"size": None}, {"depth": 3}, {"name": "5"}, {"size": True}])
def test_env_source_value_that_fits_its_parameter_is_taken(pond, kwargs):
    assert EnvSource(f"{pond}:PondEnv", kwargs)().size == kwargs.get("size", 3)


def test_env_source_file_and_its_registered_id_are_known_in_a_fresh_process(pond, tmp_path):
    """rollout 3A.27"""
    make_envs(f"{pond}:PondEnv")  # imported once, it has registered its id
    assert made_afresh(EnvSource("Pond-v0", {"size": 7}), "env.spec.id, env.unwrapped.size", tmp_path) == "Pond-v0 7"


def test_env_source_class_taken_out_of_a_file_is_known_in_a_fresh_process(pond, tmp_path):
    maker = type(EnvSource(f"{pond}:PondEnv")())
    assert made_afresh(EnvSource(maker, {"size": 4}), "env.size", tmp_path) == "4"


def test_env_source_of_a_script_is_known_in_a_fresh_process(tmp_path):
    """rollout 3A.27, 3A.37: an id, a class and a lambda of the very script that runs."""
    script = tmp_path / "script.py"
    script.write_text(
        FILE
        + f"""
import pathlib, pickle
from rlfeed.envs import EnvSource
for name, target in dict(id="Pond-v0", kind=PondEnv, function=lambda size: PondEnv(size)).items():
    source = EnvSource(target, {{"size": 6}})
    pathlib.Path({str(tmp_path)!r}, name).write_bytes(pickle.dumps([source]))
"""
    )
    subprocess.run([sys.executable, str(script)], cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, timeout=120, check=True)
    sources = f"[pickle.loads(pathlib.Path({str(tmp_path)!r}, n).read_bytes())[0] for n in ('id', 'kind', 'function')]"
    code = f"import pathlib, pickle; print([source().unwrapped.size for source in {sources}])"
    child = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    assert child.stdout.strip() == "[6, 6, 6]"


def test_env_source_lambda_and_closure_are_known_in_a_fresh_process(tmp_path):
    """rollout 3A.37"""
    length = 13
    source = EnvSource(lambda: ConstantRewardEnv(length), wrappers=(lambda env: gymnasium.wrappers.TimeLimit(env, 5),))
    assert made_afresh(source, "env.unwrapped.length, env._max_episode_steps", tmp_path) == "13 5"


@pytest.mark.parametrize(
    ("source", "name"),
    [
        (lambda lock: EnvSource(ConstantRewardEnv, {"length": 3, "lock": lock}), "kwargs['lock'] = <unlocked"),
        (lambda lock: EnvSource(ConstantRewardEnv, wrappers=(lambda env: lock,)), "wrappers[0] = <function"),
        (lambda lock: EnvSource(lambda: lock), "the variable lock = <unlocked"),
    ],
)
def test_env_source_part_that_cannot_be_sent_is_named(source, name):
    """rollout 3A.23, 3A.37"""
    with pytest.raises(ConfigError) as error:
        pickle.dumps(source(threading.Lock()))
    assert name in str(error.value)
    assert "cannot be sent to a worker process" in str(error.value)
