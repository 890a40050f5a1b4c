"Hooks of mkdocs: the search leaves out formulas, and the link to the repository does not ask GitHub for its stars."


def on_page_content(html, **_):
    "Leave formulas out of the search, which would show them as raw TeX."
    return html.replace('class="arithmatex"', 'class="arithmatex" data-search-exclude')


def on_post_template(output_content, **_):
    return on_post_page(output_content)


def on_post_page(output, **_):
    "Leave the link to the repository without the mark by which the theme's script looks for it."
    return output.replace(' data-md-component="source"', "")
