"""A token store's packs for Megatron-Bridge or NeMo 2, and theirs as a token store.

    python data_prep/export.py runs/data/train --seq-length 4096 --to megatron-bridge-parquet --out train.idx.parquet
    python data_prep/export.py runs/data/train --seq-length 4096 --to nemo-npy --out packed_4096.npy
    python data_prep/export.py packed.parquet --seq-length 4096 --to store --tokenizer MODEL --out runs/data/train

The packs are those of the index: the same documents share a sequence there. NeMo's file is a pickle of everything: who
reads it runs what it says, and all of it is in memory when it is written and in every process that reads it. We write
it and do not read it. A store that is made of packs is packed anew, by --seq-length.
"""

from __future__ import annotations

try:
    from nano3.cli import UserError, run
    from nano3.outputs import fresh_file, fresh_output
except ModuleNotFoundError as missing:
    import sys

    print(f"error: {missing}; run: make install, then: . .venv/bin/activate", file=sys.stderr)
    raise SystemExit(2) from None

import argparse
from contextlib import ExitStack
from pathlib import Path

from tqdm import tqdm

from data_prep.exchange import FORMATS, documents_of, write_npy, write_parquet
from data_prep.packing import PackedDataset, build_packs
from data_prep.store import StoreWriter
from data_prep.tokens import ChatTokenizer
from nano3.outputs import check_output
from nano3.rows import open_rows
from nano3.token_store import KIND, TokenStore, tokenizer_file

WRITERS = {"megatron-bridge-parquet": write_parquet, "nemo-npy": write_npy}
STORE = "store"


def export(store: Path, seq_length: int, kind: str, out: Path) -> int:
    """Writes the packs of a store as `kind` to the file `out`; how many. Raises `UserError` for what it cannot say."""
    if out.suffix != FORMATS[kind]:
        raise UserError(f"--out {out} must end in {FORMATS[kind]}, by which readers of {kind} know the file")
    packs = PackedDataset(store, seq_length)
    packs.check_contents()
    with fresh_file(out) as temporary:
        WRITERS[kind](packs, temporary)
    return len(packs)


def import_packs(source: Path, tokenizer: Path, seq_length: int, out: Path) -> TokenStore:
    """Writes the documents of Megatron-Bridge's packed parquet, a file or a folder of them, as a store, and packs it.

    Raises `UserError` for rows that are not as they should be, and for tokens that the tokenizer does not have.
    """
    check_output(out, KIND)
    rows, encoder = open_rows(source), ChatTokenizer(tokenizer)
    with fresh_output(out, KIND) as folder, ExitStack() as stack:
        writer = StoreWriter(folder)
        stack.callback(writer.close)
        for row in tqdm(rows, desc=source.name, unit="pack", disable=None):
            batch = documents_of(row.fields, row.where)
            if (largest := int(batch.tokens.max())) >= encoder.vocab_size:
                raise UserError(
                    f"{row.where}: input_ids has {largest}, but {tokenizer} ends at {encoder.vocab_size - 1}; give the "
                    "tokenizer that made the packs"
                )
            file, _, number = row.where.rpartition(":")
            documents = len(batch.lengths)
            writer.add_batch(batch, [rows.name] * documents, [(Path(file).name, int(number))] * documents)
        if not writer.supervised_tokens:
            raise UserError(f"{source}: no token of it is trained (loss_mask is 0 everywhere)")
        writer.finish(encoder, tokenizer_folder=str(tokenizer), inputs=rows.facts)
        build_packs(TokenStore(folder), seq_length)
    return TokenStore(out)


def main() -> int:
    parse = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parse.add_argument("source", metavar="STORE", type=Path, help="token store; with --to store packed parquet")
    parse.add_argument("--to", required=True, choices=(*FORMATS, STORE), help="what to write")
    parse.add_argument("--seq-length", required=True, type=int, help="positions in a pack")
    parse.add_argument("--out", required=True, type=Path, help="file, or the folder of the store")
    parse.add_argument(
        "--tokenizer", type=Path, help="with --to store: pico, or the model's folder, that made the packs"
    )
    args = parse.parse_args()
    if (args.tokenizer is not None) != (args.to == STORE):
        raise UserError("--tokenizer goes with --to store, and --to store requires it")
    if args.to != STORE:
        print(f"{export(args.source, args.seq_length, args.to, args.out)} packs in {args.out}")
        return 0
    tokenizer_file(args.tokenizer)
    store = import_packs(args.source, args.tokenizer, args.seq_length, args.out)
    print(f"{len(store)} documents of {store.manifest['tokens']:,} tokens in {args.out}")
    return 0


if __name__ == "__main__":
    run(main)
