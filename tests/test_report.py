"The report: its content, that it is one page, and that it can hold any text."

import dataclasses
import html
import json
import os
import re
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from scipy.special import expit

pytest.importorskip("matplotlib", reason="the extra plots is not installed")
from test_evaluation import ROWS

from rlhf_reward import RewardConfig
from rlhf_reward.card import model_card
from rlhf_reward.data import Comparison
from rlhf_reward.evaluation import Rule, evaluate
from rlhf_reward.intervals import interval
from rlhf_reward.markdown import code_span, escape_markdown
from rlhf_reward.report import (
    plots,
    prepare_report,
    readable,
    report_html,
    report_json,
    report_markdown,
    write_report,
)
from rlhf_reward.report_summary import figure_lines
from rlhf_reward.tables import correctness

LENGTH = Rule(lambda prompt, response: float(len(response)))
FIRST = Rule(lambda prompt, response: 3.0 * response.startswith("answer"))


@pytest.fixture(scope="module")
def evaluations():
    rated = [
        Comparison(f"p{row}", ("a" * (1 + row % 3), "bb", "ccc"), (1, 2, 3), (3.0, 2.0, float(row % 2)))
        for row in range(30)
    ]
    return {
        "pairs.jsonl": {"length": evaluate(LENGTH, ROWS), "first": evaluate(FIRST, ROWS)},
        "rated": {"length": evaluate(LENGTH, rated)},
    }


@pytest.fixture(scope="module")
def html_page(evaluations):
    return report_html(evaluations)


def test_figures_are_those_of_the_evaluation(evaluations, html_page):
    report = evaluations["pairs.jsonl"]["first"].report
    low = 100 * report["accuracy_interval"]["low"]
    high = 100 * report["accuracy_interval"]["high"]
    share = f"{100 * report['accuracy']:.1f} ({low:.1f} to {high:.1f})"
    for page in (report_markdown(evaluations), html.unescape(html_page)):
        for what in (
            share,
            "first without the prompt",
            "longer wins",
            "random",
            "Length-controlled accuracy",
            "p by prompts",
            "Kendall",
            "expected rating of the pick",
            "sha256",
            "Methods",
            report_json(evaluations)["data"]["pairs.jsonl"]["models"]["first"]["verdict"].split(",")[0],
            "most confident mistakes of length",
            f"{report['pairs']} pairs",
            f"{report['calibration']['log_loss']:.4f}",
        ):
            assert what in page, what
    first = json.loads(json.dumps(report_json(evaluations), allow_nan=False))["data"]["pairs.jsonl"]["models"][
        "first"
    ]
    assert first["accuracy"] == report["accuracy"]
    assert first["mistakes"][0]["rejected"]["text"].startswith("answer")


def test_each_figure_has_its_name():
    "The numbers are all different, so that none can be taken for another."

    def share(value):
        return {"value": value, "low": value - 0.05, "high": value + 0.05}

    report = {
        "pairs": 23,
        "accuracy_interval": share(0.61),
        "tied_rewards": 7,
        "margin": 1.1,
        "margin_q25": 0.2,
        "margin_median": 0.9,
        "margin_q75": 1.7,
        "calibration": {
            "log_loss": 0.5551,
            "ece": 0.123,
            "temperature": 1.5,
            "at_bound": None,
            "log_loss_at_temperature": 0.5441,
        },
        "length": {
            "pearson": 0.321,
            "spearman": 0.234,
            "controlled_accuracy": share(0.57),
            "chosen_longer": {"accuracy": share(0.71), "pairs": 11},
            "chosen_shorter": {"accuracy": share(0.42), "pairs": 12},
        },
        "ranking": {
            "best_found_interval": share(0.44),
            "comparisons": 13,
            "kendall_tau": 0.345,
            "ndcg": 0.876,
            "without_tau": 3,
            "by_chance": {"best_found": 0.255, "ndcg": 0.777},
        },
    }
    assert figure_lines(report) == [
        ("Pairs", "23"),
        ("Accuracy, %", "61.0 (56.0 to 66.0)"),
        ("Tied rewards, counted half", "7"),
        ("Log-loss", "0.5551 (chance: 0.6931)"),
        ("Expected calibration error", "0.123"),
        ("Best temperature", "1.5 (log-loss 0.5441)"),
        ("Margin: mean, quartiles", "1.100; 0.200, 0.900, 1.700"),
        ("Reward and length: Pearson, Spearman", "0.321, 0.234"),
        ("Accuracy where the chosen is longer, %", "71.0 (66.0 to 76.0), 11 pairs"),
        ("Accuracy where the chosen is shorter, %", "42.0 (37.0 to 47.0), 12 pairs"),
        ("Length-controlled accuracy, %", "57.0 (52.0 to 62.0)"),
        ("Best of K found, %", "44.0 (39.0 to 49.0) of 13 comparisons; by chance 25.5"),
        ("Kendall τ, NDCG", "0.345, 0.876; by chance 0, 0.777"),
        ("Comparisons without a τ: all rewards tie", "3"),
    ]


