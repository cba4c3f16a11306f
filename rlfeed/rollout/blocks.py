"""Blocks of a rollout: steps written in place, one by one, into one piece of memory that `Batch` carves."""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int64
from numpy import ndarray

from rlfeed.errors import PolicyError
from rlfeed.layout import Layout, Slot
from rlfeed.nest import Nest, Path, describe, leaves
from rlfeed.rollout.rows import to_numpy
from rlfeed.rollout.views import columns_of
from rlfeed.types import Batch, Step

_WRITTEN = ("observation", "action", "reward", "extras")  # at every step; the flags only where one is unusual
_FLAGS = ("terminated", "truncated", "is_first", "mask", "loss_mask")
_KEPT = ("mask", "loss_mask")  # True unless a step was lost or there is none
_BEFORE = ("carry", "prev_action", "prev_reward")


class Block:
    """Collect steps until one environment has T of them, in memory laid out as the batch will be.

    Every observation is copied once, to its place. Environments out of step with the others (NEXT_STEP autoreset and
    first-ready batches make them so) have fewer steps, and padding behind.

    Args:
        length: T.
        step: The first step, as an example; `write` takes it.
        before: Carry, previous action and previous reward of every environment, ``[N, ...]``.
        finals: For how many final observations to leave room; more of them cost a copy of the block.
    """

    def __init__(self, length: int, step: Step, before: tuple[Nest, Nest, ndarray], finals: int) -> None:
        self._length, self._num_envs = length, len(before[2])
        self._fields = self._outline(step, before)
        layout = self._layout(finals)
        self._block = torch.empty(layout.nbytes, dtype=torch.uint8)
        views = {(slot.name, slot.path): _view(slot, self._block.numpy()) for slot in layout.slots}
        self._columns = [(n, path, view.swapaxes(0, 1)) for (n, path), view in views.items() if n in _WRITTEN]
        self._flags = {name: views[name, ()].swapaxes(0, 1) for name in _FLAGS}
        for name, flag in self._flags.items():
            flag[:] = name in _KEPT
        for name, nest in zip(_BEFORE, before, strict=True):
            for path, leaf in leaves(nest):
                views[name, path][:] = to_numpy(leaf)
        self._lengths: Int64[ndarray, " N"] = views["lengths", ()]
        self._lengths[:] = 0
        self._count = 0  # steps of every environment; once they differ, _lengths says
        self._even = True
        self._last = step  # while they are in step
        self._lasts: list[tuple[Step, int]] = []  # then: the last step of every environment, and its row there
        self._closed: Bool[ndarray, " N"] = np.ones(self._num_envs, bool)  # nothing follows the last step
        self._any_closed = True
        self._finals: list[tuple[int, int, list[ndarray]]] = []  # environment, step, and what it led to, by leaf

    @property
    def full(self) -> bool:
        """Say whether an environment has T steps.

        Returns:
            True where one has.
        """
        return (self._count if self._even else int(self._lengths.max())) == self._length

    @property
    def finals(self) -> int:
        """Count the final observations.

        Returns:
            K so far.
        """
        return len(self._finals)

    def write(self, step: Step, *, quiet: bool) -> None:
        """Take one step.

        Args:
            step: The step.
            quiet: Whether no episode begins with it, and none ends or is lost in it.

        Raises:
            PolicyError: If extras have other names, shapes or dtypes than in the first step.
        """
        ids, at = step.env_ids, self._count
        extras = columns_of(step)
        if not self._even or (ids is not None and len(ids) < self._num_envs):
            self._part()
            ids = np.arange(self._num_envs) if ids is None else ids
            at = (self._lengths[ids], ids)
        for name, path, view in self._columns:
            leaf = _leaf(extras if name == "extras" else getattr(step, name), path)
            if leaf is None or leaf.dtype != view.dtype or leaf.shape[1:] != view.shape[2:]:
                raise _changed(name, path, leaf, view)
            view[at] = leaf
        if not quiet or self._any_closed:
            self._mark(step, at, np.arange(self._num_envs) if ids is None else ids)
        if self._even:
            self._count += 1
            self._last = step
            return
        self._lengths[ids] += 1
        for row, env_id in enumerate(step.env_ids if step.env_ids is not None else range(len(step))):
            self._lasts[env_id] = (step, row)

    def batch(self, upcoming: Iterable[tuple[Int64[ndarray, " k"], Nest]], is_first: Bool[ndarray, " N"]) -> Batch:
        """Give the batch.

        Args:
            upcoming: What is acted on next, where that is known: environments, ascending, and their observations.
            is_first: Whether the next step of an environment begins an episode.

        Returns:
            The batch, in one piece of memory.
        """
        self._part()
        self._note_cuts(np.arange(self._num_envs), is_first)
        self._end_rows(upcoming)
        layout = self._layout(len(self._finals))
        if layout.nbytes > len(self._block):
            larger = torch.empty(layout.nbytes, dtype=torch.uint8)
            larger[: len(self._block)] = self._block
            self._block = larger
        if self._finals:
            views = [_view(s, self._block.numpy()) for s in layout.slots if s.name.startswith("final_")]
            for k, (env_id, t, observation) in enumerate(self._finals):
                views[0][k] = env_id, t
                for view, leaf in zip(views[1:], observation, strict=True):
                    view[k] = leaf
        return Batch.carve(self._block[: layout.nbytes], layout, plain=True)

    def _mark(self, step: Step, at: Any, ids: Int64[ndarray, " k"]) -> None:
        self._note_cuts(ids, step.is_first)
        for name in ("terminated", "truncated", "is_first"):
            self._flags[name][at] = getattr(step, name)
        over = step.terminated | step.truncated
        for row in over.nonzero()[0].tolist():
            self._note(int(ids[row]), self._count if self._even else int(self._lengths[ids[row]]), step, row)
        if step.lost is not None:
            for name in _KEPT:
                self._flags[name][at] = ~step.lost
            over = over | step.lost
        self._closed[ids] = over
        self._any_closed = bool(self._closed.any())

    def _note_cuts(self, ids: Int64[ndarray, " k"], is_first: Bool[ndarray, " k"]) -> None:
        """Note what the last step led to where an episode begins although it did not end: it is found nowhere else."""
        for env_id in ids[is_first & ~self._closed[ids]].tolist():
            step, row = (self._last, env_id) if self._even else self._lasts[env_id]
            self._note(env_id, (self._count if self._even else int(self._lengths[env_id])) - 1, step, row)

    def _note(self, env_id: int, t: int, step: Step, row: int) -> None:
        # Copied: the whole step would be kept until the block is full.
        self._finals.append((env_id, t, [leaf[row].copy() for _, leaf in leaves(step.next_observation)]))

    def _part(self) -> None:
        """Let every environment have its own number of steps from here on."""
        if self._even:
            self._lengths[:] = self._count
            self._lasts = [(self._last, row) for row in range(self._num_envs)]
            self._even = False

    def _end_rows(self, upcoming: Iterable[tuple[Int64[ndarray, " k"], Nest]]) -> None:
        lengths = self._lengths
        observations = [(path, view) for name, path, view in self._columns if name == "observation"]
        unknown = lengths > 0
        for ids, observation in upcoming:
            unknown[ids] = False
            for path, view in observations:
                view[lengths[ids], ids] = _leaf(observation, path)
        for env_id in unknown.nonzero()[0].tolist():  # it is reset later: what its last step led to stands there
            step, row = self._lasts[env_id]
            for path, view in observations:
                view[lengths[env_id], env_id] = _leaf(step.next_observation, path)[row]
        for env_id in (lengths < self._length).nonzero()[0].tolist():
            for name, _, view in self._columns:
                view[lengths[env_id] + (name == "observation") :, env_id] = 0
            for name in _KEPT:
                self._flags[name][lengths[env_id] :, env_id] = False

    def _outline(self, step: Step, before: tuple[Nest, Nest, ndarray]) -> list[tuple[str, Path, torch.dtype, Any]]:
        envs, by_step = (self._num_envs,), (self._num_envs, self._length)
        fields = [("observation", (self._num_envs, self._length + 1), step.observation)]
        fields += [("action", by_step, step.action), ("reward", by_step, step.reward)]
        fields += [("extras", by_step, columns_of(step))]
        fields += [(name, by_step, step.terminated) for name in _FLAGS]
        fields += [(name, envs, nest) for name, nest in zip(_BEFORE, before, strict=True)]
        fields += [("lengths", envs, np.zeros(1, np.int64))]
        return [
            (name, path, _torch_dtype(leaf), (*leading, *leaf.shape[1:]))
            for name, leading, nest in fields
            for path, leaf in leaves(nest)
        ]

    def _layout(self, finals: int) -> Layout:
        """Lay out the fields; how many final observations there are is known last, so they come last."""
        observations = [(path, dtype, shape[2:]) for name, path, dtype, shape in self._fields if name == "observation"]
        ends = [("final_index", (), torch.int64, (finals, 2))]
        ends += [("final_observation", path, dtype, (finals, *shape)) for path, dtype, shape in observations]
        return Layout.of([*self._fields, *ends])


def _view(slot: Slot, memory: ndarray) -> ndarray:
    dtype = torch.empty(0, dtype=slot.dtype).numpy().dtype
    nbytes = math.prod(slot.shape) * dtype.itemsize
    return memory[slot.offset : slot.offset + nbytes].view(dtype).reshape(slot.shape)


def _leaf(nest: Nest, path: Path) -> Any:
    for key in path:
        if type(nest) is dict and key not in nest:
            return None
        nest = nest[key]
    return nest


def _torch_dtype(leaf: Any) -> torch.dtype:
    return leaf.dtype if isinstance(leaf, torch.Tensor) else torch.from_numpy(np.empty(0, leaf.dtype)).dtype


def _changed(name: str, path: Path, leaf: Any, view: ndarray) -> PolicyError:
    got = "is missing" if leaf is None else f"is {leaf.dtype} of shape {leaf.shape}"
    wanted = f"{view.dtype} of shape (k, {', '.join(map(str, view.shape[2:]))})".replace(", )", ",)")
    return PolicyError(
        f"policy: {describe(name, path)} {got}; expected {wanted}, as in the first step of the block. Return the same "
        "extras in every step."
    )
