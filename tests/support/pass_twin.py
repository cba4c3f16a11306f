"""A slow and obvious twin of a finite pass: what each sample is, where it begins, and which steps it holds."""

from support.replay_twin import SHIFT, LaneTwin, ReplayTwin, carry_of

from rlfeed.replay import Episode, Sequence


class _LaneLeft(LaneTwin):
    """A lane in which an episode begins with the oldest row that is left of it."""

    def first_of(self, row):
        return max(self.tail, super().first_of(row))


class PassTwin(ReplayTwin):
    """Lanes of Python lists that are gone through once."""

    def __init__(self, lanes, rows, **options):
        super().__init__(lanes, rows, **options)
        self.lanes = [_LaneLeft(rows) for _ in range(lanes)]

    def steps(self):
        """The ids of all stored steps."""
        return [
            (number << SHIFT) | row
            for number, lane in enumerate(self.lanes)
            for row in lane.live()
            if lane.is_step(row)
        ]

    def samples(self, unit):
        """The ids of the steps in each sample, by the id of the first one."""
        groups = {}
        for identity in self.steps():
            lane, row = self.find(identity)
            place = {Sequence: getattr(unit, "length", 0), Episode: 10**9}.get(type(unit), 1)
            groups.setdefault((identity >> SHIFT, lane.rows[row].episode, lane.rows[row].index // place), []).append(
                identity
            )
        return {ids[0]: ids for ids in groups.values()}

    def window(self, identity, unit):
        """The unpadded window of a sample; the state it begins with is that of its first row, where that has one."""
        burn_in = getattr(unit, "burn_in", 0)
        shown = super().window(identity, Sequence(len(self.samples(unit)[identity]), burn_in, unit.gamma))
        lane, row = self.find(identity)
        first = lane.rows[row - shown["burn_in"]]
        stored = first.index > 0 and first.index % self.carry_every == 0
        return shown | {"carry": carry_of(*first.observation) if stored else 0.0}


def held(batch):
    """The ids of the steps that a batch holds: those under its loss mask."""
    if batch.loss_mask is None:
        return batch.ids.tolist()
    starts = zip(batch.ids.tolist(), batch.burn_in.tolist(), batch.loss_mask.tolist(), strict=True)
    return [start + t - burn_in for start, burn_in, row in starts for t, trained in enumerate(row) if trained]
