"""Makes another pack index for a token store, leaving its tokens as they are.

python data_prep/repack.py runs/data/train --seq-length 8192
"""

from __future__ import annotations

try:
    from nano3.cli import run
except ModuleNotFoundError as missing:
    import sys

    print(f"error: {missing}; run: make install, then: . .venv/bin/activate", file=sys.stderr)
    raise SystemExit(2) from None

import argparse

from data_prep.packing import build_packs
from data_prep.prepare import add_packing_options, packing_arguments
from data_prep.summary import print_packs
from nano3.store_contents import check_store
from nano3.token_store import TokenStore


def main() -> int:
    """Writes the index and prints how full its packs are."""
    parser = argparse.ArgumentParser(
        description="Pack a token store for another sequence length.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("store", help="token store that data_prep/prepare.py made")
    add_packing_options(parser)
    args = parser.parse_args()
    packing = packing_arguments(args)
    print(args.store)
    store = TokenStore(args.store)
    check_store(store)
    print_packs(build_packs(store, **packing))
    return 0


if __name__ == "__main__":
    run(main)
