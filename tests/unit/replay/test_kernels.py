"""Kernels against literals and slow twins."""

import numpy as np
import pytest
from numba import njit

from rlfeed.replay.kernels import draw, gather, words
from rlfeed.replay.kernels import rows as rows_of


@njit
def philox_of(key, number, attempt):
    return draw.philox(key, number, attempt)


@njit
def below_of(bits, bound):
    return draw.below(bits, bound)


@njit
def copy(destination, source, nbytes):
    words.copy_row(destination, source, nbytes)


# Random123's known-answer vectors for philox4x32-10; the first two of four words make our 64 bits.
VECTORS = [
    (0x0000000000000000, 0x0000000000000000, 0x0000000000000000, 0xE169C58D6627E8D5),
    (0xFFFFFFFFFFFFFFFF, 0xFFFFFFFFFFFFFFFF, 0xFFFFFFFFFFFFFFFF, 0x41C83B0E408F276D),
    (0x299F31D0A4093822, 0x85A308D3243F6A88, 0x0370734413198A2E, 0x94FDCCEBD16CFE09),
]


@pytest.mark.parametrize(("key", "number", "attempt", "expected"), VECTORS)
def test_philox_known_answers_equal(key, number, attempt, expected):
    signed = [np.uint64(value).astype(np.int64) for value in (key, number, attempt)]
    assert int(philox_of(*signed)) == expected


@pytest.mark.parametrize("bound", [1, 2, 3, 1000, 2**32 - 1, 2**32 + 5, 2**44])
def test_below_any_bits_is_high_word_of_product(bound):
    generator = np.random.default_rng(bound)
    samples = [0, 1, 2**32 - 1, 2**32, 2**64 - 1, *map(int, generator.integers(0, 2**64, 50, np.uint64))]
    for bits in samples:
        assert below_of(np.uint64(bits), bound) == (bits * bound) >> 64


@pytest.mark.parametrize("nbytes", [*range(0, 70), 100, 128, 255, 511, 512, 513, 1000, 7056])
def test_copy_row_any_length_copies_exactly_that(nbytes):
    source = np.random.default_rng(nbytes).integers(1, 255, nbytes + 16, np.uint8)
    target = np.zeros(nbytes + 16, np.uint8)
    copy(target.ctypes.data + 8, source.ctypes.data + 3, nbytes)
    expected = np.zeros(nbytes + 16, np.uint8)
    expected[8 : 8 + nbytes] = source[3 : 3 + nbytes]
    assert np.array_equal(target, expected)


@pytest.mark.parametrize("counts", [[5], [3, 3, 3], [1, 0, 7, 2], [0, 0, 4], [100, 1, 1, 1, 1]])
def test_lane_of_every_index_equals_linear_search(counts):
    @njit
    def lane_of(upto, index):
        return draw.lane_of(upto, index)

    upto = np.cumsum(counts)
    expected = [lane for lane, count in enumerate(counts) for _ in range(count)]
    assert [lane_of(upto, i) for i in range(upto[-1])] == expected


@njit
def place(rows, ids, todo, n_step, here, there):
    gather.place_rows(rows, ids, todo, n_step, here, there)


@pytest.mark.parametrize("rows", [4, 7, 1000, 125_001, 2**31 + 11])
@pytest.mark.parametrize("n_step", [1, 3])
def test_place_rows_any_row_of_44_bits_is_the_remainder(rows, n_step):
    """The remainder is taken in floating point; multiples of the lane's length and their neighbours are its edges."""
    generator = np.random.default_rng(rows)
    turns = [0, 1, 2, 3, (2**44 - 3) // rows, *map(int, generator.integers(0, (2**44 - 2) // rows, 300))]
    absolute = [turn * rows + near for turn in turns for near in (-1, 0, 1) if 0 <= turn * rows + near < 2**44]
    ids = np.array([(5 << rows_of.LANE_SHIFT) | row for row in absolute], np.int64)
    todo, here, there = np.arange(len(ids))[::-1].copy(), np.empty_like(ids), np.empty_like(ids)
    place(rows, ids, todo, n_step, here, there)
    assert here[::-1].tolist() == [5 * rows + row % rows for row in absolute]
    assert there[::-1].tolist() == [5 * rows + (row + n_step) % rows for row in absolute]
