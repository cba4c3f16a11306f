"""Agents: one file each, read from top to bottom, built on the library; and their presets by name."""

from agents.dqn import apex, dqn, rainbow
from agents.ppo import impala, ppo, ppo_rnn
from agents.pqn import pqn, pqn_rnn
from agents.r2d2 import r2d2
from agents.sac import crossq, sac, xqc

PRESETS = {
    "apex": apex,
    "crossq": crossq,
    "dqn": dqn,
    "impala": impala,
    "ppo": ppo,
    "ppo_rnn": ppo_rnn,
    "pqn": pqn,
    "pqn_rnn": pqn_rnn,
    "r2d2": r2d2,
    "rainbow": rainbow,
    "sac": sac,
    "xqc": xqc,
}

__all__ = [
    "PRESETS", "apex", "crossq", "dqn", "impala", "ppo", "ppo_rnn", "pqn", "pqn_rnn", "r2d2", "rainbow", "sac", "xqc",
]  # fmt: skip
