"""The finished runs: one JSON line each, after a first line on the environment and the text."""

import dataclasses
import json

from benchmarks import timing
from benchmarks.quality import tasks
from benchmarks.quality.runs import CPU, GPU, Cell, Cells, tuned

FOLDER = timing.RESULTS / "quality"


def folder(scale):
    """The folder that holds the runs of a scale."""
    return FOLDER / "gpu" if scale.together else FOLDER


def read(folder):
    """Maps (cell, seed) to the record of the run; empty without a file."""
    path = folder / "runs.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    records = {}
    for line in lines[1:]:
        record = json.loads(line)
        options = tuple(sorted(record["options"].items()))
        cell = Cell(
            **{
                field.name: record[field.name]
                for field in dataclasses.fields(Cell)
                if field.name != "options"
            },
            options=options,
        )
        records[cell, record["seed"]] = record
    return records


def where(folder):
    """The environment of the runs, or None without runs."""
    path = folder / "runs.jsonl"
    return json.loads(path.read_text().splitlines()[0]) if path.exists() else None


def cells(scale, records):
    """The cells of a scale with its tuning results; on a GPU, settings are those from the CPU."""
    return Cells(
        scale,
        tuned(
            scale,
            records,
            tuned(CPU, read(FOLDER) if scale == GPU else {}, {}) if scale.together else {},
        ),
    )


class Store:
    """Opens the runs in a folder to add to them.

    Raises:
      SystemExit: the existing runs were trained on another version of Python's standard library.
    """

    def __init__(self, folder):
        folder.mkdir(parents=True, exist_ok=True)
        known = where(folder)
        if known and known["text"] != tasks.fingerprint():
            raise SystemExit(
                f"The runs in {folder} learned the standard library of Python {known['python']}, "
                "which is another text than the one here. Continue them with that Python, or keep "
                "yours elsewhere with --out."
            )
        self._file = (folder / "runs.jsonl").open("a")
        if not known:
            self._write({**timing.environment(), "text": tasks.fingerprint()})

    def add(self, cell, seed, record):
        self._write(
            {**dataclasses.asdict(cell), "options": dict(cell.options), "seed": seed, **record}
        )

    def _write(self, content):
        self._file.write(json.dumps(content) + "\n")
        self._file.flush()
