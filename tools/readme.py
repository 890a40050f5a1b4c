"Write README.md from nbs/index.ipynb, without Quarto. Run in the project's root."
import re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from traitlets.config import Config

notebook = nbformat.read("nbs/index.ipynb", as_version=4)
notebook.metadata.language_info = {"name": "python"} # for the code blocks; nbdev_clean takes it out of the notebook
exporter = MarkdownExporter(config=Config(RegexRemovePreprocessor={"patterns": [r"#\|\s*hide"]}))
markdown, _ = exporter.from_notebook_node(notebook)
Path("README.md").write_text(re.sub(r"\n{3,}", "\n\n", markdown).strip() + "\n", encoding="utf-8")
