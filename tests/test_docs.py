"""
The site: built strictly, no broken link, every name with its reference and an example, code that runs, pages that a
browser shows.
"""
import ast
import base64
import builtins
import functools
import http.server
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import urllib.request
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import nbformat
import pytest
import yaml
from programs import kill_group, run

ROOT = Path(__file__).parents[1]
pytest.importorskip("mkdocs", reason="mkdocs-material is not installed")


@pytest.fixture(scope="module")
def docs():
    "tools/docs.py, in the project's root."
    before = Path.cwd()
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT / "tools"))
    import docs
    yield docs
    sys.path.remove(str(ROOT / "tools"))
    os.chdir(before)


IGNORED = (".git", ".venv", "runs", "_proc", "_docs", "__pycache__", ".ipynb_checkpoints")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "The folder of the built site, made as `make docs` makes it, on a copy."
    copy = tmp_path_factory.mktemp("project") / "copy"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*IGNORED))
    run(sys.executable, "tools/docs.py", "site", cwd=copy)
    run(sys.executable, "-m", "mkdocs", "build", cwd=copy, environment={"NO_MKDOCS_2_WARNING": "1"})
    return copy / "_docs"


# ----- pages

def test_a_page_that_leads_nowhere_is_refused(site, tmp_path):
    "Strict: a warning of mkdocs stops the build. Three pages are enough to see it, with the settings of the site."
    pages = tmp_path / "pages"
    pages.mkdir()
    (pages / "index.md").write_text("# Start\n\n[scoring](scoring.md), [reward](reward.md#RewardModel)\n")
    for name in ("scoring.md", "reward.md"):
        shutil.copy(site.parent / "_proc" / name, pages)
    shutil.copytree(site.parent / "_proc/assets", pages / "assets")
    settings = {
        "INHERIT": str(site.parent / "mkdocs.yml"),
        "docs_dir": str(pages),
        "nav": ["index.md", "scoring.md", "reward.md"],
        "hooks": [str(ROOT / "tools/hooks.py")],  # relative to the file that names it
    }
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump(settings))
    page = pages / "scoring.md"
    text = page.read_text()
    page.write_text(text + "\n[nowhere](nowhere.md) [no such place](reward.md#no-such-place)\n")
    done = run(sys.executable, "-m", "mkdocs", "build", cwd=tmp_path, status=None)
    assert done.returncode != 0 and "nowhere.md" in done.stderr and "no-such-place" in done.stderr


class Links(HTMLParser):
    "The ids of a page, and each tag that refers to an address, with its attributes."
    def __init__(self, page):
        super().__init__()
        self.ids = []
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if "id" in attributes:
            self.ids.append(attributes["id"])
        self.found += [(tag, attributes, attributes[name]) for name in ("href", "src") if name in attributes]


def test_every_internal_link_resolves(site):
    pages = {}
    for path in site.rglob("*.html"):
        if path.name != "404.html":
            pages[path] = Links(path.read_text())
    anchors = {path: page.ids for path, page in pages.items()}
    for path, names in anchors.items():
        repeated = {name for name, count in Counter(names).items() if count > 1}
        assert {name for name in repeated if name[:2] != "__"} == set(), path.name  # those are the theme's
    wrong = set()
    seen = 0
    for path, page in pages.items():
        for tag, attributes, address in page.found:
            link = urlsplit(address)
            if link.scheme or link.netloc:
                allowed = tag == "a" or link.scheme == "data" or attributes.get("rel") == "canonical"
                assert allowed, f"{path.name} asks another host: {tag} {attributes}"
                continue
            seen += 1
            target = (path.parent / unquote(link.path)).resolve() if link.path else path
            has_anchor = link.fragment and target.suffix == ".html"
            if not target.exists() or has_anchor and unquote(link.fragment) not in anchors[target]:
                wrong.add(f"{path.relative_to(site)}: {address}")
    assert not wrong and seen > 2000, "\n".join(sorted(wrong))


def notebooks(folder=ROOT / "nbs"):
    paths = folder.rglob("*.ipynb")
    return sorted(path for path in paths if not {"runs", ".ipynb_checkpoints"} & set(path.relative_to(folder).parts))


@functools.cache
def read(path):
    return nbformat.read(path, as_version=4)


def cells(path, kind):
    return [cell for cell in read(path).cells if cell.cell_type == kind]


def test_search_has_lessons_first_and_no_formulas(site, docs):
    "The glossary is first of all: with these boosts a browser finds margin there before `margin_spread`."
    index = json.loads((site / "search/search_index.json").read_text())["docs"]
    for entry in index:
        prose = re.sub(r"<(pre|code)>.*?</\1>", "", entry["text"], flags=re.DOTALL)
        assert not {"\\(", "\\["} & set(re.findall(r"\\.", prose)), entry["location"]
        is_lesson = entry["location"].startswith(("tutorials/", "explanations/"))
        boost = docs.BOOST if is_lesson else 1
        if entry["location"].startswith("explanations/glossary."):
            boost = docs.GLOSSARY_BOOST
        assert entry.get("boost", 1) == boost, entry["location"]
    assert docs.GLOSSARY_BOOST >= 8 > docs.BOOST >= 3


def test_outputs_do_not_depend_on_where_and_how_often_a_notebook_ran():
    "No warning of an installed package, with its path, and no run that found the folder of an earlier one."
    wrong = []
    for path in notebooks():
        texts = []
        for cell in cells(path, "code"):
            texts += [output.get("text", "") for output in cell.outputs]
        wrong += [path.name for text in texts if "site-packages" in text]
        if path.name != "05e_resuming.ipynb":  # it shows such a run
            wrong += [path.name for text in texts if "of an earlier run" in text]
    assert wrong == []


PHONE = 358  # pixels that a page has there


def widest_inches(png):
    "Return the width of a PNG on paper, by the pixels for an inch that matplotlib writes into it."
    width = int.from_bytes(png[16:20], "big")
    start = png.index(b"pHYs") + 4
    return width / (int.from_bytes(png[start:start + 4], "big") * 0.0254)


def smallest_text(svg):
    "Return the pixels of the smallest text of a picture on a phone."
    width = float(re.search(r'viewBox="\S+ \S+ (\S+) ', svg)[1])
    sizes = re.findall(r'font-size[=:]\s*"?([\d.]+)', svg)
    sizes += [100 * float(scale) for scale in re.findall(r"scale\(([\d.]+) -", svg)]  # of letters that are drawn
    return min(map(float, sizes)) * PHONE / width


