"""Sphinx configuration of the documentation; `make docs` builds it."""

import inspect
import pathlib
import re
import tomllib
import types

from sphinx.roles import XRefRole
from sphinx.util import logging
from sphinx.util.nodes import make_refnode

import jaxsparse
from jaxsparse import analysis, flax, nnx, recipes

METADATA = tomllib.loads((pathlib.Path(__file__).parent.parent / "pyproject.toml").read_text())
FACES = (jaxsparse, recipes, flax, nnx, analysis)

project = METADATA["project"]["name"]
release = version = jaxsparse.__version__
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "myst_nb", "sphinx_copybutton"]
exclude_patterns = ["_build"]

# the notebooks keep the outputs that `make notebooks` gave them
nb_execution_mode = "off"
myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 3
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True

autodoc_typehints = "none"  # the sections of each docstring say more
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False
napoleon_use_rtype = False
python_maximum_signature_line_length = 80
default_role = "code_or_link"  # docstrings write code in single backticks

# nothing is fetched, so types of other projects have nowhere to point to
nitpick_ignore_regex = [("py:.*", r"(?!jaxsparse).*")]

html_theme = "furo"
html_title = f"jaxsparse {release}"
html_show_copyright = False
# the address is written once, in pyproject.toml
source = METADATA["project"].get("urls", {}).get("Source")
if source:
    html_theme_options = {
        "source_repository": source,
        "source_branch": "main",
        "source_directory": "docs/",
    }

log = logging.getLogger(__name__)


def as_rst(app, what, name, obj, options, lines):
    """Marks what a docstring indents by four, after a paragraph, as Python; escapes `*args` in its
    sentences, which would become emphasis.
    """
    text = re.sub(
        r"(?m)^(\S.*\n\n)(?=    [^\s>])", r"\1.. code-block:: python\n\n", "\n".join(lines)
    )
    parts = text.split("`")  # every other one is code
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r"(?m)^(?! *(?:>>>|\.\.\.)).*", escaped, parts[i])
    # an empty type: napoleon takes what stands before a colon for one
    lines[:] = re.sub(r"(?m)^(Returns:\n +)", r"\1: ", "`".join(parts)).split("\n")


def escaped(line):
    return re.sub(r"(?<![\w*])\*(?=\*?\w)", r"\\*", line[0])


class CodeOrLink(XRefRole):
    """Code in a docstring, which becomes a link where it is the name of something public."""

    def process_link(self, env, refnode, has_explicit_title, title, target):
        return self.text, self.text


def link_or_code(app, env, node, contnode):
    if node["reftype"] != "code_or_link":
        return None
    domain = env.domains.python_domain
    target = node["reftarget"]
    # bare, these two are most often the arguments of those names
    for face in () if target in ("masks", "plan") else FACES:
        name = f"{face.__name__}.{target.removeprefix('jaxsparse.')}"
        if name in domain.objects:
            place = domain.objects[name]
            return make_refnode(
                app.builder, node["refdoc"], place.docname, place.node_id, contnode, name
            )
    return contnode


def public():
    """The full name of everything public, with the object."""
    for face in FACES:
        for name in getattr(face, "__all__", None) or dir(face):
            thing = getattr(face, name)
            if not name.startswith("_") and not isinstance(thing, types.ModuleType):
                yield f"{face.__name__}.{name}", thing


def documented(thing) -> bool:
    """Whether a docstring was written for it, rather than made by `dataclass` or `NamedTuple`."""
    return bool(thing.__doc__) and not thing.__doc__.startswith(f"{thing.__name__}(")


def members(cls):
    """The public methods and properties that a class defines itself, without those of pytrees."""
    for name, member in vars(cls).items():
        member = member.fget if isinstance(member, property) else getattr(member, "func", member)
        if not name.startswith(("_", "tree_")) and inspect.isfunction(member):
            yield name, member


def check_public(app, env):
    """Warns, which fails the build, of what is public and has no docstring or no place here."""
    for name, thing in public():
        if name not in env.domains.python_domain.objects:
            log.warning("%s is public, but no page of the API documents it", name)
        if inspect.isfunction(thing) or inspect.isclass(thing):
            parts = [(name, thing)]
            parts += [
                (f"{name}.{one}", f)
                for one, f in (members(thing) if inspect.isclass(thing) else ())
            ]
            for path, part in parts:
                if not documented(part):
                    log.warning("%s has no docstring", path)


def skip_member(app, what, name, obj, skip, options):
    """Leaves the fields of named tuples to the section `Attributes` of their docstrings."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def setup(app):
    app.add_role("code_or_link", CodeOrLink())
    app.connect("autodoc-process-docstring", as_rst, priority=400)  # napoleon is at 500
    app.connect("autodoc-skip-member", skip_member)
    app.connect("missing-reference", link_or_code)
    app.connect("env-check-consistency", check_public)
