"""Rows of nests, NumPy or torch alike: what a rollout keeps per environment.

A table holds one row per environment. Where all environments are in step, taking and putting rows is free: the table
is replaced, never written, so that whoever holds an older one keeps it.
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int64
from numpy import ndarray
from torch import Tensor

from rlfeed.nest import Nest, map_nest


def take(table: Nest, ids: Int64[ndarray, " k"], num_envs: int) -> Nest:
    """Take the rows of some environments.

    Args:
        table: ``[N, ...]`` per leaf.
        ids: Which, ascending.
        num_envs: N.

    Returns:
        ``[k, ...]`` per leaf; the table itself where all are asked for.
    """
    return table if len(ids) == num_envs else pick(table, ids)


def pick(table: Nest, ids: Int64[ndarray, " k"]) -> Nest:
    """Copy the rows of some environments.

    Args:
        table: ``[N, ...]`` per leaf.
        ids: Which.

    Returns:
        ``[k, ...]`` per leaf, in memory of their own.
    """
    return map_nest(lambda leaf: leaf[ids if isinstance(leaf, ndarray) else torch.from_numpy(ids)], table)


def put(table: Nest, ids: Int64[ndarray, " k"], rows: Nest, num_envs: int) -> Nest:
    """Replace the rows of some environments.

    Args:
        table: ``[N, ...]`` per leaf; stays as it is.
        ids: Which, ascending.
        rows: ``[k, ...]`` per leaf.
        num_envs: N.

    Returns:
        The new table.
    """
    if len(ids) == num_envs:
        return rows

    def replaced(old: Any, new: Any) -> Any:
        old = copy(old)
        old[ids if isinstance(old, ndarray) else torch.from_numpy(ids)] = new
        return old

    return map_nest(replaced, table, rows)


def table_like(rows: Any, num_envs: int) -> Any:
    """Make a table for rows of one leaf.

    Args:
        rows: ``[k, ...]``, an array or a tensor.
        num_envs: N.

    Returns:
        ``[N, ...]`` zeros.
    """
    shape = (num_envs, *rows.shape[1:])
    return rows.new_zeros(shape) if isinstance(rows, Tensor) else np.zeros(shape, rows.dtype)


def write(table: Nest, ids: Int64[ndarray, " k"], rows: Nest) -> None:
    """Write the rows of some environments into a table that nobody else holds.

    Args:
        table: ``[N, ...]`` per leaf.
        ids: Which, ascending.
        rows: ``[k, ...]`` per leaf.
    """

    def written(old: Any, new: Any) -> None:
        old[ids if isinstance(old, ndarray) else torch.from_numpy(ids)] = new

    map_nest(written, table, rows)


def reset_rows(rows: Nest, where: Bool[ndarray, " k"], initial: Nest) -> Nest:
    """Set rows to what episodes begin with.

    Args:
        rows: ``[k, ...]`` per leaf; stays as it is.
        where: True where a row is reset.
        initial: ``[1, ...]`` or ``[k, ...]`` per leaf.

    Returns:
        The new rows, in memory of their own.
    """

    def chosen(row: Any, first: Any) -> Any:
        mask = where.reshape(-1, *(1,) * (row.ndim - 1))
        if isinstance(row, Tensor):
            return torch.where(torch.from_numpy(mask).to(row.device), first, row)
        return np.where(mask, first, row)

    return map_nest(chosen, rows, initial)


def copy(nest: Nest) -> Nest:
    """Copy every leaf.

    Args:
        nest: Arrays or tensors.

    Returns:
        The same in memory of their own.
    """
    return map_nest(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else np.array(leaf), nest)


def to_numpy(leaf: Any) -> ndarray:
    """Give a leaf as an array.

    Args:
        leaf: An array, a tensor on any device, or what NumPy makes an array of.

    Returns:
        The array; it may share memory with the leaf.
    """
    return leaf.numpy(force=True) if isinstance(leaf, Tensor) else np.asarray(leaf)


def to_tensor(leaf: Any) -> Tensor:
    """Give a leaf as a tensor.

    Args:
        leaf: An array or a tensor.

    Returns:
        The tensor; it may share memory with the leaf.
    """
    return leaf if isinstance(leaf, Tensor) else torch.from_numpy(np.asarray(leaf))
