"""
Which model families work in which formats, as a Markdown table: tiny random models, exported, opened and held against
PyTorch by the code that the tests run.

yes: fp32 agrees with PyTorch, dense and with sparse attention. dense only: as dense. Below: every reason.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import families

from edgeformer import formats
from edgeformer.agreement import Cell
from edgeformer.errors import BadInput

FURTHEST = 1e-4  # from PyTorch in fp32


def main() -> int:
    parser = argparse.ArgumentParser(prog="tools/families", description=__doc__)
    parser.add_argument("family", nargs="*", choices=[*families.NAMES, []], help="only these")
    parser.add_argument("--format", action="append", choices=formats.names(), help="only this; repeatable")
    options = parser.parse_args()
    chosen, names = options.family or families.NAMES, options.format or formats.names()
    reasons, failed = [], 0
    print("| family | head |", " | ".join(names), "|", flush=True)
    print("|---" * (len(names) + 2) + "|", flush=True)
    for family in chosen:
        dense = {name: _failure(family, name, families.dense(family, (name,))) for name in names}
        sparse = {name: _not_sparse(family, name) for name in names if dense[name] is None}
        words = ["**no**" if dense[name] else "dense only" if sparse[name] else "yes" for name in names]
        print(f"| {family} | {families.model(family).task.kind} |", " | ".join(words), "|", flush=True)
        reasons += [f"- {family}, {name}: {why}" for found in (dense, sparse) for name, why in found.items() if why]
        failed += sum(why is not None for why in dense.values())
    print("", *reasons, sep="\n")
    print(f"\n{len(chosen) * len(names) - failed} of {len(chosen) * len(names)} work")
    return int(failed > 0)


def _failure(family: str, name: str, cells: tuple[Cell, ...]) -> str | None:
    """Why this family does not work in this format."""
    for cell in cells:
        if cell.error:
            return cell.error
        if cell.precision == "fp32" and not (cell.same and cell.same.max_abs < FURTHEST):
            return f"{family} in {name}-fp32 is up to {cell.same.max_abs if cell.same else 'nan'} from PyTorch"
    return None


def _not_sparse(family: str, name: str) -> str | None:
    """Why it has no sparse attention there."""
    try:
        cells = families.sparse(family, (name,))
    except BadInput as error:
        return str(error)
    kept = [account for cell in cells for account in cell.sparse_layers.values()]
    if kept and not any(account["sparse"] for account in kept):
        return "; ".join(reason for account in kept for reason in account["dense_because"])
    return _failure(family, name, cells)


if __name__ == "__main__":
    sys.exit(main())
