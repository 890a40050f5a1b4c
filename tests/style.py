"""
Measure the style rules that `test_project.py` holds: width, density, size, privacy and words.

Run it on files to list every violation: `python tests/style.py rlhf_reward/data.py nbs/03_data.ipynb`, or on the
whole project without arguments.
"""
import ast
import functools
import io
import json
import re
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TEXTS = ("README.md", "CONTRIBUTING.md")
FOLDERS = ("rlhf_reward", "nbs", "tests", "tools", "benchmarks")
MAX_COLUMNS, MAX_SHOWN_COLUMNS = 120, 100
MAX_MODULE_LINES, MAX_CLASS_LINES = 400, 200
MAX_CELLS, MAX_STRETCH = 40, 120

# Words of this project's old English, each with what to write instead. A rule is (pattern, replacement).
WORDS = [
    (r"\bwanted\b", "expected"),
    (r"\bwants\b", "requires / needs"),
    (r"\bMend\b|\bmend\b|\bmended\b", "fix"),
    (r"is not there\b", "does not exist"),
    (r"\bbehind\b", "after"),
    (r"\bbeside\b", "next to / with / besides"),
    (r"\bdeviation\b(?<!standard deviation)", "standard deviation"),
    (r"\blearnt\b", "learned"),
    (r"says? nothing", "carries no signal"),
    (r"stands? (twice|for|as|where|in|there)\b", "is / appears"),
    (r"is said\b|are said\b", "is reported"),
    (r"goes? on\b|going on\b|go on\b", "continue"),
    (r"nobody waits|given up", "cancelled"),
    (r"to its end\b", "completely"),
    (r"of no effect", "ignored"),
    (r"made[- ]up", "dummy / made"),
    (r"\blies\b", "is"),
    (r"\bsaid\b", "reported / given"),
    (r"Nothing to object", "No problems found"),
]
DOCSTRING_START = re.compile(r"^\s*(What|Of|Whether what)\b")


def code_cells(path):
    "Yield (source, is_shown, is_exported, has_output) of each code cell; a text has none."
    if path.suffix != ".ipynb":
        return
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            source = "".join(cell["source"])
            directives = set(re.findall(r"^#\|\s*(\w+)", source, flags=re.MULTILINE))
            hidden = bool(directives & {"hide", "exporti", "default_exp", "hide_input"})
            yield source, not hidden, bool(directives & {"export", "exporti"}), bool(cell["outputs"])


def markdown_cells(path):
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "markdown":
            yield "".join(cell["source"])


def parse(source):
    "The syntax tree of a cell or module, without shell lines."
    return ast.parse(re.sub(r"^[!%].*", "", source, flags=re.MULTILINE))


def sources(path):
    "The code of a module, or of each cell of a notebook: (label, source)."
    if path.suffix == ".py":
        return [(str(path), path.read_text(encoding="utf-8"))]
    return [(f"{path} cell {number}", source) for number, (source, *_) in enumerate(code_cells(path))]


def wide_lines(path):
    "Yield each line that is too wide: over 120 columns, or 100 in the visible code of a notebook."
    if path.suffix == ".py":
        lines = path.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines, start=1):
            is_generated = path.name == "_modidx.py" or line.startswith("__all__ = ")  # by nbdev
            if len(line) > MAX_COLUMNS and not is_generated:
                yield f"{path}:{number}: {len(line)} columns"
        return
    for number, (source, is_shown, is_exported, _) in enumerate(code_cells(path)):
        limit = MAX_SHOWN_COLUMNS if is_shown and not is_exported else MAX_COLUMNS
        for line in source.splitlines():
            if len(line) > limit:
                yield f"{path} cell {number}: {len(line)} columns: {line.strip():.60}"


def nested_comprehensions(path):
    "Yield each comprehension inside another comprehension."
    kinds = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
    for label, source in sources(path):
        for outer in ast.walk(parse(source)):
            if isinstance(outer, kinds):
                inner = [node for node in ast.walk(outer) if isinstance(node, kinds) and node is not outer]
                several = len(outer.generators) > 1
                for node in inner:
                    yield f"{label}:{node.lineno}: a comprehension inside a comprehension"
                if several and not inner:
                    yield f"{label}:{outer.lineno}: a comprehension with several loops"


def named_lambdas(path):
    "Yield each lambda that is assigned to a name."
    for label, source in sources(path):
        for node in ast.walk(parse(source)):
            if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(node.value, ast.Lambda):
                yield f"{label}:{node.lineno}: a lambda with a name"


def large_parts(path):
    "Yield a module that is too long, and each class."
    if path.suffix == ".py" and path.parent.name != "tests" and path.name != "_modidx.py":
        text = path.read_text(encoding="utf-8")
        count = text.count("\n")
        if count > MAX_MODULE_LINES and "tests" not in folders(path):
            yield f"{path}: {count} lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef) and node.end_lineno - node.lineno + 1 > MAX_CLASS_LINES:
                yield f"{path}:{node.lineno}: class {node.name} has {node.end_lineno - node.lineno + 1} lines"


def folders(path):
    "The parts of a path inside the project, which may itself be in a folder of any name: a clone is in `rlhf_reward`."
    return set(path.relative_to(ROOT).parts)


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


