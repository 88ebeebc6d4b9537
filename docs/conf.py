"""How `make docs` builds these pages and the reference of the package, without a network. Notebooks are run."""

import re
from typing import Any

from attnorm import __version__

project = "attnorm"
author = "the attnorm authors"
copyright = author
release = version = __version__
extensions = ["myst_nb", "sphinx.ext.apidoc", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"attnorm {__version__}"
exclude_patterns = ["results/*/**", "release-*"]

# The reference, a page a module, is made of the docstrings. The kernels are a language of their own.
apidoc_modules = [
    {
        "path": "../src/attnorm",
        "destination": "api",
        "exclude_patterns": ["**/triton/kernels*", "**/__main__*", "**/studio/**"],
        "separate_modules": True,
        "module_first": True,
        "no_headings": False,
    }
]
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_default_options = {
    "members": True,
    "show-inheritance": True,
    "ignore-module-all": True,
    "exclude-members": "extra_repr",
}
napoleon_google_docstring, napoleon_numpy_docstring, napoleon_use_ivar = True, False, True
default_role = "code"  # in a docstring `name` is a name
python_use_unqualified_type_names = True
myst_heading_anchors = 3
nb_execution_mode, nb_execution_raise_on_error, nb_execution_timeout = "force", True, 300
nb_merge_streams = True
nb_execution_show_tb, nb_output_stderr = True, "remove"  # what packages remark there has paths in it
suppress_warnings = [
    "myst.xref_missing",
    "ref.python",
    "ref.ref",
]  # files of the repository; names with two homes; torch

if tags.has("quick"):  # type: ignore[name-defined] # noqa: F821 # of the tests: neither every module nor notebooks
    apidoc_modules, nb_execution_mode = [], "off"
    exclude_patterns.append("api")
    suppress_warnings += ["toc.excluded", "toc.not_readable", "myst-nb.lexer"]


def escape(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are plain text: |x| is a norm and *.json a pattern; but **options: is an argument."""
    is_argument = re.compile(r" *\*+\w+:").match
    lines[:] = [line if is_argument(line) else re.sub(r"([|*])", r"\\\1", line) for line in lines]


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", escape)
