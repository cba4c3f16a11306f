"""Priorities of stored steps, in sum trees that the learner folds and updates and other processes read.

New rows are not announced to a tree: at its next tick the learner folds in what was written since. A process that may
not fold (a worker of a stock DataLoader) draws those rows by arithmetic, each with the greatest mass.
"""

import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from rlfeed.errors import FieldError
from rlfeed.memory import Memory
from rlfeed.replay import kernels as k
from rlfeed.replay.storage import Storage
from rlfeed.replay.units import Transition, rule_of

_FAN = 16
_DIRTY, _BOUND, _RULE = 0, 1, 2  # words of a tree's memory, before those that the kernels know
_WORDS = _RULE + k.RULE_SIZE


class Tree:
    """Hold the masses (priority^alpha) of one unit's starts.

    Args:
        storage: Whose rows.
        alpha: Exponent of the priorities.
        lows: Whether the least mass is kept.
    """

    def __init__(self, storage: Storage, alpha: float, *, lows: bool) -> None:
        self._storage, self.alpha, self._lows = storage, alpha, lows
        counts = [_padded(storage.lanes * storage.ring)]
        while counts[-1] > 1:
            above = counts[-1] // _FAN
            counts.append(above if above == 1 else _padded(above))
        begins = np.concatenate([[0], np.cumsum(counts)[:-1]])
        self.levels = np.stack([begins, counts], axis=1).astype(np.int64)
        self._inner = int(sum(counts[1:]))
        self._nodes_count = counts[0] + (2 + lows) * self._inner
        kind = "private" if storage.memory.is_private else "shared"
        self._memory = Memory(kind, (_WORDS + 1 + storage.lanes + self._nodes_count) * 8)
        self._bind()
        if lows:
            self.nodes[-self._inner :] = np.inf  # the least of no start

    def _bind(self) -> None:
        words = self._memory.bytes.view(np.int64)
        self._state, self.words = words[:_WORDS], words[_WORDS : _WORDS + 1 + self._storage.lanes]
        self.nodes = words[_WORDS + 1 + self._storage.lanes :].view(np.float64)
        self._threads = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        views = ("_state", "words", "nodes", "_threads")
        return {name: value for name, value in vars(self).items() if name not in views}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._bind()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Keep other writers out; mend what one that was killed in the middle has left."""
        with self._threads, self._memory.locked():
            if self._state[_DIRTY]:
                k.rebuild(self.nodes, self.levels)
            self._state[_DIRTY] = 1
            yield
            self._state[_DIRTY] = 0

    @property
    def rule(self) -> np.ndarray | None:
        """Tell whose starts these are.

        Returns:
            The unit's rule, or None while no unit has claimed the tree.
        """
        return self._state[_RULE:] if self._state[_BOUND] else None

    def claim(self, rule: np.ndarray) -> bool:
        """Make the tree hold the starts of a unit.

        Args:
            rule: The unit's.

        Returns:
            False where it holds another's.
        """
        with self._writing():
            if not self._state[_BOUND]:
                self._state[_RULE:], self._state[_BOUND] = rule, 1
        return bool((self._state[_RULE:] == rule).all())

    def fold(self) -> None:
        """Take in what was written since the last time."""
        plan, words = self._storage.plan, self.words
        if k.is_behind(plan, words):
            with self._writing():
                k.fold(plan, self._state[_RULE:], self.nodes, words, self.levels, self.alpha)

    def set(self, ids: np.ndarray, values: np.ndarray) -> None:
        """Give starts new priorities, after folding.

        Args:
            ids: ``[B]`` int64.
            values: ``[B]`` float64, >= 0.
        """
        self.fold()
        with self._writing():
            k.set_priorities(self._storage.plan, self.nodes, self.words, self.levels, ids, values, self.alpha)

    def total(self) -> float:
        """Give the mass of all starts.

        Returns:
            Their sum.
        """
        return float(self.nodes[self.levels[-1, 0]])

    def least(self) -> float:
        """Give the least mass of a start that is not zero, where that is kept.

        Returns:
            The mass; infinite where there is none.
        """
        return float(self.nodes[self.levels[-1, 0] + 2 * self._inner]) if self._lows else math.inf

    def masses(self, ids: np.ndarray) -> np.ndarray:
        """Look masses up.

        Args:
            ids: ``[B]`` int64 of starts.

        Returns:
            ``[B]`` float64.
        """
        rows = self._storage.ring
        return self.nodes[(ids >> k.LANE_SHIFT) * rows + (ids & k.ROW_MASK) % rows]

    def state_dict(self) -> dict[str, Any]:
        """Give the leaves and how far they were folded.

        Returns:
            Arrays.
        """
        leaves = self.nodes[: self.levels[0, 1]].copy()
        return {"state": self._state.copy(), "words": self.words.copy(), "leaves": leaves}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take leaves back and compute what stands above them.

        Args:
            state: What `state_dict` gave.
        """
        with self._writing():
            self._state[_BOUND:], self.words[:] = state["state"][_BOUND:], state["words"]
            self.nodes[: self.levels[0, 1]] = state["leaves"]
            k.rebuild(self.nodes, self.levels)


