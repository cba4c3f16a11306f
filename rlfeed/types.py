"""What travels through the data path: `Step` in, `Batch` out, and the protocols users implement."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int32, Int64
from torch import Tensor

from rlfeed.errors import FieldError
from rlfeed.layout import Layout
from rlfeed.nest import Nest, Path, leaves, map_nest
from rlfeed.ragged import Ragged

Mode = Literal["explore", "greedy", "random"]


@dataclass(eq=False, slots=True)  # not frozen: that would cost 2 us more for every step
class Step:
    """Hold one step of up to N environments: k <= N rows, of the environments ``env_ids``.

    Args:
        observation: What the policy acted on, ``[k, ...]`` per leaf.
        action: What it did, ``[k, ...]`` per leaf.
        reward: ``[k]``.
        next_observation: What the environment returned for that action, ``[k, ...]``: the true final observation
            where an episode ended, never the next episode's first one.
        terminated: ``[k]`` bool, as Gymnasium defines it.
        truncated: ``[k]`` bool, as Gymnasium defines it.
        is_first: ``[k]`` bool, True where this is the first step of an episode.
        env_ids: ``[k]`` int64; None means 0 .. k-1.
        lost: ``[k]`` bool, True where the environment was lost in this step: the step is not stored and the
            episode is cut. None means nowhere.
        carry: The policy's recurrent state *before* ``observation``, ``[k, ...]`` per leaf; ``()`` when stateless.
        extras: What else the policy gave (log_prob, value, ...), ``[k, ...]`` per leaf, by name.
        env_action: What the environments got for ``action``, where the rollout clips or rescales; None: the same.
    """

    observation: Nest
    action: Nest
    reward: np.ndarray
    next_observation: Nest
    terminated: np.ndarray
    truncated: np.ndarray
    is_first: np.ndarray = field(kw_only=True)
    env_ids: np.ndarray | None = field(default=None, kw_only=True)
    lost: np.ndarray | None = field(default=None, kw_only=True)
    carry: Nest = field(default=(), kw_only=True)
    extras: dict[str, Nest] = field(default_factory=dict, kw_only=True)
    env_action: Nest | None = field(default=None, kw_only=True)

    def __len__(self) -> int:
        """Count the rows.

        Returns:
            k, the number of environments in this step.
        """
        return len(self.reward)


@dataclass(frozen=True, eq=False, kw_only=True)
class Batch(Ragged):
    """Hold a batch for a learner: ``[B, ...]`` from `Transition`, padded ``[B, T, ...]`` from `Sequence` and `Episode`.

    `packed` gives sequences without their padding, ``[S, ...]`` instead of ``[B, T, ...]``; see `Ragged`.

    Every field is dense and, when the batch came from the replay, all lie in one contiguous block, so that it is
    pinned, moved and sent between processes as one piece; a field's tensors are made when it is first looked at.
    Padded values are zeros. Fields that a unit does not have are None.

    Args:
        observation: ``[B, ...]``, or ``[B, T+1, ...]``: the last valid one is the successor of the last step.
        action: ``[B, ...]`` or ``[B, T, ...]``.
        reward: ``[B]`` (the n-step sum) or ``[B, T]``.
        terminated: ``[B]`` or ``[B, T]``.
        truncated: ``[B]`` or ``[B, T]``.
        discount: ``[B]`` = gamma^k (1 - terminated), k the steps really summed; ``[B, T]`` = gamma (1 - terminated).
        next_observation: ``[B, ...]`` after k steps; None for sequences (``observation[:, 1:]``).
        mask: ``[B, T]``, True = a stored step, burn-in included.
        loss_mask: ``[B, T]``, True = a step to train on, burn-in excluded.
        lengths: ``[B]`` int64, steps that are not padding.
        cu_lengths: ``[B+1]`` int32 of a packed batch, else None: the steps of row b lie at ``cu_lengths[b:b + 2]``.
        is_first: ``[B, T]``, True where an episode begins.
        burn_in: ``[B]`` int64, burn-in steps really there.
        carry: What the policy's recurrent state was before the first observation, ``[B, ...]``.
        prev_action: The action before the first observation, zeros where it opens an episode, ``[B, ...]``.
        prev_reward: The reward before the first observation, zeros where it opens an episode, ``[B]``.
        final_observation: ``[K, ...]``, final observations of episodes that ended inside a block of a rollout.
        final_index: ``[K, 2]`` int64, their (row, step).
        ids: ``[B]`` int64, names the (first) step for late updates; stays on the CPU.
        weights: ``[B]`` float32, importance weights; ones for uniform draws.
        source: ``[B]`` int64, which of several mixed buffers a row came from.
        extras: What the policy stored beside (log_prob, value, ...), by name, shaped as ``action`` is.
    """

    observation: Nest
    action: Nest
    reward: Float32[Tensor, "*batch"]
    terminated: Bool[Tensor, "*batch"]
    truncated: Bool[Tensor, "*batch"]
    discount: Float32[Tensor, "*batch"] | None = None
    next_observation: Nest | None = None
    mask: Bool[Tensor, "*batch"] | None = None
    loss_mask: Bool[Tensor, "*batch"] | None = None
    lengths: Int64[Tensor, " B"] | None = None
    cu_lengths: Int32[Tensor, " B1"] | None = None
    is_first: Bool[Tensor, "*batch"] | None = None
    burn_in: Int64[Tensor, " B"] | None = None
    carry: Nest = ()
    prev_action: Nest | None = None
    prev_reward: Float32[Tensor, " B"] | None = None
    final_observation: Nest | None = None
    final_index: Int64[Tensor, "K 2"] | None = None
    ids: Int64[Tensor, " B"] | None = None
    weights: Float32[Tensor, " B"] | None = None
    source: Int64[Tensor, " B"] | None = None
    extras: dict[str, Nest] = field(default_factory=dict)
    _block: Tensor | None = field(default=None, init=False, repr=False)
    _layout: Layout | None = field(default=None, init=False, repr=False)
    _plain: bool = field(default=False, init=False, repr=False)
    _memory: np.ndarray | None = field(default=None, init=False, repr=False)
    _views: dict[torch.dtype, Tensor] = field(default_factory=dict, init=False, repr=False)
    _nests: "dict[str, list[tuple[Path, Tensor]]]" = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def carve(cls, block: Tensor, layout: Layout, ids: Tensor | None = None, *, plain: bool = False) -> "Batch":
        """Make a batch whose fields are views of one block.

        Args:
            block: uint8 memory of at least ``layout.nbytes``.
            layout: Where each field lies.
            ids: ``[B]``, replaces the block's ids (they stay on the CPU when the block moves to a device).
            plain: Whether the block is ordinary memory of this process. Neither pinned memory is (torch must see whose
                copies are under way) nor shared memory (torch must see that it can be sent as it is).

        Returns:
            The batch.
        """
        batch = object.__new__(cls)  # __init__ would set every field: a tensor costs 2 us, and many are never looked at
        batch.__dict__.update(_block=block, _layout=layout, _plain=plain, _memory=None, _views={}, _nests={})
        if ids is not None:
            batch.__dict__["ids"] = ids
        return batch

    def _look(self, name: str) -> Any:
        """Carve a field, once."""
        block, layout = self._block, self._layout
        if block is None or layout is None or name not in layout:
            value = _ABSENT[name]()
        elif self._plain and not torch.compiler.is_compiling():  # a compiler follows torch, not NumPy
            value = layout.read_plain(name, block.numpy())
        else:
            value = layout.read(name, block, self._views)
        if type(value) in (dict, tuple):  # what may be edited although the fields are frozen
            self._nests[name] = list(leaves(value))
        self.__dict__[name] = value
        return value

    def block_and_layout(self) -> tuple[Tensor, Layout] | None:
        """Give the block and its layout while they are all there is: fields are frozen, but a dict may be edited.

        Returns:
            uint8 memory and where each field lies in it; None where fields lie elsewhere.
        """
        block, layout = self._block, self._layout
        if block is None or layout is None:
            return None
        same = all(_same(list(leaves(getattr(self, name))), carved) for name, carved in self._nests.items())
        return (block, layout) if same else None

    def _any(self) -> Tensor:
        return self.reward if self._block is None else self._block

    def __len__(self) -> int:
        """Count the rows.

        Returns:
            B.
        """
        return (self.reward if self.cu_lengths is None else self.cu_lengths[1:]).shape[0]

    def __reduce__(self) -> tuple[Any, ...]:
        # One tensor crosses a process boundary instead of fifteen: torch's worker queue costs 215 us for each.
        if whole := self.block_and_layout():
            block, layout = whole
            ids, begin = self.ids, block.data_ptr()
            if ids is not None and begin <= ids.data_ptr() < begin + layout.nbytes:
                ids = None  # they lie in the block: do not send it twice
            if self._plain:  # torch moves what it shares, and plain fields would not follow: it gets a name of its own
                block = torch.from_numpy(block.numpy())
            return Batch.carve, (block, layout, ids)
        return _rebuild, ({f.name: getattr(self, f.name) for f in fields(self) if f.init},)

    def map(self, fn: Callable[[Tensor], Tensor]) -> "Batch":
        """Apply a function to every tensor, ``ids`` included.

        Args:
            fn: Called with one tensor.

        Returns:
            A new batch of the results, no longer one block.
        """
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        mapped: dict[str, Any] = {n: None if value is None else map_nest(fn, value) for n, value in values.items()}
        return Batch(**mapped)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """Copy the batch to a device, in one transfer where its fields lie in one block; ``ids`` stay on the CPU.

        Args:
            device: Where to.
            non_blocking: Do not wait for the copy; meaningful from pinned memory only.

        Returns:
            The batch on the device (the same batch where it is already there).
        """
        target, here = torch.device(device), self._any().device
        if here == target or (target.index is None and here.type == target.type):
            return self
        return self.through(lambda tensor: tensor.to(target, non_blocking=non_blocking))

    def through(self, copy: Callable[[Tensor], Tensor]) -> "Batch":
        """Copy the batch with a function of ours: once where its fields lie in one block; ``ids`` stay where they are.

        Args:
            copy: Makes a copy of a tensor, of the same shape and dtype, perhaps elsewhere.

        Returns:
            The copy; it holds nothing of this batch's memory.
        """
        ids = None if self.ids is None else self.ids.clone()  # a view would keep a whole batch slot from being used
        if whole := self.block_and_layout():
            return Batch.carve(copy(whole[0]), whole[1], ids)
        moved = {f.name: getattr(self, f.name) for f in fields(self) if f.init and f.name != "ids"}
        moved = {name: None if value is None else map_nest(copy, value) for name, value in moved.items()}
        return _rebuild({"ids": ids, **moved})

    def in_block(self, allocate: Callable[[int], Tensor]) -> "Batch":
        """Put the fields of any batch into one block: what is pinned, moved and sent as one piece.

        Args:
            allocate: Gives uint8 memory of so many bytes, on the CPU, where none of the fields lie.

        Returns:
            The batch there; its ids lie there too.
        """
        if whole := self.block_and_layout():
            block, layout = whole
            return Batch.carve(allocate(layout.nbytes).copy_(block[: layout.nbytes]), layout)
        nests = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        nests = {name: list(leaves(nest)) for name, nest in nests.items() if nest is not None}
        shapes = [(name, path, leaf.dtype, tuple(leaf.shape)) for name, nest in nests.items() for path, leaf in nest]
        layout = Layout.of(shapes)
        batch = Batch.carve(allocate(layout.nbytes), layout)
        for name, nest in nests.items():
            for (_, leaf), (_, target) in zip(nest, leaves(getattr(batch, name)), strict=True):
                target.copy_(leaf)
        return batch

    def recarve(self, move: Callable[[Tensor, Layout], tuple[Tensor, Layout]]) -> "Batch":
        """Put a batch that lies in one block into another one, of another layout; ``ids`` stay where they are.

        Args:
            move: Called with the block and its layout; gives the other ones.

        Returns:
            The batch there.

        Raises:
            FieldError: If its fields do not lie in one block.
        """
        if whole := self.block_and_layout():
            return Batch.carve(*move(*whole), self.ids)
        raise FieldError("Batch.recarve: the fields do not lie in one block; expected a batch as the replay gave it.")

    def pin_memory(self) -> "Batch":
        """Copy the batch into page-locked memory, from which a device copies without waiting.

        Returns:
            The pinned batch; one that lies on a device already stays as it is.
        """
        if self._any().device.type != "cpu":
            return self
        if whole := self.block_and_layout():
            return Batch.carve(whole[0].pin_memory(), whole[1])
        return self.map(lambda tensor: tensor.pin_memory())

    def is_pinned(self) -> bool:
        """Tell whether the batch lies in page-locked memory.

        Returns:
            True where it does.
        """
        return self._any().is_pinned()

    def clone(self) -> "Batch":
        """Copy the batch into memory of its own.

        Returns:
            The copy, with the same layout.
        """
        if whole := self.block_and_layout():
            ids = None if self.ids is None else self.ids.clone()
            return Batch.carve(whole[0].clone(), whole[1], ids)
        return self.map(lambda tensor: tensor.clone())


# What a field is that a unit does not have.
_ABSENT: dict[str, Callable[[], Any]] = {f.name: lambda: None for f in fields(Batch) if f.init}
_ABSENT |= {"carry": tuple, "extras": dict}


class _Look:
    """Stand in for a field of `Batch` until it is looked at: an attribute of the object goes before this one."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, batch: Batch | None, owner: type) -> Any:
        if batch is None:
            return self
        # `Batch._look`, without its calls, for most fields of most batches: a sample of 256 has time for 27 us in all.
        values, name = batch.__dict__, self._name
        line = values["_layout"].single.get(name) if values["_plain"] else None
        if line is None or torch.compiler.is_compiling():
            return batch._look(name)
        memory = values["_memory"]
        if memory is None:
            memory = values["_memory"] = values["_block"].numpy()
        shape, dtype, offset, strides = line
        tensor = values[name] = torch.from_numpy(np.ndarray(shape, dtype, memory, offset, strides))
        return tensor


