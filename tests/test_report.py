"The report: what stands in it, that it is one page, and that it holds whatever texts hold."
import html
import json
import os
import re
import shutil

import pytest

pytest.importorskip("matplotlib", reason="the extra plots is not installed")
from test_evaluation import ROWS, Said

from rlhf_reward.data import Comparison
from rlhf_reward.evaluation import evaluate
from rlhf_reward.report import readable, report_html, report_json, report_markdown, write_report

LENGTH, FIRST = Said(lambda prompt, response: float(len(response))), Said(lambda prompt, response: 3.0 * response.startswith("answer"))


@pytest.fixture(scope="module")
def evaluations():
    rated = [Comparison(f"p{row}", ("a" * (1 + row % 3), "bb", "ccc"), (1, 2, 3), (3.0, 2.0, float(row % 2))) for row in range(30)]
    return {"pairs.jsonl": {"length": evaluate(LENGTH, ROWS), "first": evaluate(FIRST, ROWS)}, "rated": {"length": evaluate(LENGTH, rated)}}


def test_figures_are_those_of_the_evaluation(evaluations):
    report = evaluations["pairs.jsonl"]["first"].report
    share = f"{100 * report['accuracy']:.1f} ({100 * report['accuracy_interval']['low']:.1f} to {100 * report['accuracy_interval']['high']:.1f})"
    for page in (report_markdown(evaluations), html.unescape(report_html(evaluations))):
        for what in (share, "first without the prompt", "longer wins", "random", "Length-controlled accuracy", "McNemar", "Kendall", "expected" if "<h1>" in page else "picked",
                     "most confident mistakes of length", f"{report['pairs']} pairs", f"{report['calibration']['log_loss']:.4f}"):
            assert what in page, what
    assert json.loads(json.dumps(report_json(evaluations), allow_nan=False))["data"]["pairs.jsonl"]["models"]["first"]["accuracy"] == report["accuracy"]


def test_one_page_that_needs_nothing_else(evaluations, tmp_path):
    write_report(evaluations, tmp_path / "report")
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == ["report.html", "report.json", "report.md"]
    page = (tmp_path / "report/report.html").read_text()
    assert page.count("data:image/svg+xml;base64,") == 3 and not re.search(r"(src|href)=\"(?!data:)", page)
    assert page == report_html(evaluations) # the same each time


WILD = "</pre><script>alert('x')</script><img src=x onerror=alert(1)> {{ 7 * 7 }} ```` | & \x00 \u202e"


def test_texts_are_shown_as_texts():
    comparison = Comparison(WILD, (f"good {WILD}", f"bad {WILD}"), (1, 2), source=WILD)
    wrong = evaluate(Said(lambda prompt, response: float("bad" in response)), [comparison, Comparison("p", ("good", "bad"), (1, 2), source="b")])
    page = report_html({WILD: {WILD: wrong}})
    assert "<script" not in page and "<img src=x" not in page and "49" not in re.sub(r"base64,[^\"]*", "", page)
    assert html.escape(WILD, quote=False).split("'")[0] in page
    markdown = report_markdown({WILD: {WILD: wrong}})
    assert "`````text" in markdown # a fence longer than what is in it


def test_readable():
    assert readable("a") == "a" and readable([3, 4]) == "3 4" and readable([]) == ""
    assert readable([{"role": "user", "content": "u"}, {"role": "assistant", "tool_calls": [{"name": "f"}]}]).startswith("[user]\nu\n\n[assistant]\n{")


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")
def test_the_page_in_a_browser(evaluations, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    write_report(evaluations, tmp_path)
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page, asked, errors = browser.new_page(viewport={"width": 1200, "height": 900}), [], []
        page.on("request", lambda one: asked.append(one.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto((tmp_path / "report.html").as_uri())
        assert page.locator("h2").count() == 2 and page.locator("img").count() == 3
        assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 500)")
        assert page.evaluate("document.documentElement.scrollWidth <= 1200") # nothing sticks out
        page.screenshot(path=os.environ.get("REPORT_SCREENSHOT") or tmp_path / "page.png", full_page=True)
        assert not errors and all(url.startswith(("file:", "data:")) for url in asked)
        browser.close()
