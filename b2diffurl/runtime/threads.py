"""Work in a thread beside the main one."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T, R = TypeVar("T"), TypeVar("R")


class Behind:
    """Does one job at a time in a thread; `do` waits for the one before, so that memory does not grow."""

    def __init__(self) -> None:
        self.pool, self.job = ThreadPoolExecutor(1), None

    def __enter__(self) -> "Behind":
        return self

    def __exit__(self, *error: object) -> None:
        self.pool.shutdown()

    def do(self, work: Callable[[], Any]) -> None:
        """Begin with `work` when the job before is done, whose error is raised here."""
        self.wait()
        self.job = self.pool.submit(work)

    def wait(self) -> Any:
        """What the last job returned, once it is done; its error is raised here."""
        return self.job.result() if self.job else None


def ahead(work: Callable[[T], R], items: Iterable[T]) -> Iterator[tuple[T, R]]:
    """Each item with its `work(item)`, the next one's being done in a thread meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        coming: deque[tuple[T, Future[R]]] = deque()
        for item in items:
            coming.append((item, pool.submit(work, item)))
            if len(coming) > 1:
                first, job = coming.popleft()
                yield first, job.result()
        for last, job in coming:
            yield last, job.result()