class Priorities:
    """Keep the priorities of a buffer's steps: one tree per kind of start, almost always one.

    Args:
        storage: Whose rows.
        alpha: Exponent of the priorities.
        lows: Whether the least mass is kept.
    """

    def __init__(self, storage: Storage, alpha: float, *, lows: bool) -> None:
        self._storage, self._alpha, self._lows = storage, alpha, lows
        self._trees = [self._grow()]

    def _grow(self) -> Tree:
        return Tree(self._storage, self._alpha, lows=self._lows)

    def tree_of(self, rule: np.ndarray) -> Tree:
        """Find the tree of a unit's starts, or grow it: from the priorities of steps that another tree has.

        Args:
            rule: The unit's.

        Returns:
            Its tree.
        """
        for tree in self._trees:
            if tree.claim(rule):
                break
        else:
            tree = self._grow()
            tree.claim(rule)
            tree.fold()
            self._trees[0].fold()  # what was overwritten since has no priority any more
            known = self._trees[0].nodes[: tree.levels[0, 1]]
            leaves = tree.nodes[: tree.levels[0, 1]]
            leaves[:] = np.where(_is_start(leaves) & _is_start(known), known, leaves)
            k.rebuild(tree.nodes, tree.levels)
            self._trees.append(tree)
        return tree

    def update(self, ids: np.ndarray, values: np.ndarray) -> tuple[int, int]:
        """Give steps new priorities.

        Args:
            ids: ``[B]`` int64; -1 and steps that were overwritten are left out; the last of a duplicate wins.
            values: ``[B]``, finite, >= 0.

        Returns:
            How many steps are still stored, and how many are not.

        Raises:
            FieldError: If an id was never given out, or a value is not a priority; then nothing changes.
        """
        ids, values = _checked(ids, values)
        live = int(k.check_updates(self._storage.plan, ids, values))
        if live < 0:
            row, what = divmod(-1 - live, 2)
            raise FieldError(
                f"update_priorities: ids[{row}] is {ids[row]}, which this buffer never gave out; expected ids of its "
                "batches. Nothing was changed."
                if what == 0
                else f"update_priorities: values[{row}] is {values[row]}; expected finite numbers >= 0. Nothing was "
                "changed."
            )
        if self._trees[0].rule is None:  # no unit has said what a start is: every step may be one
            self._trees[0].claim(rule_of(Transition(), self._storage))
        for tree in self._trees:
            tree.set(ids, values)
        return live, len(ids) - live

    def state_dict(self) -> dict[str, Any]:
        """Give every tree.

        Returns:
            Arrays.
        """
        return {"trees": [tree.state_dict() for tree in self._trees]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the trees back.

        Args:
            state: What `state_dict` gave.
        """
        while len(self._trees) < len(state["trees"]):
            self._trees.append(self._grow())
        for tree, saved in zip(self._trees, state["trees"], strict=True):
            tree.load_state_dict(saved)


def _padded(count: int) -> int:
    return -(-count // _FAN) * _FAN


def _is_start(leaves: np.ndarray) -> np.ndarray:
    return (leaves > 0.0) | np.signbit(leaves)


def _checked(ids: Any, values: Any) -> tuple[np.ndarray, np.ndarray]:
    ids, values = (a.detach().cpu().numpy() if isinstance(a, torch.Tensor) else np.asarray(a) for a in (ids, values))
    wrong = []
    if ids.ndim != 1 or (ids.dtype.kind not in "iu" and len(ids)):
        wrong.append(f"ids has shape {ids.shape} and dtype {ids.dtype}; expected (B,) and int64")
    if values.shape != ids.shape:
        wrong.append(
            f"values has shape {values.shape}; expected {ids.shape}, one per id (of sequences: ReplayLoader."
            "update_priorities, or rlfeed.replay.sequence_priorities)"
        )
    elif values.dtype.kind not in "biuf":
        wrong.append(f"values has dtype {values.dtype}; expected numbers")
    if wrong:
        raise FieldError("update_priorities: " + "; ".join(wrong) + ". Nothing was changed.")
    return np.ascontiguousarray(ids, np.int64), np.ascontiguousarray(values, np.float64)
