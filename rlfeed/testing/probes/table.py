"""The probes by number."""

from functools import partial

from rlfeed.testing.probes.base import Answers, Probe
from rlfeed.testing.probes.control import OffsetEnv, RegulatorEnv, TemperatureEnv
from rlfeed.testing.probes.memory import AlternateEnv, CorridorEnv, LeakEnv, RecallEnv
from rlfeed.testing.probes.values import (
    ArmEnv,
    ChainEnv,
    EndlessEnv,
    LotteryEnv,
    MatchEnv,
    PowersEnv,
    RandomLengthEnv,
    SignEnv,
    one_answer,
    sign_answers,
)


def _chain(number_of_steps: int, isolates: str) -> Probe:
    return Probe(
        make=partial(ChainEnv, number_of_steps),
        isolates=isolates,
        answers=partial(ChainEnv.answers, number_of_steps),
        best_return=1.0,
    )


def _push(gamma: float) -> Answers:
    return one_answer(0.0, 1.0)


PROBES: dict[str, Probe] = {
    "P1": _chain(1, "the value loss and the optimiser"),
    "P2": Probe(
        make=SignEnv,
        isolates="whether gradients reach what reads the observation",
        answers=lambda gamma: sign_answers(-1.0, 1.0),
        best_return=0.0,
    ),
    "P3": _chain(2, "the discount"),
    "P4": Probe(
        make=ArmEnv,
        isolates="the update of the policy",
        answers=_push,
        best_return=1.0,
        passes_at=0.9,
    ),
    "P5": Probe(
        make=MatchEnv,
        isolates="whether observations, actions and rewards of a batch belong together",
        answers=lambda gamma: sign_answers(1.0, 1.0),
        best_return=1.0,
        passes_at=0.9,
    ),
    "P6": _chain(8, "the ends of rollouts and windows, and where backward recursions begin"),
    "P7": Probe(
        make=EndlessEnv,
        isolates="truncation",
        answers=EndlessEnv.answers,
        best_return=8.0,
        tolerance=1.0,
        gamma=0.98,
    ),
    "P8": Probe(
        make=EndlessEnv,
        isolates="the environments' autoreset, in each of its modes",
        answers=EndlessEnv.answers,
        best_return=8.0,
        tolerance=1.0,
        gamma=0.98,
    ),
    "P9": Probe(
        make=PowersEnv,
        isolates="n-step sums, most of all those of an episode's last steps",
        best_return=11111.0,
        gamma=1.0,
    ),
    "P10": Probe(
        make=RecallEnv,
        isolates="the carry, from acting through the replay to the gradient",
        needs_memory=True,
        best_return=1.0,
        passes_at=0.9,
        gamma=0.99,
    ),
    "P11": Probe(
        make=LeakEnv,
        isolates="the reset of the carry, the previous action and reward, and the frame stack",
        best_return=0.0,
        fails_at=0.2,
        gamma=0.99,
    ),
    "P12": Probe(
        make=AlternateEnv,
        isolates="the previous action as an input",
        actions=("discrete",),
        needs_memory=True,
        best_return=10.0,
        passes_at=9.5,
    ),
    "P13": Probe(
        make=RandomLengthEnv,
        isolates="padding and masks: episodes of 1 to 20 steps",
        answers=RandomLengthEnv.answers,
        best_return=sum(1.0 / length for length in range(1, 21)) / 20,
    ),
    "P14": Probe(
        make=RegulatorEnv,
        isolates="continuous control from end to end",
        actions=("continuous",),
        answers=RegulatorEnv.answers,
        best_return=-0.5402,
        passes_at=-0.6,
    ),
    "P15": Probe(
        make=OffsetEnv,
        isolates="the scaling of actions",
        actions=("continuous",),
        answers=lambda gamma: one_answer(0.0, 0.0),
        best_return=0.0,
        passes_at=-0.05,
    ),
    "P16": Probe(
        make=TemperatureEnv,
        isolates="the temperature: its sign, its target and the log-probability",
        actions=("continuous",),
        best_return=0.0,
        passes_at=-0.05,
    ),
    "P17": Probe(
        make=CorridorEnv,
        isolates="recurrent learning as a whole, within a minute",
        needs_memory=True,
        best_return=0.4,
        passes_at=0.36,
        gamma=0.99,
    ),
    "P19": Probe(
        make=LotteryEnv,
        isolates="the distribution over returns",
        answers=lambda gamma: one_answer(0.0, LotteryEnv.probability),
        best_return=LotteryEnv.probability,
    ),
}  # by their numbers; P18 is a benchmark of others
