import re

import pytest

from jaxsparse.examples import char_lm

pytestmark = [pytest.mark.slow, pytest.mark.promotes("the example adds positions to a batch")]


def run(tmp_path, capsys, *args):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog; " * 200)
    plot = tmp_path / "curves.png"
    char_lm.main(
        [
            "--data",
            str(text),
            "--steps",
            "6",
            "--width",
            "32",
            "--depth",
            "2",
            "--plot",
            str(plot),
            *args,
        ]
    )
    assert plot.read_bytes().startswith(b"\x89PNG")
    return capsys.readouterr().out


def test_the_example_trains_compresses_checks_and_writes(tmp_path, capsys):
    out = run(tmp_path, capsys)
    rows = {
        m[1].strip(): m
        for m in re.finditer(
            r"^(dense|2:4|2:4 compressed)  +(\d+\.\d+) +(\d\.\d+) +(\d+\.\d+)", out, re.M
        )
    }
    assert rows.keys() == {"dense", "2:4", "2:4 compressed"}
    assert float(rows["2:4"][2]) == pytest.approx(float(rows["2:4 compressed"][2]), abs=2e-3)
    assert float(rows["2:4 compressed"][4]) < float(rows["2:4"][4])
    assert "The compressed forward agrees with the masked one" in out
    assert "The 2:4 compressed model writes:\n\nThe " in out


def test_the_example_stops_where_the_compressed_forward_differs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(char_lm, "agreement", lambda *_: 0.5)
    with pytest.raises(SystemExit, match="differs from the masked one"):
        run(tmp_path, capsys)


def test_another_pattern_runs_masked_and_says_so(tmp_path, capsys):
    out = run(tmp_path, capsys, "--pattern", "1:4")
    assert "The compressed format is 2:4, so 1:4 runs masked." in out
    assert "The 1:4 model writes:" in out
