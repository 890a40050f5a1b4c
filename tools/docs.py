"""
Notebooks → Markdown: `python tools/docs.py readme` writes README.md, `python tools/docs.py site` the pages of the site into _proc/.

An exported cell becomes the reference of what it defines, read from its source alone; everything else stands as in the notebook.
Run in the project's root.
"""
import ast
import io
import os
import re
import shutil
import sys
import textwrap
import tokenize
from configparser import ConfigParser
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

CONFIG = ConfigParser(delimiters=["="])
CONFIG.read("settings.ini", encoding="utf-8")
SOURCE_URL = "{git_url}/blob/{branch}/".format(**CONFIG["DEFAULT"])
NOTEBOOKS = sorted(path for path in Path("nbs").rglob("*.ipynb") if not {"runs", ".ipynb_checkpoints"} & set(path.parts))
TEXTS = [Path("CHANGELOG.md"), Path("CONTRIBUTING.md"), *sorted(Path("benchmarks/results").glob("*.md"))]
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
TEMPLATE = """{%- extends 'markdown/index.md.j2' -%}
{% block input %}{{ super() if cell.source }}{% endblock %}
{% block stream %}{{ output.text | strip_ansi | fenced }}{% endblock %}
{%- macro picture(cell, file) %}
[![{{ cell.metadata.alt }}]({{ file | path2url }})]({{ file | path2url }})
{% endmacro -%}
{% block data_png %}{{ picture(cell, output.metadata.filenames['image/png']) }}{% endblock %}
{% block data_svg %}{{ picture(cell, output.metadata.filenames['image/svg+xml']) }}{% endblock %}
{% block data_text %}{{ output.data['text/plain'] | strip_ansi | fenced }}{% endblock %}
{% block data_html %}{{ output.data['text/html'] | bare_table }}{% endblock %}"""


# ----- pages and names

def page(path):
    "Where a file stands in the site: nbs/06_scoring.ipynb → scoring.md."
    if path.suffix == ".ipynb":
        return "/".join(re.sub(r"^\d+[a-z]?_", "", part) for part in path.relative_to("nbs").with_suffix(".md").parts)
    return f"benchmarks/{path.name}" if path.parts[0] == "benchmarks" else path.name.lower()


PAGES = {path: page(path) for path in [*NOTEBOOKS, *TEXTS]}


def directives(cell):
    return set(re.findall(r"^#\|\s*(\w+)", cell.source, flags=re.MULTILINE)) if cell.cell_type == "code" else set()


def definitions(cell):
    "What an exported cell gives to the reader: (name, node) of constants, functions, classes, and methods that are not those of a parent."
    for node in ast.parse(cell.source).body:
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)) and not node.name.startswith("_"):
            yield node.name, node
            if isinstance(node, ast.ClassDef):
                methods = (one for one in node.body if isinstance(one, FUNCTIONS) and not one.name.startswith("_"))
                yield from ((f"{node.name}.{one.name}", one) for one in methods if ast.get_docstring(one) or one.name == "forward")
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id != "logger" and not node.targets[0].id.startswith("_"):
            yield node.targets[0].id, node


def names():
    "name → pages that have its reference. A function that is called as some parameter is has to be written with ()."
    found, parameter_names = {}, set()
    for path in NOTEBOOKS:
        for cell in nbformat.read(path, as_version=4).cells:
            if "export" in directives(cell):
                for name, node in definitions(cell):
                    found.setdefault(name, set()).add(PAGES[path])
                    parameter_names |= set() if isinstance(node, ast.Assign) else {own for own, *_ in parameters(node, {})}
    plain = lambda name: name.islower() and ("_" not in name or name in parameter_names)
    return {f"{name}()" if plain(name) else name: pages for name, pages in found.items()}


def with_links(text, path, to_page, found):
    "The text with links to files turned into links to pages, and with names in backticks linked to their reference."
    def to_file(match):
        target = Path(os.path.normpath(path.parent / match[1]))
        return f"]({to_page(target)}{match[2] or ''})" if target.exists() else match[0]

    def to_name(match):
        name, own = re.sub(r"^(rlhf_reward\.)?([a-z_]+\.(?=\w))?", "", match[1]), PAGES.get(path)
        module = match[1][:-len(name)].split(".")[-2:-1]
        called = [f"{name}()"] if match[0].endswith("()`") or module else []
        pages = {one for full in [name, *called] for one in found.get(full, ()) if not module or one == f"{module[0]}.md"} - {"cli.md"}
        place = own if own in pages else min(pages) if len(pages) == 1 else None
        return f"[`{match[1]}`]({os.path.relpath(place, Path(own).parent)}#{name})" if place else match[0]

    parts = re.split(r"(^```.*?^```$|^#.*?$|^\| `.*?` \||!?\[[^\[\]\n]*\]\([^)\n]*\))", text, flags=re.MULTILINE | re.DOTALL) # code, headings, parameters and links stay
    return "".join(re.sub(r"\]\((?!\w+:|#)([^)#\s]+)(#[^)]*)?\)", to_file, part) if place % 2 else re.sub(r"`([\w.]+)(?:\(\))?`", to_name, part)
                   for place, part in enumerate(parts))


