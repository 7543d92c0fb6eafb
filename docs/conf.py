"""The documentation site: the README, the cards, the recipes and the API, as one set of pages.

    pip install -e '.[docs]' && sphinx-build -W --keep-going -c docs . site

The repository's root is the source folder, so that the pages' links to each other and to files
are right both here and in the repository.
"""

import shutil
from pathlib import Path

from sphinx.application import Sphinx

import fastface_lightning

project = "fastface_lightning"
author = copyright = "The fastface_lightning authors"
version = release = fastface_lightning.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
]
root_doc = "docs/index"
include_patterns = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/**", "recipes/*.md"]
templates_path = ["docs/templates"]
exclude_patterns = ["docs/templates"]
html_theme = "furo"
html_title = "fastface_\u200blightning"  # may break there, in the narrow sidebar

myst_heading_anchors = 3
autosummary_generate = True
# Written anew by every build, so that a module that is gone leaves no page.
shutil.rmtree(Path(__file__).parent / "api" / "generated", ignore_errors=True)
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False


def redirect_to_root(app: Sphinx, exception: Exception | None) -> None:
    """The site's first page lies in docs/; its address is the site's."""
    if not exception and app.builder.name == "html":
        page = f'<meta http-equiv="refresh" content="0; url={root_doc}.html">\n'
        (Path(app.outdir) / "index.html").write_text(page, encoding="utf-8")


def setup(app: Sphinx) -> None:
    app.connect("build-finished", redirect_to_root)
