from multiprocessing import Pipe

import pytest

from rlfeed.messages import Inbox, Outbox


def test_outbox_to_a_reader_who_is_busy_waits_for_nobody_and_loses_nothing():
    near, far = Pipe()
    inbox, outbox = Inbox(near), Outbox(far)
    sent = [bytes([n]) * (n * 50_000) for n in range(20)]  # 9.5 MB: more than any pipe holds
    for message in sent:
        outbox.send(message)
    assert not outbox.flush()

    received = []
    while not outbox.flush() or len(received) < len(sent):
        received += inbox.read() or []

    assert received == sent
    assert inbox.read() is None


def test_outbox_speaks_with_the_connections_of_multiprocessing():
    near, far = Pipe()
    Outbox(far).send(b"one")
    far.send_bytes(b"two")

    assert near.recv_bytes() == b"one"
    assert Inbox(near).read() == [b"two"]


def test_outbox_whose_reader_has_gone_raises():
    near, far = Pipe()
    outbox = Outbox(far)
    near.close()

    with pytest.raises(OSError, match="pipe"):
        outbox.send(b"anybody?")
