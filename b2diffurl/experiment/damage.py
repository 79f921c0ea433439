"""Reading on past damaged files: whatever only shows a run leaves them out, and names them."""

from collections.abc import Iterator
from contextlib import contextmanager

from b2diffurl.runtime.logs import logger


@contextmanager
def skipping(damaged: list[str], what: str) -> Iterator[None]:
    """A block that reads `what`. If a file is damaged or missing, the block ends; the log and the list `damaged` name it."""
    try:
        yield
    except (ValueError, OSError, LookupError, TypeError) as error:
        said = f"{error.args[0] if isinstance(error, KeyError) else error}".split(" Delete ")[0].rstrip(".")
        said = f"no entry {said!r}" if isinstance(error, KeyError) else said
        damaged.append(f"{what} is left out: {said}")
        logger.warning("report: %s", damaged[-1])
