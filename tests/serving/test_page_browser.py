"""The page in a real browser, against a made-up engine."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest

from tests.serving.browser import CHROMIUM, DRIVER, Browser, chromedriver, window
from tests.serving.fake_engine import WORDS, Engine, Server, small_tree, work
from vllm_eagle.algorithm.tree import DraftTree
from vllm_eagle.metrics import stats_file

pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no browser here: apt-get install chromium chromium-driver")
HOSTILE = DraftTree(np.array([1, 10, 11, 2]), np.array([0, 0, 0, 1]), np.log(np.array([1, 0.9, 0.1, 0.8], dtype=np.float32)))


@pytest.fixture(scope="module")
def driver() -> Iterator[str]:
    with chromedriver() as url:
        yield url


@pytest.fixture
def browser(driver: str, tmp_path: Path) -> Iterator[Browser]:
    with window(driver, tmp_path / "profile") as found:
        yield found


@contextmanager
def serving(engine: Engine, api_key: list[str] | None = None) -> Iterator[Server]:
    server = Server(engine, api_key)
    try:
        yield server
    finally:
        server.stop()
        stats_file.remove(engine.file)


@pytest.fixture
def engine() -> Engine:
    found = Engine(show_text=True)
    found.create_file()
    return found


def watch(browser: Browser, server: Server) -> None:
    """Open the page and wait for its first figures."""
    browser.open(server.url)
    browser.wait(lambda: browser.text("#tau"))


def assert_quiet(browser: Browser, server: Server) -> None:
    """No error on the console, and nothing asked of any other host."""
    assert [entry["message"] for entry in browser.log("browser")] == []
    asked = [
        urlsplit(message["params"]["request"]["url"])
        for message in (json.loads(entry["message"])["message"] for entry in browser.log("performance"))
        if message["method"] == "Network.requestWillBeSent"
    ]
    assert {url.netloc for url in asked if url.scheme not in ("data", "chrome")} == {f"127.0.0.1:{server.port}"}
    assert set(server.requests) == {"/eagle", "/eagle/page.css", "/eagle/page.js", "/eagle/data.json"}


def test_the_figures_appear_and_change(browser: Browser, engine: Engine) -> None:
    with serving(engine) as server:
        watch(browser, server)
        assert browser.text("#verdict") == "Idle"
        for _ in range(30):
            engine.step(small_tree(), [2, 3, 5], num_requests=2)
        for _ in range(10):
            engine.step(small_tree(), [4])
        browser.wait(lambda: browser.text("#tau") == "2.50")
        assert browser.text("#verdict") == "Speculation works"
        assert browser.text("#model") == "shipped-pair · head head"
        assert browser.text("#link") == "Live"
        assert browser.run("document.title").startswith("2.50")
        assert browser.text("#depths").split("\n") == ["depth 1", "75 %", "depth 2", "100 %", "depth 3", "0 %"]
        assert browser.text("#stages").split("\n")[:3] == ["draft", "24 %", "(2.00 ms)"]
        assert browser.text("#loads").split("\n") == ["1 req.", "3.0", "2-3 req.", "3.0"]
        assert "got a tree" in browser.text("#decisions")
        assert "25 %" in browser.text("#tiles")
        bars = browser.all("#depths i", "Math.round(100 * e.offsetWidth / e.parentNode.offsetWidth)")
        assert bars == [75, 100, 0]
        # Both spans are the same here until the page is switched: by keyboard, as everything can be.
        engine.metrics.reset()
        browser.wait(lambda: browser.text("#depths") == "Nothing in this time.")
        assert_quiet(browser, server)


def test_trees_are_drawn_with_the_accepted_path(browser: Browser, engine: Engine) -> None:
    engine.step(small_tree(), [2, 3, 5])
    engine.step(small_tree(), [4])
    with serving(engine) as server:
        watch(browser, server)
        browser.wait(lambda: browser.count("#trees svg") == 2)
        nodes = "[...e.querySelectorAll('g')].map(g => [g.classList[1] || '', g.querySelector('text').textContent])"
        newest, older = browser.all("#trees figure", nodes)
        assert newest == [["root", "The"], ["", "·price90"], ["", "<script>alert(1…10"], ["", "·of80"], ["bonus", "·four"]]
        assert older == [["root", "The"], ["on", "·price90"], ["", "<script>alert(1…10"], ["on", "·of80"], ["bonus", "·boxes"]]
        assert browser.count("#trees path.on") == 2
        label = browser.all("#trees svg", "e.getAttribute('aria-label')")[1]
        assert label == "Tree of 3 nodes, 2 accepted: price 90, of 80"
        # An accepted node stands right of its parent, and siblings do not overlap.
        boxes = browser.all("#trees figure:last-child rect", "[+e.getAttribute('x'), +e.getAttribute('y')]")
        assert boxes[0][0] < boxes[1][0] < boxes[3][0] < boxes[4][0]
        assert boxes[1][0] == boxes[2][0]
        assert abs(boxes[1][1] - boxes[2][1]) >= 21
        browser.click("#hold")
        engine.step(small_tree(), [2, 3, 5])
        browser.wait(lambda: browser.text("#tau-total") == "2.33")
        assert browser.count("#trees svg") == 2
        browser.click("#hold")
        browser.wait(lambda: browser.count("#trees svg") == 3)
        assert_quiet(browser, server)


def test_hostile_words_stay_words(browser: Browser) -> None:
    hostile = '<img src=x onerror="window.hacked=1"></title><script>window.hacked=1</script>'
    engine = Engine(show_text=True)
    engine.vllm_config.model_config.served_model_name = hostile
    engine.create_file()
    engine.step(HOSTILE, [10, 5], req_id=hostile)
    with serving(engine) as server:
        watch(browser, server)
        browser.wait(lambda: browser.count("#trees svg") == 1)
        titles = browser.all("#trees g title", "e.textContent")
        assert titles[1].startswith(WORDS[10])  # <script>...
        assert titles[2].startswith(WORDS[11])  # &amp;
        assert browser.text("#model").startswith(hostile)
        assert hostile in browser.text("figcaption:has(+ .scroll)")
        assert browser.count("#data img, #data script, header img") == 0
        assert browser.run("window.hacked === undefined")
        assert_quiet(browser, server)


def test_words_are_not_there_without_the_option(browser: Browser) -> None:
    engine = Engine()
    engine.create_file()
    engine.step(small_tree(), [2, 5])
    with serving(engine) as server:
        watch(browser, server)
        browser.wait(lambda: browser.count("#trees svg") == 1)
        labels = browser.all("#trees g text", "e.textContent")
        assert labels == ["root", "90", "10", "80", "+1"]
        assert "Words are not shown" in browser.text("#recent-note")
        page = browser.run("document.documentElement.outerHTML")
        assert "price" not in page
        assert "chatcmpl" not in page


def test_speculation_that_is_off_is_seen_at_once(browser: Browser, engine: Engine) -> None:
    engine.step(small_tree(), [2, 5])
    engine.metrics.counts["speculation_off"] = 1
    with serving(engine) as server:
        watch(browser, server)
        assert browser.text("#banner").startswith("Speculation is OFF")
        assert browser.text("#tau") == "off"
        red = browser.run("getComputedStyle(document.getElementById('banner')).color")
        r, g, b = (int(x) for x in red.removeprefix("rgb(").rstrip(")").split(","))
        assert r > 2 * max(g, b)


def test_a_key_is_asked_for_and_kept_in_the_tab(browser: Browser, engine: Engine) -> None:
    engine.step(small_tree(), [2, 5])
    with serving(engine, ["right"]) as server:
        browser.open(server.url)
        browser.wait(lambda: browser.text("#key-form"))
        assert browser.text("#data") == ""
        assert browser.run("document.activeElement.id") == "key"
        browser.press(*"wrong", "\ue007")
        browser.wait(lambda: "not the API key" in browser.text("#banner"))
        browser.type("#key", "right\ue007")
        browser.wait(lambda: browser.text("#tau-total") == "2.00")
        assert browser.text("#key-form") == ""
        assert "right" not in browser.run("document.documentElement.outerHTML")
        assert browser.run("localStorage.length + document.cookie.length") == 0
        browser.open(server.url)  # the tab knows it
        browser.wait(lambda: browser.text("#tau-total") == "2.00")
        browser.click("#forget")
        assert browser.text("#data") == ""
        browser.open(server.url)
        browser.wait(lambda: browser.text("#key-form"))


def test_a_server_that_goes_and_comes_back(browser: Browser, engine: Engine) -> None:
    engine.step(small_tree(), [2, 5])
    with serving(engine) as server:
        watch(browser, server)
        server.stop()
        browser.wait(lambda: "does not answer" in browser.text("#banner"))
        assert "trying again" in browser.text("#link")
        assert browser.count("#data.stale") == 1
        server.start()
        browser.wait(lambda: browser.text("#link") == "Live")
        assert browser.text("#banner") == ""
        assert browser.count("#data.stale") == 0
        engine.errored = True
        browser.wait(lambda: "engine is dead" in browser.text("#banner"))


def test_a_hidden_tab_asks_for_nothing(browser: Browser, engine: Engine) -> None:
    with serving(engine) as server:
        watch(browser, server)
        browser.run(HIDE, True)
        time.sleep(0.3)  # a request may be under way
        before = len(server.requests)
        time.sleep(2.5)
        assert len(server.requests) == before
        shown_s = time.monotonic()
        browser.run(HIDE, False)
        browser.wait(lambda: len(server.requests) >= before + 4)
        assert time.monotonic() - shown_s > 2.5  # at once, then one a second


def test_a_server_without_trees_says_so(browser: Browser) -> None:
    with serving(Engine(tree_mode=False)) as server:
        browser.open(server.url)
        browser.wait(lambda: "drafts no trees" in browser.text("#banner"))
        assert browser.text("#data") == ""
        assert_quiet(browser, server)


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_nothing_is_cut_off_on_any_screen(browser: Browser, engine: Engine, width: int) -> None:
    work(engine, 60)
    browser.devtools("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 600)
    with serving(engine) as server:
        watch(browser, server)
        browser.wait(lambda: browser.count("#trees svg") == 4)
        assert browser.run("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        outside = "e.closest('.scroll') || e.getBoundingClientRect().right <= innerWidth + 1 ? '' : e.outerHTML.slice(0, 80)"
        assert set(browser.all("header *, #data *, footer *", outside)) == {""}
        if width == 320:  # trees scroll by themselves, and keys reach them
            scrolls = browser.all(".scroll", "[e.scrollWidth > e.clientWidth, e.tabIndex]")
            assert any(scroll for scroll, _ in scrolls)
            assert all((tab == 0) == scroll for scroll, tab in scrolls)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_light_and_dark(browser: Browser, engine: Engine, scheme: str) -> None:
    """WCAG AA: 4.5 to 1 for every text, also on the coloured nodes of a tree."""
    work(engine, 60)
    browser.devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    with serving(engine) as server:
        watch(browser, server)
        browser.wait(lambda: browser.count("#trees svg") == 4)
        page = browser.run("getComputedStyle(document.body).backgroundColor")
        assert (luminance(page) < 0.1) == (scheme == "dark")
        pairs = browser.run(COLOURS)
        assert len(pairs) > 60
        poor = {(text, front, back) for text, front, back in pairs if contrast(front, back) < 4.5}
        assert poor == set()


def test_everything_is_reached_by_keyboard(browser: Browser, engine: Engine) -> None:
    work(engine, 30)
    with serving(engine) as server:
        watch(browser, server)
        reached = []
        for _ in range(2):
            browser.press("\ue004")  # Tab
            reached.append(browser.run("document.activeElement.id || document.activeElement.name"))
        assert reached == ["span", "hold"]
        browser.run("document.querySelector('input[name=span]').focus()")
        browser.press("\ue014")  # right
        assert browser.run("document.querySelector('input[name=span]:checked').value") == "total"
        named = "Boolean(e.getAttribute('aria-label') || e.textContent || e.labels && e.labels.length)"
        assert set(browser.all("button, input, svg[role=img]", named)) == {True}


# Hides the tab, or shows it: a headless one is never hidden by another.
HIDE = """void (hidden => {
  Object.defineProperty(document, 'hidden', {value: hidden, configurable: true});
  document.dispatchEvent(new Event('visibilitychange'));
})(arguments[0])"""

# Text, its colour, and the colour of the nearest thing behind it that has one.
COLOURS = """(() => {
  const found = [];
  for (const e of document.querySelectorAll('body *')) {
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (!own || !e.getClientRects().length || e.closest('title, script, noscript')) continue;
    const style = getComputedStyle(e);
    let back = null;
    if (e.closest('.node')) back = getComputedStyle(e.closest('.node').querySelector('rect')).fill;
    for (let up = e; !back && up; up = up.parentElement) {
      const colour = getComputedStyle(up).backgroundColor;
      if (colour !== 'rgba(0, 0, 0, 0)') back = colour;
    }
    found.push([e.textContent.slice(0, 30), e.closest('svg') ? style.fill : style.color, back]);
  }
  return found;
})()"""


def luminance(colour: str) -> float:
    values = [float(x) / 255 for x in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    red, green, blue = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in values)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)
