"""Finding and making environments: every way to name one, and one helpful message for every way to be wrong."""

import pickle
import subprocess
import sys

import gymnasium
import numpy as np
import pytest

from rlfeed.envs import EnvSource, SerialEnvs, as_envs, make_envs
from rlfeed.errors import ConfigError, EnvMakeError, EnvNotFoundError, SpaceError
from rlfeed.testing import ConstantRewardEnv, IdentifiableEnv

FILE = '''
import gymnasium, numpy as np
from neighbour import LENGTH

class MazeEnv(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, size: int = 3, speed: float = 1.0):
        self.size = size
        if size < 0:
            raise ValueError("size must be at least 0, not %d" % size)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(2, np.float32), {}

    def step(self, action):
        return np.zeros(2, np.float32), 0.0, False, False, {}

class NotAnEnv:
    pass

def build(size=1):
    return MazeEnv(size=size)

def wrong():
    return 3
'''


@pytest.fixture
def maze(tmp_path):
    (tmp_path / "neighbour.py").write_text("LENGTH = 5\n")
    file = tmp_path / "maze.py"
    file.write_text(FILE)
    yield file
    sys.modules.pop("neighbour", None)


def message(error, *parts):
    text = str(error.value)
    for part in parts:
        assert part in text, text
    return text


@pytest.mark.parametrize("target", ["{}", "{}:MazeEnv", "{}:build"])
def test_make_envs_file_path_makes_its_environment(maze, target):
    envs = make_envs(target.format(maze), 2, kwargs={"size": 4})
    assert envs.num_envs == 2
    assert [type(env).__name__ for env in envs._group.envs] == ["MazeEnv", "MazeEnv"]
    assert envs._group.envs[0].size == 4


def test_make_envs_gymnasium_id_keeps_the_time_limit_and_drops_the_checkers():
    env = make_envs("CartPole-v1")._group.envs[0]
    assert isinstance(env, gymnasium.wrappers.TimeLimit)
    assert type(env.env) is type(env.unwrapped)


@pytest.mark.parametrize(
    "target", ["gymnasium.envs.classic_control:CartPoleEnv", "gymnasium.envs.classic_control:CartPole-v1"]
)
def test_make_envs_module_path_makes_class_or_registered_id(target):
    assert make_envs(target).observation_space.shape == (4,)


def test_make_envs_id_takes_gymnasiums_own_arguments():
    env = make_envs("CartPole-v1", kwargs={"max_episode_steps": 7})._group.envs[0]
    assert env._max_episode_steps == 7


def test_make_envs_wrappers_are_applied_in_order():
    def scale(env):
        return gymnasium.wrappers.TransformReward(env, lambda r: r * 10)

    def shift(env):
        return gymnasium.wrappers.TransformReward(env, lambda r: r + 1)

    envs = make_envs(ConstantRewardEnv, wrappers=[scale, shift])
    envs.reset(0, [0])
    assert envs.step(np.array([1])).reward.tolist() == [11.0]


