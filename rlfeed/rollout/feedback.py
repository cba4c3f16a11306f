"""The pure recursion: a model's output becomes its next input, without any environment."""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Int64
from numpy import ndarray
from torch import Tensor

from rlfeed.errors import ConfigError, DivergedError, FieldError, suggest
from rlfeed.nest import Nest, describe, leaves, map_nest
from rlfeed.rollout.rows import copy, reset_rows, to_numpy

Check = Literal["raise", "stop", "off"]
CHECKS = ("raise", "stop", "off")


class Feedback:
    """Iterate over the outputs of a model that is fed its own outputs.

    World models, imagination and autoregressive generation are this class. Every ``iter()`` is a fresh start. All
    values are nests of arrays or tensors with one leading axis of n rows. A row that has stopped keeps its last
    output, input and carry, and ``active`` is False there; iteration ends when every row has stopped.

    Args:
        cell: ``cell(x, carry) -> (out, carry)``: the model.
        x0: The first input.
        carry: The model's state before ``x0``; ``()`` when stateless.
        feed: ``feed(out, x) -> next x``; by default the output is the next input.
        stop: ``stop(out) -> [n] bool``: True where this output is the row's last.
        max_steps: How many outputs to give at most; None = no bound.
        check: What to do with an output that is not finite: ``"raise"``; ``"stop"``, which ends the row before that
            output and marks it in ``invalid``; or ``"off"``.
        grad: Whether to keep the graph for gradients; otherwise the model runs in inference mode.

    Raises:
        ConfigError: If an argument is wrong.
    """

    def __init__(
        self,
        cell: Callable[[Nest, Nest], tuple[Nest, Nest]],
        x0: Nest,
        carry: Nest = (),
        *,
        feed: Callable[[Nest, Nest], Nest] | None = None,
        stop: Callable[[Nest], Any] | None = None,
        max_steps: int | None = None,
        check: Check = "raise",
        grad: bool = False,
    ) -> None:
        if check not in CHECKS:
            raise ConfigError(f"Feedback: check is {check!r}; expected one of {CHECKS}.{suggest(str(check), CHECKS)}")
        if max_steps is not None and max_steps < 1:
            raise ConfigError(f"Feedback: max_steps is {max_steps}; expected at least 1, or None for no bound.")
        shapes = [tuple(leaf.shape) for _, leaf in leaves(x0)]
        if not shapes or not all(shapes):
            raise ConfigError("Feedback: x0 has no leading axis of rows; expected [n, ...] arrays. Write x0[None].")
        self.num_rows = shapes[0][0]
        self._cell, self._feed, self._stop = cell, feed, stop
        self._x0, self._carry0 = x0, carry
        self._max_steps, self._check, self._grad = max_steps, check, grad
        self._resumed = False
        self._start()

    def __iter__(self) -> "Feedback":
        if not self._resumed:
            self._start()
        self._resumed = False
        return self

    def __next__(self) -> Nest:
        if not self.active.any() or self.step == self._max_steps:
            raise StopIteration
        with contextlib.nullcontext() if self._grad else torch.inference_mode():
            out, carry = self._cell(self._x, self._carry)
            if self.step == 0:
                _check_rows("out", out, self.num_rows)
                _check_like("carry", carry, self._carry)
            self._check_finite(out)
            if self._out is not None:
                out = self._held(out, self._out)
            x = out if self._feed is None else self._feed(out, self._x)
            if self.step == 0:
                _check_like("the next x" if self._feed else "out, the next x", x, self._x)
            self._x, self._carry = self._held(x, self._x), self._held(carry, self._carry)
        self._out = out
        self.step += 1
        self.lengths = self.lengths + self.active
        self._was_active = self.active
        if self._stop is not None:
            stopped = to_numpy(self._stop(out))
            if stopped.shape != (self.num_rows,) or stopped.dtype != bool:
                raise FieldError(
                    f"Feedback: stop(out) is {stopped.dtype} of shape {stopped.shape}; expected bool of shape "
                    f"({self.num_rows},), one for each row."
                )
            self.active = self.active & ~stopped
        return out

    @property
    def valid(self) -> Bool[ndarray, " n"]:
        """Tell which rows of the last output are new; the others had stopped before and keep their old one.

        Returns:
            ``[n]`` bool.
        """
        return self._was_active

    def state_dict(self) -> dict[str, Any]:
        """Give the state between two outputs.

        Returns:
            The state; the next ``iter()`` after `load_state_dict` goes on from it.
        """
        state = {"x": self._x, "carry": self._carry, "out": self._out}
        rows = {"active": self.active, "invalid": self.invalid, "valid": self._was_active, "lengths": self.lengths}
        return {
            "step": self.step,
            **{key: None if nest is None else copy(map_nest(_detached, nest)) for key, nest in state.items()},
            **{key: np.array(value) for key, value in rows.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state: with the next output, also after the next ``iter()``.

        Args:
            state: What `state_dict` gave.
        """
        self.step = int(state["step"])
        self._x, self._carry = copy(state["x"]), copy(state["carry"])
        self._out = None if state["out"] is None else copy(state["out"])
        self.active, self.invalid = np.array(state["active"]), np.array(state["invalid"])
        self._was_active, self.lengths = np.array(state["valid"]), np.array(state["lengths"])
        self._resumed = True

    def close(self) -> None:
        """Let go of the arrays; the iteration is over."""
        self.active = np.zeros(self.num_rows, bool)
        self._x, self._carry, self._out = self._x0, self._carry0, None

    def _start(self) -> None:
        self.step = 0
        self.active: Bool[ndarray, " n"] = np.ones(self.num_rows, bool)
        self.invalid: Bool[ndarray, " n"] = np.zeros(self.num_rows, bool)
        self.lengths: Int64[ndarray, " n"] = np.zeros(self.num_rows, np.int64)
        self._was_active = self.active
        self._x, self._carry, self._out = self._x0, self._carry0, None

    def _held(self, new: Nest, old: Nest) -> Nest:
        """Keep the old rows where a row has stopped."""
        return new if self.active.all() else reset_rows(new, ~self.active, old)

    def _check_finite(self, out: Nest) -> None:
        if self._check == "off":
            return
        for path, leaf in leaves(out):
            finite = _finite_rows(leaf) | ~self.active
            if finite.all():
                continue
            row = int(np.flatnonzero(~finite)[0])
            if self._check == "raise":
                raise DivergedError(
                    f"Feedback: step {self.step}, row {row}: {describe('out', path)} is not finite; expected finite "
                    "numbers. Find where the model makes it, or pass check='stop' to end such rows."
                )
            self.invalid = self.invalid | ~finite
            self.active = self.active & finite


def _finite_rows(leaf: Any) -> Bool[ndarray, " n"]:
    if isinstance(leaf, Tensor):
        return torch.isfinite(leaf.detach()).reshape(len(leaf), -1).all(dim=1).cpu().numpy()
    if leaf.dtype.kind not in "fc":
        return np.ones(len(leaf), bool)
    return np.isfinite(leaf).reshape(len(leaf), -1).all(axis=1)


def _check_rows(name: str, nest: Nest, rows: int) -> None:
    for path, leaf in leaves(nest):
        if not isinstance(leaf, ndarray | Tensor) or leaf.ndim == 0 or len(leaf) != rows:
            got = f"has shape {tuple(leaf.shape)}" if isinstance(leaf, ndarray | Tensor) else f"is {leaf!r}"
            raise FieldError(f"Feedback: {describe(name, path)} {got}; expected a leading axis of {rows} rows.")


def _check_like(name: str, new: Nest, old: Nest) -> None:
    def compare(before: Any, leaf: Any) -> None:
        got, wanted = _outline(leaf), _outline(before)
        if got != wanted:
            raise FieldError(
                f"Feedback: {name} is {got}; expected {wanted}, as it was before. "
                "Return that from cell, or pass feed= to make the next input of an output."
            )

    map_nest(compare, old, new, where=f"Feedback: {name}")


def _outline(leaf: Any) -> str:
    if isinstance(leaf, ndarray | Tensor):
        return f"{type(leaf).__name__} {leaf.dtype} of shape {tuple(leaf.shape)}"
    return f"a {type(leaf).__name__}"


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf
