"""Threads beside the network: in order, one item ahead, and their errors come through. Threads that compute side by side."""

import threading
import time
import weakref

import pytest
import torch

from b2diffurl.runtime.threads import Behind, ahead, at_once, pieces, side_by_side

CPU = torch.device("cpu")


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


# ---- side by side ----


def test_how_many_are_computed_at_once(monkeypatch):
    """As many as torch has threads, at most four, and none has fewer than 16 rows. One on a GPU."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert [at_once(rows, 64, CPU) for rows in (0, 1, 31, 32, 47, 48, 1000)] == [1, 1, 1, 2, 2, 3, 3]
    assert at_once(1000, 64, torch.device("meta")) == at_once(1000, 64, torch.device("cuda")) == 1
    assert at_once(1000, 15, CPU) == 1  # whoever wants so few rows saves memory
    for num_threads, number in ((1, 1), (2, 2), (4, 4), (5, 4), (6, 3), (7, 3), (8, 4), (64, 4)):
        monkeypatch.setattr(torch, "get_num_threads", lambda num_threads=num_threads: num_threads)
        assert at_once(1000, 64, CPU) == number


def test_pieces_cover_all_rows_once_and_are_even():
    for rows in (1, 2, 7, 31, 32, 33, 160):
        for at_most in (1, 5, 64):
            for number in (1, 2, 3):
                cut = [list(range(rows))[piece] for piece in pieces(rows, at_most, number)]
                assert [row for piece in cut for row in piece] == list(range(rows))
                assert all(0 < len(piece) <= at_most for piece in cut)
                if number > 1:
                    assert max(map(len, cut)) - min(map(len, cut)) <= 1
                    assert len(cut) % number == 0 or len(cut) == rows
    assert [piece.stop - piece.start for piece in pieces(160, 64, 2)] == [40] * 4
    assert [(piece.start, piece.stop) for piece in pieces(100, 64)] == [(0, 64), (64, 128)]


def test_side_by_side_is_in_order_and_each_has_its_share_of_threads(side_by_side_of_four):
    started = threading.Barrier(2, timeout=20)  # passed only if two are at work at once

    def work(item: int) -> tuple[int, int]:
        started.wait()
        time.sleep(0.02 * (item % 2))
        return item, torch.get_num_threads()

    assert list(side_by_side(work, range(4), 2)) == [(0, 2), (1, 2), (2, 2), (3, 2)]
    assert torch.get_num_threads() == 4
    assert list(side_by_side(lambda item: torch.get_num_threads(), range(2), 1)) == [4, 4]
    assert list(side_by_side(lambda item: at_once(1000, 64, CPU), range(4), 2)) == [1] * 4  # not again in each


def test_an_error_is_raised_when_all_that_have_begun_are_done(side_by_side_of_four):
    done = []

    def work(item: int) -> int:
        if item == 0:
            raise MemoryError("item 0")
        time.sleep(0.05)
        done.append(item)
        return item

    with pytest.raises(MemoryError, match="item 0"):
        list(side_by_side(work, range(50), 2))
    assert 0 < len(done) < 5
    assert torch.get_num_threads() == 4
    (first, *_) = side_by_side(lambda item: item, [7], 2)  # and the threads are still there
    assert first == 7


@pytest.fixture
def side_by_side_of_four():
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(1)


def test_results_do_not_pile_up(side_by_side_of_four):
    """Of fifty results only those at work, and the next one, are in memory at a time."""
    alive = weakref.WeakSet()

    def work(item: int) -> torch.Tensor:
        result = torch.full((1,), item)
        alive.add(result)
        return result

    for item, result in enumerate(side_by_side(work, range(50), 2)):
        assert result == item
        del result
        assert len(alive) <= 4