# ----- the reference of what an exported cell defines

def parameters(node, comments):
    "(name, type, default, comment) of each parameter of a function, or field of a class, which may have its comment as help or description."
    said = lambda *nodes: comments.get(max(one.end_lineno for one in nodes if one), "")
    code = lambda one: ast.unparse(one) if one is not None else ""
    if isinstance(node, ast.ClassDef):
        rows = []
        for one in (one for one in node.body if isinstance(one, ast.AnnAssign)):
            default, help_ = code(one.value), said(one)
            if isinstance(one.value, ast.Call) and code(one.value.func) in ("field", "Field"): # of dataclasses, of pydantic
                options = {option.arg: option.value for option in one.value.keywords}
                default = code(one.value.args[0] if one.value.args else options.get("default"))
                default = default or (f"{code(options['default_factory'])}()" if "default_factory" in options else "")
                help_ = help_ or (ast.literal_eval(options["metadata"])["help"] if "metadata" in options else "") or (ast.literal_eval(options["description"]) if "description" in options else "")
            rows.append((one.target.id, code(one.annotation), default, help_))
        return rows
    plain, rest = node.args.posonlyargs + node.args.args, node.args
    rows = list(zip([""] * len(plain), plain, [None] * (len(plain) - len(rest.defaults)) + rest.defaults))
    rows += [("*", rest.vararg, None)] * bool(rest.vararg) + [("", *both) for both in zip(rest.kwonlyargs, rest.kw_defaults)] + [("**", rest.kwarg, None)] * bool(rest.kwarg)
    return [(stars + one.arg, code(one.annotation), code(default), said(one, default)) for stars, one, default in rows if one.arg not in ("self", "cls")]


def reference(name, node, module, comments, source):
    "Heading, signature, docstring and table of a definition."
    lines = source.splitlines()
    heading = f"### <code>{name}</code> {{ #{name} }}"
    if isinstance(node, ast.Assign):
        return f"{heading}\n\n```python\n" + "\n".join(lines[node.lineno - 1:node.end_lineno]) + "\n```\n"
    signed = next((one for one in getattr(node, "body", []) if isinstance(one, FUNCTIONS) and one.name == "__init__"), node)
    rows = parameters(signed, comments)
    decorators = {ast.unparse(one).split(".")[-1] for one in node.decorator_list}
    given = "".join(f"\n    {own}{': ' * bool(type_)}{type_}{' = ' * bool(default and type_) or '=' * bool(default)}{default}," for own, type_, default, _ in rows)
    returns = "" if isinstance(node, ast.ClassDef) or node.returns is None else ast.unparse(node.returns)
    shown = name if decorators & {"property", "cached_property"} else f"{name}({given}{chr(10) * bool(given)})"
    prefix = "class " if isinstance(node, ast.ClassDef) else "async " if isinstance(node, ast.AsyncFunctionDef) else ""
    parts = [heading, f"```python\n{prefix}{shown}{' -> ' * bool(returns)}{returns}\n```"]
    parts += [ast.get_docstring(one) for one in dict.fromkeys((node, signed)) if ast.get_docstring(one)]
    returned = comments.get(node.returns.end_lineno, "") if returns else ""
    table = [(f"`{own}`", f"`{type_}`" * bool(type_), f"`{default}`" * bool(default), said) for own, type_, default, said in rows]
    table += [("**Returns**", f"`{returns}`", "", returned)] * bool(returns and returns != "None" and (returned or rows))
    if table:
        parts.append("\n".join(map("| {} | {} | {} | {} |".format, *zip(("", "Type", "Default", "Details"), ("---",) * 4, *table))))
    bases = [ast.unparse(one) for one in getattr(node, "bases", [])]
    if bases:
        parts.append(f"Bases: {', '.join(f'`{one}`' for one in bases)}.")
    if "." not in name:
        line = next(number for number, text in enumerate(Path(module).read_text(encoding="utf-8").splitlines(), start=1) if text.startswith(lines[node.lineno - 1]))
        parts.append(f"[Source]({SOURCE_URL}{module}#L{line})")
    return "\n\n".join(filter(None, parts)) + "\n"


def comments(cell):
    "line → the comment at its end."
    return {token.start[0]: token.string.lstrip("# ") for token in tokenize.generate_tokens(io.StringIO(cell.source).readline) if token.type == tokenize.COMMENT}


def references(cell, module):
    "The reference of an exported cell; an empty text where it defines nothing public."
    return "\n".join(reference(name, node, module, comments(cell), cell.source) for name, node in definitions(cell))


# ----- conversion

def nodes(source):
    "All that stands in the source of cells, without what is for the shell."
    return list(ast.walk(ast.parse(re.sub(r"^[!%].*", "", source, flags=re.MULTILINE))))


