"""Settings of Sphinx, which builds the site: `make site`."""

import json
import sys
from pathlib import Path

from docutils.nodes import SkipNode
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.errors import ConfigError

sys.path.insert(0, str(Path(__file__).parent))
import content

content.write_pages("notebooks", content.notebook_pages())
content.write_pages("api", content.api_pages())

project = "Residual networks"
html_title = "Residual networks"
html_theme = "furo"
html_favicon = "favicon.svg"
html_static_path = ["explorer", "site.css"]
html_css_files = ["site.css"]
smartquotes = False  # docstrings quote code
html_show_copyright = html_show_sphinx = html_copy_source = False
extensions = ["myst_nb"]
exclude_patterns = ["build"]
nb_execution_mode = "off"  # the notebooks' committed outputs are shown
nb_merge_streams = True
myst_enable_extensions = ["colon_fence", "dollarmath", "substitution"]
myst_substitutions = content.findings()
myst_heading_anchors = 4
add_module_names = False
python_maximum_signature_line_length = 80
html_math_renderer = "mathml"


def inline_formula(writer, node):
    """Write a formula of a line as MathML, which browsers show without a script."""
    writer.body.append(tex2mathml(node.astext()))
    raise SkipNode


def displayed_formula(writer, node):
    """Write a formula between paragraphs."""
    writer.body.append(f'<div class="math">{tex2mathml(node.astext(), as_block=True)}</div>')
    raise SkipNode


def setup(app):
    """Have formulas written as MathML; ConfigError if the explorer's maps are of another set."""
    app.add_html_math_renderer("mathml", (inline_formula, None), (displayed_formula, None))
    maps = json.loads((content.SITE / "explorer" / "maps.json").read_text(encoding="utf-8"))
    published = content.published_set().name
    depth, networks = content.results("04_depth"), [n["name"] for n in maps["networks"]]
    expected = (published, depth["data"]["classes"], list(depth["networks"]))
    if (maps["set"], maps["classes"], networks) != expected:
        raise ConfigError(
            f"the explorer's maps are of {maps['set']}, classes {maps['classes']} and {networks}; "
            f"{published} with {expected[1:]} is published: run `python site/maps.py`"
        )
