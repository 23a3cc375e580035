"""The benchmark that retrains a pruned language model, at a small size."""

import importlib
import json
import pathlib

import numpy as np
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.promotes("the benchmark is written as users write")]


@pytest.fixture
def retraining(monkeypatch):
    monkeypatch.syspath_prepend(str(pathlib.Path(__file__).parent.parent / "benchmarks"))
    return importlib.import_module("retraining")


def test_it_trains_from_a_start_and_continues_where_it_stopped(retraining, tmp_path, monkeypatch):
    monkeypatch.setattr(retraining, "RUNS", [("sparsegpt", "static"), ("sparsegpt", "adapters")])
    arguments = ["--tiny", "--steps", "3", "--out", str(tmp_path)]
    retraining.main(arguments)
    file = tmp_path / "retraining.jsonl"
    *others, last = lines = file.read_text().splitlines(keepends=True)
    records = [json.loads(line) for line in lines]
    for start, recipe in retraining.RUNS:
        *tried, whole = (one for one in records if (one["start"], one["recipe"]) == (start, recipe))
        assert 3 <= len(tried) <= 6 and {one["steps"] for one in tried} == {2}
        perplexities = {one["rate"]: one["perplexity"] for one in tried}
        assert perplexities[whole["rate"]] == min(perplexities.values())
        assert len(whole["losses"]) == whole["steps"] == 3 and np.isfinite(whole["losses"]).all()

    before = (tmp_path / "retraining.json").read_text()
    assert [row[:2] for row in json.loads(before)["rows"]] == [list(run) for run in retraining.RUNS]
    file.write_text("".join(others))
    retraining.main(arguments)
    *same, again = file.read_text().splitlines(keepends=True)
    assert same == others
    assert json.loads(again)["losses"] == json.loads(last)["losses"]


def test_the_text_is_not_that_of_the_test(retraining):
    manual = set(retraining.smollm.manual_pages().split("\n\n"))
    shared = [text for text in retraining.docstrings().split("\n\n") if text in manual]
    assert max(map(len, shared), default=0) < 60
