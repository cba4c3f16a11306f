"""The pure recursion: a model's output becomes its next input, without any environment."""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Int64
from numpy import ndarray
from torch import Tensor

from rlfeed.errors import CheckpointError, ConfigError, DivergedError, FieldError, suggest
from rlfeed.nest import Nest, Path, describe, leaves, map_nest
from rlfeed.rollout.cell import (
    check_outline,
    check_rows,
    finite_rows,
    is_array,
    marks,
    memory,
    outline,
    pick,
    surely_finite,
)
from rlfeed.rollout.rows import put, reset_rows, to_numpy

Check = Literal["raise", "stop", "off"]
CHECKS = ("raise", "stop", "off")
GUARDED_STEPS = 3  # enough to recognise a cell that writes into one array, or into two in turn


class Feedback:
    """Iterate over the outputs of a model that is fed its own outputs.

    World models, imagination and autoregressive generation are this class. Every ``iter()`` is a fresh start. All
    values are nests of arrays or tensors with one leading axis of n rows. A row that has stopped keeps its last
    output, input and carry, and ``active`` is False there; iteration ends when every row has stopped.

    Outputs may be kept. A cell may write into its input, or into one array again and again: that is recognised in the
    first steps, in which it works on copies, and from then on it goes on doing so.

    Args:
        cell: ``cell(x, carry) -> (out, carry)``: the model; called once for each output.
        x0: The first input.
        carry: The model's state before ``x0``, with the same leading axis; ``()`` when stateless.
        feed: ``feed(out, x) -> next x``, writing into neither; by default the output is the next input.
        stop: ``stop(out) -> [n] bool``: True where this output is the row's last. Read in every step, which waits for
            a device.
        max_steps: How many outputs to give at most; None = no bound.
        check: What to do with an output that is not finite: ``"raise"``; ``"stop"``, which ends the row before that
            output and marks it in ``invalid``; or ``"off"``.
        check_every: Read what the check found in tensors once in so many steps, and at the end, so that a device need
            not be waited for in every step; the error names the step in which it happened. Needs ``check="raise"``:
            a row cannot end before an output that has been handed out.
        grad: Whether to keep the graph for gradients; otherwise the model runs in inference mode.
        detach_every: Cut the graph after every so many steps (truncated backpropagation through time): the next input
            and the carry are detached there. None = never.
        compact: Whether ``cell``, ``feed`` and ``stop`` get only the rows that have not stopped, ``[m, ...]``.
            Outputs have all n rows either way, equal ones where the model treats every row by itself.
        batched: False where nothing has an axis of rows: ``stop`` gives one bool, and iteration ends there.

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
        check_every: int = 1,
        grad: bool = False,
        detach_every: int | None = None,
        compact: bool = False,
        batched: bool = True,
    ) -> None:
        if check not in CHECKS:
            raise ConfigError(f"Feedback: check is {check!r}; expected one of {CHECKS}.{suggest(str(check), CHECKS)}")
        for name, count in (("max_steps", max_steps), ("check_every", check_every), ("detach_every", detach_every)):
            if count is not None and (type(count) is bool or not isinstance(count, int | np.integer) or count < 1):
                raise ConfigError(f"Feedback: {name} is {count!r}; expected an integer of at least 1.")
        for name, function in (("cell", cell), ("feed", feed), ("stop", stop)):
            if not callable(function) and (function is not None or name == "cell"):
                raise ConfigError(f"Feedback: {name} is {function!r}; expected a function.")
        if check_every > 1 and check == "stop":
            raise ConfigError(
                f"Feedback: check_every is {check_every} with check='stop'; expected 1, since a row that ends before "
                "its first bad output must be known in that step. Leave check_every out, or use check='raise'."
            )
        if detach_every is not None and not grad:
            raise ConfigError(
                f"Feedback: detach_every is {detach_every} without gradients; expected None. Pass grad=True."
            )
        rows = _count_rows(x0) if batched else None
        check_rows("x0", x0, rows, ConfigError)
        check_rows("carry", carry, rows, ConfigError)
        self.num_rows = 1 if rows is None else rows
        self._cell, self._feed, self._stop = cell, feed, stop
        self._x0, self._carry0 = x0, carry
        self._max_steps, self._check, self._check_every = max_steps, check, check_every
        self._grad, self._detach_every = grad, detach_every
        self._compact, self._batched = compact, batched
        self._resumed = False
        self._start()

    def __iter__(self) -> "Feedback":
        if not self._resumed:
            self._start()
        self._resumed = False
        return self

    def __next__(self) -> Nest:
        if not self._live or self.step == self._max_steps:
            self._read_pending()
            raise StopIteration
        with contextlib.nullcontext() if self._grad else torch.inference_mode():
            out, carry = self._called()
            last = out if self._out is None else self._out
            bad = None if self._check == "off" else self._not_finite(out)
            if bad is not None:
                self.invalid = self.invalid | self._end(bad, self.step)
                if not self._live:
                    raise StopIteration
                if self._compact:
                    out, carry = pick(out, ~bad), pick(carry, ~bad)
                    self._narrow(~bad)
            if self._compact:
                given = put(last, self._seen, out, self.num_rows)
                x = self._fed(out)
            else:
                given = out = self._held(out, last)
                x, carry = self._held(self._fed(out), self._x), self._held(carry, self._carry)
            stopped = None if self._stop is None else self._stopped(out, self._stop)
            self._x, self._carry, self._out = x, carry, given
            self.step += 1
            self._was_active = self.active
            if stopped is not None and stopped.any():
                self._end(stopped, self.step)
                if self._compact:
                    self._narrow(~stopped)
            if self._detach_every and self.step % self._detach_every == 0:
                kept = self._x, self._carry, self._out
                self._x, self._carry, self._out = map(_detached, kept)
        if self.step % self._check_every == 0 or self.step == self._max_steps or not self._live:
            self._read_pending()
        return given

    @property
    def valid(self) -> Bool[ndarray, " n"]:
        """Tell which rows of the last output are new; the others had stopped before and keep their old one.

        Returns:
            ``[n]`` bool.
        """
        return self._was_active

    @property
    def lengths(self) -> Int64[ndarray, " n"]:
        """Count the outputs of each row so far.

        Returns:
            ``[n]``.
        """
        return np.where(self.active, self.step, self._lengths)

    def state_dict(self) -> dict[str, Any]:
        """Give the state between two outputs.

        Returns:
            The state, without any graph; the next ``iter()`` after `load_state_dict` goes on from it. ``x`` and
            ``carry`` have the rows that the cell sees. What the cell keeps for itself, such as a generator, is not
            in it.

        Raises:
            DivergedError: If an output whose check was still to be read is not finite.
        """
        self._read_pending()
        nests = {"x": self._x, "carry": self._carry, "out": self._out}
        rows = {"active": self.active, "invalid": self.invalid, "valid": self._was_active, "lengths": self.lengths}
        return {
            "step": self.step,
            **{key: None if nest is None else _copied(_detached(_plain(nest))) for key, nest in nests.items()},
            **{key: value.copy() for key, value in rows.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state: with the next output, also after the next ``iter()``.

        Args:
            state: What `state_dict` gave.

        Raises:
            CheckpointError: If it is of other rows, shapes or dtypes.
        """
        active = np.array(state["active"], bool)
        rows = int(active.sum()) if self._compact else self.num_rows
        started = (_first_rows(nest, rows) if self._batched else nest for nest in (self._x0, self._carry0))
        wanted, got = [outline(nest) for nest in started], [outline(state["x"]), outline(state["carry"])]
        if active.shape != (self.num_rows,) or got != wanted:
            raise CheckpointError(
                f"Feedback: the state has x and carry of {got} and {active.size} rows; expected {wanted} and "
                f"{self.num_rows}. Build it with the x0, carry and compact that it was saved with."
            )
        self._start()
        self.step = int(state["step"])
        self._x, self._carry, self._out = (self._taken(state[key]) for key in ("x", "carry", "out"))
        self._x, self._carry = _like(self._x0, self._x), _like(self._carry0, self._carry)
        self.active, self.invalid = active, np.array(state["invalid"], bool)
        self._was_active, self._lengths = np.array(state["valid"], bool), np.array(state["lengths"], np.int64)
        self._live = int(active.sum())
        if self._compact:
            self._seen = np.flatnonzero(active)
        self._resumed = True

    def close(self) -> None:
        """Let go of the arrays; the iteration is over."""
        self._end(self.active[self._seen], self.step)
        self._x, self._carry, self._out = self._x0, self._carry0, None
        self._pending, self._earlier, self._resumed = [], [], False

    def _start(self) -> None:
        self.step = 0
        self.active: Bool[ndarray, " n"] = np.ones(self.num_rows, bool)
        self.invalid: Bool[ndarray, " n"] = np.zeros(self.num_rows, bool)
        self._was_active = self.active
        self._lengths = np.zeros(self.num_rows, np.int64)
        self._live = self.num_rows
        self._seen = np.arange(self.num_rows)  # which rows the cell sees
        self._x, self._carry, self._out = self._x0, self._carry0, None
        self._outlines: Any = None
        self._pending: list[tuple[int, Path, Tensor, ndarray, ndarray]] = []
        self._guarded, self._reuses = True, False
        self._earlier: list[Nest] = []

    def _called(self) -> tuple[Nest, Nest]:
        x, carry = self._x, self._carry
        if self._guarded:
            x, carry = _copied(x), _copied(carry)
        result = self._cell(x, carry)
        if not isinstance(result, tuple) or len(result) != 2:
            raise FieldError(
                f"Feedback: step {self.step}: cell returned a {type(result).__name__}; expected the pair (out, carry). "
                "Return (out, ()) where there is no carry."
            )
        self._check_outlines(*result)
        if not self._guarded:
            return result
        if not self._reuses:
            self._reuses = not memory(result[0]).isdisjoint(memory((x, carry, *self._earlier)))
            self._earlier.append(result[0])
            self._guarded = self._reuses or len(self._earlier) < GUARDED_STEPS
            if not self._guarded:
                self._earlier = []
        return _copied(result[0]), _copied(result[1])

    def _check_outlines(self, out: Nest, carry: Nest) -> None:
        if self._outlines is None:
            rows = len(self._seen)
            check_rows("out", out, rows if self._batched else None)
            if self._out is not None:
                before = _first_rows(self._out, rows) if self._batched else self._out
                check_outline("out", self.step, out, outline(before))
                self._out = _like(out, self._out)
            check_outline("carry", self.step, carry, outline(self._carry))
            self._outlines = outline(out), outline(carry)
        elif (outline(out), outline(carry)) != self._outlines:
            check_outline("out", self.step, out, self._outlines[0])
            check_outline("carry", self.step, carry, self._outlines[1])

    def _fed(self, out: Nest) -> Nest:
        if self._feed is not None:
            x = self._feed(out, self._x)
            check_outline("the next x", self.step, x, outline(self._x))
            return x
        if self.step == 0:
            check_outline("out, the next x", self.step, out, outline(self._x))
        return out

    def _stopped(self, out: Nest, stop: Callable[[Nest], Any]) -> Bool[ndarray, " m"]:
        stopped = to_numpy(stop(out))
        expected = (len(self._seen),) if self._batched else ()
        if stopped.shape != expected or stopped.dtype != bool:
            rule = f"bool of shape {expected}, one for each row" if self._batched else "one bool"
            raise FieldError(
                f"Feedback: step {self.step}: stop(out) is {stopped.dtype} of shape {stopped.shape}; expected {rule}."
            )
        return stopped.reshape(-1)

    def _end(self, rows: Bool[ndarray, " m"], length: int) -> Bool[ndarray, " n"]:
        """End some of the rows that the cell sees, after so many outputs."""
        ended = np.zeros(self.num_rows, bool)
        ended[self._seen[rows]] = True
        ended &= self.active
        self._lengths = np.where(ended, length, self._lengths)
        self.active = self.active & ~ended
        self._live = int(self.active.sum())
        return ended

    def _narrow(self, keep: Bool[ndarray, " m"]) -> None:
        self._x, self._carry, self._seen = pick(self._x, keep), pick(self._carry, keep), self._seen[keep]
        self._outlines = None

    def _held(self, new: Nest, old: Nest) -> Nest:
        """Keep the old rows where a row has stopped."""
        return new if self._live == self.num_rows else reset_rows(new, ~self.active, old)

    def _not_finite(self, out: Nest) -> Bool[ndarray, " m"] | None:
        """Find the rows to end: None where every number is finite, or where that is still to be read."""
        rows = len(self._seen)
        found = None
        for path, leaf in leaves(out):
            if self._check_every > 1 and isinstance(leaf, Tensor):
                if leaf.is_floating_point() or leaf.is_complex():
                    self._pending.append((self.step, path, marks(leaf, rows), self._seen, self.active))
                continue
            if surely_finite(leaf):
                continue
            bad = ~finite_rows(leaf, rows) & self.active[self._seen]
            if not bad.any():
                continue
            if self._check == "raise":
                raise self._diverged(self.step, path, int(self._seen[bad][0]))
            found = bad if found is None else found | bad
        return found

    def _read_pending(self) -> None:
        if self._pending and torch.cat([mark for _, _, mark, _, _ in self._pending]).isnan().any():
            for step, path, mark, seen, active in self._pending:
                bad = to_numpy(mark.isnan()) & active[seen]
                if bad.any():
                    raise self._diverged(step, path, int(seen[bad][0]))
        self._pending = []

    def _diverged(self, step: int, path: Path, row: int) -> DivergedError:
        place = f", row {row}" if self._batched else ""
        return DivergedError(
            f"Feedback: step {step}{place}: {describe('out', path)} is not finite; expected finite numbers. Find where "
            "the model makes it, or pass check='stop' to end such rows."
        )

    def _taken(self, nest: Nest) -> Nest:
        """Take a saved nest: where x0 lies, in memory of its own."""
        device = next((leaf.device for _, leaf in leaves((self._x0, self._carry0)) if isinstance(leaf, Tensor)), None)
        if nest is None or device is None:
            return None if nest is None else _copied(nest)
        return map_nest(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, _copied(nest))


def _count_rows(x0: Nest) -> int:
    for _, leaf in leaves(x0):
        if is_array(leaf) and leaf.ndim:
            return len(leaf)
    raise ConfigError(
        "Feedback: x0 has no leading axis of rows; expected [n, ...] arrays. Write x0[None], or pass batched=False."
    )


def _first_rows(nest: Nest, rows: int) -> Nest:
    return map_nest(lambda leaf: leaf[:rows], nest)


def _plain(nest: Nest) -> Nest:
    """Forget the names of named tuples: a file could not keep them."""
    if isinstance(nest, dict):
        return {key: _plain(part) for key, part in nest.items()}
    return tuple(_plain(part) for part in nest) if isinstance(nest, tuple) else nest


def _like(named: Nest, nest: Nest) -> Nest:
    """Give named tuples their names back."""
    return map_nest(lambda _, leaf: leaf, named, nest)


def _copied(nest: Nest) -> Nest:
    return map_nest(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf.copy(), nest)


def _detached(nest: Nest) -> Nest:
    return map_nest(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, nest)
