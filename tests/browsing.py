"""A real browser for pages that people see."""

import os

import pytest

from benchmarks import chromium
from benchmarks.chromium import screenshot

__all__ = ["browser", "lines_of", "screenshot", "set_window"]


def browser():
    """Headless Chromium from Debian's packages; without it the test is skipped, but not under CI."""
    if missing := chromium.missing():
        message = f"no {' and '.join(missing)}: apt-get install chromium chromium-driver"
        assert not os.environ.get("CI"), message
        pytest.skip(message)
    return chromium.browser()


def set_window(driver, width: int, scheme: str = "light") -> None:
    """A phone or a desktop of this width [px], whose user likes pages light or dark."""
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    chromium.emulate(driver, "setEmulatedMedia", features=features)
    chromium.set_size(driver, width)


def lines_of(driver, selector: str) -> list[int]:
    """On how many lines the text of each element stands; 0 for an empty one."""
    return driver.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map(one => { const range = document.createRange();"
        "range.selectNodeContents(one); return new Set([...range.getClientRects()].map(each => each.top)).size })",
        selector,
    )
