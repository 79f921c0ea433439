"""The page for judging in a real browser: by keys alone, by mouse, on a phone, and when something goes wrong."""

from collections.abc import Iterator

import numpy as np
import pytest
from browsing import browser, screenshot, set_window
from conftest import ran, stage_of
from PIL import Image
from scored import scores
from serving import serving

from b2diffurl.labelling.session import Session
from b2diffurl.runtime.files import write_record

LIMIT_SEC = 20
CARDS = ".card .shot"


class Page:
    """The page as a person uses it. After each act it waits until the server has every answer."""

    def __init__(self, driver):
        self.driver = driver

    def open(self, url: str) -> None:
        self.driver.get(url)
        self.wait("return document.querySelectorAll('.card .shot img').length > 0")

    def wait(self, condition: str) -> None:
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.driver, LIMIT_SEC, poll_frequency=0.02).until(lambda driver: driver.execute_script(condition))

    def settle(self) -> None:
        self.wait("return (document.body.dataset.waiting ?? '0') === '0'")

    def press(self, *keys: str) -> None:
        from selenium.webdriver import ActionChains

        ActionChains(self.driver, duration=0).send_keys(*keys).perform()
        self.settle()

    def click(self, selector: str, which: int = 0) -> None:
        self.driver.find_elements("css selector", selector)[which].click()
        self.settle()

    def text(self, selector: str) -> str:
        return self.driver.find_element("css selector", selector).text

    def all(self, selector: str) -> list[str]:
        return [one.text for one in self.driver.find_elements("css selector", selector)]

    @property
    def focused(self) -> str:
        return self.driver.execute_script("return document.activeElement.getAttribute('aria-label')")


@pytest.fixture(scope="module")
def driver() -> Iterator:
    one = browser()
    yield one
    one.quit()


@pytest.fixture
def page(driver) -> Page:
    set_window(driver, 1280)
    driver.get_log("browser")
    return Page(driver)


@pytest.fixture
def begun(begin):
    """(folder, settings, stage) of six groups of three images that wait for scores."""
    folder, settings = begin({"reward.name": "file"})
    return folder, settings, stage_of(folder)


def test_a_stage_is_judged_by_keys_alone(begun, page):
    """Numbers, letters and arrows; taken back and changed; reloaded in the middle, where it goes on; no file before F; then
    the run selects by exactly these answers."""
    from selenium.webdriver.common.keys import Keys

    folder, settings, stage = begun
    with serving(stage) as server:
        page.open(server.url)
        assert page.text("#count") == "Group 1 of 6 · 0 answered"
        assert page.text("#prompt") == Session(stage).prompts[0]
        page.press("2")
        assert page.all(".badge")[:3] == ["1", "2 best", "3"]
        assert Session(stage).votes.picks == {0: (1, None)}  # half an answer is kept, too
        page.press("3")
        assert page.text("#count") == "Group 2 of 6 · 1 answered"
        page.press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, "b", Keys.ARROW_LEFT, "w")
        assert page.text("#count") == "Group 3 of 6 · 2 answered"
        page.press("0")
        page.press("1", Keys.BACKSPACE, "3", "1")
        page.open(server.url)
        assert page.text("#count") == "Group 5 of 6 · 4 answered"
        page.press("p", "p", "2", "1")  # the third group was no different; now it is
        assert page.text("#count") == "Group 5 of 6 · 4 answered"
        page.press("f")  # too early: nothing happens
        page.press(Keys.ENTER, Keys.ARROW_RIGHT, Keys.SPACE)
        assert not stage.given_scores.exists()
        page.press("0")
        assert page.text("#count") == "Group 6 of 6 · 6 answered"
        assert page.text("#ready").startswith("Everything is answered")
        assert not stage.given_scores.exists()
        page.press("f")
        page.wait("return !document.getElementById('end').hidden")
        assert str(stage.given_scores) in page.text("#end")
        assert "ExpName=tiny Reward=file bash run_process.sh" in page.text("#end")
    assert page.driver.get_log("browser") == []
    ran(folder, "select", settings)
    expected = [0, 1, -1, 0, -1, 1, -1, 1, 0, -1, 0, 1, 1, -1, 0, 0, 0, 0]
    assert [row["reward"] for row in scores(folder)] == expected


