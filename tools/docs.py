"""
Convert notebooks to Markdown.

`python tools/docs.py readme` writes README.md, and `python tools/docs.py site` writes the pages of the site into
_proc/. An exported cell becomes the reference of the names that it defines, read from its source alone; all other
cells stay as they are in the notebook. Run it in the root of the project.
"""
import ast
import copy
import functools
import json
import os
import re
import shutil
import sys
from pathlib import Path

import nbformat
from cells import (
    as_commands, bare_table, fenced, import_statement, is_picture, join_streams, without_bars, without_empty_sections,
)
from nbconvert import MarkdownExporter
from reference import CONFIG, SOURCE_URL, definitions, is_constant, parameters, references
from reference import FUNCTIONS as FUNCTIONS, comments as comments  # for the tests
from schemes import for_both_schemes

LIBRARY = CONFIG["DEFAULT"]["lib_path"]
ASSETS = Path("docs/assets")  # copied to the site, where pages show its pictures

TEMPLATE = """{%- extends 'markdown/index.md.j2' -%}
{% block input %}{{ super() if cell.source }}{% endblock %}
{% block stream %}{{ output.text | strip_ansi | without_bars | fenced }}{% endblock %}
{%- macro picture(output, file) %}
[![{{ output.metadata.alt }}]({{ file | path2url }})]({{ file | path2url }})
{% endmacro -%}
{% block data_png %}{{ picture(output, output.metadata.filenames['image/png']) }}{% endblock %}
{% block data_svg %}{{ picture(output, output.metadata.filenames['image/svg+xml']) }}{% endblock %}
{% block data_text %}{{ output.data['text/plain'] | strip_ansi | fenced }}{% endblock %}
{% block data_html %}{{ output.data['text/html'] | bare_table }}{% endblock %}"""

COLAB_URL = SOURCE_URL.replace("https://github.com", "https://colab.research.google.com/github")
IN_COLAB = f"Run first: !pip install '{LIBRARY}[plots,peft] @ git+{CONFIG['DEFAULT']['git_url']}'"

# Front matter of tutorials and explanations: the search shows the glossary, then them, before the reference of a class.
LESSON = "---\nsearch:\n  boost: {boost}\n---\n\n"
BOOST, GLOSSARY_BOOST = 3, 8  # with 2 the search for margin began with margin_spread

# Code, headings, the first column of a parameter table, and links: no name inside them becomes a link.
PROTECTED = re.compile(
    r"(^```.*?^```$"
    r"|^#.*?$"
    r"|^\| `.*?` \|"
    r"|!?\[[^\[\]\n]*\]\([^)\n]*\))",
    flags=re.MULTILINE | re.DOTALL,
)


# ----- notebooks, pages and modules


def is_source(path):
    "False for copies that a run or Jupyter made."
    return not {"runs", ".ipynb_checkpoints"} & set(path.parts)


def page(path):
    "Return the page of a file: nbs/06_scoring.ipynb → scoring.md."
    if path.suffix == ".ipynb":
        parts = path.relative_to("nbs").with_suffix(".md").parts
        return "/".join(re.sub(r"^\d+[a-z]?_", "", part) for part in parts)
    if path.parts[0] == "benchmarks":
        return f"benchmarks/{path.name}"
    return path.name.lower()


def directives(cell):
    "Return the names of the nbdev directives of a code cell."
    if cell.cell_type != "code":
        return set()
    return set(re.findall(r"^#\|\s*(\w+)", cell.source, flags=re.MULTILINE))


def module_of(notebook):
    "Return the dotted module that a notebook is exported to, without the package: serving.batching; None for none."
    for cell in notebook.cells:
        match = re.search(r"^#\|\s*default_exp\s+([\w.]+)", cell.source, flags=re.MULTILINE)
        if match and cell.cell_type == "code":
            return match[1]
    return None


def module_file(module):
    "Return the path of a module: serving.batching → rlhf_reward/serving/batching.py."
    return f"{LIBRARY}/{module.replace('.', '/')}.py"