def test_text_in_pictures_can_be_read_on_a_phone(docs):
    "It has nine pixels at least: a PNG, whose text has ten points by default, is not drawn wider than 5.6 inches."
    small = {}
    scrolled = {"terminal.svg"}  # by docs/assets/site.css
    drawn = [(path.name, path.read_text()) for path in (ROOT / "docs/assets").glob("*.svg")]
    for path in notebooks():
        data_of_pictures = []
        for cell in cells(path, "code"):
            data_of_pictures += [output.data for output in cell.outputs if docs.is_picture(output)]
        for data in data_of_pictures:
            if "image/svg+xml" in data:
                drawn.append((path.name, data["image/svg+xml"]))
            elif (inches := widest_inches(base64.b64decode(data["image/png"]))) > 5.6:
                small[path.name] = f"{inches:.1f} inches"
    for name, svg in drawn:
        if name not in scrolled and smallest_text(svg) < 9:
            small[name] = f"{smallest_text(svg):.1f} pixels"
    assert len(drawn) > 8 and small == {}


def test_each_picture_is_described(docs):
    "In words of its own: the heading, which is the default, does not describe what is seen."
    missing = []
    for path in notebooks():
        for cell in cells(path, "code"):
            described = re.findall(r"^#\| fig-alt: (.*)", cell.source, flags=re.MULTILINE)
            if len(described) != sum(map(docs.is_picture, cell.outputs)) or len(set(described)) < len(described):
                missing.append((path.name, cell.source[:60]))
    assert missing == []


def pictures(text):
    "Return (alt text, address) of each picture of a Markdown text."
    found = re.findall(r"!\[([^\]]*)\]\(([^)\s]+)\)", text)
    for tag in re.findall(r"<(?:img|source)\s[^>]*>", text):
        attributes = dict(re.findall(r'(\w+)="([^"]*)"', tag))
        found.append((attributes.get("alt"), attributes.get("src") or attributes["srcset"]))
    return found


def test_pictures_in_texts_exist_and_are_described():
    "Small files, in both schemes, with alternative texts of some words. README has those of the index."
    texts = {ROOT / "README.md": (ROOT / "README.md").read_text()}
    for path in notebooks():
        texts[path] = "\n".join(cell.source for cell in cells(path, "markdown"))
    seen = {}
    for path, text in texts.items():
        for alt, address in pictures(text):
            picture = (path.parent / address).resolve()
            assert picture.is_file() and picture.stat().st_size <= 150_000, (path.name, address)
            assert alt is None or len(alt.split()) > 5, (path.name, address, alt)
            light = picture.with_name(picture.name.replace("-dark.", "-light."))
            assert light.is_file() and light.with_name(light.name.replace("-light.", "-dark.")).is_file(), address
            seen.setdefault(path.name, set()).add(picture)
    schemes = {path.with_name(path.name.replace("-light.", "-dark.")) for path in seen["index.ipynb"]}
    assert seen["index.ipynb"] | schemes <= seen["README.md"] and len(seen["index.ipynb"]) >= 4


def test_pictures_of_both_schemes(docs):
    text = "![A curve](a/b-light.svg) and ![A map](map.svg)"
    both = "![A curve](a/b-light.svg#only-light)![A curve](a/b-dark.svg#only-dark) and ![A map](map.svg)"
    assert docs.for_both_schemes(text) == both
    found = pictures(docs.for_both_schemes(text, on_github=True))
    assert sorted(found, key=str) == [("A curve", "a/b-light.svg"), ("A map", "map.svg"), (None, "a/b-dark.svg")]


def test_citation_file():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert f"git_url = {citation['repository-code']}\n" in (ROOT / "settings.ini").read_text()
    assert "(CITATION.cff) is how to cite" in (ROOT / "README.md").read_text()


def test_notebooks_are_published_with_their_pages(site):
    for path in notebooks():
        assert (site / path.relative_to(ROOT / "nbs")).read_bytes() == path.read_bytes()


def test_links_in_markdown_files_and_notebooks_resolve():
    "In the repository, for those who read there."
    files = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")]
    texts = [(path, path.read_text()) for path in [*files, *(ROOT / "benchmarks/results").glob("*.md")]]
    for path in notebooks():
        texts += [(path, cell.source) for cell in cells(path, "markdown")]
    found = []
    for path, text in texts:
        found += [(path, link) for link in re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", text)]
    assert len(found) > 60
    assert [(path.name, link) for path, link in found if not (path.parent / link).exists()] == []


# ----- the reference

def exported(docs):
    for path in docs.NOTEBOOKS:
        for cell in docs.read(path).cells:
            if "export" in docs.directives(cell):
                yield path, cell


def test_what_a_reference_says(docs):
    source = '''
class Thing(Base):
    "What it is. See `Scorer`."
    def __init__(
        self,
        name: str, # of the |thing|, `a|b`, {1: 2}
        *parts: int, # any number
        size: Optional[int] = None, # in tokens
    ):
        "Raises `ValueError` for none."

    def forward(
        self,
        rewards: TensorType["batch_size", 1, float], # r
    ) -> float: # scalar
        "The loss."

    def parent(self):
        return 1

@dataclass
class Row:
    "A row."
    prompt: str = field(default="", metadata={"help": "What was asked."})
    rewards: list[float] = Field(description="One for each.")
    user: Optional[str] = Field(None, description="Who asks.")
    more: dict = field(default_factory=dict) # for later

class Options(TypedDict, total=False):
    "Options."
    # How many rows are read,
    # at most.
    rows: int
    name: str # of the data

def read(
    # Where the rows are: a path,
    # or a name.
    data: Annotated[Union[str, Path, list[Union[str, Path]]], Field(description="a path or a list of paths")] = \
    "rows.jsonl",
    # ignored: a comment at the end comes first
    size: int = 1, # in rows
    *,
    same: bool = False, last: bool = True,
    # the rows, in order
) -> list[dict[str, Any]]:
    "Read rows."

LIMIT = 3 # of things
_own = 4
'''
    cell = nbformat.v4.new_code_cell("#| export\n" + source)
    lines = "class Thing(Base):\nclass Row:\nclass Options(TypedDict, total=False):\ndef read(\n"
    Path("module.py").write_text(lines)
    try:
        text = docs.references(cell, "module.py")
    finally:
        Path("module.py").unlink()
    parts = (
        "### <code>Thing</code> { #Thing }",
        "class Thing(\n    name: str,\n    *parts: int,\n    size: Optional[int] = None,\n)",
        "What it is. See `Scorer`.\n\nRaises `ValueError` for none.",
        "| `name` | `str` |  | of the \\|thing\\|, `a|b`, &#123;1: 2} |",
        "| `*parts` | `int` |  | any number |",
        "| `size` | `Optional[int]` | `None` | in tokens |",
        "Bases: `Base`.",
        "### <code>Thing.forward</code> { #Thing.forward }",
        "| `rewards` | `TensorType['batch_size', 1, float]` |  | r |",
        "| **Returns** | `float` |  | scalar |",
        "| `prompt` | `str` | `''` | What was asked. |",
        "| `rewards` | `list[float]` |  | One for each. |",
        "| `user` | `Optional[str]` | `None` | Who asks. |",
        "| `more` | `dict` | `dict()` | for later |",
        "/module.py#L1)",
        "/module.py#L2)",
        "LIMIT = 3 # of things",
        "| `rows` | `int` |  | How many rows are read, at most. |",
        "| `name` | `str` |  | of the data |",
        "Where the rows are: a path, or a name. |",
        "| `size` | `int` | `1` | in rows |",
        "| `same` | `bool` | `False` |  |",
        "| `last` | `bool` | `True` |  |",
        "| **Returns** | `list[dict[str, Any]]` |  | the rows, in order |",
        (
            "    data: Annotated[\n"
            "        Union[str, Path, list[Union[str, Path]]],\n"
            "        Field(description='a path or a list of paths'),\n"
            "    ] = 'rows.jsonl',\n"
        ),
    )
    for part in parts:
        assert part in text, part
    assert "_own" not in text and "parent" not in text # which is documented by the class that has it first


def test_constants_are_narrow_and_the_same(docs):
    "A page shows them in lines that fit, with strings and brackets broken where they have to be."
    from signatures import WIDTH, narrowed

    num_broken = 0
    for _, cell in exported(docs):
        lines = cell.source.splitlines()
        for name, node in docs.definitions(cell):
            if isinstance(node, ast.Assign):
                written = lines[node.lineno - 1 : node.end_lineno]
                shown = narrowed(written)
                assert max(map(len, shown.splitlines())) <= WIDTH, name
                assert ast.dump(ast.parse(shown)) == ast.dump(ast.parse("\n".join(written))), name
                num_broken += shown != "\n".join(written)
    assert num_broken > 40


def test_outputs_as_they_are(docs, tmp_path):
    "Text in a fence that it does not hold, tables without pandas' style, pictures with what they show, nothing hidden."
    cell = nbformat.v4.new_code_cell
    output = nbformat.v4.new_output
    frame = '<div><style scoped>td {}</style><table border="1" class="dataframe"><td>7</td></table></div>'
    table = output("execute_result", data={"text/html": frame, "text/plain": "7"})
    picture = output("display_data", data={"image/png": "iVBORw0KGgo=", "text/plain": "<Figure>"})
    written = [
        cell("#| hide\nsecret = 1", outputs=[output("stream", text="hidden")]),
        cell("#| exporti\ndef _inner(): pass"),
        cell("print(card)", outputs=[output("stream", text="a\n```python\nb\n```\n")]),
        cell("table", outputs=[table]),
        cell("#| fig-alt: A curve\n#| fig-alt: A bar\nplot()", outputs=[picture, picture]),
        cell("#| echo: false\nplot()", outputs=[output("execute_result", data={"text/plain": "shown"})]),
        *map(nbformat.v4.new_markdown_cell, ("## Empty", "## Internals", "### Readers")),
        cell("#| exporti\ndef _read(): pass"),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=written), tmp_path / "page.ipynb")
    text, pictures = docs.markdown(tmp_path / "page.ipynb", str, {})
    for part in ("secret", "hidden", "_inner", "#|", "style", "## "):
        assert part not in text, part
    assert "````text\na\n```python\nb\n```\n````" in text and "<table><td>7</td></table>" in text
    for alt, name in zip(("A curve", "A bar"), pictures, strict=True):
        assert f"[![{alt}]({name})]({name})" in text, alt
    assert text.count("plot()") == 1 and "```text\nshown\n```" in text