for _name in _ABSENT:
    setattr(Batch, _name, _Look(_name))


def _same(now: list[tuple[Path, Tensor]], carved: list[tuple[Path, Tensor]]) -> bool:
    return len(now) == len(carved) and all(a == b and x is y for (a, x), (b, y) in zip(now, carved, strict=True))


def _rebuild(values: dict[str, Any]) -> Batch:
    return Batch(**values)


@dataclass(eq=False, slots=True)
class PolicyContext:
    """Tell a policy what it may need beside the observation.

    Args:
        is_first: ``[k]`` bool, True where an episode begins with this observation.
        mode: ``"explore"`` (collect), ``"greedy"`` (evaluate) or ``"random"`` (prefill).
        env_ids: ``[k]`` int64, which environments the rows belong to.
        env_steps: Steps taken so far, summed over environments: the clock of exploration schedules.
        prev_action: The action before, zeros where ``is_first``.
        prev_reward: ``[k]`` float32, the reward before, zeros where ``is_first``.
        action_mask: ``[k, A]`` bool of allowed actions, or None.
        generator: The rollout's own NumPy generator: the only source of randomness a policy should use.
    """

    is_first: np.ndarray
    mode: Mode
    env_ids: np.ndarray
    env_steps: int
    prev_action: Nest
    prev_reward: np.ndarray
    action_mask: np.ndarray | None
    generator: np.random.Generator


