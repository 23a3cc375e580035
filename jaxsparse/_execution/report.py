"""The report of a sparsified function: how it uses each compressed weight."""

import dataclasses
from typing import NamedTuple

__all__ = ["Report", "Usage"]


class Usage(NamedTuple):
    """One use of a compressed weight by a program.

    Attributes:
      path: the path of the weight; several, separated by commas, where they are concatenated before
        their product.
      product: the operation, with the shapes of its operands.
      reason: why the weight is decompressed there; empty where it runs compressed.
      implementation: what computes it on the default device: `"dense"` or the name of a kernel.
    """

    path: str
    product: str
    reason: str
    implementation: str


@dataclasses.dataclass(frozen=True)
class Report:
    """How a function uses its compressed weights; `print` it for a table.

    Attributes:
      products: one `Usage` for each place in the program that uses a compressed weight; the body of
        a loop counts once.
    """

    products: tuple[Usage, ...]

    def __str__(self):
        import tabulate  # here, so that only printing pays for the import

        rows = [
            (one.path, one.product, one.reason or "compressed", one.implementation)
            for one in self.products
        ]
        compressed = sum(not one.reason for one in self.products)
        table = tabulate.tabulate(
            rows, ("leaf", "product", "runs", "implementation"), disable_numparse=True
        )
        return f"{table}\n{compressed} of {len(rows)} uses run compressed."
