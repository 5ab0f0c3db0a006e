"""Sphinx settings of the book: stored outputs, formulas as MathML, nothing from the net."""

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.util import logging

project = html_title = "Test-time adaptation of CLIP"
language = "en"
extensions = ["myst_nb", "sphinxcontrib.bibtex"]
nb_execution_mode = "off"
nb_ipywidgets_js = {}  # the scripts of widgets lie on servers; the lessons store static figures
nb_render_markdown_format = "myst"
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
bibtex_bibfiles = ["references.bib"]
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["book.css"]
html_math_renderer = "mathml"
html_use_index = html_copy_source = html_show_copyright = html_show_sphinx = False


def math(display: str):
    """Visitor of formulas that writes MathML; what cannot be converted is a warning."""

    def visit(self, node):
        try:
            self.body.append(convert(node.astext().strip(), display=display))
        except Exception as error:  # the converter raises what it likes
            logging.getLogger(__name__).warning("no MathML: %r", error, location=node)
        raise nodes.SkipNode

    return visit, None


def setup(app):
    """Called by Sphinx."""
    app.add_html_math_renderer("mathml", math("inline"), math("block"))