def imports(source):
    "name → the import that binds it."
    return {one.asname or one.name.split(".")[0]: ast.unparse(ast.ImportFrom(node.module, [one], 0) if isinstance(node, ast.ImportFrom) else ast.Import([one]))
            for node in nodes(source) if isinstance(node, (ast.Import, ast.ImportFrom)) for one in node.names}


def markdown(path, to_page, found):
    "A notebook as Markdown, and its pictures by name."
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata.language_info = {"name": "python"} # for the code blocks; nbdev_clean takes it out of the notebook
    module = next((match[1] for cell in notebook.cells if (match := re.search(r"^#\| default_exp (\w+)", cell.source, flags=re.MULTILINE))), None)
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    cells, heading, public = [], "", []
    for cell in notebook.cells:
        heading = (re.findall(r"^#+ (.*)", cell.source, flags=re.MULTILINE) or [heading])[-1] if cell.cell_type == "markdown" else heading
        if "export" in directives(cell):
            public += [name for name, _ in definitions(cell) if "." not in name]
            cell = nbformat.v4.new_markdown_cell(references(cell, f"{CONFIG['DEFAULT']['lib_path']}/{module}.py"))
        if not directives(cell) & {"hide", "exporti", "default_exp"}:
            if cell.cell_type == "markdown":
                cell.source = with_links(cell.source, path, to_page, found)
            else:
                alt = re.search(r"^#\| fig-alt: (.*)", cell.source, flags=re.MULTILINE)
                cell.metadata["alt"] = alt[1] if alt else heading.replace("`", "")
                cell.source = "" if directives(cell) & {"echo", "hide_input"} else re.sub(r"^#\|.*\n", "", cell.source, flags=re.MULTILINE)
            cells.append(cell)
    if public: # behind the title: what the examples suppose
        imported = textwrap.fill(", ".join(public), 120, initial_indent="    ", subsequent_indent="    ")
        shown = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
        used = {node.id for node in nodes(shown) if isinstance(node, ast.Name)} - imports(shown).keys()
        unseen = {line for name, line in imports(code).items() if name in used}
        lines = [*sorted(unseen, key=lambda line: (line.startswith("from"), line)), f"from {CONFIG['DEFAULT']['lib_path']}.{module} import (\n{imported})"]
        cells.insert(1, nbformat.v4.new_markdown_cell("\n".join(["```python", *lines, "```"])))
    notebook.cells = cells

    def fenced(output):
        fence = "```"
        while fence in output:
            fence += "`"
        return "\n{0}text\n{1}\n{0}\n".format(fence, output.strip("\n"))

    bare = lambda html: re.sub(r"<style scoped>.*?</style>\n?|( border=\"1\")? class=\"dataframe\"", "", html, flags=re.DOTALL)
    exporter = MarkdownExporter(raw_template=TEMPLATE, filters={"bare_table": bare, "fenced": fenced})
    text, resources = exporter.from_notebook_node(notebook, {"unique_key": path.stem, "output_files_dir": f"{path.stem}_files"})
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n", resources["outputs"]


def readme():
    "README.md of nbs/index.ipynb, with links to the notebooks themselves."
    text, pictures = markdown(Path("nbs/index.ipynb"), lambda target: target.as_posix(), {})
    Path("docs/readme").mkdir(parents=True, exist_ok=True)
    for name, data in pictures.items():
        Path("docs/readme", Path(name).name).write_bytes(data)
        text = text.replace(f"({name})", f"(docs/readme/{Path(name).name})")
    Path("README.md").write_text(text, encoding="utf-8")


def site():
    "All pages, their pictures, the notebooks and what the pages are dressed with, as mkdocs.yml expects them."
    shutil.rmtree("_proc", ignore_errors=True)
    shutil.copytree("docs/assets", "_proc/assets")
    found = names()
    for path, place in PAGES.items():
        to = Path("_proc", place)
        to.parent.mkdir(parents=True, exist_ok=True)
        to_page = lambda target: os.path.relpath(PAGES[target], Path(place).parent) if target in PAGES else SOURCE_URL + target.as_posix()
        if path.suffix == ".md":
            to.write_text(with_links(path.read_text(encoding="utf-8"), path, to_page, found if place == "changelog.md" else {}), encoding="utf-8")
            continue
        text, pictures = markdown(path, to_page, found)
        opened = f"[Open this notebook]({SOURCE_URL}{path.as_posix()}){{ .notebook }} [Download it]({path.name}){{ .notebook }}"
        text, titled = re.subn(r"\A(# .*\n)", rf"\1\n{opened}\n", text)
        if not titled:
            sys.exit(f"{path} has to begin with its title (# …), behind which its links stand; its page begins with {text[:40]!r}.")
        to.write_text(text, encoding="utf-8")
        shutil.copy(path, to.parent)
        for name, data in pictures.items():
            (to.parent / name).parent.mkdir(exist_ok=True)
            (to.parent / name).write_bytes(data)


if __name__ == "__main__":
    {"readme": readme, "site": site}[sys.argv[1]]()
