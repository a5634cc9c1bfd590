"""Sphinx's settings for the site: ``sphinx-build -W -c docs . build/site`` (CONTRIBUTING.md).

The source folder is the whole repository, so that links between its Markdown files are the same
here as on GitHub. The front page is README.md.
"""

from __future__ import annotations

import os
from pathlib import Path

from sphinx.application import Sphinx

import tome_ext

ROOT = Path(__file__).parents[1]
os.environ["MPLBACKEND"] = "Agg"

project = "tome_ext"
author = "The tome_ext developers"
project_copyright = f"2026, {author}"
version = release = tome_ext.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_gallery.gen_gallery",
]
root_doc = "README"
include_patterns = [
    "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff",
    "docs/**", "examples/*/README.md",
]  # fmt: skip
exclude_patterns = [
    "docs/gallery/*.py", "docs/gallery/*.ipynb", "docs/gallery/*.md5",
    ".*", "build*", "bench", "csrc", "tests", "tome_ext",  # not searched for pages
]  # fmt: skip

# Every name in a docstring's role must be known. Types in signatures are not looked up: they are
# mostly those of torch, whose index is on the network.
nitpicky = True
nitpick_ignore_regex = [("py:class|py:obj", ".*")]

myst_heading_anchors = 4  # GitHub's names of headings
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
napoleon_use_ivar = True
napoleon_use_rtype = False
maximum_signature_line_length = 90

sphinx_gallery_conf = {
    "examples_dirs": str(ROOT / "examples" / "gallery"),
    "gallery_dirs": str(ROOT / "docs" / "gallery"),
    "filename_pattern": "",
    "abort_on_example_error": True,
    "download_all_examples": False,
    "show_signature": False,
    "write_computation_times": False,
}

html_theme = "furo"
html_title = f"tome_ext {version}"
html_copy_source = False
html_static_path = ["site.css"]
html_css_files = ["site.css"]

CONTENTS = """
```{toctree}
:hidden:
:caption: Begin

docs/install
docs/choosing-r
docs/gallery/index
docs/troubleshooting
```

```{toctree}
:hidden:
:caption: Use

docs/models
docs/methods
docs/running/README
docs/tuning
docs/evaluation
docs/embedding
docs/cpp
docs/migration
```

```{toctree}
:hidden:
:caption: Reference

docs/reference/README
docs/operators
```

```{toctree}
:hidden:
:caption: Measured

docs/benchmarking
docs/fidelity
```

```{toctree}
:hidden:
:caption: How it works

docs/attention
docs/cpu-kernels
docs/cuda-kernels
CONTRIBUTING
CHANGELOG
```
"""
RUNNING = """
```{toctree}
:hidden:

compile
cuda-graphs
precision
training
distributed
export
cpu
onnx
openvino
../../examples/aoti_cpp/README
../../examples/onnxruntime_cpp/README
../../examples/openvino_cpp/README
```
"""


def add_contents(app: Sphinx, page: str, source: list[str]) -> None:
    """Give pages that GitHub shows too the menu that only the site has."""
    source[0] += {"README": CONTENTS, "docs/running/README": RUNNING}.get(page, "")


def write_index(app: Sphinx, error: Exception | None) -> None:
    """Let the folder's address lead to the front page."""
    if error is None and app.builder.name == "html":
        text = '<!doctype html><meta http-equiv="refresh" content="0; url=README.html">\n'
        (Path(app.outdir) / "index.html").write_text(text, encoding="utf-8")


def setup(app: Sphinx) -> None:
    app.connect("source-read", add_contents)
    app.connect("build-finished", write_index)
