import ast
import importlib.util
import inspect
import pathlib
import re
import subprocess
import sys

import pytest

import jaxsparse as js

PACKAGE = pathlib.Path(js.__file__).parent
# each room imports from the rooms before it, and each file of a room from the files before it
ROOMS = {
    "": ["_checks", "_registration"],
    "_program": ["arguments", "flow", "walk", "uses", "windows"],
    "_masks": ["ranking", "groups", "nm", "transposable", "topk", "blocks", "bits"],
    "_plan": [
        *["stages", "pattern", "patterns", "paths", "plan", "eligibility", "planning"],
        *["masks", "budgets"],
    ],
    "_training": [
        *["state", "forward", "schedules", "scores", "renew", "rewire", "pieces", "phases"],
        *["explore_exploit", "sr_ste", "mdgf", "sdgf", "gradual", "static"],
    ],
    "_kernels": ["__init__", "mosaic", "ampere", "decode", "hopper"],
    "_packed": [
        *["layouts", "sparse24", "int8", "compress", "partition", "matmul", "verify", "files"],
        "cutlass",
    ],
    "_pruning": [
        *["methods", "matrices", "calibration", "prune", "permutation"],
        *["alignment", "channels", "permute"],
    ],
    "_execution": ["weights", "moves", "fusion", "report", "run", "sparsify", "quantize"],
    "_analysis": ["costs", "metrics", "trajectories", "recorder"],
}
FACES = ["recipes", "analysis", "flax", "nnx", "inspect"]
FILES = [f"{room}.{file}".lstrip(".") for room, files in ROOMS.items() for file in files] + FACES
PUBLIC = [getattr(js, name) for name in dir(js)]
PUBLIC += [getattr(js.analysis, name) for name in dir(js.analysis) if not name.startswith("_")]
PUBLIC = [x for x in PUBLIC if inspect.isfunction(x) or inspect.isclass(x)] + [
    js.flax.plan,
    js.flax.intercept,
    *(getattr(js.recipes, name) for name in js.recipes.__all__),
]
PUBLIC += [js.nnx.plan, js.nnx.intercept]


def test_imports_point_one_way():
    for place, file in enumerate(FILES):
        earlier = {name.removesuffix(".__init__") for name in FILES[:place]}
        assert imported(PACKAGE / f"{file.replace('.', '/')}.py") <= earlier, file


def imported(path):
    """The files of the package that a file imports, at its top or inside."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("jaxsparse"):
            module = node.module.removeprefix("jaxsparse").removeprefix(".")
            dotted = {f"{module}.{alias.name}".lstrip(".") for alias in node.names}
            names |= {name for name in dotted if name in FILES} or {module}
    return names


def test_kernels_import_only_the_shim():
    for kernel in ("ampere", "decode", "hopper"):
        assert imported(PACKAGE / f"_kernels/{kernel}.py") <= {
            "_checks",
            "_kernels",
            "_kernels.mosaic",
        }, kernel


def test_every_file_has_its_place():
    files = {path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py")}
    names = {".".join(path.with_suffix("").parts) for path in files if path.parts[0] != "examples"}
    rooms = {f"{room}.__init__" for room in ROOMS}
    assert names - rooms - {"__init__"} == set(FILES) - rooms


def test_the_namespace_is_what_users_need():
    modules = {name for name in dir(js) if inspect.ismodule(getattr(js, name))}
    assert dir(js) == sorted(js.__all__)
    assert modules == {"analysis", "flax", "nnx", "recipes"}
    for name in set(dir(js)) - modules:  # no function shadows a module
        assert importlib.util.find_spec(f"jaxsparse.{name}") is None


def test_the_import_is_light():
    code = """
import sys, jaxsparse
heavy = ("flax.nnx", "tabulate", "jax.experimental.pallas", "matplotlib")
print([module for module in heavy if module in sys.modules])
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_no_file_is_two():
    assert all(len(path.read_text().splitlines()) <= 500 for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("function", PUBLIC, ids=lambda f: f.__name__)
def test_docstrings_say_what_goes_in_and_out(function):
    doc = inspect.getdoc(function)
    assert re.match(r"[A-Z`].*(\n.*)?\.", doc)
    if inspect.isclass(function):
        return
    names = [name for name in inspect.signature(function).parameters if name not in ("opt_state",)]
    assert all(re.search(rf"^  \*{{0,2}}{re.escape(name)}: ", doc, re.M) for name in names), names
    assert "Example:\n  >>> " in doc
    assert "Returns:\n" in doc or function.__name__ == "intercept"
