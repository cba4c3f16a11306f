"""The benchmark measures what it says: samples are checked, ratios are honest, who takes no part is named."""

import itertools
import json

import numpy as np
import pytest
import torch
from support.scripts import (
    benchmark_script,
    contest,
    contestants,
    feed_benchmark,
    feed_contestants,
    feed_life,
    peers,
    workloads,
)

from rlfeed.errors import UnsupportedError
from rlfeed.replay import Sequence

STREAM, MOVIE = workloads.make_stream(4000), workloads.make_movie(2, 60)


def transitions(contestant):
    return contestant.uniform(STREAM)(256)


def prioritized(contestant):
    return contestant.prioritized(STREAM, itertools.repeat(torch.rand(256, generator=torch.Generator())))(256)


def pixels(contestant):
    return contestant.pixels(MOVIE)(32)


def episodes(contestant):
    return contestant.episodes(STREAM)(64)


def windows(contestant):
    draw, write = contestant.windows(STREAM, 80, workloads.make_steps(100, 1))
    write()
    return draw(64)


WORKS = {
    transitions: lambda sample: workloads.check_transitions(sample, 256),
    prioritized: lambda sample: workloads.check_transitions(sample, 256),
    pixels: lambda sample: workloads.check_pixels(sample, 32),
    episodes: lambda sample: workloads.check_padded(sample, 64, 200),
    windows: lambda sample: workloads.check_padded(sample, 64, 80),
}


@pytest.mark.parametrize("work", WORKS)
@pytest.mark.parametrize("kind", [contestants.Rlfeed, *peers.PEERS], ids=lambda kind: kind.name)
@pytest.mark.filterwarnings("ignore")  # theirs
def test_contestant_gives_what_was_asked_for(kind, work):
    try:
        contestant = kind()
    except ImportError:
        pytest.skip(f"{kind.name} is not installed here: `make peers` does")
    try:
        sample = work(contestant)
    except (contestants.NotServedError, UnsupportedError) as reason:
        pytest.skip(f"not served: {reason}")
    WORKS[work](sample)


@pytest.mark.parametrize("work", [transitions, pixels, episodes])
@pytest.mark.parametrize("kind", [feed_contestants.StockItems, feed_contestants.StockBatches])
def test_stock_loader_gives_what_was_asked_for(kind, work):
    WORKS[work](work(kind(0)))


def test_wide_buffer_gives_sixteen_tensors():
    tensors = feed_benchmark.every_tensor(feed_benchmark.hold_wide(32, 100).sample(4, Sequence(8)))

    assert len(tensors) == 16
    assert len({tensor.data_ptr() for tensor in tensors.values()}) == 16


def test_first_marked_counts_the_batches_before():
    batches = [{"reward": torch.tensor([1.0, reward])} for reward in (0.0, 776.0, 777.0)]

    assert feed_life.first_marked(iter(batches), 3) == 2
    assert feed_life.first_marked(iter(batches), 2) is None


def tampered(work, key, change):
    sample = {name: field.clone() for name, field in work(contestants.Rlfeed()).items()}
    change(sample[key])
    return sample


@pytest.mark.parametrize(
    ("work", "key", "change"),
    [
        (transitions, "next_observation", lambda field: field[7].zero_()),  # another successor
        (transitions, "next_observation", lambda field: field[7, 1].fill_(workloads.FINAL)),  # an end that was none
        (transitions, "action", lambda field: field[7].zero_()),
        (transitions, "observation", lambda field: field.resize_(255, 17)),
        (episodes, "mask", lambda field: field[7, 0].fill_(False)),
        (episodes, "observation", lambda field: field[7].copy_(field[7].flip(0))),
        (episodes, "terminated", lambda field: field[7, 0].fill_(True)),  # an end in the middle
        (windows, "lengths", lambda field: field[7].add_(1)),
    ],
)
def test_check_wrong_sample_is_refused(work, key, change):
    sample = tampered(work, key, change)

    with pytest.raises(workloads.WrongSampleError):
        WORKS[work](sample)


def frames(numbers):
    """Show frames by number: stacks ``[B, 4, 84, 84]``."""
    shown = np.zeros((*np.shape(numbers), *workloads.FRAME), np.uint8)
    shown[:, :, 0, :4] = np.array(numbers, np.int32)[..., None].view(np.uint8)
    return torch.from_numpy(shown)


@pytest.mark.parametrize(
    ("observation", "following", "terminated", "right"),
    [
        ([5, 6, 7, 8], [6, 7, 8, 9], False, True),
        ([5, 5, 5, 5], [5, 5, 5, 6], False, True),  # an episode's first frame stands for those before it
        ([5, 6, 7, 8], [6, 7, 8, 10], False, False),
        ([5, 6, 7, 8], [5, 6, 7, 8], True, True),  # not every peer keeps the final frame
        ([5, 6, 2, 8], [6, 7, 8, 9], False, False),
    ],
)
def test_check_pixels_knows_the_order(observation, following, terminated, right):
    sample = {
        "observation": frames([observation]),
        "next_observation": frames([following]),
        "terminated": torch.tensor([terminated]),
    }

    if right:
        workloads.check_pixels(sample, 1)
    else:
        with pytest.raises(workloads.WrongSampleError):
            workloads.check_pixels(sample, 1)


