"""A real browser for pages that people see."""

import base64
import os
import shutil
from pathlib import Path

import pytest


def browser():
    """Headless Chromium from Debian's packages; without it the test is skipped, but not under CI."""
    missing = [name for name in ("chromium", "chromedriver") if not shutil.which(name)]
    if missing:
        message = f"no {' and '.join(missing)}: apt-get install chromium chromium-driver"
        assert not os.environ.get("CI"), message
        pytest.skip(message)
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))


def set_window(driver, width: int, scheme: str = "light") -> None:
    """A phone or a desktop of this width [px], whose user likes pages light or dark."""
    emulate(driver, "setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
    emulate(driver, "setDeviceMetricsOverride", metrics(width, 900))


def lines_of(driver, selector: str) -> list[int]:
    """On how many lines the text of each element stands; 0 for an empty one."""
    return driver.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map(one => { const range = document.createRange();"
        "range.selectNodeContents(one); return new Set([...range.getClientRects()].map(each => each.top)).size })",
        selector,
    )


def screenshot(driver, width: int, path: Path) -> int:
    """Write the whole page of a window of this width as PNG, however long it is; returns its height [px]."""
    height = driver.execute_script("return document.documentElement.scrollHeight")
    emulate(driver, "setDeviceMetricsOverride", metrics(width, height))
    path.write_bytes(base64.b64decode(driver.execute_cdp_cmd("Page.captureScreenshot", {})["data"]))
    return height


def metrics(width: int, height: int) -> dict:
    return {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}


def emulate(driver, what: str, settings: dict) -> None:
    driver.execute_cdp_cmd(f"Emulation.{what}", settings)
