"""Threads beside the network: in order, one item ahead, and their errors come through."""

import time

import pytest

from b2diffurl.runtime.threads import Behind, ahead


def test_what_is_done_behind_comes_in_order_and_its_errors_come_through():
    done = []
    with Behind() as writer:
        for n in range(5):
            writer.do(lambda n=n: (time.sleep(0.01), done.append(n)))
        writer.wait()
    assert done == list(range(5))
    with Behind() as writer, pytest.raises(OSError, match="disk full"):
        writer.do(lambda: (_ for _ in ()).throw(OSError("disk full")))
        writer.do(lambda: None)


def test_an_error_waits_for_a_job_unless_it_may_be_abandoned():
    done = []
    for abandon, expected in ((False, ["written"]), (True, [])):
        with pytest.raises(KeyboardInterrupt), Behind(abandon=abandon) as writer:
            writer.do(lambda: (time.sleep(0.2), done.append("written")))
            raise KeyboardInterrupt
        assert done == expected
        time.sleep(0.3)
        done.clear()


def test_reading_ahead_is_one_item_ahead():
    """While an item is worked on the next one has been asked for, and no other."""
    asked = []
    for item, doubled in ahead(lambda n: asked.append(n) or 2 * n, range(4)):
        time.sleep(0.02)
        assert doubled == 2 * item
        assert asked == list(range(min(item + 2, 4)))
    assert list(ahead(str, [])) == []
