"""What preparing rows costs beside the tokenizer alone: batch by batch in one process, CPU time.

Preparation tells after every batch of rows how many it has read. There its clock stops, and bare `encode_batch_fast`
encodes the whole texts of the same rows. So both see the same minute of a machine that others use too. What comes after
the last batch, the end of the part and the join with its packs, is spread over the batches, less what it costs for ten
rows.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from data_inputs import chat_rows
from packing_cost import SEQ
from tokenizers import Tokenizer
from tqdm import tqdm

from data_prep.chat import render, text_of
from data_prep.documents import BATCH, Options
from data_prep.job import Job
from data_prep.join import join
from data_prep.packing import PackedDataset
from data_prep.part_folder import Work
from data_prep.prepare import prepare
from data_prep.shards import PartWriter
from nano3.conversations import Conversations
from nano3.rows import write_rows
from nano3.token_store import TokenStore

KINDS = {
    "a MedMCQA question and its letter": (1, 0, 32),
    "four questions, three as the answer": (4, 3, 8),
    "thirty questions, thirty as the answer": (30, 30, 1),
}
"""Rows by the number of questions that are asked and that are the answer, and how many batches there are, in eighths of
`--batches`: about as many tokens of each kind."""
START_ROWS = 10
LONG = 16_384
"""Positions of a pack, which the longest rows need."""
ROUNDS = 9
"""Times that all packs are read."""


def cpu(work: Callable[[], Any]) -> float:
    """CPU seconds of this process."""
    begun = time.process_time()
    work()
    return time.process_time() - begun


def preparing(folder: Path, tokenizer: Path, batches: int, options: Options) -> list[dict[str, Any]]:
    """For each kind of rows, what bare encoding costs in parts of what a preparation costs."""
    write_rows(folder / "few.jsonl", chat_rows(START_ROWS, 1, 0))
    # The first compiles.
    start = min(_Beside(folder / "few.jsonl", tokenizer, 1).prepare(folder / "store", options)[1] for _ in range(3))
    results = []
    for name, (asked, answered, eighths) in KINDS.items():
        count = max(2, batches * eighths // 8)
        write_rows(folder / "rows.jsonl", chat_rows(count * BATCH, asked, answered))
        beside = _Beside(folder / "rows.jsonl", tokenizer, count)
        store, rest = beside.prepare(folder / "store", options)
        rest -= start
        bare, ours = (np.array(costs[max(1, count // 8) :]) for costs in (beside.bare, beside.ours))
        low, middle, high = np.quantile(bare / (ours + rest / count), (0.25, 0.5, 0.75)).tolist()
        results.append(
            {
                "what": f"prepare, {name}",
                "backend": options.backend,
                "batches": len(ours),
                "tokens a document": round(store.manifest["tokens"] / len(store), 1),
                "of bare encoding": round(middle, 3),
                "quartiles": [round(low, 3), round(high, 3)],
                "us a document": round(float(np.median(ours) + rest / count) / BATCH * 1e6, 1),
                "of it after the last batch": round(rest / count / BATCH * 1e6, 1),
            }
        )
        print(results[-1], flush=True)
    return results


class _Beside:
    """A preparation of `count` full batches of rows, with bare encoding of the same texts after each.

    `ours` and `bare` are the CPU seconds of every batch.
    """

    def __init__(self, rows: Path, tokenizer: Path, count: int) -> None:
        self._rows, self._tokenizer = rows, tokenizer
        self._texts = (text_of(render(row.messages, thinking=True)) for row in Conversations(rows))
        self._encoder = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
        self._bar = tqdm(total=count, unit="batch", disable=None)
        self.ours: list[float] = []
        self.bare: list[float] = []

    def prepare(self, out: Path, options: Options) -> tuple[TokenStore, float]:
        """The store that `data_prep/prepare.py` would write, and the CPU seconds after its last batch."""
        work = Work(out)
        job = Job.of([self._rows], self._tokenizer, options, shard_rows=self._bar.total * BATCH)
        work.begin(job)
        part = PartWriter(job, work)
        part.reader.begin(0)
        self._begun = time.process_time()
        part.write(0, self._batch)
        rest = time.process_time() - self._begun
        self._bar.close()
        rest += cpu(partial(join, work, LONG))
        return TokenStore(out), rest

    def _batch(self, rows: int) -> None:
        self.ours.append(time.process_time() - self._begun)
        texts = list(islice(self._texts, rows))
        self.bare.append(cpu(partial(self._encoder.encode_batch_fast, texts, add_special_tokens=False)))
        self._bar.update()
        self._begun = time.process_time()


def random_pack(folder: Path, tokenizer: Path) -> dict[str, Any]:
    """What reading a pack costs, in an order that no cache foresees."""
    write_rows(folder / "rows.jsonl", chat_rows(10_000, 4, 3))
    prepare([folder / "rows.jsonl"], tokenizer, folder / "store", SEQ)
    packs = PackedDataset(folder / "store", SEQ)
    order = np.random.default_rng(0).permutation(len(packs)).tolist()
    each = [cpu(lambda: [packs[number] for number in order]) / len(order) for _ in range(ROUNDS)]
    result = {
        "what": f"a random pack of {SEQ}",
        "us": round(statistics.median(each) * 1e6, 1),
        "least": round(min(each) * 1e6, 1),
    }
    print(result, flush=True)
    return result
