import ast
import inspect
import pathlib
import re
import subprocess
import sys

import pytest

import jaxsparse as js

PACKAGE = pathlib.Path(js.__file__).parent
ORDER = ["patterns", "_program.arguments", "_program.flow", "_program.walk", "_program.uses", "plan", "budgets"]
ORDER += ["ranking", "groups", "transposable", "topk", "blocks", "masks", "scores", "bits", "state"]
ORDER += ["schedules", "phases", "forward", "transforms", "progressive", "recipes", "layouts", "compress", "kernels", "matmul"]
ORDER += ["_program.weights", "_program.fusion", "_program.execute"]
ORDER += ["costs", "metrics", "trajectories", "recorder", "analysis", "flax", "nnx"]
KERNELS = ["kernels", "kernels.mosaic"]  # before each kernel; only a lowering for CUDA imports more than the first
PUBLIC = [getattr(js, name) for name in dir(js) if not name.startswith("_")]
PUBLIC += [getattr(js.analysis, name) for name in dir(js.analysis) if not name.startswith("_")]
PUBLIC = [x for x in PUBLIC if callable(x)] + [js.flax.plan, js.flax.intercept, *(getattr(js.recipes, name) for name in js.recipes.__all__)]
PUBLIC += [js.nnx.plan, js.nnx.intercept]


def test_imports_point_one_way():
    for place, module in enumerate(ORDER):
        path = PACKAGE / f"{module.replace('.', '/')}.py"
        assert imported(path if path.exists() else PACKAGE / module / "__init__.py") <= set(ORDER[:place]), module


def imported(path):
    froms = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom) and node.module]
    inside = {f"_program.{alias.name}" for node in froms if node.module == "jaxsparse._program" for alias in node.names}
    names = {node.module.removeprefix("jaxsparse.") for node in froms if node.module.startswith("jaxsparse.")}
    return names - {"_program"} | inside


def test_kernels_know_only_the_shim():
    for path in (PACKAGE / "kernels").glob("*.py"):
        place = KERNELS.index(f"kernels.{path.stem}") if f"kernels.{path.stem}" in KERNELS else len(KERNELS)
        assert imported(path) <= set(KERNELS[:place] if path.stem != "__init__" else []), path


def test_every_module_has_its_place():
    programs = {f"_program.{path.stem}" for path in (PACKAGE / "_program").glob("*.py")} - {"_program.__init__"}
    assert {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"} | {"kernels"} | programs == set(ORDER)


def test_the_import_is_light():
    code = "import sys, jaxsparse; print([m for m in ('flax', 'tabulate', 'jax.experimental.pallas', 'matplotlib') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_no_file_is_two():
    assert all(len(path.read_text().splitlines()) <= 500 for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("function", PUBLIC, ids=lambda f: f.__name__)
def test_docstrings_say_what_goes_in_and_out(function):
    doc = inspect.getdoc(function)
    assert re.match(r"[A-Z`].*\.", doc)
    if inspect.isclass(function):
        return
    names = [name for name in inspect.signature(function).parameters if name not in ("opt_state",)]
    assert all(re.search(rf"^  \*{{0,2}}{re.escape(name)}: ", doc, re.M) for name in names), names
    assert "Example:\n  >>> " in doc
    assert "Returns:\n" in doc or function.__name__ == "intercept"
