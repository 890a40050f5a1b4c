"A hook of mkdocs: the search leaves out formulas, which it would show as raw TeX."


def on_page_content(html, **_):
    return html.replace('class="arithmatex"', 'class="arithmatex" data-search-exclude')
