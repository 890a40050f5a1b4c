"""
Hooks of mkdocs: the search leaves out formulas, options and numbers stay in one line, a phone can stack the cells of
the reference and wrap printed sentences, and the link to the repository does not ask GitHub for its stars.
"""
import re

CODE = re.compile(r"<td>.*?</td>|<code>.*?</code>", flags=re.DOTALL)  # tables have names of options in plain text too
TAG = re.compile(r"(<[^>]*>)")
OPTION = re.compile(r"(?<![\w-])(--?[a-z][\w-]*)")  # of a command; a browser breaks a line after any of its hyphens
# Formulas and code as a whole, tags, and the text in between
PIECE = re.compile(
    r'<(span|div) class="arithmatex".*?</\1>|<(pre|code|script)\b.*?</\2>|<[^>]*>|[^<]+',
    flags=re.DOTALL,
)
POWER = re.compile(r"(?<![\w.])(\d[\d.]*e-\d+)")  # 1e-5
PRINTED = re.compile(r'<div class="language-text highlight">(<pre>.*?</pre>)', flags=re.DOTALL)
PARAMETERS = re.compile(r"<table>(\s*<thead>\s*<tr>\s*<th></th>\s*<th>Type</th>\s*<th>Default</th>)")
OPTIONS = re.compile(r"<table>(\s*<thead>\s*<tr[^>]*>\s*<th>option</th>\s*<th>what it means</th>\s*<th>commands</th>)")


def with_options_whole(match):
    "Return code or a cell in whose options no line is broken."
    if "arithmatex" in match[0]:  # the script that typesets formulas expects no elements in them
        return match[0]
    parts = TAG.split(match[0])
    parts[::2] = [OPTION.sub(r'<span class="option">\1</span>', text) for text in parts[::2]]
    return "".join(parts)


def with_numbers_whole(match):
    "Return a piece of a page; in prose no line ends before a percent sign or within a number such as 1e-5."
    if match[0].startswith("<"):
        return match[0]
    return POWER.sub(r'<span class="option">\1</span>', re.sub(r"(?<=\d) %", "\u00a0%", match[0]))


def with_sentences_marked(match):
    "Return printed text, marked unless it has indented lines or columns, which a wrapped line would spoil."
    has_columns = re.search(r"^ |  ", TAG.sub("", match[1]), flags=re.MULTILINE)
    return match[0] if has_columns else f'<div class="language-text highlight prose">{match[1]}'


def on_page_content(html, **_):
    "Leave formulas out of the search, which would show them as raw TeX, and mark what docs/assets/site.css shows."
    html = PIECE.sub(with_numbers_whole, html)
    html = html.replace('class="arithmatex"', 'class="arithmatex" data-search-exclude')
    html = PRINTED.sub(with_sentences_marked, html)
    html = PARAMETERS.sub(r"<table data-parameters>\1", html)
    html = OPTIONS.sub(r"<table data-parameters data-options>\1", html)
    return CODE.sub(with_options_whole, html)


def on_post_template(output_content, **_):
    return on_post_page(output_content)


def on_post_page(output, **_):
    "Leave the link to the repository without the mark by which the theme's script looks for it."
    return output.replace(' data-md-component="source"', "")
