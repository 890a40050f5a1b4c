"Pictures of which there is one for the light scheme and one for the dark."
import re

# A picture of the light scheme, next to which is the file of the dark one.
OF_LIGHT_SCHEME = re.compile(r"!\[([^\]]*)\]\(([^)\s]*)-light\.(svg|png)\)")


def for_both_schemes(text, on_github=False):
    "Let each picture of the light scheme be followed by that of the dark one; the site and GitHub show one of them."
    if on_github:
        source = r'<source media="(prefers-color-scheme: dark)" srcset="\2-dark.\3">'
        picture = rf'<picture>{source}<img src="\2-light.\3" alt="\1" width="560"></picture>'
        return OF_LIGHT_SCHEME.sub(picture, text)
    return OF_LIGHT_SCHEME.sub(r"![\1](\2-light.\3#only-light)![\1](\2-dark.\3#only-dark)", text)
