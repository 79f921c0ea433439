"""Work in a second thread: writing behind the main one, reading ahead of it."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from threading import Thread
from typing import Any, TypeVar

T, R = TypeVar("T"), TypeVar("R")


class Behind:
    """Runs one job at a time in a thread. `do` waits for the job before, so that jobs do not pile up in memory.

    If the block ends by an error the last job is waited for, unless it is one to `abandon`: a request to a slow server.
    """

    def __init__(self, *, abandon: bool = False) -> None:
        self.abandon = abandon
        self.job: Future[Any] | None = None
        self.jobs: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()  # None: the end
        # A daemon does not keep the process from ending. One for all jobs: torch makes a pool of threads for each thread.
        Thread(target=self.work, daemon=True).start()

    def __enter__(self) -> "Behind":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self.jobs.put(None)
        if self.job and not (kind and self.abandon):
            self.job.exception()

    def do(self, work: Callable[[], Any]) -> None:
        """Start `work` once the job before is done. If that job failed, its error is raised here."""
        self.wait()
        self.job = Future()
        self.jobs.put((self.job, work))

    def wait(self) -> Any:
        """Wait for the last job; returns what it returned, or raises its error."""
        return self.job.result() if self.job else None

    def work(self) -> None:
        while given := self.jobs.get():
            job, work = given
            try:
                job.set_result(work())
            except BaseException as error:
                job.set_exception(error)


def ahead(work: Callable[[T], R], items: Iterable[T]) -> Iterator[tuple[T, R]]:
    """Yield (item, `work(item)`) for each item; a thread works on the next item while the caller uses this one."""
    with ThreadPoolExecutor(1) as pool:
        coming: deque[tuple[T, Future[R]]] = deque()  # at most two: with more, results would pile up in memory
        for item in items:
            coming.append((item, pool.submit(work, item)))
            if len(coming) > 1:
                first, job = coming.popleft()
                yield first, job.result()
        for last, job in coming:
            yield last, job.result()