def test_env_source_from_file_is_made_again_in_another_process(maze, tmp_path):
    source = EnvSource(f"{maze}:MazeEnv", {"size": 2})
    (tmp_path / "source.pickle").write_bytes(pickle.dumps(source))
    code = (
        "import pickle, pathlib; source = pickle.loads(pathlib.Path(r'%s').read_bytes());"
        "env = source(); print(type(env).__module__, env.size)" % (tmp_path / "source.pickle")
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert child.stdout.split() == [type(source()).__module__, "2"]


def test_make_envs_unknown_id_suggests_the_nearest():
    with pytest.raises(EnvNotFoundError) as error:
        make_envs("CartPol-v1")
    message(error, "CartPol-v1: no environment of that id", "Did you mean", "'CartPole-v1'")
    assert error.value.exit_code == 2


def test_make_envs_missing_file_suggests_the_nearest(maze):
    with pytest.raises(EnvNotFoundError) as error:
        make_envs(f"{maze.parent}/mazes.py:MazeEnv")
    message(error, "holds no file of that name", "Did you mean 'maze.py'?")


def test_make_envs_missing_folder_says_so(tmp_path):
    with pytest.raises(EnvNotFoundError) as error:
        make_envs(f"{tmp_path}/nowhere/maze.py")
    message(error, "nowhere does not exist")


def test_make_envs_missing_class_suggests_the_nearest(maze):
    with pytest.raises(EnvNotFoundError) as error:
        make_envs(f"{maze}:MaseEnv")
    message(error, "has no 'MaseEnv'", "Did you mean 'MazeEnv'")


def test_make_envs_file_without_an_environment_says_what_was_expected(tmp_path):
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(EnvNotFoundError) as error:
        make_envs(f"{tmp_path}/empty.py")
    message(error, "no gymnasium.Env class", "empty.py:ClassName")


def test_make_envs_missing_module_says_which():
    with pytest.raises(EnvNotFoundError) as error:
        make_envs("gymnasium.no_such_part:Env")
    message(error, "no module 'gymnasium.no_such_part'")


@pytest.mark.parametrize("mode", ["serial", "sync", "async"])
def test_make_envs_constructor_that_raises_shows_its_own_traceback(maze, mode):
    with pytest.raises(EnvMakeError) as error:
        make_envs(f"{maze}:MazeEnv", kwargs={"size": -1}, mode=mode)
    text = message(error, "MazeEnv: its constructor raised ValueError", "maze.py", "ValueError: size must be")
    assert "rlfeed/envs" not in text
    assert error.value.exit_code == 2


def test_make_envs_file_that_does_not_import_shows_its_own_traceback(tmp_path):
    (tmp_path / "broken.py").write_text("import gymnasium\nraise RuntimeError('no licence')\n")
    with pytest.raises(EnvMakeError) as error:
        make_envs(f"{tmp_path}/broken.py:Env")
    message(error, "importing it raised RuntimeError", "line 2", "no licence")


@pytest.mark.parametrize("target", ["maze:NotAnEnv", "class", "maze:wrong"])
def test_make_envs_what_is_no_environment_is_refused(maze, target):
    found = dict if target == "class" else f"{maze}:{target.partition(':')[2]}"
    with pytest.raises(ConfigError) as error:
        make_envs(found)
    message(error, "expected a gymnasium.Env", "Derive the class from gymnasium.Env")


@pytest.mark.parametrize(
    ("target", "kwargs", "known"),
    [("maze", {"sise": 3}, ["'size'", "'speed'"]), ("CartPole-v1", {"sutton_barto": 1}, ["'sutton_barto_reward'"])],
)
def test_make_envs_unknown_argument_lists_the_parameters(maze, target, kwargs, known):
    with pytest.raises(ConfigError) as error:
        make_envs(f"{maze}:MazeEnv" if target == "maze" else target, kwargs=kwargs)
    message(error, "has no parameter", "Did you mean", *known)


def test_make_envs_environment_instance_is_refused():
    with pytest.raises(ConfigError) as error:
        make_envs(IdentifiableEnv())
    message(error, "expected an id, a class or a function", "Rollout")


@pytest.mark.parametrize("mode", ["serial", "sync"])
def test_make_envs_factory_of_one_and_the_same_environment_is_refused(mode):
    env = IdentifiableEnv()
    with pytest.raises(ConfigError) as error:
        make_envs(lambda: env, 2, mode=mode)
    message(error, "environments 0 and 1 are the same object")


def test_make_envs_different_spaces_are_refused():
    sizes = iter([2, 3])
    with pytest.raises(ConfigError) as error:
        make_envs(lambda: ConstantRewardEnv(actions=next(sizes)), 2)
    message(error, "action_space of environment 1 is Discrete(3)")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({"num_envs": 0}, "num_envs is 0"),
        ({"num_envs": True}, "num_envs is True"),
        ({"mode": "asinc"}, "Did you mean 'async'"),
        ({"autoreset": "same"}, "autoreset is 'same'"),
        ({"kwargs": [3]}, r"kwargs is [3]"),
        ({"wrappers": "TimeLimit"}, "Write ['TimeLimit']"),
        ({"first_env_id": "1"}, "first_env_id is '1'"),
    ],
)
def test_make_envs_wrong_argument_is_named(arguments, part):
    with pytest.raises(ConfigError) as error:
        make_envs("CartPole-v1", **arguments)
    message(error, part)


def test_make_envs_space_that_cannot_be_stored_is_named():
    class Graphs(ConstantRewardEnv):
        def __init__(self):
            super().__init__()
            self.observation_space = gymnasium.spaces.Dict(text=gymnasium.spaces.Text(5))

    with pytest.raises(SpaceError) as error:
        make_envs(Graphs)
    message(error, 'observation_space["text"]')


def test_as_envs_takes_environments_in_every_form_and_refuses_a_name():
    vector = gymnasium.make_vec("CartPole-v1", num_envs=2)
    assert as_envs(vector).num_envs == 2
    assert as_envs(IdentifiableEnv()).num_envs == 1
    envs = SerialEnvs([IdentifiableEnv()])
    assert as_envs(envs) is envs
    with pytest.raises(ConfigError, match="make_envs"):
        as_envs("CartPole-v1")


def test_vector_envs_without_autoreset_mode_are_refused():
    class Silent(gymnasium.vector.VectorEnv):
        def __init__(self):
            self.metadata = {}

    with pytest.raises(ConfigError, match="has no autoreset_mode"):
        as_envs(Silent())


@pytest.mark.parametrize("mode", ["auto", "serial", "sync", "pool"])
def test_make_envs_names_every_part_of_both_spaces_that_cannot_be_stored(mode):
    spaces = gymnasium.spaces
    graph = spaces.Graph(spaces.Box(0, 1, (2,)), None)

    class Mixed(ConstantRewardEnv):
        def __init__(self):
            super().__init__()
            self.observation_space = spaces.Dict(fine=spaces.Discrete(2), says=spaces.Text(4), web=graph)
            self.action_space = spaces.Tuple([spaces.Discrete(3), spaces.Sequence(spaces.Discrete(2))])

    with pytest.raises(SpaceError) as error:
        make_envs(Mixed, 2, mode=mode)
    message(error, 'observation_space["says"]: is Text', 'observation_space["web"]: is Graph')
    message(error, "action_space[1]: is Sequence")