def test_a_stage_is_rated_by_mouse(begun, page):
    """The other way to judge is a click away, and what was picked before is kept beside it."""
    folder, settings, stage = begun
    with serving(stage) as server:
        page.open(server.url)
        page.click(CARDS, 2)
        page.click("#modes button", 1)
        assert page.text("#count") == "Group 1 of 6 · 0 answered"
        for group in range(6):
            for image in range(3):
                page.click(f".card:nth-child({image + 1}) .row button", (group + image) % 5)
        assert page.text("#count") == "Group 6 of 6 · 6 answered"
        page.click("#previous")
        page.click(".card:nth-child(1) .row button", 0)
        assert Session(stage).votes.picks == {0: (2, None)}
        page.click("#finish")
        page.wait("return !document.getElementById('end').hidden")
    assert page.driver.get_log("browser") == []
    ran(folder, "select", settings)
    expected = [(group + image) % 5 + 1 for group in range(6) for image in range(3)]
    expected[12] = 1
    assert [row["reward"] for row in scores(folder)] == expected


def test_keys_of_ratings_and_the_focus(begun, page):
    """A rating goes on to the next image that lacks one, and to the next group; the focus can be seen and followed."""
    from selenium.webdriver.common.keys import Keys

    _, _, stage = begun
    with serving(stage) as server:
        page.open(server.url)
        page.press("m", "4")
        assert page.focused == "Image 2"
        page.press(Keys.ARROW_RIGHT, "5")
        assert page.focused == "Image 2"
        page.press("1")
        assert (page.text("#count"), page.focused) == ("Group 2 of 6 · 1 answered", "Image 1")
        assert Session(stage).votes.ratings == {0: 4, 1: 1, 2: 5}
        outline = "return getComputedStyle(document.activeElement).outlineWidth"
        assert page.driver.execute_script(outline) == "3px"
        page.press("z")
        assert page.driver.execute_script("return document.getElementById('zoom').open")
        page.press(Keys.ARROW_RIGHT, "2", "z")
        assert not page.driver.execute_script("return document.getElementById('zoom').open")
        assert Session(stage).votes.ratings == {0: 4, 1: 1, 2: 5, 4: 2}
        page.press(Keys.BACKSPACE, Keys.BACKSPACE)
        nameless = "return [...document.querySelectorAll('button')].filter(one => !(one.ariaLabel || one.innerText)).length"
        assert page.driver.execute_script(nameless) == 0


def test_two_images_need_one_answer_and_one_image_a_rating(begun, page):
    """Of two the other one is the worst; of one there is no best, and no such button."""
    _, _, stage = begun
    manifest = stage.manifest("sample")
    for siblings in (2, 1):
        stage.labels.unlink(missing_ok=True)
        shape = [2, siblings, *manifest["batch_shape"][2:]]
        write_record(stage.manifest_path("sample"), manifest | {"batch_shape": shape})
        with serving(stage) as server:
            page.open(server.url)
            page.press("2")
            votes = Session(stage).votes
        assert (votes.picks, votes.ratings) == (({0: (1, 0)}, {}) if siblings == 2 else ({}, {0: 2}))
    assert not page.driver.find_element("id", "modes").is_displayed()


def test_what_is_not_saved_is_said(begun, page):
    """Scores from elsewhere in the meantime, and a server that is gone: the page says so and takes no more answers."""
    _, _, stage = begun
    with serving(stage) as server:
        page.open(server.url)
        page.press("1")
        stage.given_scores.write_text("mine")
        page.press("2")
        page.wait("return !document.getElementById('alert').hidden")
        assert "scores_given.csv is there already" in page.text("#alert")
        page.press("3", "f")
        stage.given_scores.unlink()
        page.open(server.url)
        assert page.all(".badge")[:3] == ["1 best", "2", "3"]
    server.server_close()
    page.press("2")
    page.wait("return !document.getElementById('alert').hidden")
    assert "the server does not answer" in page.text("#alert")
    assert Session(stage).votes.picks == {0: (0, None)}


