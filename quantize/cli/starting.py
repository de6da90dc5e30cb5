"""`edge-quantize init`: the recipe that `auto` would run, written down with comments.

Law of this file: words in, one file out; nothing is measured and nothing is overwritten.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from edge_runtime.errors import ConflictError, StorageError
from quantize.cli import making


def add_parser(subparsers: Any) -> None:
    """The command."""
    init = subparsers.add_parser("init", help="write the recipe of `auto`, to be changed")
    making.add_wish(init)
    init.add_argument("-o", "--out", metavar="RECIPE", type=Path, default=Path("recipe.yaml"))
    init.set_defaults(handler=_init)


def _init(arguments: argparse.Namespace) -> int:
    from quantize import writing

    recipe, out = making.wished(arguments), arguments.out
    text = writing.text(recipe, out.parent)
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as e:
        raise ConflictError(
            "is there already", where=str(out), remedy="give another name with -o, or delete it"
        ) from e
    except OSError as e:
        raise StorageError(f"cannot be written: {e.strerror}", where=str(out)) from e
    print(f"wrote {out}: {len(recipe.variants)} variants; next: edge-quantize run {out} -o BUNDLE")
    return 0