def test_the_name_of_an_index_is_in_the_header_of_its_table(docs):
    import pandas as pd

    table = pd.DataFrame({"x": [1], "y": [2]}, index=pd.Index(["a"], name="step"))
    for columns in (table, table.rename_axis(columns="set"), pd.concat({"p": table, "q": table}, axis=1)):
        rows = re.findall(r"<tr.*?</tr>", docs.bare_table(columns.to_html()), flags=re.DOTALL)
        headers = [re.findall(r"<th[^>]*>(.*?)</th>", row) for row in rows]
        assert len(headers) == columns.columns.nlevels + 1
        assert headers[-2] == ["step", *["x", "y"] * columns.columns.nlevels]
    plain = table.rename_axis(None).to_html()
    assert docs.bare_table(plain) == plain.replace(' border="1" class="dataframe"', "")


def test_commands_can_be_pasted_and_have_no_progress_bars(docs):
    cell = nbformat.v4.new_code_cell("!rlhf_reward train run.yaml\n!ls")
    docs.as_commands(cell)
    assert (cell.source, cell.metadata["magics_language"]) == ("rlhf_reward train run.yaml\nls", "sh")
    for source in ("!ls {folder}", "!ls\nprint(1)", "print(1)"):
        cell = nbformat.v4.new_code_cell(source)
        docs.as_commands(cell)
        assert cell.source == source and not cell.metadata
    bars = "Scoring:  80%|███  | 4/5 [00:03<00:00,  1.30batch/s]\rScoring: 100%|████| 5/5 [00:03<00:00]\r\n"
    assert docs.without_bars(f"before\n\r{bars}100% | after 4/5 [x]\n") == "before\n100% | after 4/5 [x]\n"


def test_what_is_marked_for_the_style_of_the_site(docs):
    import hooks

    shown = hooks.on_page_content("<p>x --no</p><code>a -m b --output_dir <b>--x-y</b> c--d</code>")
    marked = '<span class="option">{}</span>'.format
    code = f"a {marked('-m')} b {marked('--output_dir')} <b>{marked('--x-y')}</b> c--d"
    assert shown == f"<p>x --no</p><code>{code}</code>"
    assert hooks.on_page_content("<td>see --x-y</td>") == f"<td>see {marked('--x-y')}</td>"
    printed = '<div class="language-text highlight{}"><pre><span></span><code>{}</code></pre></div>'.format
    for text, is_prose in (("one\ntwo words", True), ("a  b", False), ("a\n b", False)):
        assert hooks.on_page_content(printed("", text)) == printed(" prose" if is_prose else "", text)
    numbers = "<p>5 % of {}, <b>2</b> %</p><pre>5 % of 1e-5</pre><i>{}, a1e-5</i>".format
    assert hooks.on_page_content(numbers("1e-5", "2.5e-07")) == numbers(marked("1e-5"), marked("2.5e-07")).replace(
        "<p>5 %", "<p>5\u00a0%"
    )
    formula = '<td><span class="arithmatex" data-search-exclude>\\(-a 1e-5 %\\)</span></td>'
    assert hooks.on_page_content(formula.replace(" data-search-exclude", "")) == formula
    head = "<table>\n<thead>\n<tr>\n<th>{}</th>\n<th>Type</th>\n<th>Default</th>".format
    assert hooks.on_page_content(head("")) == head("").replace("<table>", "<table data-parameters>")
    assert hooks.on_page_content(head("x")) == head("x")
    head = '<table>\n<thead>\n<tr style="x">\n<th>option</th>\n<th>{}</th>\n<th>commands</th>'.format
    stacked = head("what it means").replace("<table>", "<table data-parameters data-options>")
    assert hooks.on_page_content(head("what it means")) == stacked
    assert hooks.on_page_content(head("x")) == head("x")