def test_what_the_plots_draw(monkeypatch):
    import matplotlib.axes

    result = evaluate(Rule(lambda prompt, response: float(len(response)) + response.startswith("answer")), ROWS)
    drawn = {"hist": [], "plot": [], "scatter": [], "vlines": [], "set": []}
    for kind in drawn:
        original = getattr(matplotlib.axes.Axes, kind)
        monkeypatch.setattr(
            matplotlib.axes.Axes,
            kind,
            lambda self, *args, kind=kind, original=original, **options: drawn[kind].append((args, options))
            or original(self, *args, **options),
        )
    assert list(plots(result)) == ["Calibration", "Margin and length", "Rewards", "Margins"]
    reward = result.responses["reward"].to_numpy()
    pairs = result.pairs
    report = result.report
    (chosen, _), (rejected, _), (margins, _) = drawn["hist"]
    assert (
        chosen[0].tolist()
        == reward[pairs["winner"]].tolist()
        != rejected[0].tolist()
        == reward[pairs["loser"]].tolist()
    )
    assert margins[0].tolist() == pairs["margin"].tolist()
    bins = report["calibration"]["bins"]
    (reliability, _), (length, _) = drawn["scatter"]
    assert reliability == ([one["confidence"] for one in bins], [one["accuracy"] for one in bins])
    assert drawn["set"][0][1]["xlim"] == (0.48, 1.02) and drawn["plot"][0][0] == ([0.5, 1], [0.5, 1])
    ((confidence, low, high), _), = drawn["vlines"] # the error bars
    assert confidence == reliability[0] and len(low) == len(high) == len(bins)
    for bin_, lower, upper in zip(bins, low, high):
        assert 0 <= lower <= bin_["accuracy"] <= upper <= 1
    number = np.minimum((expit(np.abs(pairs["margin"])) - 0.5) * 20 // 1, 9)
    own = pairs[number == number.min()]
    by_prompt = interval(correctness(own["margin"].to_numpy()), own["prompt"])
    assert (low[0], high[0]) == (by_prompt["low"], by_prompt["high"])
    assert length[0].tolist() == pairs["longer_by"].tolist()
    assert length[1].tolist() == pairs["margin"].tolist()
    line = drawn["plot"][1][0]
    assert line[1].tolist() == [report["length"]["reward_per_token"] * end for end in line[0]]
    assert report["length"]["reward_per_token"] > 0.5


def test_a_legend_covers_no_bar(monkeypatch):
    "Rewards that are spread evenly, so that no corner of the plot is empty."
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    labeled = [Comparison(f"p{row}", (f"{row % 7}", f"{row % 5}"), (1, 2), labels=(1, 0)) for row in range(35)]
    spread = evaluate(Rule(lambda prompt, response: float(response) if prompt else 0.0), labeled)
    plots(spread)
    legends = 0
    for figure in figures:
        figure.draw_without_rendering()
        (axes,) = figure.axes
        legend = axes.get_legend()
        if legend is not None:
            box = legend.get_window_extent()
            bars = [bar.get_window_extent() for bar in axes.patches]
            assert len(bars) == 60 and not any(map(box.overlaps, bars)), axes.get_title()
            legends += 1
    assert legends == 2


def test_sources_with_all_baselines_and_rows_without_one():
    mixed = [
        *ROWS[:20],
        *(Comparison(f"q{row}", ("answer", "reply"), (1, 2)) for row in range(5)),
        Comparison("p", ("a", "b"), (1, 1), source="ties"),
    ]
    asks = Rule(lambda prompt, response: 3.0 * response.startswith("answer") * bool(prompt))
    page = report_markdown({"mixed": {"first": evaluate(asks, mixed)}})
    table = page[page.index("| source | pairs") :].split("\n\n")[0].splitlines()
    assert table[0] == "| source | pairs | first | first without the prompt | longer wins | shorter wins | random |"
    assert [line.split(" | ")[0].strip("| ") for line in table[2:]] == ["(no source)", "one", "ties", "two"]
    assert "| ties | 0 | – | – |" in page
    assert table[2].split(" | ")[1] == "5"
    assert [cell.split(" ")[0] for cell in table[2].strip("| ").split(" | ")[2:]] == [
        "100.0",
        "50.0",
        "100.0",
        "0.0",
        "50.0",
    ]
    assert "| first without the prompt | 50.0 (" in page
    assert "| longer wins | 50.0 (" not in page


def test_benchmarks_with_their_parts_and_matrices():
    result = evaluate(FIRST, ROWS)
    result.report["benchmark"] = {
        "name": "rm-bench",
        "rule": "By hand.",
        "score": 1,
        "chat": {"easy": 0.25, "matrix": [[0.5, 0.75], [0.125, 1.0]]},
    }
    markdown = report_markdown({"b": {"m": result}})
    page = report_html({"b": {"m": result}})
    for what in (
        "| score | 1.0000 |",
        "| chat, easy | 0.2500 |",
        "| chosen 1 | 0.500 | 0.750 |",
        "| chosen 2 | 0.125 | 1.000 |",
    ):
        assert what in markdown
    cells = '<td data-label="rejected 1">0.125</td><td data-label="rejected 2">1.000</td>'
    assert f"<td>chosen 2</td>{cells}" in page
    assert "<td>chat, easy</td><td>0.2500</td>" in page


def test_what_can_go_wrong_is_found_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "afile").write_text("")
    with pytest.raises(FileExistsError, match="afile' is a file; expected the name of a folder"):
        prepare_report(tmp_path / "afile")
    assert prepare_report(tmp_path / "new/folder").is_dir()
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'rlhf_reward\[plots\]'"):
        prepare_report(tmp_path)


