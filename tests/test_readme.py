import inspect
import pathlib
import re

import jaxsparse as js

README = (pathlib.Path(__file__).parent.parent / "README.md").read_text()


def test_the_loop_runs_as_printed():
    # the other, in NNX, is run by the tests of NNX
    loop, _ = re.findall(r"```python\n(.*?)```", README, re.S)
    found = {}
    exec(loop, found)
    assert isinstance(found["packed"]["params"]["layers_0"]["kernel"], js.Sparse24)
    assert found["logits"].shape == (32, 10)


def test_the_signature_of_the_recipe_is_the_one_printed():
    (printed,) = re.findall(r"`js\.recipes\.explore_exploit\((.*?)\)`", README)
    parameters = inspect.signature(js.recipes.explore_exploit).parameters.values()
    assert printed == ", ".join(
        p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters
    )


def test_the_tables_are_those_of_the_committed_results(monkeypatch):
    monkeypatch.syspath_prepend(str(pathlib.Path(__file__).parent.parent / "benchmarks"))
    import readme

    assert readme.filled(README) == README
