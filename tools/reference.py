"""
Write the Markdown reference of what an exported cell defines, from its source alone.

A parameter or field is described by the comment at its end, or else by the lines of comments above it, as
`docments` of fastcore has it.
"""
import ast
import io
import re
import tokenize
from configparser import ConfigParser
from pathlib import Path
from typing import NamedTuple

from signatures import annotation, narrowed, signature

CONFIG = ConfigParser(delimiters=["="])
CONFIG.read("settings.ini", encoding="utf-8")
SOURCE_URL = "{git_url}/blob/{branch}/".format(**CONFIG["DEFAULT"])
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def is_private(name):
    return name.startswith("_") or name == "logger"


def methods(node):
    "Yield the methods of a class that are documented there, rather than in a parent."
    for method in node.body:
        if isinstance(method, FUNCTIONS) and not method.name.startswith("_"):
            if ast.get_docstring(method) or method.name == "forward":
                yield method


def is_overload(node):
    "True for one of several signatures of a function, which follows them."
    return any(ast.unparse(decorator) == "overload" for decorator in getattr(node, "decorator_list", []))


def definitions(cell):
    "Yield (name, node) of each public constant, function, class and method of an exported cell."
    for node in ast.parse(cell.source).body:
        if is_overload(node):
            continue
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)) and not is_private(node.name):
            yield node.name, node
            if isinstance(node, ast.ClassDef):
                for method in methods(node):
                    yield f"{node.name}.{method.name}", method
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            if not is_private(node.targets[0].id):
                yield node.targets[0].id, node


def is_constant(definition):
    "True for (name, node) of a constant or the name of a type."
    return isinstance(definition[1], ast.Assign)


class Comment(NamedTuple):
    text: str
    is_alone: bool  # on a line without code


class Parameter(NamedTuple):
    name: str  # with the stars of *args and **kwargs
    type: str
    default: str
    comment: str


def comments(cell):
    "Return the `Comment` of each line that has one."
    found = {}
    for token in tokenize.generate_tokens(io.StringIO(cell.source).readline):
        if token.type == tokenize.COMMENT and not token.string.startswith("#|"):
            is_alone = not token.line[: token.start[1]].strip()
            found[token.start[0]] = Comment(token.string.lstrip("# "), is_alone)
    return found


def comment_of(first, last, found, may_be_above=True):
    "Return the comment at the end of the last line, or else the lines of comments above the first."
    if last in found and not found[last].is_alone:
        return found[last].text
    lines = []
    while may_be_above and first - 1 in found and found[first - 1].is_alone:
        first -= 1
        lines.insert(0, found[first].text)
    return " ".join(lines)


def code(node):
    return "" if node is None else ast.unparse(node)


def field_options(call):
    "Return (default, help) of a `field` of dataclasses or a `Field` of pydantic."
    options = {option.arg: option.value for option in call.keywords}
    default = code(call.args[0] if call.args else options.get("default"))
    if not default and "default_factory" in options:
        default = f"{code(options['default_factory'])}()"
    if "metadata" in options:
        return default, ast.literal_eval(options["metadata"])["help"]
    if "description" in options:
        return default, ast.literal_eval(options["description"])
    return default, ""


def fields(node, found):
    "Return a `Parameter` for each annotated field of a class."
    rows = []
    for field in node.body:
        if isinstance(field, ast.AnnAssign):
            default = code(field.value)
            help_text = ""
            if isinstance(field.value, ast.Call) and code(field.value.func) in ("field", "Field"):
                default, help_text = field_options(field.value)
            comment = comment_of(field.lineno, field.end_lineno, found) or help_text
            rows.append(Parameter(field.target.id, code(field.annotation), default, comment))
    return rows