def test_all_files_or_none(tmp_path, monkeypatch):
    monkeypatch.setattr("rlhf_reward.report.report_html", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report({"d": {"m": evaluate(FIRST, ROWS)}}, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_one_page_that_needs_nothing_else(evaluations, html_page, tmp_path):
    write_report(evaluations, tmp_path / "report")
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == [
        "report.html",
        "report.json",
        "report.md",
    ]
    page = (tmp_path / "report/report.html").read_text()
    assert page.count("<svg ") == 4 + 4 + 5
    assert not re.search(r"(src|href)=\"(?!data:|#)|url\((?!#)|@import", page)
    assert len(set(re.findall(r'\bid="([^"]*)"', page))) == page.count(' id="') # drawings share no name
    assert page == html_page # the same each time
    both, sources, *_ = re.findall(r"<h3>(.*?)</h3>(.*?)(?=<h3>)", page, flags=re.DOTALL) # charts of whiskers
    labels = [re.findall(r'class="label">(.*?)<', chart) for _, chart in (both, sources)]
    assert (both[0], sources[0]) == ("Accuracy over all pairs, %", "By source")
    without = ["length without the prompt", "first without the prompt"]
    assert labels[0] == ["length", "first", *without, "longer wins", "shorter wins", "random"]
    assert labels[1] == 2 * ["length", "first", "longer wins"]
    for name, report in evaluations["pairs.jsonl"].items():
        share = report.report["accuracy_interval"]
        style = f"--low: {100 * share['low']:.2f}%; --length: {100 * (share['high'] - share['low']):.2f}%"
        assert style in both[1], name
    small = {"rated": {"length": evaluate(LENGTH, [Comparison("p", ("a", "b"), (1, 1), (2.0, 1.0))])}} # quick to draw
    record = {"date": "2026-01-31 14:05 UTC", "command": "rlhf_reward evaluate --data 'a b'"}
    dated = report_html(small, record)
    assert dated == report_html(small, dict(record))
    assert dated.replace(record["date"], "2027") == report_html(small, {**record, "date": "2027"})
    in_one_line = re.sub("</?span.*?>", "", dated)
    assert "2026-01-31 14:05 UTC" in dated and "evaluate --data &#39;a b&#39;<" in in_one_line
    assert "- Command: `rlhf_reward evaluate --data 'a b'`" in report_markdown(small, record)
    assert report_json(small, record)["record"] == record
    for color in ("tab:", "#1f77b4", "#2ca02c", "#d62728"): # a red and a green that some cannot tell apart
        assert color not in page


WILD = "</pre><script>alert('x')</script><img src=x onerror=alert(1)> {{ 7919 * 7907 }} ```` | & \x00 \u202e"


def test_texts_are_shown_as_texts():
    comparison = Comparison(WILD, (f"good {WILD}", f"bad {WILD}"), (1, 2), source=WILD)
    wrong = evaluate(
        Rule(lambda prompt, response: float("bad" in response)),
        [comparison, Comparison("p", ("good", "bad"), (1, 2), source="b")],
    )
    page = report_html({WILD: {WILD: wrong}})
    assert page.count("<script") == 1 # its own
    assert "<img src=x" not in page
    assert "62615533" not in page
    assert html.escape(WILD, quote=False).split("'")[0] in page
    markdown = report_markdown({WILD: {WILD: wrong}})
    assert "`````text" in markdown # a fence longer than what is in it


def test_readable():
    assert readable("a") == "a"
    assert readable([3, 4]) == "3 4"
    assert readable([]) == ""
    assert readable(
        [{"role": "user", "content": "u"}, {"role": "assistant", "tool_calls": [{"name": "f"}]}]
    ).startswith("[user]\nu\n\n[assistant]\n{")


HOSTILE = (
    "<img src=x onerror=alert(1)>",
    "a\n\n# A heading\n<script>alert(1)</script>",
    "[click](javascript:alert(1))",
    "``` `code` | cell",
    "**bold** \x1b[31m",
    "&lt;b&gt;",
)


def visible_lines(page):
    "The lines of a Markdown page outside of its blocks of code."
    return re.sub(r"(?ms)^(`{3,})[^\n]*\n.*?^\1$", "", page)


@pytest.mark.parametrize("name", HOSTILE)
def test_names_in_a_markdown_report_are_text(name):
    "Names of the data, the models and the sources were written as Markdown with their HTML and line breaks."
    rows = []
    for number, row in enumerate(ROWS):
        rows.append(dataclasses.replace(row, source=name if number % 2 else "other"))
    page = report_markdown({name: {name: evaluate(LENGTH, rows), "second": evaluate(FIRST, rows)}})
    lines = visible_lines(page)
    assert "<img" not in lines and "<script" not in lines and "<b>" not in html.unescape(lines.replace("&amp;", ""))
    assert not re.search(r"^# A heading", lines, re.MULTILINE) and "\x1b" not in lines
    assert not re.search(r"(?<!\\)\]\(javascript", lines) and not re.search(r"(?<!\\)\*\*bold", lines)
    columns = {line.count("|") - line.count("\\|") for line in lines.splitlines() if line.startswith("| ---")}
    for table in re.findall(r"(?m)(?:^\|.*\n)+", lines):
        cells = {line.count("|") - line.count("\\|") for line in table.splitlines()}
        assert len(cells) == 1, table  # no name begins a cell
    assert columns


@pytest.mark.parametrize("name", HOSTILE)
def test_names_as_markdown(name):
    for shown in (escape_markdown(name), code_span(name)):
        assert "\n" not in shown and "\x1b" not in shown
    assert "<" not in escape_markdown(name)
    span = code_span(name)
    fence = re.match("`+", span).group()
    assert fence not in span[len(fence) : -len(fence)] and span.endswith(fence)


def test_plain_names_stay_as_they_are():
    for name in ("my-model_1.5", "org/name", "data (new).jsonl", "Größe", "a/b_c-d"):
        assert escape_markdown(name) == name and code_span(name) == f"`{name}`"


@pytest.mark.parametrize("name", HOSTILE)
def test_names_of_metrics_in_a_card_are_text(name, tmp_path):
    "They are those of evaluation sets and of `compute_metrics`."
    log = [{"step": 1, "eval_loss": 0.5, f"eval_{name}": 1.0}]
    model = SimpleNamespace(config=SimpleNamespace())
    card = model_card(model, RewardConfig(str(tmp_path), use_cpu=True, report_to="none"), log, "title")
    (line,) = [line for line in card.splitlines() if line.startswith("| ") and line.endswith(" | 1 |")]
    assert line == f"| {escape_markdown(name)} | 1 |"


@pytest.mark.parametrize("name", HOSTILE)
def test_names_in_a_card_are_text(name, tmp_path):
    scale = {"reward_mean": 0.0, "reward_std": 1.0, "reward_over": {"data": name, "responses": 2}}
    model = SimpleNamespace(config=SimpleNamespace(name_or_path=name, rlhf_reward=scale))
    args = RewardConfig(str(tmp_path), use_cpu=True, report_to="none", run_name=name, hub_model_id=name)
    card = model_card(model, args, [], name, dataset=name)
    _, header, page = re.split(r"^---$", card, maxsplit=2, flags=re.MULTILINE)
    assert yaml.safe_load(header)["base_model"] == name
    lines = re.sub(r"(`+).+?(?<!`)\1(?!`)", "", visible_lines(page))  # without code in a line
    assert "<img" not in lines and "<script" not in lines and "\x1b" not in page
    assert not re.search(r"^# A heading", page, re.MULTILINE)
    assert not re.search(r"(?<!\\)\]\(javascript", lines)


def test_the_page_in_a_browser(evaluations, tmp_path, chromium):
    write_report(evaluations, tmp_path)
    page = chromium.new_page(viewport={"width": 1200, "height": 900})
    asked = []
    errors = []
    page.on("request", lambda one: asked.append(one.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto((tmp_path / "report.html").as_uri())
    assert page.locator("h2").all_text_contents() == ["pairs.jsonl", "rated", "Methods"]
    assert page.locator("svg").count() == 13
    colors = set()
    for width, scheme in ((1200, "light"), (390, "light"), (1200, "dark"), (390, "dark")):
        page.set_viewport_size({"width": width, "height": 900})
        page.emulate_media(color_scheme=scheme)
        assert page.evaluate("document.documentElement.scrollWidth") <= width # nothing sticks out
        clipped = """[...document.querySelectorAll(".wide, .chart, td, .label, .figure, pre, form")]
            .filter(one => one.offsetParent && one.scrollWidth > one.clientWidth + 1).map(one => one.outerHTML)"""
        assert not page.evaluate(clipped) # and nothing is cut off
        blank = page.locator("td:empty").evaluate_all("cells => cells.filter(cell => cell.offsetParent).length")
        assert width == 1200 or blank == 0 # no label without a value
        assert page.evaluate("""[...document.querySelectorAll(".plots svg")]
            .every(one => one.getBoundingClientRect().width > 250 && one.getBoundingClientRect().height > 200)""")
        colors.add((scheme, page.evaluate("getComputedStyle(document.body).backgroundColor")))
        colors.add((scheme, page.evaluate("getComputedStyle(document.querySelector('.plots svg text')).fill")))
        screenshot = f"{os.environ.get('REPORT_SCREENSHOT') or tmp_path / 'page'}_{width}_{scheme}.png"
        page.screenshot(path=screenshot, full_page=True)
    assert len(colors) == 4 # each scheme has its own background and its own color of texts in plots
    form = page.locator("form.filter").first
    shown = form.locator("output")
    assert shown.text_content() == "20 of 20"
    form.locator("[name=words]").fill("no text has this")
    assert shown.text_content() == "0 of 20"
    form.locator("[name=words]").fill("")
    form.locator("[name=source]").select_option("one")
    number = page.locator("#mistakes-1-1 > details[data-source=one]").count()
    assert 0 < number < 20 and shown.text_content() == f"{number} of 20"
    assert page.locator("#mistakes-1-1 > details:visible").count() == number
    form.locator("[name=longer]").select_option("chosen")
    assert shown.text_content() == "0 of 20" # the rule prefers what is longer
    assert not errors
    assert all(url.startswith(("file:", "data:")) for url in asked)
    page.close()
