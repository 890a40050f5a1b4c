"Builds the package from `settings.ini`; change names, versions and requirements there."
import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here / "settings.ini", encoding="utf-8")
settings = config["DEFAULT"]
extras = {
    key.removesuffix("_requirements"): value.split()
    for key, value in settings.items()
    if key.endswith("_requirements")
}

# PyPI has no files of the repository: links to them go to its site.
long_description = (here / "README.md").read_text(encoding="utf-8")
repository = f"{settings['git_url']}/blob/{settings['branch']}/"
long_description = re.sub(r"\]\((?!\w+:|#)", f"]({repository}", long_description)
long_description = long_description.replace(".png)", ".png?raw=true)")

setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    keywords=settings["keywords"],
    author=settings["author"],
    license="Apache-2.0",
    license_files=["LICENSE"],
    long_description=long_description,
    project_urls={
        "Documentation": "https://rlhf-reward.github.io/rlhf_reward/",
        "Source": settings["git_url"],
    },
    long_description_content_type="text/markdown",
    packages=find_packages(include=[settings["lib_path"], f"{settings['lib_path']}.*"]),
    package_data={"": ["*.html", "*.json"], settings["lib_path"]: ["configs/*.yaml", "py.typed"]},
    python_requires=f">={settings['min_python']}",
    install_requires=settings["requirements"].split(),
    extras_require=extras,
    entry_points={
        "console_scripts": settings["console_scripts"].split(),
        "nbdev": [f"{settings['lib_name']}={settings['lib_path']}._modidx:d"],
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
