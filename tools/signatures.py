"""
Write signatures and constants for the reference pages, at most `WIDTH` columns wide.

A code block of the site shows that many columns on a screen 1,280 pixels wide without scrolling.
"""
import ast
import io
import re
import textwrap
import tokenize

WIDTH = 100

# A line that ends with a string: what is before it (a name, a key or an argument), the string, and what closes after.
STRING_AT_END = re.compile(r"""(\s*(?:\w+ ?= ?|["'][\w ]+["']: |\): )?)([rf]?)(["'])((?:\\.|(?!\3).)*)\3([,)]*)""")
WORD = re.compile(r"(?:\{[^{}]*\}|[^ ])+ *| +")  # with the spaces after it; the braces of an f-string are one word


def annotation(node):
    "Return a type, without the quotes around the name of a class that is defined later."
    if node is None:
        return ""
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ast.unparse(node)


def top_level(text):
    "Yield (position, character) of each bracket, comma and | of an expression that is in no inner bracket."
    depth = 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        position = token.start[1]
        if token.type != tokenize.OP:
            continue
        if token.string in ")]}":
            depth -= 1
        if depth == 0 and token.string in "()[]{},|":
            yield position, token.string
        if token.string in "([{":
            depth += 1


def longest_brackets(text):
    "Return the positions of the outer pair of brackets with the longest contents, or None."
    pairs = []
    for position, character in top_level(text):
        if character in "([{":
            start = position
        elif character in ")]}":
            pairs.append((position - start, start, position))
    length, start, end = max(pairs, default=(0, 0, 0))
    return (start, end) if length > 1 else None


def split_at(text, separator):
    "Return the parts of an expression between the separators that are in no bracket."
    parts = []
    start = 0
    for position, character in top_level(text):
        if character == separator:
            parts.append(text[start:position].strip())
            start = position + 1
    return [*parts, text[start:].strip()]


def position_of_for(text):
    "Return where the `for` of a comprehension is that is in no bracket, or None."
    depth = 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.OP:
            depth += (token.string in "([{") - (token.string in ")]}")
        elif token.string == "for" and depth == 0:
            return token.start[1]
    return None


def broken(text, indent=""):
    "Return the lines of an expression, broken between its elements or inside its brackets if it is too wide."
    if len(indent) + len(text) <= WIDTH:
        return [indent + text]
    elements = [element for element in split_at(text, ",") if element]
    if len(elements) > 1:
        return broken_elements(elements, indent)
    brackets = longest_brackets(text)
    if brackets is None:
        first, *alternatives = split_at(text, "|")
        return [indent + first, *(f"{indent}    | {alternative}" for alternative in alternatives)]
    start, end = brackets
    lines = [indent + text[: start + 1]]
    contents = text[start + 1:end]
    elements = [element for element in split_at(contents, ",") if element]
    loop = position_of_for(contents)
    if loop is None:
        lines += broken_elements(elements, indent + "    ")
    else:
        lines += [f"{indent}    {part}".rstrip() for part in (contents[:loop], contents[loop:]) if part]
    lines.append(indent + text[end:])
    return lines


def broken_elements(elements, indent):
    lines = []
    for element in elements:
        lines += broken(f"{element},", indent)
    return lines


def parameter(row):
    "Return a parameter as a signature has it."
    text = row.name
    if row.type:
        text += f": {row.type}"
    if row.default:
        text += f" = {row.default}" if row.type else f"={row.default}"
    return text


def signature(name, node, rows):
    "Return the signature of a function, a class or a property, one parameter a line."
    prefix = ""
    if isinstance(node, ast.ClassDef):
        prefix = "class "
    elif isinstance(node, ast.AsyncFunctionDef):
        prefix = "async "
    decorators = {ast.unparse(decorator).split(".")[-1] for decorator in node.decorator_list}
    returns = getattr(node, "returns", None)
    end = f" -> {annotation(returns)}" if returns else ""
    if decorators & {"property", "cached_property"}:
        return "\n".join(broken(f"{prefix}{name}{end}"))
    if not rows:
        return "\n".join(broken(f"{prefix}{name}(){end}"))
    lines = [f"{prefix}{name}("]
    for row in rows:
        lines += broken(parameter(row) + ",", "    ")
    if len(end) < WIDTH:
        lines.append(f"){end}")
    else:
        first, *rest = broken(end.removeprefix(" -> "))
        lines += [f") -> {first}", *rest]
    return "\n".join(lines)


def end_comment(line):
    "Return (code, comment) of a line; the comment is empty if there is none."
    try:
        for token in tokenize.generate_tokens(io.StringIO(line).readline):
            if token.type == tokenize.COMMENT:
                return line[: token.start[1]].rstrip(), token.string.lstrip("# ")
    except (tokenize.TokenError, IndentationError):  # at the end of a line whose bracket is closed later
        pass
    return line, ""


def can_break(line):
    "True for code with balanced brackets whose commas all separate elements."
    try:
        list(top_level(line))
    except (tokenize.TokenError, IndentationError):
        return False
    return "lambda" not in line and position_of_for(line) is None


def broken_string(line):
    "Return the lines of a line whose string at the end is too wide, broken between words; other lines as they are."
    match = STRING_AT_END.fullmatch(line)
    if len(line) <= WIDTH or match is None:
        return [line]
    start, prefix, quote, text, end = match.groups()
    needs_brackets = bool(re.fullmatch(r"\w+ = ", start))
    lines = [f"{start}("] if needs_brackets else []
    indent = "    " if needs_brackets else " " * len(start)
    pieces = [""]
    for word in WORD.findall(text):
        if pieces[-1] and len(indent + prefix + pieces[-1] + word) + 2 + len(end) > WIDTH:
            pieces.append("")
        pieces[-1] += word
    for piece in pieces:
        is_first = piece is pieces[0] and not needs_brackets
        lines.append(f"{start if is_first else indent}{prefix}{quote}{piece}{quote}")
    lines[-1] += end
    return [*lines, ")"] if needs_brackets else lines


def narrowed(lines):
    "Return the source of a constant; where a line is too wide, its comment is above it and its brackets are broken."
    shown = []
    for line in lines:
        if len(line) <= WIDTH:
            shown.append(line)
            continue
        line, comment = end_comment(line)
        text = line.lstrip()
        indent = line[: len(line) - len(text)]
        prefix = f"{indent}# "
        shown += textwrap.wrap(comment, WIDTH, initial_indent=prefix, subsequent_indent=prefix)
        parts = [line] if STRING_AT_END.fullmatch(line) or not can_break(text) else broken(text, indent)
        for part in parts:
            shown += broken_string(part)
    return "\n".join(shown)