def test_imports_of_a_module_are_one_statement(docs):
    example = nbformat.v4.new_code_cell("first(a, second, _third, np)")
    source = "import numpy as np\nfrom x import a, b\nfrom rlhf_reward.m import second, _third\n"
    block = docs.import_block("m", ["first", "second"], [example], source)
    own = "from rlhf_reward.m import first, second, _third"
    assert block == f"```python\nimport numpy as np\nfrom x import a\n{own}\n```"


def test_constants_follow_what_they_are_of(docs):
    "The public class or function is first on a page, not a constant, unless a text before the constant is about it."
    def exported(source):
        return nbformat.v4.new_code_cell(f"#| export\n{source}")

    title, text = nbformat.v4.new_markdown_cell("# Title"), nbformat.v4.new_markdown_cell("## Words")
    constant, function = exported("WORDS = 1"), exported("SECOND = 2\ndef f():\n    pass")
    order = docs.with_constants_later([title, constant, text, function, text])
    assert order == [title, text, function, constant, text]
    unchanged = [title, text, constant, function]
    assert docs.with_constants_later(unchanged) == unchanged
    assert docs.with_constants_later([title, constant]) == [title, constant]
    firsts = {"report": "write_report", "rl": "RewardFunction", "comparison": "Comparison", "verdict": "Advantages"}
    for name, first in firsts.items():
        path = next(path for path, page in docs.PAGES.items() if page == f"{name}.md")
        text = docs.markdown(path, Path.as_posix, {})[0]
        assert re.search("^### <code>(.*)</code>", text, flags=re.MULTILINE)[1] == first, name


def test_a_link_is_not_called_by_the_name_of_a_notebook():
    "Readers of the site do not see the names of notebooks; a page is called by its title or its subject."
    wrong = []
    for path in notebooks():
        for cell in cells(path, "markdown"):
            wrong += [(path.name, label) for label in re.findall(r"\[(`?\d\d[a-z]?_\w+`?)\]\(", cell.source)]
    assert wrong == []


def test_headings_of_a_lesson_differ():
    for path in notebooks(ROOT / "nbs/tutorials") + notebooks(ROOT / "nbs/explanations"):
        text = "\n".join(cell.source for cell in cells(path, "markdown"))
        headings = Counter(re.findall(r"^#+ (.*)", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE))
        assert [heading for heading, count in headings.items() if count > 1] == [], path.name


def test_examples_import_names_of_the_data_from_one_module():
    parts = re.compile(r"from rlhf_reward\.(rows|loading|comparison) import")
    for path in notebooks():
        for cell in cells(path, "code"):
            is_example = "#| export" not in cell.source and "#| hide" not in cell.source
            assert not (is_example and parts.search(cell.source)), f"{path.name}: expected rlhf_reward.data"


def test_names_and_files_become_links(docs):
    def linked(text, path="nbs/tutorials/01_train.ipynb"):
        return docs.with_links(text, Path(path), lambda target: f"<{target}>", names)

    names = docs.names()
    scorer = "[`Scorer`](../scoring.md#Scorer)"
    expected = "[`Scorer.rank`](../ranks.md#BaseScorer.rank) and [`scoring.Scorer`](../scoring.md#Scorer)"
    assert linked("`Scorer.rank` and `scoring.Scorer`") == expected  # the class inherits the method
    expected = "[`evaluate`](../evaluation.md#evaluate), `evaluate`, `nothing`"
    assert linked("`evaluate()`, `evaluate`, `nothing`") == expected  # without () it is the command
    assert linked("`tokenize_rows`") == "[`tokenize_rows`](../tokens.md#tokenize_rows)"
    attention = "`attention_mask`, [`packing.attention_mask`](../attention.md#attention_mask)"  # where it is today
    assert linked("`attention_mask`, `packing.attention_mask`") == attention  # the first is a parameter
    assert linked("`from_pretrained`", "nbs/06_scoring.ipynb") == "`from_pretrained`"  # that of transformers
    assert linked("| `Scorer` | `Scorer` | [0, 1) |") == f"| `Scorer` | {scorer} | [0, 1) |"  # a parameter's name
    assert linked("in [0, 0.5) and `Scorer`") == f"in [0, 0.5) and {scorer}"
    links = "[a](../06_scoring.ipynb#x) [b](https://x.y) [`Scorer`](02_your_data.ipynb)"
    expected = "[a](<nbs/06_scoring.ipynb>#x) [b](https://x.y) [`Scorer`](<nbs/tutorials/02_your_data.ipynb>)"
    assert linked(links) == expected
    assert linked("# `Scorer`\n```python\n`Scorer`\n```") == "# `Scorer`\n```python\n`Scorer`\n```"
    two_pages = {"evaluate": {"a.md", "b.md"}}  # which of the two?
    assert docs.with_links("`evaluate`", Path("nbs/x.ipynb"), str, two_pages) == "`evaluate`"


def test_every_public_name_is_documented(docs, site):
    "Each function and class has a docstring, each parameter a type or a comment, and each has its place on its page."
    missing = []
    for path, cell in exported(docs):
        comments = docs.comments(cell)
        page = (site / docs.PAGES[path]).with_suffix(".html").read_text()
        for name, node in docs.definitions(cell):
            if f'id="{name}"' not in page:
                missing.append(f"{name} has no place on {docs.PAGES[path]}")
            if not isinstance(node, ast.Assign):
                missing += undocumented(docs, name, node, comments)
    assert missing == []


def undocumented(docs, name, node, comments):
    "Yield what a function or class lacks."
    methods = [method for method in getattr(node, "body", []) if isinstance(method, docs.FUNCTIONS)]
    inner = next((method for method in methods if method.name == "__init__"), node)
    if not (ast.get_docstring(node) or ast.get_docstring(inner) or name.endswith(".forward")):
        yield f"{name} has no docstring"
    for parameter, type_, _, comment in docs.parameters(inner, comments):
        if not comment and not type_:
            yield f"{name}: {parameter} has no type"
        elif not comment and name not in OVER_HTTP:  # vLLM documents its own fields
            yield f"{name}: {parameter} has no comment"


# The parts of requests and answers: their examples are requests.
OVER_HTTP = {
    "RequestModel", "Message", "ScoreRequest", "ScoreAnswer", "RankRequest", "RankedResponse", "RankAnswer",
    "ClassifyRequest", "ClassifyResult", "Usage", "ClassifyAnswer", "RewardRequest", "Problem", "QueueFull",
    "ClientRequest", "Document", "RerankRequest", "RerankResult", "RerankAnswer", "TEIRerankRequest", "TEIRank",
    "VLLMScoreRequest", "VLLMScore", "VLLMScoreAnswer", "ListAnswer", "PoolingRequest", "Pooling", "PoolingAnswer",
    "EmbeddingsRequest", "Embedding", "EmbeddingsAnswer", "TokenizeRequest", "TokenizeAnswer", "SGLangRequest",
    "SGLangResult", "PredictRequest", "Prediction", "SpreadAnswer", "VoyageRerankRequest", "VoyageRerankAnswer",
}


