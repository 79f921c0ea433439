"""Work in other threads: writing behind the main one, reading ahead of it, and computing side by side on the CPU."""

import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache
from itertools import islice
from queue import SimpleQueue
from threading import Thread
from typing import Any, TypeVar

import torch

T, R = TypeVar("T"), TypeVar("R")
# With fewer rows, or more threads, a small network would mostly wait for Python, which runs one thread at a time.
MAX_AT_ONCE, MIN_ROWS = 4, 16
WORKER = "side by side"  # the name of the threads that compute side by side


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
        torch.get_num_threads()  # torch gives a thread its number when it first asks, which may be while others have fewer
        while given := self.jobs.get():
            job, work = given
            try:
                job.set_result(work())
            except BaseException as error:
                job.set_exception(error)


def ahead(work: Callable[[T], R], items: Iterable[T]) -> Iterator[tuple[T, R]]:
    """Yield (item, `work(item)`) for each item; a thread works on the next item while the caller uses this one."""
    with ThreadPoolExecutor(1, initializer=torch.get_num_threads) as pool:  # as in Behind.work
        coming: deque[tuple[T, Future[R]]] = deque()  # at most two: with more, results would pile up in memory
        for item in items:
            coming.append((item, pool.submit(work, item)))
            if len(coming) > 1:
                first, job = coming.popleft()
                yield first, job.result()
        for last, job in coming:
            yield last, job.result()


# ---- computing side by side ----


def at_once(num_rows: int, at_most: int, device: torch.device) -> int:
    """In how many threads side by side a network on `device` best sees `num_rows` rows, `at_most` of them in each.

    1 for the GPU, for few rows, and where the user wants few rows at once, to save memory. Torch can have several threads
    share each operation. In a small network they wait for one another most of the time, and all the time if another program
    has one of the cores.
    """
    if device.type != "cpu" or threading.current_thread().name.startswith(WORKER) or at_most < MIN_ROWS:
        return 1
    num_threads = torch.get_num_threads()
    most = max(1, min(num_threads, MAX_AT_ONCE, num_rows // MIN_ROWS))
    # Of 6 threads 3 with 2 each, not 4 with 1: none is idle.
    return max(range(min(2, most), most + 1), key=lambda number: (num_threads // number * number, number))


def pieces(num_rows: int, at_most: int, number_at_once: int = 1) -> list[slice]:
    """Cut rows into pieces of `at_most`, the last one smaller. If several are computed at once, into equal ones for each."""
    if number_at_once == 1:
        return [slice(start, start + at_most) for start in range(0, num_rows, at_most)]
    number = math.ceil(num_rows / at_most / number_at_once) * number_at_once
    size, larger = divmod(num_rows, number)
    ends = [0, *(size * (n + 1) + min(n + 1, larger) for n in range(number))]
    return [slice(*ends[n : n + 2]) for n in range(number) if ends[n] < ends[n + 1]]


def side_by_side(work: Callable[[T], R], items: Sequence[T], number_at_once: int) -> Iterator[R]:
    """Yield `work(item)` of each item in order, `number_at_once` of them computed at the same time.

    They share torch's threads. What is computed depends on the number of items at once, but not on which of them is faster.
    If one fails, its error is raised once those that have begun are done. Only one thread of the program may call this at a
    time.
    """
    if number_at_once == 1:
        yield from map(work, items)
        return
    num_threads, waiting = torch.get_num_threads(), iter(items)
    jobs: deque[Future[R]] = deque()  # one more than are at work: with all of them, results would pile up in memory

    def alone(item: T) -> R:
        torch.set_num_threads(num_threads // number_at_once)  # each thread has a number of its own
        return work(item)

    try:
        torch.set_num_threads(num_threads // number_at_once)  # and MKL one for all of them
        for item in islice(waiting, number_at_once + 1):
            jobs.append(workers(number_at_once).submit(alone, item))
        while jobs:
            result = jobs[0].result()
            jobs.popleft()
            for item in islice(waiting, 1):
                jobs.append(workers(number_at_once).submit(alone, item))
            yield result
            del result
    finally:
        for job in jobs:
            job.cancel()
        wait(jobs)
        torch.set_num_threads(num_threads)


@cache  # threads are kept, as are the caches that torch's libraries have for each thread
def workers(number: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(number, WORKER)


os.register_at_fork(after_in_child=workers.cache_clear)  # a forked process has none of these threads
