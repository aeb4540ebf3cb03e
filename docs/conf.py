"""Sphinx's configuration: `make docs` builds the site in docs/_build/html, without the network."""

from __future__ import annotations

import sys
from pathlib import Path

from textrl_swarm import __version__

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "textrl_swarm"
author = "The textrl_swarm developers"
copyright = author
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "generated_pages",  # docs/_ext
]
exclude_patterns = ["_build"]
default_role = "code"  # docstrings write code in single backquotes
smartquotes = False  # a quoted "module:name" must survive being copied
maximum_signature_line_length = 90

myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # settings list their fields under "Attributes:"; as ivars they make no second entry

html_theme = "furo"
html_title = f"textrl_swarm {version}"
html_show_copyright = False
html_static_path = ["_static"]
html_css_files = ["wide.css"]
copybutton_prompt_text = "$ "