def is_form(node):
    "Whether a class is only the form of what functions take or return: its example is theirs."
    if not isinstance(node, ast.ClassDef):
        return False
    bases = {ast.unparse(base) for base in node.bases}
    is_dataclass = any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)
    return is_dataclass or bool(bases & {"TypedDict", "NamedTuple", *FORMS})


FORMS = {"Statistics", "EvaluationReport", "JackknifeInterval", "Targets", "Interval"}  # TypedDicts that others extend


def test_every_public_name_has_an_example_with_its_output(docs):
    "A base class has the examples of the classes that extend it."
    used = set()
    for path in docs.NOTEBOOKS:
        for cell in cells(path, "code"):
            if not docs.directives(cell) & {"export", "exporti", "hide", "default_exp"}:
                for node in docs.nodes(cell.source):
                    if isinstance(node, ast.Name):
                        used.add(node.id)
                    elif isinstance(node, ast.Attribute):
                        used.add(node.attr)
    defined = set()
    for _, cell in exported(docs):
        for name, node in docs.definitions(cell):
            if not isinstance(node, ast.Assign) and "." not in name and not is_form(node):
                defined.add(name)
            if isinstance(node, ast.ClassDef) and name in used:
                used.update(ast.unparse(base) for base in node.bases)
    assert len(defined) > 80 and sorted(defined - used - OVER_HTTP) == []


def names_bound_in(docs, source):
    "The names that the code of a cell binds: imports, assignments, parameters, definitions."
    bound = set(docs.imports(source))
    for node in docs.nodes(source):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            bound.add(node.id)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, (*docs.FUNCTIONS, ast.ClassDef, ast.ExceptHandler)):
            bound.add(node.name)
    return bound


