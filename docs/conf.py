"""Settings of the documentation, which `make docs` builds with Sphinx."""

from __future__ import annotations

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

import spade_fast

project = "spade_fast"
author = "the authors of spade_fast"
version = release = spade_fast.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "numpydoc"]
myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 3

default_role = "code"  # `x` in docstrings
autodoc_member_order = "bysource"
numpydoc_show_class_members = False  # each page lists them
autodoc_typehints_format = "short"
maximum_signature_line_length = 90
# Links into other projects would need the network; annotations may name private types.
nitpick_ignore_regex = [("py:.*", r"(?!spade_fast\.).*"), ("py:class", r"spade_fast(\.[a-z_]+){2}\.\w+")]

html_title = "spade_fast"
html_theme = "pydata_sphinx_theme"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_show_copyright = False
html_theme_options = {
    "header_links_before_dropdown": 5,
    "secondary_sidebar_items": ["page-toc"],
    "show_prev_next": False,
    "show_toc_level": 2,
}
html_sidebars = {page: [] for page in ("algorithms", "changelog", "design", "evidence", "figures", "speed", "tutorial")}
html_math_renderer = "mathml"


def visit_inline_math(self, node):
    self.body.append(tex2mathml(node.astext(), as_block=False))
    raise nodes.SkipNode


def visit_math_block(self, node):
    self.body.append(f'<div class="equation">{tex2mathml(node.astext(), as_block=True)}</div>')
    raise nodes.SkipNode


def setup(app):
    # MathML, which every browser draws, instead of MathJax, which is a script from another host.
    app.add_html_math_renderer("mathml", (visit_inline_math, None), (visit_math_block, None))
