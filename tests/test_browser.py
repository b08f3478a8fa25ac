"""The report page in a browser: tables sort, filters filter, examples open, and nothing runs or loads that should not."""

from __future__ import annotations

import base64
import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from rows import make_row

from kvfactory.report.page import render
from kvfactory.results import Run

webdriver = pytest.importorskip("selenium.webdriver")
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.remote.webelement import WebElement  # noqa: E402
from selenium.webdriver.support.ui import Select, WebDriverWait  # noqa: E402

CHROMIUM, CHROMEDRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and CHROMEDRIVER), reason="chromium and chromedriver are not installed")

FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
NASTY = " </script><script>window.pwned=1</script><img src=x onerror='window.pwned=2'> & \u2028 </div>"
LONG = "adakv:window_size=32:kernel_size=7:pooling=avgpool"
BUDGETS = {"fullkv": [None], "h2o": [64, 128], LONG: [1024]}


@pytest.fixture(scope="module")
def driver(tmp_path_factory) -> Iterator[webdriver.Chrome]:
    """A browser of 1280 by 900 that notes what it says and what it asks the network for."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}", "--window-size=1280,900"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(executable_path=CHROMEDRIVER))
    yield browser
    browser.quit()


def needle_run(path: Path) -> Run:
    """Six examples under four configurations, their prompts recorded; scores are 1 or 0 and answers are nasty."""
    rows, kept, prompts = [], [], []
    for number in range(6):
        name, length = f"needle/{number}", 512 << number % 2
        tokens = [f" word{place}" for place in range(8)]
        prompt = {"example_id": name, "tokens": 100, "begin": tokens[:3], "end": tokens[3:]}
        prompts.append(prompt | {"question": "", "after": None, "shared_with": None})
        for method, budgets in BUDGETS.items():
            for budget in budgets:
                score = float(method != "h2o" or number % 3 == 0)
                fields = {"benchmark": "needle", "context_length": length, "depth_percent": 50.0 * (number // 2)}
                answer = f"right{NASTY}" if score else f"wrong{NASTY}"
                fields |= {"example_id": name, "prediction": answer, "answers": ["right"]}
                fields |= {"ratio": 1.0 if budget is None else budget / 2048}
                rows.append(make_row(str(length), method, budget, score, **fields))
                levels = "9" * 8 if budget is None else "01234789"
                kept.append({"example_id": name, "method": method, "budget": str(budget or "full"), "kept": levels})
    path.mkdir()
    for file, lines in (("prompts.jsonl", prompts), ("kept.jsonl", kept)):
        (path / file).write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return Run(path, rows, {"model": "tiny/model"}, [])


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> str:
    """The page of a run that recorded its prompts and one that did not, as an address."""
    folder = tmp_path_factory.mktemp("runs")
    cells = itertools.product(["qa", "code"], range(3), ["fullkv", "h2o"])
    rows = [
        make_row(
            group,
            method,
            None if method == "fullkv" else 64,
            0.5,
            benchmark="ledger",
            example_id=f"{group}/{number}",
            prediction=f"{method} {number}",
            answers=["x"],
        )
        for group, number, method in cells
    ]
    page = folder / "report.html"
    page.write_text(render([needle_run(folder / "needle"), Run(folder / "ledger", rows, {}, [])]), encoding="utf-8")
    return page.as_uri()


@pytest.fixture
def page(driver, address) -> webdriver.Chrome:
    """The browser, with the page opened anew and nothing chosen."""
    driver.get("about:blank")
    driver.get(address)
    return driver


def all_of(within: webdriver.Chrome | WebElement, selector: str) -> list[WebElement]:
    return within.find_elements(By.CSS_SELECTOR, selector)


def shown(within: webdriver.Chrome | WebElement, selector: str) -> list[WebElement]:
    return [element for element in all_of(within, selector) if element.is_displayed()]


def column(page: webdriver.Chrome, place: int) -> list[str]:
    return [cell.text for cell in shown(page, f"#leaderboard tbody tr > :nth-child({place})")]


def heading(page: webdriver.Chrome, name: str) -> tuple[int, WebElement]:
    """Place, from 1, and button of a column of the leaderboard."""
    buttons = all_of(page, "#leaderboard th button")
    place = [button.text for button in buttons].index(name)
    return place + 1, buttons[place]


def choose(page: webdriver.Chrome, name: str, text: str) -> None:
    Select(page.find_element(By.ID, name)).select_by_visible_text(text)


def options(page: webdriver.Chrome, name: str) -> list[str]:
    return [option.text for option in Select(page.find_element(By.ID, name)).options]


def open_examples(page: webdriver.Chrome) -> None:
    page.execute_script("document.getElementById('examples').scrollIntoView()")
    WebDriverWait(page, 10).until(lambda page: shown(page, "#example h3"))


def complaints(page: webdriver.Chrome) -> list[str]:
    return [entry["message"] for entry in page.get_log("browser")]


# -- tables and filters ----------------------------------------------------------------------------------------------


def test_a_click_sorts_by_a_column_and_another_turns_it_round(page):
    place, button = heading(page, "budget")
    as_made = column(page, place)
    button.click()
    rising = column(page, place)
    assert rising == ["64", "64", "128", "1024", "full", "full"] != as_made, "as numbers, not as texts"
    assert button.find_element(By.XPATH, "..").get_attribute("aria-sort") == "ascending"
    button.click()
    assert column(page, place) == rising[::-1]
    assert button.find_element(By.XPATH, "..").get_attribute("aria-sort") == "descending"
    assert len(all_of(page, "#leaderboard th[aria-sort]")) == 1


def test_tables_sort_from_the_keyboard_and_what_has_no_number_stays_last(page):
    place, button = heading(page, "its 95 % interval")
    for _ in range(2):
        button.send_keys(Keys.ENTER)
        found = column(page, place)
        assert found[-2:] == ["–", "–"], "of the two baselines"
    assert heading(page, "method")[1].get_attribute("type") == "button"


def test_filters_leave_what_they_name_everywhere_and_say_how_much_that_is(page):
    everything = len(all_of(page, "main tbody tr"))
    choose(page, "filter-benchmark", "needle")
    choose(page, "filter-method", "h2o")
    assert column(page, 1) == ["needle", "needle"] and column(page, 3) == ["h2o", "h2o"]
    assert page.find_element(By.CSS_SELECTOR, "#leaderboard .count").text == "2 of 6 lines"
    assert page.find_element(By.ID, "filter-count").text.endswith(f"of {everything} lines are shown")
    assert [section.find_element(By.TAG_NAME, "h2").text for section in shown(page, "section.benchmark")] == ["needle"]
    assert len(shown(page, ".heatmaps figure")) == 2
    choose(page, "filter-budget", "128")
    assert len(shown(page, ".heatmaps figure")) == len(column(page, 1)) == 1
    open_examples(page)
    assert options(page, "choose-benchmark") == ["needle"]
    assert options(page, "choose-left") == options(page, "choose-right") == ["h2o @ 128"]
    choose(page, "filter-budget", "all")
    assert options(page, "choose-left") == ["h2o @ 64", "h2o @ 128"]


def test_the_search_goes_by_parts_of_names(page):
    page.find_element(By.ID, "filter-words").send_keys("KERNEL needle")
    assert column(page, 3) == [LONG]
    page.find_element(By.ID, "filter-words").send_keys(" nothing")
    assert column(page, 3) == []
    assert page.find_element(By.CSS_SELECTOR, "#leaderboard .count").text == "0 of 6 lines"


# -- examples --------------------------------------------------------------------------------------------------------


def test_an_example_shows_both_answers_as_text_and_which_tokens_were_kept(page):
    open_examples(page)
    choose(page, "choose-right", "h2o @ 64")
    predictions = [element.get_property("textContent") for element in shown(page, ".prediction")]
    assert predictions == [f"right{NASTY}"] * 2
    assert page.execute_script("return window.pwned") is None
    full, evicted = shown(page, ".prompt")
    assert [span.text.strip() for span in all_of(full, ".k9")] == ["word0 word1 word2", "word3 word4 word5 word6 word7"]
    assert [(span.text.strip(), span.get_attribute("class")) for span in all_of(evicted, "span")] == [
        ("word0", "k0"),
        ("word1", "k1"),
        ("word2", "k2"),
        ("92 tokens are not recorded", "gap"),
        ("word3", "k3"),
        ("word4", "k4"),
        ("word5", "k7"),
        ("word6", "k8"),
        ("word7", "k9"),
    ]
    lines = [span.value_of_css_property("text-decoration-line") for span in all_of(evicted, ".k0, .k9")]
    assert lines == ["line-through", "underline"], "shades are not told by colour alone"
    choose(page, "choose-benchmark", "ledger")
    assert "did not record its prompts" in page.find_element(By.ID, "example").text
    assert complaints(page) == []


def test_only_examples_that_differ_or_are_wrong_are_gone_through(page):
    open_examples(page)
    choose(page, "choose-right", "h2o @ 64")
    assert len(options(page, "choose-example")) == 6
    page.find_element(By.ID, "only-differ").click()
    assert options(page, "choose-example") == [f"needle/{number}" for number in (1, 2, 4, 5)]
    choose(page, "choose-group", "1024")
    assert options(page, "choose-example") == ["needle/1", "needle/5"]
    page.find_element(By.ID, "only-differ").click()
    page.find_element(By.ID, "only-wrong").click()
    choose(page, "choose-left", "h2o @ 128")
    assert options(page, "choose-example") == ["needle/1", "needle/5"]
    choose(page, "choose-left", "fullkv @ full")
    choose(page, "choose-right", f"{LONG} @ 1024")
    assert "No example is like that" in page.find_element(By.ID, "example-status").text
    assert page.find_element(By.ID, "example").text == ""


def test_the_next_example_is_a_click_or_a_key_away_and_has_an_address_of_its_own(page, address):
    open_examples(page)
    choose(page, "choose-left", "h2o @ 128")
    forward, back = page.find_element(By.ID, "next-example"), page.find_element(By.ID, "previous-example")
    assert forward.is_enabled() and not back.is_enabled()
    forward.send_keys(Keys.ENTER)
    forward.click()
    assert page.find_element(By.ID, "example-status").text == "Example 3 of 6"
    shared = page.current_url
    page.get("about:blank")
    page.get(shared)
    WebDriverWait(page, 10).until(lambda page: shown(page, "#example h3"))
    assert page.find_element(By.CSS_SELECTOR, "#example > h3").text == "needle/2"
    assert [box.text for box in shown(page, ".answer h3")] == ["h2o @ 128", "h2o @ 64"]
    page.execute_script(f"location.hash = 'benchmark=ledger&example={quote('code/1')}'")
    WebDriverWait(page, 10).until(lambda page: page.find_element(By.CSS_SELECTOR, "#example > h3").text == "code/1")
    page.execute_script("location.hash = 'benchmark=ledger&example=gone'")
    WebDriverWait(page, 10).until(lambda page: "no example gone" in page.find_element(By.ID, "example-status").text)


# -- the page as a whole ---------------------------------------------------------------------------------------------


def test_nothing_is_asked_of_the_network_and_nothing_is_complained_about(page):
    page.get_log("performance")  # the browser's own first pages
    page.refresh()
    open_examples(page)
    events = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    asked = [each["params"]["request"]["url"] for each in events if each["method"] == "Network.requestWillBeSent"]
    assert any(each.startswith("file:") for each in asked)
    assert {each.partition(":")[0] for each in asked} <= {"file", "data"}
    assert (
        page.execute_script("return performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:'))")
        == []
    )
    assert complaints(page) == []


def test_the_policy_stops_what_would_run_or_load(page):
    page.execute_script("""
        const script = document.createElement('script');
        script.textContent = 'window.pwned = 3';
        document.body.append(script);
        const image = document.createElement('img');
        image.src = 'https://example.invalid/x.png';
        document.body.append(image);
    """)
    assert page.execute_script("return window.pwned") is None
    told = WebDriverWait(page, 10).until(lambda page: complaints(page))
    assert all("Content Security Policy" in each for each in told)


def test_a_narrow_screen_scrolls_tables_and_not_the_page(page):
    narrow = {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", narrow)
    open_examples(page)
    try:
        assert page.execute_script("return innerWidth") == 400
        assert page.execute_script("return document.documentElement.scrollWidth") <= 400
        wide = "const box = document.querySelector('#leaderboard .scroll'); return box.scrollWidth > box.clientWidth"
        assert page.execute_script(wide)
        lefts = {each.location["x"] for each in shown(page, "#filters label, #example-controls > label")}
        assert len(lefts) <= 2, "controls stand below each other"
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_on_paper_there_are_tables_and_no_controls(page):
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        assert len(shown(page, "#leaderboard tbody tr")) == 6
        assert not shown(page, ".controls, nav, #examples")
        assert page.find_element(By.CSS_SELECTOR, ".scroll").value_of_css_property("overflow-x") == "visible"
        paper = base64.b64decode(page.execute_cdp_cmd("Page.printToPDF", {"preferCSSPageSize": True})["data"])
        assert paper.startswith(b"%PDF")
    finally:
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_ten_thousand_rows_are_there_in_three_seconds(driver, tmp_path):
    methods = [(f"method{number % 5}", 64 << number // 5) for number in range(20)]
    rows = [
        make_row(
            "all",
            method,
            budget,
            (number % 7) / 7,
            example_id=f"all/{number}",
            prediction=f"{number} " * 20,
            answers=["1"],
        )
        for number, (method, budget) in itertools.product(range(500), methods)
    ]
    assert len(rows) == 10_000
    page = tmp_path / "report.html"
    page.write_text(render([Run(tmp_path, rows, {}, [])]), encoding="utf-8")
    assert page.stat().st_size < 5e6
    seconds = []
    while len(seconds) < 3 and min(seconds, default=9) >= 3:
        driver.get("about:blank")
        driver.get(page.as_uri())
        seconds.append(
            driver.execute_script("return performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd")
            / 1000
        )
    assert min(seconds) < 3
    open_examples(driver)
    assert driver.find_element(By.ID, "example-status").text == "Example 1 of 500"