@pytest.mark.parametrize("notebook", sorted((ROOT / "nbs").glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_reader_has_all_that_the_examples_use(docs, notebook):
    "The page binds the names in its visible cells: by its imports, by its reference, by an earlier cell."
    page = docs.shown(notebook.relative_to(ROOT), str, {})
    text = "\n\n".join(cell.source for cell in page.cells if cell.cell_type == "markdown")
    own = r"^```python\n((?:(?:import|from) .*\n)*from rlhf_reward\.\S+ import [^`]*)^```$"
    head = re.search(own, text, flags=re.MULTILINE)
    bound = set(dir(builtins)) | set(docs.imports(head[1] if head else ""))
    unseen = {"export", "exporti", "hide", "default_exp", "echo", "hide_input"}
    for cell in cells(notebook, "code"):
        if not docs.directives(cell) & unseen:
            bound |= names_bound_in(docs, cell.source)
            used = {node.id for node in docs.nodes(cell.source) if isinstance(node, ast.Name)}
            assert used <= bound, cell.source


# What README's first command installs, with the dependencies of its dependencies that pages import, and Jupyter.
INSTALLED = {
    "IPython",
    "datasets",
    "fastapi",
    "matplotlib",
    "pandas",
    "rlhf_reward",
    "safetensors",
    "torch",
    "transformers",
    "yaml",
}


@pytest.mark.parametrize("notebook", sorted((ROOT / "nbs/tutorials").glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_tutorial_can_be_typed(docs, notebook):
    "Its visible cells are enough: a hidden one binds no name for them and changes no folder. Other packages are named."
    bound = {*dir(builtins), "_exit_code"}
    packages = set()
    for cell in cells(notebook, "code"):
        if "hide" in docs.directives(cell):
            assert not re.search(r"^%cd|\bchdir\(", cell.source, flags=re.MULTILINE), cell.source
            continue
        bound |= names_bound_in(docs, cell.source)
        used = {node.id for node in docs.nodes(cell.source) if isinstance(node, ast.Name)}
        assert used <= bound, cell.source
        for statement in docs.imports(cell.source).values():
            packages.add(statement.split()[1].split(".")[0])
    text = "\n".join(cell.source for cell in cells(notebook, "markdown"))
    named = " ".join(re.findall(r"`pip install (.*?)`", text))
    others = packages - INSTALLED - set(sys.stdlib_module_names)
    assert {package for package in others if package not in named} == set()


# The page of a module → the class or function that its readers come for.
PRINCIPAL = {
    "adapters": "lora_config",
    "arguments": "RewardConfig",
    "averaging": "average_checkpoints",
    "benchmarks": "evaluate_benchmark",
    "checkpoint_files": "open_tokenizer",
    "comparison": "Comparison",
    "engine": "RewardEngine",
    "evaluation": "evaluate",
    "flip_features": "find_flips_in_rows",
    "flips": "find_flips",
    "head_start": "fit_head",
    "laplace": "fit_laplace",
    "length_calibration": "LengthCalibration",
    "length_losses": "LengthResidual",
    "loading": "load_rows",
    "mixtures": "mix_rows",
    "model_ranking": "rank_models",
    "omissions": "omissions",
    "overoptimization": "overoptimization",
    "report": "write_report",
    "reward": "RewardModel",
    "rl": "RewardFunction",
    "rl_loops": "OpenRLHFReward",
    "scoring": "Scorer",
    "serving": "serve",
    "sft_adapters": "merge_sft_adapter",
    "suite": "suite_table",
    "tokens": "tokenize_rows",
    "training": "RewardTrainer",
    "verdict": "verdict",
    "verify": "Verifier",
}


def needed_to_define(docs, node, nodes):
    "The names that have to exist before a class or function is defined: bases, decorators, annotations, defaults."
    parts = [*node.decorator_list, *getattr(node, "bases", [])]
    functions = [node]
    if isinstance(node, ast.ClassDef):
        functions = [part for part in node.body if isinstance(part, docs.FUNCTIONS)]
        parts += [part for part in node.body if part not in functions]
    for function in functions:
        parts += [function.args, function.returns, *function.decorator_list]
    needed = set()
    for part in filter(None, parts):
        needed |= {name.id for name in ast.walk(part) if isinstance(name, ast.Name)} & nodes.keys()
    others = {name: other for name, other in nodes.items() if name not in needed}
    for name in list(needed):
        needed |= needed_to_define(docs, nodes[name], others)
    return needed


def test_a_page_begins_with_what_its_readers_come_for(docs):
    "Its first class or function is public, or needed to define it; then come the forms of results, and the principal."
    opening = {}
    wrong = {}
    for path in docs.NOTEBOOKS:
        nodes = {}
        shown = []  # up to the first that is not only a form
        for cell in docs.read(path).cells:
            kinds = docs.directives(cell) & {"export", "exporti"}
            for node in ast.parse(cell.source).body if kinds else ():
                if isinstance(node, (*docs.FUNCTIONS, ast.ClassDef)) and (not shown or is_form(nodes[shown[-1]])):
                    nodes[node.name] = node
                    shown += [node.name] if "export" in kinds and not node.name.startswith("_") else []
        if shown:
            first = nodes[shown[0]]
            before = list(nodes)[: list(nodes).index(first.name)]
            wrong[path.name] = set(before) - needed_to_define(docs, first, nodes)
            opening[docs.PAGES[path].removesuffix(".md")] = shown
    assert {name: names for name, names in wrong.items() if names} == {}
    bases = {"LengthResidual": "NoLengthLoss"}  # which its page shows first
    missing = [page for page, name in PRINCIPAL.items() if bases.get(name, name) not in opening[page]]
    assert missing == [], {page: opening[page] for page in missing}


# ----- code in Markdown

def rated_by_attribute(row):
    "A row with ratings of two attributes."
    rows = {"prompt": row["prompt"], "responses": row["responses"]}
    return {**rows, "ratings": {"helpfulness": row["scores"], "correctness": [1, None, 2, 3]}}


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    "The folder that commands on the pages expect: data, a trained model, a model and a benchmark by hub names."
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    from rlhf_reward import RewardModel
    from rlhf_reward.benchmarks import REWARDBENCH
    from rlhf_reward.synthetic import synthetic_comparisons, synthetic_texts, tiny_decoder

    folder = tmp_path_factory.mktemp("desk")
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tiny_decoder(folder / "tiny", synthetic_texts()))
    tokenizer.chat_template = (  # as chat models have one
        "{% for message in messages %}<{{ message.role }}>{{ message.content }}{{ eos_token }}{% endfor %}"
    )
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=4096,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder / "Qwen/Qwen3-0.6B")
    tokenizer.save_pretrained(folder / "Qwen/Qwen3-0.6B")
    RewardModel(str(folder / "Qwen/Qwen3-0.6B"), device="cpu").save_pretrained(folder / "my-reward-model", tokenizer)
    ranked = list(synthetic_comparisons(40))
    by_prompt = {row["prompt"]: row for row in ranked}
    pairs = [best_and_worst(row) for row in by_prompt.values()]
    thumbs = []
    for row in pairs:
        for column, label in (("chosen", True), ("rejected", False)):
            thumbs.append({"prompt": row["prompt"], "completion": row[column], "label": label})
    Dataset.from_list([in_messages(row) for row in pairs]).to_parquet(folder / "chats.parquet")
    benchmark = []
    for weights in REWARDBENCH.values():
        benchmark += [{**pairs[0], "subset": subset} for subset in weights]
    (folder / "allenai/reward-bench/data").mkdir(parents=True)
    files = {
        "ranked": ranked,
        "pairs": pairs,
        "heldout": pairs,
        "rated": [rated_by_attribute(row) for row in ranked],
        "thumbs": thumbs,
        "rows": [{"prompt": row["prompt"], "response": row["chosen"]} for row in pairs],
        "allenai/reward-bench/data/filtered-00000-of-00001": benchmark,
    }
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def in_messages(row):
    "A pair as conversations."
    prompt = [{"role": "user", "content": row["prompt"]}]
    answers = {column: [{"role": "assistant", "content": row[column]}] for column in ("chosen", "rejected")}
    return {"prompt": prompt, **answers}


def best_and_worst(row):
    "The pair of a comparison's best response and its worst."
    scores = row["scores"]
    chosen = row["responses"][scores.index(max(scores))]
    rejected = row["responses"][scores.index(min(scores))]
    return {"prompt": row["prompt"], "chosen": chosen, "rejected": rejected}


def markdown_texts():
    files = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
    texts = {path: path.read_text() for path in [*files, *sorted((ROOT / "benchmarks/results").glob("*.md"))]}
    for path in notebooks():
        if path.name != "index.ipynb":  # of which README is made
            texts[path] = "\n\n".join(cell.source for cell in cells(path, "markdown"))
    return texts


def markdown_blocks(kind):
    blocks = []
    for path, text in markdown_texts().items():
        found = re.findall(rf"^```{kind}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
        blocks += [pytest.param(block, id=f"{path.stem}-{number}") for number, block in enumerate(found)]
    return blocks


def commands(block):
    starts = r"\n(?=rlhf_reward|python|pip|make|accelerate|curl|vllm)"
    return [command for command in re.split(starts, block.replace("\\\n", " ").strip()) if command]


def test_code_is_of_a_kind_that_is_run():
    for path, text in markdown_texts().items():
        fences = re.findall(r"^ *(?:```+|~~~+)(.*)$", text, flags=re.MULTILINE)
        assert set(fences[::2]) <= {"sh", "python", "text"} and set(fences[1::2]) <= {""}, path


COMMAND = re.compile(r"(\$ )?(rlhf_reward|python|pip|git|make|accelerate|curl|vllm|[A-Z_]+=)")  # how a command begins


def test_commands_fit_the_page():
    "A command that is too long for a page of 1280 pixels is broken with a backslash, not by the browser."
    fits = 96  # characters, next to the button that copies
    long = []
    for path, text in markdown_texts().items():
        for kind, block in re.findall(r"^```(sh|text)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
            for command in re.split(r"(?<!\\)\n", block):
                if kind == "sh" or COMMAND.match(command):  # other text is wrapped: it is printed
                    long += [(path.name, line) for line in command.split("\n") if len(line) > fits]
    for path in notebooks():
        for cell in cells(path, "code"):
            lines = [line.removeprefix("!") for line in cell.source.splitlines() if line.startswith("!")]
            long += [(path.name, line) for line in lines if len(line) > fits]
    assert long == []


SHELL_BLOCKS = markdown_blocks("sh")
COMMAND_BLOCKS = [block for block in SHELL_BLOCKS if "curl" not in block.values[0]]
REQUEST_BLOCKS = [block for block in SHELL_BLOCKS if "curl" in block.values[0]]
ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "TQDM_DISABLE": "1"}


@pytest.mark.parametrize("block", COMMAND_BLOCKS)
def test_commands_on_the_pages_run(block, desk, python):
    for command in commands(block):
        words = shlex.split(command.split("<<")[0], comments=True)
        if words[0] == "make":  # tests that call the tests would have no end
            run("make", "--dry-run", "--always-make", *words[1:], cwd=ROOT)
        elif words[0] == "pip":
            check_extras(words)
        elif words[0] == "python" and words[1].startswith("benchmarks/"):
            check_options(python, words)  # it takes an hour, and data that is not here
        elif words[:2] == ["rlhf_reward", "serve"]:
            with Server(python, words, desk):
                pass
        else:
            shutil.rmtree(desk / "report", ignore_errors=True)
            (desk / "scored.jsonl").unlink(missing_ok=True)
            trained = desk / "my-reward-model"
            kept = shutil.copytree(trained, desk / "kept", dirs_exist_ok=True)
            run_in_shell(python, command, desk, ENVIRONMENT)
            shutil.rmtree(trained)
            kept.rename(trained)


def run_in_shell(python, command, folder, environment):
    "Run a command as a reader would, with `rlhf_reward` and `python` from the folder of the interpreter."
    path = os.pathsep.join([str(Path(python).parent), str(Path(sys.executable).parent), os.environ["PATH"]])
    return run("bash", "-ec", command, cwd=folder, environment={**environment, "PATH": path})


def check_extras(words):
    "`pip install 'rlhf_reward[…]'` names extras that there are."
    settings = (ROOT / "settings.ini").read_text()
    extras = re.search(r"\[(.*)\]", words[-1])[1].split(",")
    assert words[1] == "install"
    assert [extra for extra in extras if f"{extra}_requirements" not in settings] == []


def check_options(python, words):
    "A script knows the options that it is called with."
    printed = run(python, ROOT / words[1], "--help", environment=ENVIRONMENT).stdout
    assert printed and {word for word in words if word.startswith("--")} <= set(re.findall(r"--\w+", printed))


class Server:
    "`rlhf_reward serve …`, on a port that is free instead of 8000, from its first answer to the end of the block."
    def __init__(self, python, words, folder):
        self.port = free_port()
        words = [*words, "--port", str(self.port)]  # the last one counts
        environment = {name: value for name, value in os.environ.items() if name != "RLHF_REWARD_TOKEN"}
        self.log = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [python, "-m", *words],
            cwd=folder,
            env={**environment, **ENVIRONMENT},
            stdout=self.log,
            stderr=self.log,
            start_new_session=True,
        )

    def __enter__(self):
        for _ in range(240):
            assert self.process.poll() is None, self.printed()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=1)
                return self
            except OSError:
                threading.Event().wait(0.25)
        kill_group(self.process)
        raise AssertionError(f"The server did not answer for a minute:\n{self.printed()}")

    def __exit__(self, *_):
        self.process.terminate()
        try:
            self.process.wait(30)
        finally:
            kill_group(self.process)

    def printed(self):
        self.log.seek(0)
        return self.log.read()


def free_port():
    with http.server.HTTPServer(("127.0.0.1", 0), None) as server:
        return server.server_port


def test_requests_on_the_pages_are_answered(desk, python):
    blocks = [block.values[0] for block in REQUEST_BLOCKS]
    assert len(blocks) >= 5
    serve = ["rlhf_reward", "serve", "--model", "my-reward-model", "--port", "8000", "--device", "cpu"]
    with Server(python, serve, desk) as server:
        for block in blocks:
            request = block.replace("curl -sS", "curl -sS --fail-with-body")
            request = request.replace("127.0.0.1:8000", f"127.0.0.1:{server.port}")
            assert run_in_shell(python, request, desk, {}).stdout, block


def test_python_on_the_pages_is_in_cells(desk, python):
    "Cells run in `test_notebooks.py`; README has those of the index. Nothing would run a block in Markdown."
    blocks = [block for block in markdown_blocks("python") if not block.id.startswith("README")]
    assert blocks == []
    code = "\n\n".join(block.values[0] for block in markdown_blocks("python"))
    assert "RewardTrainer" in code
    hidden = cells(ROOT / "nbs/index.ipynb", "code")[0].source  # makes a tiny model of that name, and the rows
    run(python, "-c", f"{hidden}\n{code}", cwd=desk)


# ----- in a browser

class SiteHandler(http.server.SimpleHTTPRequestHandler):
    """
    Serves the site, and of the search one entry unless `has_search`.

    A browser takes longer for the whole index than for all the rest of a page. What pages share is asked for once.
    """
    protocol_version = "HTTP/1.1"
    has_search = False

    def do_GET(self):
        if self.path.endswith("/search_index.json") and not SiteHandler.has_search:
            index = json.loads(Path(self.translate_path(self.path)).read_text())
            body = json.dumps({**index, "docs": index["docs"][:1]}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        else:
            super().do_GET()

    def end_headers(self):
        if "/assets/" in self.path:
            self.send_header("Cache-Control", "max-age=3600")
        super().end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def browser(site, chromium):
    "Chromium, and `address`, where it finds the site."
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(SiteHandler, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    chromium.address = f"http://127.0.0.1:{server.server_port}/"
    yield chromium
    server.shutdown()


def open_page(browser, name, width=1280, scheme="light"):
    "Open a page of the site in a window of its own."
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    collect_wrong(page, browser.address)
    page.goto(urljoin(browser.address, name))  # until its scripts have run
    page.wait_for_load_state("networkidle")
    return page


def collect_wrong(page, address):
    "Let `page.wrong` collect messages on the console, requests to elsewhere, and failed requests."
    page.wrong = []

    def note_message(message):
        if message.type in ("error", "warning"):
            page.wrong.append(message.text)

    def note_request(request):
        if not request.url.startswith((address, "data:", "blob:")):
            page.wrong.append(request.url)

    def note_response(response):
        if response.status >= 400:
            page.wrong.append(f"{response.status} {response.url}")

    page.on("console", note_message)
    page.on("pageerror", lambda error: page.wrong.append(str(error)))
    page.on("request", note_request)
    page.on("response", note_response)


TABS = 4
LESSONS = ("tutorials", "explanations")
SEEN = """() => {
    const all = selector => [...document.querySelectorAll(selector)];
    const links = all("a").map(link => link.textContent);
    const linked = text => links.filter(link => link.includes(text)).length;
    return {
        formulas: all(".arithmatex").length,
        typeset: all(".arithmatex .katex").length,
        wrongFormulas: all(".katex-error").length,
        hasDollars: document.querySelector("article").innerText.includes("$$"),
        notDescribed: all("article img").filter(image => !image.alt).length,
        styles: all("link[href$='assets/site.css']").length,
        opened: linked("Open this notebook"),
        downloaded: linked("Download it"),
        inColab: linked("Open in Colab"),
    };
}"""
SEEN_AT_A_WIDTH = """() => ({
    width: document.documentElement.scrollWidth,
    hasPictures: [...document.images].every(image => image.complete && image.naturalWidth > 0),
    scrolled: [...document.querySelectorAll("article pre code, article .md-typeset__scrollwrap")]
        .filter(block => block.scrollWidth > block.clientWidth).map(block => block.innerText),
    scrolledCommands: [...document.querySelectorAll("article .language-sh pre code")]
        .filter(block => block.scrollWidth > block.clientWidth).map(block => block.innerText),
    broken: [...document.querySelectorAll("article .option")]
        .filter(option => option.getClientRects().length > 1).map(option => option.innerText),
    scrolledFormulas: [...document.querySelectorAll("article .arithmatex")]
        .filter(formula => formula.scrollWidth > formula.clientWidth).map(formula => formula.innerText),
    covered: [...document.querySelectorAll("article pre > .md-code__nav")].filter(nav => {
        const code = nav.parentElement.querySelector("code");
        const top = code.getBoundingClientRect().top + parseFloat(getComputedStyle(code).paddingTop);
        return nav.offsetHeight && getComputedStyle(nav).opacity > 0 && nav.getBoundingClientRect().bottom > top + 1;
    }).map(nav => nav.parentElement.innerText),
    scrolledParameters: [...document.querySelectorAll("article [data-parameters]")]
        .filter(table => table.scrollWidth > table.clientWidth).map(table => table.innerText),
})"""


def test_every_page_at_desktop_and_phone_width(browser, site):
    """
    No error, no request that leaves the machine, formulas typeset, pictures there.

    Nothing scrolls sideways, no line ends inside the name of an option, and the button that copies covers no code.
    """
    paths = sorted(path for path in site.rglob("*.html") if path.name != "404.html")  # of the published site
    context = browser.new_context(reduced_motion="reduce")  # otherwise it is drawn many times
    tabs = [context.new_page() for _ in range(TABS)]
    waiting = iter(paths)

    def load_next(page):
        path = next(waiting, None)
        if path:
            page.goto(urljoin(browser.address, path.relative_to(site).as_posix()), wait_until="commit")

    for page in tabs:
        collect_wrong(page, browser.address)
        page.set_viewport_size({"width": 1280, "height": 900})
        load_next(page)
    formulas = 0
    for number, path in enumerate(paths):
        name = path.relative_to(site).as_posix()
        page = tabs[number % TABS]  # while one is read, the others load
        page.wait_for_load_state("load")  # its scripts have run
        page.wait_for_load_state("networkidle")
        seen = page.evaluate(SEEN)
        formulas += seen["formulas"]
        assert seen["typeset"] == seen["formulas"] and seen["wrongFormulas"] == 0 and not seen["hasDollars"], name
        assert seen["notDescribed"] == 0 and seen["styles"] == 1, name
        is_lesson = path.parent.name in LESSONS
        if path.stem not in ("changelog", "contributing") and path.parent.name != "benchmarks":
            assert (seen["opened"], seen["downloaded"], seen["inColab"]) == (1, 1, is_lesson), name
        own_width = page.viewport_size["width"]  # the other one is that of the tab's next page too
        for width in (own_width, 1280 + 390 - own_width):
            page.set_viewport_size({"width": width, "height": 900})
            seen = page.evaluate(SEEN_AT_A_WIDTH)
            assert seen["hasPictures"] and seen["width"] <= width, name
            assert width != 1280 or seen["scrolled"] == [], name
            assert seen["scrolledFormulas"] == [] and seen["covered"] == [], name
            assert seen["broken"] == [] and seen["scrolledParameters"] == [] and seen["scrolledCommands"] == [], name
        assert page.wrong == [], name
        load_next(page)
    context.close()
    assert formulas > 20


def test_tables_can_be_read_on_a_phone(browser):
    "Numbers and words stay whole; where a table is too wide for that, it is scrolled."
    broken = """[...document.querySelectorAll("article td")].flatMap(cell => {
        const walker = document.createTreeWalker(cell, NodeFilter.SHOW_TEXT), found = [];
        const whole = document.createRange();
        while (walker.nextNode()) {
            if (walker.currentNode.parentElement.closest("code")) continue; // names are long
            whole.selectNodeContents(walker.currentNode);
            if (whole.getClientRects().length < 2) continue; // all in one line
            for (const word of walker.currentNode.textContent.matchAll(/[\\p{L}\\d.]+/gu)) {
                const range = document.createRange();
                range.setStart(walker.currentNode, word.index);
                range.setEnd(walker.currentNode, word.index + word[0].length);
                if (new Set([...range.getClientRects()].map(box => Math.round(box.top))).size > 1) found.push(word[0]);
            }
        }
        return found;
    })"""
    page = open_page(browser, "index.html", 390)
    for name in ("index.html", "reward.html", "training.html", "tutorials/many_gpus.html", "benchmarks/cpu.html"):
        page.goto(urljoin(browser.address, name))
        assert page.locator("article td").count() > 4 and page.evaluate(broken) == [], name
    page.goto(urljoin(browser.address, "tutorials/moving.html"))
    table = page.locator("article table").first  # of long code in two columns
    assert table.evaluate("table => table.scrollWidth <= table.clientWidth")
    codes = """[...document.querySelectorAll("article td:first-child > code")]
        .filter(code => code.getClientRects().length > 1).map(code => code.innerText)
        .filter(text => /^\\w+$/.test(text))"""
    for name in ("benchmarks.html", "tutorials/rankings.html", "cli.html"):
        page.goto(urljoin(browser.address, name))
        assert page.evaluate(codes) == [], name
    widths = page.locator("article [data-options] td").evaluate_all("cells => cells.map(cell => cell.clientWidth)")
    assert len(widths) > 20 and min(widths[1::3] + widths[2::3]) > 300
    page.goto(urljoin(browser.address, "arguments.html"))
    types = page.locator("article [data-parameters] td:nth-child(2)")
    texts, heights = types.all_inner_texts(), types.evaluate_all("cells => cells.map(cell => cell.clientHeight)")
    assert len(texts) > 20 and [text for text, height in zip(texts, heights) if len(text) < 40 and height > 30] == []
    page.close()


SCREENSHOTS = [
    ("index.html", 1280, "light"),
    ("reward.html", 1280, "light"),
    ("losses.html", 390, "dark"),
    ("explanations/each_token_once.html", 1280, "dark"),
    ("tutorials/train.html", 390, "light"),
    ("tutorials/is_it_good.html", 1280, "light"),
    ("index.html", 390, "dark"),
]


def test_the_page_of_the_model(browser):
    page = open_page(browser, "reward.html")
    for place in ("RewardModel", "RewardModel.forward", "PairwiseLoss", "PairwiseLoss.forward"):
        heading = page.locator(f'[id="{place}"]')
        assert heading.is_visible()
        header = heading.locator("xpath=following::table[1]//tr[1]/th") if place != "PairwiseLoss" else None
        assert header is None or header.all_inner_texts()[1:] == ["Type", "Default", "Details"]
    assert page.locator("a", has_text="Open this notebook").get_attribute("href").endswith("nbs/01_reward.ipynb")
    assert page.locator("article a", has_text="Source").first.get_attribute("href").startswith("https://github.com/")
    if os.environ.get("SITE_SCREENSHOTS"):
        for name, width, scheme in SCREENSHOTS:
            path = Path(os.environ["SITE_SCREENSHOTS"], f"{Path(name).stem}_{width}_{scheme}.png")
            open_page(browser, name, width, scheme).screenshot(path=path, full_page=True)


SEARCHED = {"PairwiseLoss": "reward.html", "--lora_r": "tutorials/", "--on_overlong truncate_prompt": "tutorials/"}


def test_search_finds(browser, monkeypatch):
    monkeypatch.setattr(SiteHandler, "has_search", True)
    page = open_page(browser, "index.html")
    page.locator("label.md-search__icon, .md-search__input").first.click()
    results = "[...document.querySelectorAll('.md-search-result__item a')]"
    for words, found in SEARCHED.items():
        page.locator(".md-search__input").fill("")
        page.wait_for_function(f"{results}.length === 0")
        page.locator(".md-search__input").press_sequentially(words)
        page.wait_for_function(f"found => {results}.some(link => link.href.includes(found))", arg=found)
    assert page.wrong == []


def test_dark_and_light(browser):
    for scheme, name in (("light", "default"), ("dark", "slate")):
        body = open_page(browser, "index.html", scheme=scheme).locator("body")
        assert body.get_attribute("data-md-color-scheme") == name
