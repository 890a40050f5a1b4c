"Prepare the cells of a notebook for its page: their outputs, and no heading that nothing follows."
import re
import textwrap

from signatures import WIDTH

# The last row of column names, from its first cell on, and the row below it, which has the name of the index alone.
INDEX_NAME = re.compile(
    r"(<tr[^>]*>\s*<th>)[^<]*(</th>(?:(?!<tr).)*</tr>)"
    r"\s*<tr>\s*<th>([^<]+)</th>(?:\s*<th></th>)+\s*</tr>(?=\s*</thead>)",
    flags=re.DOTALL,
)


def is_picture(output):
    return bool({"image/png", "image/svg+xml"} & output.get("data", {}).keys())


def join_streams(cell):
    "Join the parts in which a kernel sent the output of a shell command."
    joined = []
    for output in cell.outputs:
        if joined and output.output_type == "stream" == joined[-1].output_type and output.name == joined[-1].name:
            joined[-1].text += output.text
        else:
            joined.append(output)
    cell.outputs = joined


def without_bars(text):
    "Return printed text without its progress bars, whose lines a terminal writes over each other."
    return re.sub(r"^[^\n]*\d%\|[^\n]*\| \d+/\d+ \[[^\n]*\][ \r]*\n?", "", text, flags=re.MULTILINE)


def as_commands(cell):
    "Turn a code cell of shell commands alone into what can be pasted into a terminal."
    lines = cell.source.splitlines()
    if cell.cell_type == "code" and lines and all(line.startswith("!") for line in lines) and "{" not in cell.source:
        cell.source = "\n".join(line.removeprefix("!") for line in lines)
        cell.metadata["magics_language"] = "sh"  # nbconvert names the block after it


def fenced(output):
    "Return printed text in a fence that it does not contain."
    fence = "```"
    while fence in output:
        fence += "`"
    return "\n{0}text\n{1}\n{0}\n".format(fence, output.strip("\n"))


def bare_table(html):
    "Return a table of pandas without its style, and with the name of its index in the first cell of its header."
    bare = re.sub(r"<style scoped>.*?</style>\n?|( border=\"1\")? class=\"dataframe\"", "", html, flags=re.DOTALL)
    return INDEX_NAME.sub(r"\1\3\2", bare)


def without_empty_sections(cells):
    "Return the cells without headings that nothing follows before a heading of the same level, or the end."
    kept = []
    next_level = 1  # of the heading that follows, 7 for anything else; the end of a page counts as a title
    for cell in reversed(cells):
        if not cell.source and not cell.get("outputs"):
            continue
        text = cell.source if cell.cell_type == "markdown" else ""
        heading = re.match(r"(#+) (?!<code>)", text)  # not that of a reference, which is content
        level = len(heading[1]) if heading else 7
        if heading and level >= next_level and "\n" not in text.strip():
            continue
        next_level = level
        kept.append(cell)
    return kept[::-1]


def import_statement(start, names):
    "Return `from … import` with the names, in brackets if they do not fit a line."
    statement = f"{start} import {', '.join(names)}"
    if len(statement) <= WIDTH:
        return statement
    listed = textwrap.fill(", ".join(names) + ",", 96, initial_indent="    ", subsequent_indent="    ")
    return f"{start} import (\n{listed}\n)"