@functools.cache
def read(path):
    "Return a notebook, which stays as it is: reading one takes longer than all else that is done with it."
    return nbformat.read(path, as_version=4)


NOTEBOOKS = sorted(filter(is_source, Path("nbs").rglob("*.ipynb")))
TEXTS = [Path("CHANGELOG.md"), Path("CONTRIBUTING.md"), *sorted(Path("benchmarks/results").glob("*.md"))]
PAGES = {path: page(path) for path in [*NOTEBOOKS, *TEXTS]}
MODULES = {PAGES[path]: module_of(read(path)) for path in NOTEBOOKS}


# ----- names and links


@functools.cache
def all_definitions():
    "Return (page, name, node) of each public definition of the library."
    found = []
    for path in NOTEBOOKS:
        for cell in read(path).cells:
            if "export" in directives(cell):
                found += [(PAGES[path], name, node) for name, node in definitions(cell)]
    return found


def inherited_methods():
    "Return where the methods that a class inherits are defined, by name: Scorer.rank → BaseScorer.rank."
    definitions = {name: node for _, name, node in all_definitions()}

    def bases(name):
        for base in getattr(definitions.get(name), "bases", []):
            yield ast.unparse(base)
            yield from bases(ast.unparse(base))

    inherited = {}
    for name, node in definitions.items():
        for base in bases(name):
            for method in definitions:
                own_name = f"{name}.{method.removeprefix(f'{base}.')}"
                if method.startswith(f"{base}.") and own_name not in definitions:
                    inherited.setdefault(own_name, method)
    return inherited


INHERITED = inherited_methods()


def names():
    """
    Return the pages that have the reference of a name, by name.

    A function whose name is one lower-case word, or also the name of some parameter, is listed as `name()`.
    """
    pages = {}
    parameter_names = set()
    for own_page, name, node in all_definitions():
        pages.setdefault(name, set()).add(own_page)
        if not isinstance(node, ast.Assign):
            parameter_names.update(parameter.name for parameter in parameters(node, {}))

    for name, method in INHERITED.items():
        pages[name] = pages[method]

    def listed(name):
        is_plain = name.islower() and ("_" not in name or name in parameter_names)
        return f"{name}()" if is_plain else name

    return {listed(name): name_pages for name, name_pages in pages.items()}


def belongs(own_page, module):
    "True if a page has the reference of a module, written as on a page: packing, serving, serving.batching, batching."
    own = MODULES.get(own_page) or ""
    return own == module or own.startswith(f"{module}.") or own.endswith(f".{module}")


def pages_of(text, is_called, found):
    "Return the pages that may have the reference of `text`: Scorer.rank, scoring.Scorer, rlhf_reward.serving.serve."
    module, name = re.fullmatch(r"((?:[a-z_0-9]+\.)*)(.+)", text).groups()
    module = module.rstrip(".")
    is_qualified = bool(module)
    module = re.sub(rf"^{LIBRARY}(\.|$)", "", module)
    pages = set(found.get(name, ()))
    if is_called or is_qualified:
        called = found.get(f"{name}()", set())
        pages |= {own_page for own_page in called if not belongs(own_page, "cli")}  # those are written as commands
    if module:
        own_pages = {own_page for own_page in pages if belongs(own_page, module)}
        is_module = Path(module_file(module)).exists() or Path(LIBRARY, module).is_dir()
        return own_pages or (pages if is_module else set())  # a module may have a name that moved to another
    return pages


def with_links(text, path, to_page, found):
    "Return the text with links to files turned into links to pages, and names in backticks linked to their reference."
    own = PAGES.get(path)

    def to_file(match):
        target = Path(os.path.normpath(path.parent / match[1]))
        return f"]({to_page(target)}{match[2] or ''})" if target.exists() else match[0]

    def to_name(match):
        pages = pages_of(match[1], match[0].endswith("()`"), found)
        if own not in pages and len(pages) != 1:
            return match[0]
        target = own if own in pages else min(pages)
        anchor = re.sub(r"^([a-z_0-9]+\.)*", "", match[1])
        anchor = INHERITED.get(anchor, anchor)
        return f"[`{match[1]}`]({os.path.relpath(target, Path(own).parent)}#{anchor})"

    parts = PROTECTED.split(text)
    for index, part in enumerate(parts):
        if index % 2:
            parts[index] = re.sub(r"\]\((?!\w+:|#)([^)#\s]+)(#[^)]*)?\)", to_file, part)
        else:
            parts[index] = re.sub(r"`(\w[\w.]*)(?:\(\))?`", to_name, part)
    return "".join(parts)


