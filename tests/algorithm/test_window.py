"""The trained window: which steps it holds, and which are taken after it."""

import pytest

from b2diffurl.algorithm.window import Window


def test_a_window_counts_steps_from_the_noise():
    """The last S steps are T-S..T-1; for records a window is its two ends."""
    assert Window.last(3, 8) == Window(5, 8)
    assert (Window(5, 8).num_steps, Window(5, 8).ends, str(Window(5, 8))) == (3, [5, 8], "[5, 8)")
    assert [Window(5, 8).text(8), Window(5, 8).text(9), Window(0, 2).text(8)] == ["3", "3 from step 6", "2 from step 1"]


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (2, 2), (3, 2)])
def test_an_empty_window_is_refused(start, stop):
    with pytest.raises(ValueError, match=f"not from {start} to {stop}"):
        Window(start, stop)


@pytest.mark.parametrize(
    ("at_most", "expected"),
    [(0, [2, 3, 4, 5, 6]), (1, [2]), (2, [2, 4]), (3, [2, 3, 5]), (4, [2, 3, 4, 5]), (9, [2, 3, 4, 5, 6])],
)
def test_a_tail_is_evenly_spaced_from_where_the_window_leads(at_most, expected):
    """Of five steps that are left; after a window that ends with the image none is."""
    assert Window(1, 2).tail(7, at_most) == expected
    assert Window(1, 7).tail(7, at_most) == []
