"""How worker processes are started, for a while."""

import multiprocessing
from contextlib import contextmanager


@contextmanager
def start_method(method):
    """Start processes in one way: by fork they are there at once."""
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method(method, force=True)
    try:
        yield
    finally:
        multiprocessing.set_start_method(before, force=True)
