"""``scripts/check_env.py``: what it prints, and its exit codes."""

import re

import pytest
from support.scripts import check_env_script

FILE = '''
import numpy as np
from rlfeed.testing import HealthyEnv

class PondEnv(HealthyEnv):
    def __init__(self, depth: int = 1):
        super().__init__()
        self.depth = depth

    def _observe(self):
        return super()._observe() * self.depth

    def _reward(self):
        return super()._reward() if self.depth else np.zeros(1)
'''


@pytest.fixture
def pond(tmp_path):
    file = tmp_path / "pond.py"
    file.write_text(FILE)
    return f"{file}:PondEnv"


def check(capsys, *args):
    code = check_env_script.main([*args, "--no-workers"])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_check_env_script_healthy_environment_ends_with_its_figures_and_zero(capsys, pond):
    code, out, _ = check(capsys, pond, "--episodes", "2", "--num-envs", "1")
    assert code == 0
    name, played, resume, speed, layout = out.splitlines()
    assert name == "PondEnv: 0 errors, 0 notes"
    assert re.fullmatch(r"played: 2 episodes, \d+ steps, each several times", played)
    assert resume.startswith("resume: re-enacted: ")
    assert re.fullmatch(r"speed: [\d,]+ steps/s in one process", speed)
    assert re.fullmatch(r"layout: this process: a step takes \d+ us .*there is nothing to share out", layout)


def test_check_env_script_prints_every_finding_with_its_fix_and_one(capsys, pond):
    code, out, _ = check(capsys, pond, "--env.kwargs.depth", "5")
    assert code == 1
    assert re.search(r"^error: PondEnv: episode 0, .*: observation\[\d\] is .*, outside -1.0 to 1.0$", out, re.M)
    assert "    fix: Clip it, or declare wider bounds." in out
    code, out, _ = check(capsys, pond, "--env.kwargs.depth=0")
    assert code == 1
    assert "reward must be a scalar, got shape (1,)" in out


def test_check_env_script_wrappers_are_checked_with_their_environment(capsys, pond):
    code, out, _ = check(capsys, pond, "--env.wrappers", "TimeLimit:max_episode_steps=3")
    assert code == 0
    assert "3 episodes, 9 steps: no episode was terminated" in out


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["CartPol-v1"], "Did you mean 'CartPole-v1'"),
        (["{pond}", "--env.kwargs.size", "3"], "has no parameter 'size'; expected some of ['depth']"),
        (["{pond}", "--env.kwargs.depth", "deep"], "depth is 'deep', text; expected int"),
        (["{pond}", "--episodes", "0"], "episodes is 0"),
        (["{pond}s"], "has no 'PondEnvs'; expected a class or a registered id. Did you mean 'PondEnv'"),
    ],
)
def test_check_env_script_bad_input_is_named_and_two(capsys, pond, args, words):
    code, _, err = check(capsys, *(arg.format(pond=pond) for arg in args))
    assert code == 2
    assert words in err