def test_two_windows_at_once(begun, page):
    """The scores are those that the person sees: a window that lacks another's answers takes no more, and says so."""
    _, _, stage = begun
    with serving(stage) as server:
        page.open(server.url)
        first = page.driver.current_window_handle
        page.driver.switch_to.new_window("tab")
        page.open(server.url)
        page.press("2", "3", "m")
        page.driver.close()
        page.driver.switch_to.window(first)
        page.press("1")
        page.wait("return !document.getElementById('alert').hidden")
        assert "in another window something else has been answered" in page.text("#alert")
        assert Session(stage).votes.picks == {0: (1, 2)}
        page.open(server.url)
        assert page.text("#count") == "Group 1 of 6 · 0 answered"
        page.press("4")
        assert Session(stage).votes.ratings == {0: 4}


def test_digits_in_the_upper_row_of_their_keys(begun, page):
    """On a French keyboard the key of 2 gives é, and is the second image all the same."""
    _, _, stage = begun
    with serving(stage) as server:
        page.open(server.url)
        page.driver.execute_script("document.dispatchEvent(new KeyboardEvent('keydown', {key: 'é', code: 'Digit2'}))")
        page.settle()
    assert Session(stage).votes.picks == {0: (1, None)}


def test_hostile_prompts_are_text(begun, page):
    """Markup in a prompt is shown, and does nothing; letters that turn the direction of writing are shown as codes."""
    _, _, stage = begun
    prompts = ["<img src=x onerror=alert(1)></script>\u202e" + "long " * 300] * 18
    with serving(stage) as server:
        server.session.prompts = prompts
        page.open(server.url)
        assert page.text("#prompt").startswith("<img src=x onerror=alert(1)></script>\\u202elong long")
        assert page.driver.execute_script("return document.documentElement.scrollWidth") <= 1280
        page.press("z")
        height = "return document.querySelector('#zoom {}').clientHeight"
        assert page.driver.execute_script(height.format(".badge")) < page.driver.execute_script(height.format("img")) / 10
    assert page.driver.get_log("browser") == []


@pytest.mark.parametrize("scheme", ["light", pytest.param("dark", marks=pytest.mark.long)])
def test_it_fits_phones_and_desktops(begun, page, tmp_path, scheme):
    """At 390 and 1400 px in both ways to judge: every image is loaded and large, nothing is wider than the window, buttons
    are large enough for a finger, and the paper is light or dark as the reader's system is. Screenshots stay in the folder.
    """
    _, _, stage = begun
    with serving(stage) as server:
        for width in (390, 1400):
            set_window(page.driver, width, scheme)
            for mode in range(2):
                page.open(server.url)
                page.click("#modes button", mode)
                page.wait("return [...document.images].every(image => !image.src || image.complete)")
                find = "return [...document.querySelectorAll('.shot img')].map(one => [one.naturalWidth, one.clientWidth])"
                sizes = page.driver.execute_script(find)
                assert [natural for natural, _ in sizes] == [64] * 3
                assert min(shown for _, shown in sizes) >= (150 if width == 390 else 350)
                assert page.driver.execute_script("return document.documentElement.scrollWidth") <= width
                find = "return [...document.querySelectorAll('.row button, nav button')].map(one => one.clientHeight)"
                assert min(height for height in page.driver.execute_script(find) if height) >= 40
                path = tmp_path / f"{scheme}_{width}_{mode}.png"
                screenshot(page.driver, width, path)
                set_window(page.driver, width, scheme)
                pixels = np.asarray(Image.open(path).convert("L"))
                assert (pixels[:6].mean() > 240) if scheme == "light" else (pixels[:6].mean() < 40)
    assert page.driver.get_log("browser") == []