def private_definitions(tree):
    "The private names that a module defines: functions, classes, methods, constants, fields."
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
            names.add(node.id if isinstance(node, ast.Name) else node.attr)
    return {name for name in names if is_private(name)}


@functools.cache
def private_names_by_module(root):
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in (root / "rlhf_reward").rglob("*.py")}
    return {path: private_definitions(tree) for path, tree in trees.items() if path.name != "_modidx.py"}


def private_imports(path):
    "Yield each use of a private name of another module of the library: by an import, or as an attribute."
    if "rlhf_reward" not in folders(path) or path.suffix != ".py":
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    elsewhere = set()
    for module, names in private_names_by_module(ROOT).items():
        if module != path:
            elsewhere |= names
    elsewhere -= private_definitions(tree)
    for node in ast.walk(tree):
        is_import = isinstance(node, ast.ImportFrom)
        inside = is_import and (node.level or (node.module or "").startswith("rlhf_reward"))
        for alias in node.names if inside else []:
            if is_private(alias.name) and alias.name != "_modidx":
                yield f"{path}:{node.lineno}: imports the private name {alias.name}"
        if isinstance(node, ast.Attribute) and node.attr in elsewhere:
            owner = ast.unparse(node.value)
            if owner not in ("self", "cls", "super()"):
                yield f"{path}:{node.lineno}: uses {owner}.{node.attr}, which is private to another module"


def imported_modules(modules):
    "{module: modules of the library that it imports when it is imported itself}, given {path: module}."
    return {name: imported_by(path, name, set(modules.values())) for path, name in modules.items()}


def imported_by(path, name, known):
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in statements_at_import(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = parts[:len(parts) - node.level + 1] if node.level else []
            source = ".".join([*base, *filter(None, [node.module])])
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                found.add(inner if inner in known else source)
    return (found & known) - {name}


def statements_at_import(tree):
    "The statements of a module that run when it is imported: all but those in functions and under TYPE_CHECKING."
    waiting = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        waiting += [child for child in ast.iter_child_nodes(node) if isinstance(child, (ast.stmt, ast.ExceptHandler))]


def strings_and_comments(source):
    "Yield (line number, text) of each comment, string and docstring of Python source."
    for token in tokenize.generate_tokens(io.StringIO(re.sub(r"^[!%].*", "", source, flags=re.MULTILINE)).readline):
        kinds = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
        if token.type in kinds:
            yield token.start[0], token.string


def old_words(path):
    "Yield each phrase of the word list, in comments, strings and prose."
    if path.name in ("style.py", "_modidx.py"):
        return
    texts = []
    for label, source in sources(path) if path.suffix in (".py", ".ipynb") else []:
        texts += [(f"{label}:{number}", text) for number, text in strings_and_comments(source)]
        for node in ast.walk(parse(source)):
            kinds = (ast.Module, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
            docstring = ast.get_docstring(node) if isinstance(node, kinds) else None
            if docstring and DOCSTRING_START.match(docstring):
                yield f"{label}:{getattr(node, 'lineno', 1)}: the docstring begins {docstring[:40]!r}"
    if path.suffix == ".ipynb":
        texts += [(f"{path} text", text) for text in markdown_cells(path)]
    elif path.suffix == ".md":
        texts = [(str(path), path.read_text(encoding="utf-8"))]
    for label, text in texts:
        for pattern, replacement in WORDS:
            for match in re.finditer(pattern, text):
                context = text[max(0, match.start() - 30):match.end() + 20]
                yield f"{label}: {match[0]!r}, write {replacement}: …{context!r}"


def long_stretches(path):
    "Yield a notebook with too many cells, visible asserts, or too many exported lines between two outputs."
    if path.suffix != ".ipynb":
        return
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    if len(cells) > MAX_CELLS:
        yield f"{path}: {len(cells)} cells, expected at most {MAX_CELLS}"
    longest = current = 0
    for source, is_shown, is_exported, has_output in code_cells(path):
        if is_exported:
            current += len([line for line in source.splitlines() if not line.startswith("#|")])
            longest = max(longest, current)
        elif has_output:
            current = 0
        if is_shown and not is_exported and re.search(r"^\s*assert ", source, flags=re.MULTILINE):
            yield f"{path}: a visible assert: {re.search(r'assert .*', source)[0]:.60}"
    if longest > MAX_STRETCH:
        yield f"{path}: {longest} exported lines without an output, expected at most {MAX_STRETCH}"


CHECKS = (wide_lines, nested_comprehensions, named_lambdas, large_parts, private_imports, old_words, long_stretches)


def all_files():
    "Every module, notebook and test of the project, and the texts for its readers."
    yield from (ROOT / name for name in TEXTS)
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*")):
            skipped = {"runs", ".ipynb_checkpoints", "__pycache__", "results"} & folders(path)
            if path.suffix in (".py", ".ipynb") and not skipped:
                yield path


def violations(check, paths=None):
    "Every violation of one rule."
    found = []
    for path in paths or all_files():
        found += check(path)
    return found


if __name__ == "__main__":
    paths = [Path(name).resolve() for name in sys.argv[1:]] or None
    for check in CHECKS:
        found = violations(check, paths)
        print(f"{check.__name__}: {len(found)}")
        for line in found if paths else []:
            print("  ", line.replace(str(ROOT) + "/", ""))
