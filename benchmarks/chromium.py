"""Chromium, from Debian's packages, steered by selenium: how a page looks, and how soon."""

import base64
import shutil
from pathlib import Path
from typing import Any

PROGRAMS = ("chromium", "chromedriver")
OPTIONS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")


def missing() -> list[str]:
    """Which programs are not installed."""
    return [name for name in PROGRAMS if not shutil.which(name)]


def browser() -> Any:
    """A headless Chromium of its own; to be used in a `with`."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in OPTIONS:
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))


def set_size(driver: Any, width: int, height: int = 900) -> None:
    """A window of this size [px]; a narrow one is a phone's."""
    emulate(driver, "setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500)


def screenshot(driver: Any, width: int, path: Path) -> int:
    """Write the whole page of a window of this width as PNG, however long it is; returns its height [px]."""
    height = driver.execute_script("return document.documentElement.scrollHeight")
    set_size(driver, width, height)
    path.write_bytes(base64.b64decode(driver.execute_cdp_cmd("Page.captureScreenshot", {})["data"]))
    return height


def emulate(driver: Any, what: str, **settings: Any) -> None:
    driver.execute_cdp_cmd(f"Emulation.{what}", settings)
