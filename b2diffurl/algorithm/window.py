"""The trained window: which of a sampler's steps are trained, and which steps follow it.

T sampler steps, counted from 0 at the noise to T-1 at the image, S of them trained
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Window:
    """The trained steps start..stop-1. Those before are the prefix, those after the tail."""

    start: int
    stop: int

    def __post_init__(self):
        if not 0 <= self.start < self.stop:
            raise ValueError(f"a trained window goes from one step to a later one, not from {self.start} to {self.stop}")

    @classmethod
    def last(cls, num_trained_steps: int, num_steps: int) -> "Window":
        """The last S of T steps."""
        return cls(num_steps - num_trained_steps, num_steps)

    @property
    def num_steps(self) -> int:
        """S."""
        return self.stop - self.start

    @property
    def ends(self) -> list[int]:
        """[start, stop], for records."""
        return [self.start, self.stop]

    def tail(self, num_steps: int, at_most: int = 0) -> list[int]:
        """The steps taken after the window, of T in all: each, or evenly spaced ones if `at_most` so many are wanted.

        The first is always taken: the window's last step leads to it.
        """
        left = num_steps - self.stop
        count = min(at_most, left) or left
        return [self.stop + number * left // count for number in range(count)]

    def text(self, num_steps: int) -> str:
        """S for people, and where the window lies unless it is the last of T steps: `2`, or `2 from step 3`."""
        return f"{self.num_steps}" if self.stop == num_steps else f"{self.num_steps} from step {self.start + 1}"

    def __str__(self) -> str:
        return f"[{self.start}, {self.stop})"