def arguments(signed):
    "Yield (stars, argument, default) in the order of a signature."
    plain = signed.posonlyargs + signed.args
    defaults = [None] * (len(plain) - len(signed.defaults)) + signed.defaults
    for argument, default in zip(plain, defaults):
        yield "", argument, default
    if signed.vararg:
        yield "*", signed.vararg, None
    for argument, default in zip(signed.kwonlyargs, signed.kw_defaults):
        yield "", argument, default
    if signed.kwarg:
        yield "**", signed.kwarg, None


def parameters(node, found):
    "Return a `Parameter` for each parameter of a function or each field of a class."
    if isinstance(node, ast.ClassDef):
        return fields(node, found)
    rows = []
    previous = node.lineno  # a comment above a line with several parameters is about the first
    for stars, argument, default in arguments(node.args):
        last = max(argument.end_lineno, default.end_lineno if default else 0)
        if argument.arg not in ("self", "cls"):
            comment = comment_of(argument.lineno, last, found, argument.lineno > previous)
            rows.append(Parameter(stars + argument.arg, annotation(argument.annotation), code(default), comment))
        previous = last
    return rows


def constructor(node):
    "Return the `__init__` of a class that has one, or else the node itself."
    for method in getattr(node, "body", []):
        if isinstance(method, FUNCTIONS) and method.name == "__init__":
            return method
    return node


def in_cell(text):
    "Return text for the cell of a table, which a vertical line would end, and braces would be attributes of."
    special = {"|": r"\|", "{": "&#123;"}
    return re.sub(r"(`[^`]*`)|[|{]", lambda match: match[1] or special[match[0]], text)


def table(rows, node, found):
    "Return the Markdown table of parameters, types, defaults and comments; empty for a function without them."
    lines = []
    for row in rows:
        type_and_default = [text and f"`{text}`" for text in (row.type, row.default)]
        cells = [f"`{row.name}`", *type_and_default, in_cell(row.comment)]
        lines.append("| " + " | ".join(cells) + " |")
    returns = getattr(node, "returns", None)
    if annotation(returns) not in ("", "None"):
        comment = comment_of(returns.lineno, returns.end_lineno, found, returns.lineno > node.lineno)
        if comment or rows:
            lines.append(f"| **Returns** | `{annotation(returns)}` |  | {in_cell(comment)} |")
    header = ["|  | Type | Default | Details |", "| --- | --- | --- | --- |"]
    return "\n".join(header + lines) if lines else ""


def source_link(definition, module):
    "Return the link to the line of a module that begins a definition."
    for number, line in enumerate(Path(module).read_text(encoding="utf-8").splitlines(), start=1):
        if line.startswith(definition):
            return f"[Source]({SOURCE_URL}{module}#L{number})"
    raise ValueError(f"{module} has no line {definition!r}; run `make export`.")


def reference(name, node, module, found, source):
    "Return heading, signature, docstring, table and source link of a definition."
    lines = source.splitlines()
    heading = f"### <code>{name}</code> {{ #{name} }}"
    if isinstance(node, ast.Assign):
        shown = narrowed(lines[node.lineno - 1:node.end_lineno])
        return f"{heading}\n\n```python\n{shown}\n```\n"
    signed = constructor(node)
    rows = parameters(signed, found)
    parts = [heading, f"```python\n{signature(name, node, rows)}\n```"]
    for documented in dict.fromkeys((node, signed)):
        parts.append(ast.get_docstring(documented))
    parts.append(table(rows, node, found))
    bases = ", ".join(f"`{code(base)}`" for base in getattr(node, "bases", []))
    parts.append(bases and f"Bases: {bases}.")
    if "." not in name:
        parts.append(source_link(lines[node.lineno - 1], module))
    return "\n\n".join(filter(None, parts)) + "\n"


def references(cell, module):
    "Return the reference of an exported cell, constants last; empty if it defines no public name."
    found = comments(cell)
    ordered = sorted(definitions(cell), key=is_constant)
    return "\n".join(reference(name, node, module, found, cell.source) for name, node in ordered)