# ----- conversion


@functools.cache
def nodes(source):
    "Return all syntax nodes of the source of cells, without shell lines."
    return list(ast.walk(ast.parse(re.sub(r"^[!%].*", "", source, flags=re.MULTILINE))))


def imports(source):
    "Return the import statement that binds a name, by name."
    statements = {}
    for node in nodes(source):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                is_from = isinstance(node, ast.ImportFrom)
                statement = ast.ImportFrom(node.module, [alias], 0) if is_from else ast.Import([alias])
                statements[alias.asname or alias.name.split(".")[0]] = ast.unparse(statement)
    return statements


def import_block(module, public, cells, source):
    "Return a code block with the imports that the examples of a page use; those of its module are last."
    shown = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    used = {node.id for node in nodes(shown) if isinstance(node, ast.Name)} - imports(shown).keys()
    lines = set()
    names = {}  # by the module that they are imported from
    for name, line in imports(source).items():
        start, _, imported = line.partition(" import ")
        if name in used and start.startswith("from"):
            names.setdefault(start, []).append(imported)
        elif name in used:
            lines.add(line)
    start = f"from {LIBRARY}.{module}"
    private = sorted(set(names.pop(start, [])) - set(public))
    statements = [import_statement(other, sorted(names[other])) for other in sorted(names)]
    statements.append(import_statement(start, [*public, *private]))
    return "\n".join(["```python", *sorted(lines), *statements, "```"])


def prepare(cell, heading, link):
    "Turn a visible cell into one as the page shows it."
    if cell.cell_type == "markdown":
        cell.source = link(cell.source)
        return
    join_streams(cell)
    described = iter(re.findall(r"^#\| fig-alt: (.*)", cell.source, flags=re.MULTILINE))
    for output in cell.outputs:
        if is_picture(output):
            output.metadata["alt"] = next(described, heading.replace("`", ""))
    is_hidden = directives(cell) & {"echo", "hide_input"}
    cell.source = "" if is_hidden else re.sub(r"^#\|.*\n", "", cell.source, flags=re.MULTILINE)


def with_constants_later(cells):
    "Return the cells with the constants that follow the title after the first exported cell with more than constants."
    constants = []
    others = []
    num_texts = 0  # the title is the first; constants after a second are what it is about
    for index, cell in enumerate(cells):
        num_texts += cell.cell_type == "markdown"
        defined = list(definitions(cell)) if "export" in directives(cell) else []
        if not all(map(is_constant, defined)):
            return [*others, cell, *constants, *cells[index + 1:]]
        (constants if defined and num_texts == 1 else others).append(cell)
    return cells


def shown(path, to_page, found):
    "Return a notebook with the cells that its page shows: references in place of exported ones, and the imports."
    notebook = copy.deepcopy(read(path))
    notebook.metadata.language_info = {"name": "python"}  # for the code blocks; nbdev_clean removes it
    module = module_of(notebook)
    source = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    cells = []
    public = []
    heading = ""
    for cell in with_constants_later(notebook.cells):
        if cell.cell_type == "markdown":
            heading = (re.findall(r"^#+ (.*)", cell.source, flags=re.MULTILINE) or [heading])[-1]
        if "export" in directives(cell):
            public += [definition for definition in definitions(cell) if "." not in definition[0]]
            cell = nbformat.v4.new_markdown_cell(references(cell, module_file(module)))
        if not directives(cell) & {"hide", "exporti", "default_exp"}:
            prepare(cell, heading, lambda text: with_links(text, path, to_page, found))
            cells.append(cell)
    if public:  # after the title
        names = [name for name, _ in sorted(public, key=is_constant)]
        cells.insert(1, nbformat.v4.new_markdown_cell(import_block(module, names, cells, source)))
    for cell in cells:
        as_commands(cell)
    notebook.cells = without_empty_sections(cells)
    return notebook