def test_stream_steps_continue_and_end_where_the_stream_does():
    steps = STREAM.steps(4)

    assert [step.observation[2, 0] for step in steps] == list(range(2000, 3000))
    ends = np.flatnonzero([step.terminated[2] for step in steps])
    assert [steps[end].next_observation[2, 1] for end in ends] == [workloads.FINAL] * len(ends)
    assert np.flatnonzero([step.is_first[2] for step in steps]).tolist() == [0, *(ends + 1)]


class Clock:
    """Go on only where a call says so."""

    def __init__(self):
        self.now_s = 0.0

    def __call__(self):
        return self.now_s

    def case(self, us, **kwargs):
        def spend():
            self.now_s += us / 1e6

        return contest.Case(spend, clock=self, **kwargs)


def test_contest_compares_with_the_first_and_with_the_best_peer(capsys):
    clock, run = Clock(), contest.Contest(rounds=3)
    cases = {"bare": clock.case(10.0), "ours": clock.case(2000.0, per=100)}
    cases |= {"slow peer": clock.case(80.0, peer=True), "best peer": clock.case(50.0, peer=True)}

    times = run.measure("some work", cases, {"ours": "a note", "nobody": "not installed"})

    assert times["ours"] == pytest.approx([20.0] * 3)
    assert run.tables[0]["best_peer"] == "best peer"
    lines = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[5] == ["bare", "10.0", "10.0", "1.00", "5.00", ""]
    assert cells[6] == ["ours", "20.0", "20.0", "2.00", "2.50", "a note"]
    assert lines[-1] == "Without nobody (not installed)."


def test_contest_settles_before_every_round_outside_the_timed_part(capsys):
    clock, run, settled = Clock(), contest.Contest(rounds=3), []

    times = run.measure("some work", {"one": clock.case(3.0, settle=lambda: settled.append(clock.case(1000.0).call()))})

    assert times["one"] == pytest.approx([3.0] * 3)
    assert len(settled) == 3


def test_contest_facts_are_a_table_and_are_kept(capsys):
    run = contest.Contest()

    run.tell("some life", {"end": {"theirs": "20 s", "ours": "0.1 s"}, "begin": {"theirs": "-", "ours": "2 s"}})

    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()]
    assert cells[3] == ["", "theirs", "ours"]
    assert cells[5:7] == [["end", "20 s", "0.1 s"], ["begin", "-", "2 s"]]
    assert run.tables[0]["facts"]["end"]["ours"] == "0.1 s"


def test_contest_what_happens_before_a_call_is_not_timed():
    clock = Clock()

    assert clock.case(3.0, before=clock.case(1000.0).call).time_us(4) == pytest.approx(3.0)


def test_ratio_drifting_machine_gives_the_ratio_of_the_work():
    assert contest.ratio([10.0, 20.0, 70.0], [5.0, 10.0, 35.0]) == 2.0


def test_benchmark_replay_measures_every_work_and_writes_the_rounds(tmp_path, capsys):
    path = tmp_path / "rounds.json"

    benchmark_script.main(["replay", "--rows=8000", "--rounds=2", f"--json={path}"])

    record = json.loads(path.read_text())
    assert len(record["tables"]) == 11
    assert record["versions"]["torch"] == torch.__version__
    for table in record["tables"]:
        assert any("rlfeed" in name for name in table["us"]), table["title"]
        assert all(len(rounds) == 2 for rounds in table["us"].values())
        assert not any("gives something else" in note for note in table["notes"].values())
    assert "uniform 256 transitions" in capsys.readouterr().out


def test_benchmark_feed_measures_what_was_asked_for_and_writes_the_rounds(tmp_path, capsys):
    path = tmp_path / "rounds.json"

    benchmark_script.main(["feed-vectors", "--rows=4000", "--rounds=1", f"--json={path}"])

    (table,) = json.loads(path.read_text())["tables"]
    assert {"rlfeed, 0 workers", "rlfeed, 1 worker", "DataLoader, samples, 1 worker"} <= table["us"].keys()
    assert table["us"].keys() == table["cpu_us"].keys()
    assert not table["notes"]
    assert "42 KB; wall clock" in capsys.readouterr().out


@pytest.mark.slow
def test_benchmark_feed_measures_everything(tmp_path):
    path = tmp_path / "rounds.json"

    benchmark_script.main(["feed", "--rows=20000", "--rounds=1", f"--json={path}"])

    *measured, life = json.loads(path.read_text())["tables"]
    assert len(measured) == 7
    assert not any(table["notes"] for table in measured)
    assert "wrong" not in str(life["facts"])


def test_benchmark_unknown_work_is_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        benchmark_script.main(["unifrom"])

    assert stopped.value.code == 2
    assert "unifrom: no such benchmark; expected some of replay, uniform" in capsys.readouterr().err
