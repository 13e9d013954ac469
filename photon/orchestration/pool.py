"""Threads that wait for agents, and are not waited for when something else ends the work."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

#: Questions that are at work at the same time; how many requests there are, the client bounds.
AT_ONCE = 8


@contextmanager
def at_once(name: str) -> Iterator[ThreadPoolExecutor]:
    """Yield threads; in the end what has not begun is dropped; what waits ends with the agents' client."""
    pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix=name)
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
