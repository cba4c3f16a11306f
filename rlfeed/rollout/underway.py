"""What was decided for environments that have not come back yet: where the first ready ones go on, others may."""

import numpy as np
from jaxtyping import Int64
from numpy import ndarray

from rlfeed.nest import Nest, map_nest
from rlfeed.rollout.rows import pick, table_like, write


class Underway:
    """Keep one row per environment from the moment it is acted on until its outcome is there.

    Args:
        num_envs: N.
    """

    def __init__(self, num_envs: int) -> None:
        self._where = np.zeros(num_envs, bool)
        self._table: Nest = None

    def __len__(self) -> int:
        """Count the environments that are underway.

        Returns:
            How many.
        """
        return int(np.count_nonzero(self._where))

    def put(self, ids: Int64[ndarray, " k"], rows: Nest) -> None:
        """Note what was decided.

        Args:
            ids: The environments, ascending.
            rows: ``[k, ...]`` per leaf; copied.
        """
        if self._table is None:
            self._table = map_nest(lambda leaf: table_like(leaf, len(self._where)), rows)
        write(self._table, ids, rows)
        self._where[ids] = True

    def take(self, ids: Int64[ndarray, " k"]) -> Nest:
        """Take what was decided for environments that came back.

        Args:
            ids: Which, ascending.

        Returns:
            ``[k, ...]`` per leaf, in memory of its own.
        """
        self._where[ids] = False
        return pick(self._table, ids)

    def look(self) -> tuple[Int64[ndarray, " k"], Nest]:
        """Look at what is underway.

        Returns:
            The environments, ascending, and ``[k, ...]`` per leaf.
        """
        ids = self._where.nonzero()[0]
        return ids, pick(self._table, ids)
