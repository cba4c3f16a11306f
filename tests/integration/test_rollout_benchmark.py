"""The rollout benchmark measures what it says: runs take the steps they promise, the time of children counts."""

import itertools
import json
import multiprocessing
import time
from functools import partial

import numpy as np
import pytest
from support.scripts import benchmark_script, contest, rollout_contestants, rollout_life, rollout_peers

Load = rollout_contestants.Load
CARTPOLE = Load("CartPole-v1", 3, 7)


class Counted:
    """Count the steps of all CartPoles."""

    def __init__(self, monkeypatch):
        from gymnasium.envs.classic_control import CartPoleEnv

        self.steps, step = 0, CartPoleEnv.step

        def counting(env, action):
            self.steps += 1
            return step(env, action)

        monkeypatch.setattr(CartPoleEnv, "step", counting)


SERVED = {
    rollout_contestants.Bare: ("blocks", "step"),
    rollout_contestants.Rlfeed: ("blocks", "store", "step"),
    rollout_peers.CleanRL: ("blocks",),
    rollout_peers.StableBaselines3: ("blocks", "store"),
    rollout_peers.StableBaselines3PPO: ("store",),
    rollout_peers.Tianshou: ("store",),
    partial(rollout_peers.Gymnasium, workers=False): ("step",),
}


@pytest.mark.parametrize(
    ("kind", "work"),
    [
        pytest.param(kind, work, id=f"{getattr(kind, 'func', kind).__name__}-{work}")
        for kind, works in SERVED.items()
        for work in works
    ],
)
@pytest.mark.filterwarnings("ignore")  # theirs
def test_run_takes_the_steps_it_promises(kind, work, monkeypatch):
    counted = Counted(monkeypatch)
    try:
        contestant = kind()
    except ImportError:
        pytest.skip("not installed here: `make peers` does")
    run = getattr(contestant, work)(CARTPOLE, *((1000,) if work == "store" else ()))

    run()
    before = counted.steps
    for _ in range(10):
        run()
    contestant.close()

    taken = counted.steps - before
    resets = 10 * 21 // 8  # of Gymnasium's vector environments: such a step is none; no episode is as short as that
    assert 10 * CARTPOLE.steps - resets <= taken <= 10 * CARTPOLE.steps


def test_rlfeed_blocks_hold_what_a_learner_takes():
    contestant = rollout_contestants.Rlfeed()

    batch = contestant.blocks(CARTPOLE)()
    contestant.close()

    assert batch.action.shape == (3, 7)
    assert set(batch.extras) == {"log_prob", "value"}


def test_continuous_actions_and_wide_observations_are_acted_on():
    """HalfCheetah has both, and is not installed everywhere."""
    acting = rollout_contestants.Acting("Pendulum-v1", critic=True)

    action, extras = acting.act(np.ones((5, 3), np.float64), np.random.default_rng(0))

    assert (action.shape, action.dtype) == ((5, 1), np.float32)
    assert {name: column.shape for name, column in extras.items()} == {"log_prob": (5,), "value": (5,)}
    for kind in (rollout_contestants.Bare, rollout_contestants.Rlfeed):
        kind().blocks(Load("Pendulum-v1", 2, 3))()


def test_acting_log_probabilities_are_those_of_the_actions():
    """Oracle: as often as it is drawn, an action has the probability that is told of it."""
    acting, generator = rollout_contestants.Acting("CartPole-v1", critic=True), np.random.default_rng(0)

    action, extras = acting.act(np.ones((20_000, 4), np.float32), generator)

    for value in (0, 1):
        told = np.exp(extras["log_prob"][action == value])
        assert told == pytest.approx((action == value).mean(), abs=0.02)  # five standard deviations


def test_family_time_counts_children_and_theirs():
    context = multiprocessing.get_context("fork")
    (mine, theirs), spent_s = context.Pipe(), 0.2

    def spin(pipe, depth):
        if depth:
            child = context.Process(target=spin, args=(pipe, depth - 1))
            child.start()
            child.join()
            return
        while time.process_time() < spent_s:
            pass
        pipe.send("spun")
        pipe.recv()

    before_s, own_s = contest.family_time(), time.process_time()
    child = context.Process(target=spin, args=(theirs, 1))
    child.start()
    mine.recv()
    grown_s = contest.family_time() - before_s - (time.process_time() - own_s)
    mine.send("end")
    child.join()

    assert grown_s >= 0.9 * spent_s


def test_contest_rate_is_a_column(capsys):
    clock = itertools.count(step=1e-4)  # a tenth of a millisecond from one look to the next
    run = contest.Contest(rounds=3)

    run.measure("some work", {"one": contest.Case(lambda: None, clock=lambda: next(clock), most=1, per=2)}, rate=True)

    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()]
    assert cells[3][1:5] == ["median us", "min", "a second", "of first"]
    assert cells[5] == ["one", "50.0", "50.0", "20,000", "1.00", "", ""]


def test_benchmark_rollout_measures_what_was_asked_for_and_writes_the_rounds(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("rollout_benchmark.ROUND_S", 0.01)
    path = tmp_path / "rounds.json"

    benchmark_script.main(["rollout-blocks", "--rows=2000", "--rounds=2", f"--json={path}"])

    tables = json.loads(path.read_text())["tables"]
    assert len(tables) == 2
    for table in tables:
        assert {"bare loop", "rlfeed, this process", "CleanRL's loop"} <= table["us"].keys()
        assert all(len(rounds) == 2 for rounds in table["us"].values())
    assert "actor and critic, 2 x CartPole-v1; processor, an env step" in capsys.readouterr().out


def test_is_alive_knows_an_end_that_nobody_has_asked_for():
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    child.start()
    alive = rollout_life.is_alive(child.pid)
    child.kill()
    while rollout_life.is_alive(child.pid):
        time.sleep(0.01)
    child.join()

    assert alive


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of peers and of environments that break
def test_benchmark_rollout_measures_everything(tmp_path, monkeypatch):
    monkeypatch.setattr("rollout_benchmark.ROUND_S", 0.05)
    path = tmp_path / "rounds.json"

    benchmark_script.main(["rollout", "--rows=4000", "--rounds=1", f"--json={path}"])

    tables = json.loads(path.read_text())["tables"]
    life = tables[-1]["facts"]
    assert len(tables) >= 12
    assert all("goes on" in row["rlfeed"] for name, row in life.items() if name.startswith("it "))
    assert "live" not in life["the run is killed with -9: its workers are gone after"]["rlfeed"]