@functools.cache
def exporter():
    filters = {"bare_table": bare_table, "fenced": fenced, "without_bars": without_bars}
    return MarkdownExporter(raw_template=TEMPLATE, filters=filters)


def markdown(path, to_page, found):
    "Return a notebook as Markdown, and its pictures by name."
    resources = {"unique_key": path.stem, "output_files_dir": f"{path.stem}_files"}
    text, resources = exporter().from_notebook_node(shown(path, to_page, found), resources)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n", resources["outputs"]


def write_readme():
    "Write README.md from nbs/index.ipynb, with links to the notebooks themselves."
    text, pictures = markdown(Path("nbs/index.ipynb"), Path.as_posix, {})
    text = for_both_schemes(text, on_github=True)
    Path("docs/readme").mkdir(parents=True, exist_ok=True)
    for name, data in pictures.items():
        Path("docs/readme", Path(name).name).write_bytes(data)
        text = text.replace(f"({name})", f"(docs/readme/{Path(name).name})")
    Path("README.md").write_text(text, encoding="utf-8")


def write_notebook_page(path, target, to_page, found):
    "Write the page of a notebook, its pictures and the notebook itself."
    text, pictures = markdown(path, to_page, found)
    opened = f"[Open this notebook]({SOURCE_URL}{path.as_posix()}){{ .notebook }}"
    opened += f" [Download it]({path.name}){{ .notebook }}"
    is_lesson = path.parent != Path("nbs")
    if is_lesson:
        opened += f' [Open in Colab]({COLAB_URL}{path.as_posix()}){{ .notebook title="{IN_COLAB}" }}'
    text, titles = re.subn(r"\A(# .*\n)", rf"\1\n{opened}\n", for_both_schemes(text))
    if not titles:
        sys.exit(f"{path} begins with {text[:40]!r}; expected its title first (# …), since its links follow the title.")
    if is_lesson:
        text = LESSON.format(boost=GLOSSARY_BOOST if target.stem == "glossary" else BOOST) + text
    target.write_text(text, encoding="utf-8")
    shutil.copy(path, target.parent)
    for name, data in pictures.items():
        picture = target.parent / name
        picture.parent.mkdir(exist_ok=True)
        picture.write_bytes(data)


def check_pages():
    "Exit if two files would be written to the same page."
    paths = {}
    for path, own_page in PAGES.items():
        if own_page in paths:
            sys.exit(f"{paths[own_page]} and {path} have the same page, {own_page}; rename one of them.")
        paths[own_page] = path


def write_site():
    "Write all pages, their pictures, the notebooks and the assets of the site, as mkdocs.yml expects them."
    check_pages()
    shutil.rmtree("_proc", ignore_errors=True)
    shutil.copytree(ASSETS, "_proc/assets")
    found = names()
    for path, own_page in PAGES.items():
        target = Path("_proc", own_page)
        target.parent.mkdir(parents=True, exist_ok=True)

        def to_page(linked, folder=Path(own_page).parent):
            if linked in PAGES:
                return os.path.relpath(PAGES[linked], folder)
            if ASSETS in linked.parents:
                return os.path.relpath(linked.relative_to(ASSETS.parent), folder)
            return SOURCE_URL + linked.as_posix()

        if path.suffix == ".ipynb":
            write_notebook_page(path, target, to_page, found)
        else:
            text = path.read_text(encoding="utf-8")
            text = with_links(text, path, to_page, found if own_page == "changelog.md" else {})
            target.write_text(text, encoding="utf-8")
    pages = {}
    for own_page, name, _ in all_definitions():
        pages.setdefault(name, []).append(own_page.replace(".md", ".html"))
    Path("_proc/assets/names.js").write_text(f"const pagesOf = {json.dumps(pages)};\n", encoding="utf-8")


if __name__ == "__main__":
    {"readme": write_readme, "site": write_site}[sys.argv[1]]()
