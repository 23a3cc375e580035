"""Prints what a safetensors file of a model holds.

python -m jaxsparse.inspect model.safetensors
"""

import argparse
import pathlib
from collections.abc import Sequence
from typing import Any

import tabulate

from jaxsparse._packed import files
from jaxsparse._packed.sparse24 import Sparse24

__all__ = ["main"]


def _form(value: Any) -> str:
    if not isinstance(value, Sparse24):
        return "dense"
    return f"2:4{'' if value.scale is None else ' int8'}, {value.layout}"


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=pathlib.Path, help="a safetensors file")
    args = parser.parse_args(argv)
    try:
        entries = files.read(args.file, "inspect")
    except (FileNotFoundError, ImportError, ValueError) as error:
        raise SystemExit(str(error)) from None
    sizes = [files.megabytes(value) for _, value in entries]
    rows = [
        (
            path,
            "x".join(map(str, value.shape)) or "scalar",
            value.dtype,
            _form(value),
            value.kinds if isinstance(value, Sparse24) else "",
            *size,
        )
        for (path, value), size in zip(entries, sizes, strict=True)
    ]
    total = [sum(column) for column in zip(*sizes, strict=True)] or [0.0, 0.0]
    rows.append(("all", "", "", "", "", *total))
    header = ("leaf", "shape", "dtype", "form", "axes", "MB", "MB dense")
    print(tabulate.tabulate(rows, header, floatfmt=".3f", disable_numparse=[0, 1, 2, 3, 4]))


if __name__ == "__main__":
    main()
