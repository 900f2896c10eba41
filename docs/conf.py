"""Builds the site of these pages and of the API: ``sphinx-build -W -q -b html docs OUT``."""

import sys
from pathlib import Path

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

ROOT = Path(__file__).resolve().parents[1]  # not to be imported from: the package is complete where it is installed
sys.path = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]

import nnunet_topomae  # noqa: E402

project = "nnunet_topomae"
author = "the nnunet_topomae developers"
version = release = nnunet_topomae.__version__
html_title = f"{project} {version}"
html_theme = "furo"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build", "site"]
myst_heading_anchors = 3

autodoc_default_options = {"members": True, "show-inheritance": True, "member-order": "bysource"}
autodoc_typehints = "none"  # docstrings give shapes, which types do not
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # attributes are described where the class is, not once more on their own
napoleon_attr_annotations = False

nitpicky = True
nitpick_ignore_regex = [  # what other packages define; their sites cannot be reached while building
    ("py:.*", r"(abc|collections|pathlib|typing|numpy|torch|nnunetv2)\..*"),
]


def resolve_short_name(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.Node
) -> nodes.Node | None:
    """Docstrings say :class:`Views` or :meth:`Views.draw`; find the one object of the API whose name ends like that."""
    domain = env.get_domain("py")
    target = node.get("reftarget", "")
    found = [name for name in domain.objects if name.endswith(f".{target}")]
    if node.get("refdomain") != "py" or len(found) != 1:
        return None
    return domain.resolve_xref(env, node["refdoc"], app.builder, node["reftype"], found[0], node, content)


def is_described_by_its_class(
    app: Sphinx, what: str, name: str, member: object, skip: bool, options: object
) -> bool | None:
    """Leave out the fields of named tuples, which the docstring of the class describes."""
    return True if type(member).__name__ == "_tuplegetter" else None


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("missing-reference", resolve_short_name)
    app.connect("autodoc-skip-member", is_described_by_its_class)
