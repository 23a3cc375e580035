import pathlib
import re

import pytest

import jaxsparse as js

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_loop_runs_as_printed():
    (loop,) = re.findall(r"```python\n(.*?)```", README, re.S)
    namespace = {}
    exec(loop, namespace)
    assert isinstance(namespace["packed"]["params"]["layers_0"]["kernel"], js.Sparse24)
    assert namespace["logits"].shape == (32, 10)


def test_it_is_short():
    assert len(README.splitlines()) <= 120


@pytest.mark.parametrize("page", ["README.md", "docs/results.md"])
def test_the_tables_are_those_of_the_committed_results(page, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import readme

    text = (ROOT / page).read_text()
    assert "<!-- gpu" in text
    assert readme.filled(text, ROOT / page) == text


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_its_links_lead_somewhere(page):
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / page).read_text()):
        assert (ROOT / link).exists(), link
