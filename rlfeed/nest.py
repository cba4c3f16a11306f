"""Nests: arrays in nested dicts and tuples, and the few operations the data path needs on them.

A nest is an array, a dict of nests, or a tuple of nests; named tuples keep their names. ``()`` is the empty nest
(a stateless policy's carry). A path names one leaf: ``("camera",)`` or ``("arm", 0)``; errors print it as the user
would type it.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from rlfeed.errors import FieldError

Path = tuple[str | int, ...]
Nest = Any  # a recursive alias would be opaque to beartype and to most editors


def leaves(nest: Nest, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Walk the leaves of a nest in order.

    Args:
        nest: The nest to walk.
        path: The path of the nest itself.

    Yields:
        Pairs of a leaf's path and the leaf.
    """
    if isinstance(nest, dict):
        for key, value in nest.items():
            yield from leaves(value, (*path, key))
    elif isinstance(nest, tuple):
        for index, value in enumerate(nest):
            yield from leaves(value, (*path, index))
    else:
        yield path, nest


def build(pairs: "Iterator[tuple[Path, Any]] | list[tuple[Path, Any]]") -> Nest:
    """Put leaves back together: the inverse of `leaves` (an index in a path makes a tuple).

    Args:
        pairs: Pairs of a path and a leaf, in the order `leaves` gives them.

    Returns:
        The nest; ``()`` when there are no pairs.
    """
    pairs = list(pairs)
    if len(pairs) == 1 and pairs[0][0] == ():
        return pairs[0][1]
    groups: dict[str | int, list[tuple[Path, Any]]] = {}
    for path, leaf in pairs:
        groups.setdefault(path[0], []).append((path[1:], leaf))
    built = {key: build(group) for key, group in groups.items()}
    if all(isinstance(key, int) for key in built):
        return tuple(built[key] for key in sorted(built))
    return built


def map_nest(fn: Callable[..., Any], nest: Nest, *others: Nest, where: str = "nest") -> Nest:
    """Apply a function to every leaf of one nest, or to the corresponding leaves of several.

    Args:
        fn: Called with one leaf of each nest.
        nest: The nest whose structure the result has.
        others: Further nests of the same structure.
        where: What the nest is called in an error.

    Returns:
        A nest of the function's results.

    Raises:
        FieldError: If the structures differ; the message names the path.
    """
    if isinstance(nest, dict):
        for other in others:
            if not isinstance(other, dict) or other.keys() != nest.keys():
                got = sorted(other) if isinstance(other, dict) else type(other).__name__
                raise FieldError(f"{where}: has {got}; expected the keys {sorted(nest)}.")
        return {k: map_nest(fn, v, *(o[k] for o in others), where=f'{where}["{k}"]') for k, v in nest.items()}
    if isinstance(nest, tuple):
        for other in others:
            if not isinstance(other, tuple) or len(other) != len(nest):
                got = f"{len(other)} parts" if isinstance(other, tuple) else type(other).__name__
                raise FieldError(f"{where}: has {got}; expected a tuple of {len(nest)} parts.")
        parts = (map_nest(fn, v, *(o[i] for o in others), where=f"{where}[{i}]") for i, v in enumerate(nest))
        return getattr(nest, "_make", tuple)(parts)
    return fn(nest, *others)


def describe(name: str, path: Path) -> str:
    """Print a leaf's place as a user would type it.

    Args:
        name: The name of the whole nest, such as ``observation``.
        path: The leaf's path in it.

    Returns:
        For example ``observation["camera"][0]``.
    """
    return name + "".join(f'["{part}"]' if isinstance(part, str) else f"[{part}]" for part in path)


def stack(nests: list[Nest]) -> Nest:
    """Stack equal nests of arrays along a new first axis.

    Args:
        nests: At least one nest; all of one structure, shapes and dtypes.

    Returns:
        A nest of NumPy arrays with a leading axis of ``len(nests)``.
    """
    return map_nest(lambda *parts: np.stack(parts), *nests)