@dataclass(eq=False, slots=True)
class PolicyOutput:
    """Hold what a policy decided for k rows.

    Args:
        action: ``[k, ...]`` per leaf.
        carry: The recurrent state after the observation; ``()`` when stateless.
        extras: Columns to store beside (log_prob, value, ...), by name.
    """

    action: Nest
    carry: Nest = ()
    extras: dict[str, Nest] = field(default_factory=dict)


@runtime_checkable
class Policy(Protocol):
    """Decide actions, statelessly or with a carry that the rollout keeps and resets."""

    def initial_carry(self, num_envs: int) -> Nest:
        """Give the recurrent state with which episodes begin.

        Args:
            num_envs: Rows.

        Returns:
            A nest of ``[num_envs, ...]``; ``()`` when stateless.
        """
        ...

    def __call__(self, observation: Nest, carry: Nest, context: PolicyContext) -> PolicyOutput:
        """Decide for every row.

        Args:
            observation: What to act on, ``[k, ...]`` per leaf.
            carry: The recurrent state before it, ``[k, ...]`` per leaf.
            context: Episode beginnings, mode, randomness, ...

        Returns:
            Actions, the next carry, and columns to store.
        """
        ...


@runtime_checkable
class Stateful(Protocol):
    """Be saved and resumed exactly."""

    def state_dict(self) -> dict[str, Any]:
        """Give the state as nested dicts of numbers, strings, arrays and tensors.

        Returns:
            The state; it shares no memory with the object.
        """
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take a state back.

        Args:
            state: What `state_dict` gave.
        """
        ...


@runtime_checkable
class Logger(Protocol):
    """Receive scalars by declared tag."""

    def scalar(self, tag: str, value: float, env_steps: int) -> None:
        """Record one value.

        Args:
            tag: A tag of ``rlfeed.log.tags``.
            value: The value, in the tag's unit.
            env_steps: The x-axis of every curve.
        """
        ...

    def flush(self) -> None:
        """Hand over what is pending: called before a checkpoint is saved, so that a killed run keeps its curves."""
        ...

    def close(self) -> None:
        """Write what is pending and release files."""
        ...


def check_rows(name: str, value: Any, rows: int) -> None:
    """Check that an array has one entry per row.

    Args:
        name: The field, for the error.
        value: The array.
        rows: How many rows are expected.

    Raises:
        FieldError: If the leading axis differs.
    """
    shape = np.shape(value)
    if not shape or shape[0] != rows:
        raise FieldError(f"{name}: has shape {shape}; expected a leading axis of {rows}, one entry per environment.")
