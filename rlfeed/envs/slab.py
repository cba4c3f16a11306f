"""The memory that a pool of environments shares with its processes: one column per field, one row per environment."""

import math
from typing import Any

import numpy as np
from numpy import ndarray

from rlfeed.memory import Memory
from rlfeed.nest import Nest, map_nest
from rlfeed.specs import ArraySpec

_LINE = 64  # bytes: columns of different writers do not share cache lines at their edges
FLIGHT, STEPPED, MOVED = 0, 1, 2  # of a row: no result yet; its result is there; it lies in `final`
IDLE, STEP, RESET = 0, 1, 2  # what a worker is doing
_FLAG, _REAL, _WORD = (ArraySpec((), np.dtype(name)) for name in ("bool", "float64", "int64"))


class Slab:
    """Hold what environments return and are told, in memory that processes share.

    A worker writes the rows of its environments, the parent writes actions and episode numbers; they take turns, and
    a byte through a pipe says whose it is.

    Args:
        observation: Specs of one observation.
        action: Specs of one action.
        mask_length: Entries of an action mask; 0 for none.
        num_envs: N.
        workers: Processes.
    """

    def __init__(self, observation: Nest, action: Nest, mask_length: int, num_envs: int, workers: int) -> None:
        byte = ArraySpec((), np.dtype("uint8"))
        self._rows: dict[str, Nest] = {
            "observation": observation,
            "final": observation,
            "action": action,
            "mask": ArraySpec((mask_length,), np.dtype("bool")),
            "reward": _REAL,
            "terminated": _FLAG,
            "truncated": _FLAG,
            "success": _REAL,
            "stage": byte,
            "episodes": _WORD,
        }
        self.num_envs, self.workers = num_envs, workers
        self._calls = ArraySpec((8,), np.dtype("int64"))  # a line each: row, what, since, masks, awake for
        self._memory = Memory("shared", max(_LINE, self._lay_out(None)))
        self._lay_out(self._memory.bytes)

    def __getstate__(self) -> dict[str, Any]:
        kept = ("_rows", "num_envs", "workers", "_calls", "_memory")
        return {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lay_out(self._memory.bytes)

    def _lay_out(self, memory: ndarray | None) -> int:
        """Make the columns, where there is memory; give the bytes they take."""
        offset = 0

        def column(spec: ArraySpec, rows: int) -> ndarray:
            nonlocal offset
            begin, offset = offset, offset + -(-rows * spec.nbytes // _LINE) * _LINE
            if memory is None:
                return np.empty(0)
            part = memory[begin : begin + rows * spec.nbytes]
            return part.view(spec.dtype).reshape(rows, *spec.shape) if math.prod(spec.shape) else spec.zeros(rows)

        columns = {name: map_nest(lambda spec: column(spec, self.num_envs), nest) for name, nest in self._rows.items()}
        calls = column(self._calls, self.workers)
        if memory is not None:
            self.observation: Nest = columns["observation"]
            self.final: Nest = columns["final"]
            self.action: Nest = columns["action"]
            self.mask: ndarray = columns["mask"]
            self.reward: ndarray = columns["reward"]
            self.terminated: ndarray = columns["terminated"]
            self.truncated: ndarray = columns["truncated"]
            self.success: ndarray = columns["success"]
            self.stage: ndarray = columns["stage"]
            self.episodes: ndarray = columns["episodes"]
            self.calls: ndarray = calls
        return offset
