"""A store prepared in parts: equal bytes in every way, after every kill; what is unjoined, damaged or another's."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from conversion.checkpoint.output_folder import unfinished_output
from data_prep import join as joining
from data_prep import part_folder
from data_prep.chat_rows import form_named
from data_prep.documents import Options
from data_prep.job import Job
from data_prep.packing import PackedDataset, build_packs
from data_prep.part_folder import Work
from data_prep.prepare import join_shards, prepare, prepare_job, prepare_shards
from nano3.cli import UserError
from nano3.file_system import locked
from nano3.sealed_folder import seal
from nano3.store_contents import check_store
from nano3.token_store import TokenStore, unfinished_folder
from tests.helpers.data_fixtures import row, write_jsonl, write_tokenizer
from tests.helpers.killed import at_every_change, killed

ROWS, SHARD, SEQ = 50, 8, 256
"""Seven shards, of which the last has two rows."""
OPTIONS = Options(order="level")
KILLS = int(os.environ.get("KILLS", "3"))
"""Kills of three processes, which take seconds each; the figures of docs/performance.md have 10."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two inputs with weights, stages, sources, reasoning, empty answers and a row key, which shards cut anywhere."""
    folder, lines = tmp_path_factory.mktemp("rows"), []
    for number in range(ROWS):
        one = row(f"q{number}", "a" * (number % 7 + 1), "so" if number % 3 == 0 else None, f"s{number * 7 % 5}")
        one |= {"level": number % 9, "weight": (1, 1, 0.5, 3)[number % 4]}
        if number % 6 == 1:
            one["messages"][1]["spans"] = [{"text": "a", "stage": number + 1}] if number % 7 == 0 else []
        if number in (5, 30):
            one["messages"][1] = {"role": "assistant", "content": " "}
        lines.append(one)
    return [write_jsonl(folder / "a.jsonl", lines[:21]), write_jsonl(folder / "b.jsonl", lines[21:])]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, rows: list[Path], tokenizer: Path) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "store"
    prepare(rows, tokenizer, out, SEQ, OPTIONS, shard_rows=SHARD)
    return out


def test_parts_hold_what_one_store_holds(undisturbed: Path, tmp_path: Path, rows: list[Path], tokenizer: Path) -> None:
    whole, _ = prepare(rows, tokenizer, tmp_path / "whole", SEQ, OPTIONS)
    store = TokenStore(undisturbed)
    check_store(store)
    assert (len(whole.parts), len(store.parts), "parts" in whole.manifest) == (1, 7, False)
    assert store.manifest["sources"] == whole.manifest["sources"]
    for name in ("turns", "finds", "inputs", "documents", "supervised_tokens", "longest_document", "origins"):
        assert store.manifest[name] == whole.manifest[name], name
    for number in range(len(whole)):
        for there, here in zip(whole.document(number), store.document(number), strict=True):
            assert there.tolist() == here.tolist()
        assert whole.stages(number).tolist() == store.stages(number).tolist()
        assert (whole.origin(number), whole.source(number)) == (store.origin(number), store.source(number))
    assert whole.order("level").tolist() == store.order("level").tolist()
    assert whole.stage_counts().tolist() == store.stage_counts().tolist()
    flat, cut = PackedDataset(whole.folder, SEQ), PackedDataset(undisturbed, SEQ)
    assert len(flat) == len(cut)
    for number in range(len(flat)):
        assert {name: values.tolist() for name, values in flat[number].items()} == {
            name: values.tolist() for name, values in cut[number].items()
        }


def test_processes_and_elements_write_the_same_bytes(
    undisturbed: Path, tmp_path: Path, rows: list[Path], tokenizer: Path
) -> None:
    for workers in (2, 3):
        prepare(rows, tokenizer, tmp_path / str(workers), SEQ, OPTIONS, workers, SHARD)
        assert contents(tmp_path / str(workers)) == contents(undisturbed)
    job, out = Job.of(rows, tokenizer, OPTIONS, SHARD), tmp_path / "elements"
    for element in (3, 1):
        prepare_shards(job, out, element, 3)
    with pytest.raises(UserError, match=r"lacks part-00001: run its --shard again, then join"):
        join_shards(out, job, seq_length=SEQ)
    prepare_shards(job, out, 2, 3)
    join_shards(out, job, seq_length=SEQ)
    assert contents(out) == contents(undisturbed)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3", "elements"]


def test_an_unjoined_store_is_refused_with_the_command(tmp_path: Path, rows: list[Path], tokenizer: Path) -> None:
    out = tmp_path / "store"
    prepare_shards(Job.of(rows, tokenizer, OPTIONS, SHARD), out, 1, 2)
    with pytest.raises(UserError, match=r"not joined yet; .*prepare\.py --join --out .*store --seq-length N"):
        PackedDataset(out, SEQ)
    other = Job.of(rows, tokenizer, Options(thinking=False), SHARD)
    with pytest.raises(UserError, match="has parts of other inputs or options"):
        prepare_shards(other, out, 2, 2)
    prepare_shards(Job.of(rows, tokenizer, OPTIONS, SHARD), out, 2, 2)
    damaged = Work(out).part(3) / "tokens.bin"
    damaged.write_bytes(bytes(damaged.stat().st_size))
    with pytest.raises(UserError, match=r"part-00003/tokens\.bin is damaged"):
        join_shards(out, None, seq_length=SEQ)


def test_an_input_that_changed_starts_anew(tmp_path: Path, tokenizer: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [row(str(number), "b") for number in range(6)])
    out = tmp_path / "store"
    prepare_shards(Job.of([path], tokenizer, Options(), 2), out, 1, 2)
    write_jsonl(path, [row(str(number), "cc") for number in range(6)])
    with pytest.raises(UserError, match="other inputs or options"):
        prepare_shards(Job.of([path], tokenizer, Options(), 2), out, 2, 2)
    store, _ = prepare([path], tokenizer, out, SEQ, shard_rows=2)
    assert {int((store.document(number)[1] > 0).sum()) for number in range(6)} == {3}  # "cc" and its end
    assert not unfinished_folder(out).exists()


def test_a_row_that_cannot_be_used_leaves_nothing(tmp_path: Path, tokenizer: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [*(row(str(number), "b") for number in range(6)), "{"])
    for workers in (1, 2):
        with pytest.raises(UserError, match=r"x\.jsonl:7: not valid JSON"):
            prepare([path], tokenizer, tmp_path / "store", SEQ, workers=workers, shard_rows=2)
        assert [left.name for left in tmp_path.iterdir()] == ["x.jsonl"]


def test_a_document_in_two_parts_is_refused(undisturbed: Path, tmp_path: Path) -> None:
    shutil.copytree(undisturbed, tmp_path / "store")
    manifest = json.loads((tmp_path / "store" / "manifest.json").read_text())
    offsets = np.fromfile(tmp_path / "store" / "documents.idx", "<i8")
    place = int(np.flatnonzero(offsets == manifest["parts"][0]["tokens"])[0])
    offsets[place] += 1
    offsets.tofile(tmp_path / "store" / "documents.idx")
    manifest["files"]["documents.idx"]["sha256"] = hashlib.sha256(offsets.tobytes()).hexdigest()
    (tmp_path / "store" / "manifest.json").write_text(json.dumps(manifest))
    seal(tmp_path / "store")
    with pytest.raises(UserError, match="no document begins with part-00001"):
        check_store(TokenStore(tmp_path / "store"))


def test_rows_left_out_are_counted_once_wherever_they_are_cut(tmp_path: Path, tokenizer: Path) -> None:
    """Of GSM8K's form, with repetitions before, at and behind the ends of shards."""
    asked = [
        {"question": f"What is {n}+1?", "answer": f"{n + 1}\n#### {n + 1}"} for n in (1, 1, 2, 3, 3, 4, 5, 6, 6, 6)
    ]
    path = write_jsonl(tmp_path / "train.jsonl", asked)
    named = Options(form=form_named("gsm8k"))
    whole, _ = prepare([path], tokenizer, tmp_path / "whole", SEQ, named)
    assert whole.manifest["finds"]["left_out"][0]["rows"] == 4
    for rows in (1, 2, 3):
        cut, _ = prepare([path], tokenizer, tmp_path / f"cut{rows}", SEQ, named, shard_rows=rows)
        assert cut.manifest["finds"] == whole.manifest["finds"]
        assert cut.manifest["documents"] == 6


def fail_at(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, call: int, done: bool) -> None:
    """From now on the `call`-th call of a function kills its process: before it does anything, or when it is `done`."""
    original, calls = getattr(owner, name), iter(range(1, 1000))

    def dying(*args: object, **named: object) -> object:
        now = next(calls) == call
        if now and not done:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **named)
        if now:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    monkeypatch.setattr(owner, name, dying)


MOMENTS = {
    "before the first part": (part_folder.os, "rename", 1, False),
    "behind the fourth": (part_folder.os, "rename", 4, True),
    "before the join": (joining, "_write_store", 1, False),
    "in the join": (joining, "_link", 9, True),
    "before packing": (joining, "build_packs", 1, False),
    "behind packing": (joining, "build_packs", 1, True),
    "before the store has its name": (joining, "replace_folder", 1, False),
    "when the store has its name": (joining, "replace_folder", 1, True),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_every_step_it_resumes_to_the_same_bytes(
    moment: str, undisturbed: Path, tmp_path: Path, rows: list[Path], tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "store"

    def run() -> None:
        prepare(rows, tokenizer, out, SEQ, OPTIONS, shard_rows=SHARD)

    with monkeypatch.context() as patch:
        fail_at(patch, *MOMENTS[moment])
        assert killed(run)
    finished = {path.stat().st_ino for path in unfinished_folder(out).glob("part-?????/tokens.bin")}
    run()
    assert contents(out) == contents(undisturbed)
    assert finished <= {path.stat().st_ino for path in out.rglob("tokens.bin")}, "no finished part is written again"
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


@pytest.mark.parametrize("workers", [1, 3])
def test_killed_at_random_it_resumes_to_the_same_bytes(
    workers: int, undisturbed: Path, tmp_path: Path, rows: list[Path], tokenizer: Path
) -> None:
    """The processes of a killed one end with it; then the same command goes on until it is left alone."""
    drawn = random.Random(workers)

    def run() -> None:
        prepare(rows, tokenizer, tmp_path / "store", SEQ, OPTIONS, workers, SHARD)

    for _ in range(KILLS if workers > 1 else 10):
        killed(run, drawn.uniform(0, 0.5 if workers == 1 else 8))
    run()
    assert contents(tmp_path / "store") == contents(undisturbed)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


@pytest.mark.parametrize("elements", [False, True])
def test_killed_at_every_change_of_the_disk_it_resumes_and_leaves_nothing(
    elements: bool, tmp_path: Path, tokenizer: Path
) -> None:
    """Of two parts, in the place of an older store; as one command, and as two elements of an array."""
    folder, out, older = tmp_path / "work", tmp_path / "work" / "store", tmp_path / "older"
    two = write_jsonl(tmp_path / "two.jsonl", [row("q", "a"), row("q", "bb")])
    job, moments = Job.of([two], tokenizer, Options(), 1), []

    def shards() -> None:
        prepare_shards(job, out, 1, 2)
        prepare_shards(job, out, 2, 2)

    def whole() -> None:
        prepare_job(job, out, 1, seq_length=SEQ)

    prepare([two], tokenizer, older, SEQ)
    folder.mkdir()
    whole()
    expected = contents(out)
    shutil.rmtree(out)
    shutil.copytree(older, out)
    for event in at_every_change(shards if elements else whole, folder):
        if out.is_dir():
            check_store(TokenStore(out))
        if elements:
            shards()
            join_shards(out, job, seq_length=SEQ)
        else:
            whole()
        assert contents(out) == expected, event
        assert os.listdir(folder) == ["store"], event
        moments.append(event)
        shutil.rmtree(out)
        shutil.copytree(older, out)
    assert len(moments) > 40


def test_a_join_goes_on_by_itself_wherever_it_was_killed(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """But for the moments when all is done, and nothing is left that says of what the store was made."""
    folder, out, kept = tmp_path / "work", tmp_path / "work" / "store", tmp_path / "kept"
    two = write_jsonl(tmp_path / "two.jsonl", [row("q", "a"), row("q", "bb")])
    job, moments = Job.of([two], tokenizer, Options(), 1), []
    folder.mkdir()
    prepare([two], tokenizer, out, SEQ)
    prepare_shards(job, out, 1, 1)
    shutil.copytree(folder, kept)

    def run() -> None:
        join_shards(out, job, seq_length=SEQ)

    run()
    expected = contents(out)
    for event in at_every_change(run, folder):
        if out.is_dir():
            check_store(TokenStore(out))
        if not any((folder / name / "job.json").exists() for name in (".store.unfinished", ".store.joined")):
            with pytest.raises(UserError, match=r"If a join of it has just ended, there is nothing left to do"):
                run()
        else:
            run()
        assert contents(out) == expected, event
        assert os.listdir(folder) == ["store"], event
        moments.append(event)
        shutil.rmtree(folder)
        shutil.copytree(kept, folder)
    assert len(moments) > 50
    assert moments[-1].endswith(".store.lock")
    assert "is joined already" in capsys.readouterr().err


def test_only_the_store_of_the_parts_that_go_is_taken_for_joined(tmp_path: Path, tokenizer: Path) -> None:
    """Not one that other options made, and none where nothing says what it was made of."""
    two = write_jsonl(tmp_path / "two.jsonl", [row("q", "a"), row("q", "bb")])
    work, job = Work(tmp_path / "store"), Job.of([two], tokenizer, Options(), 1)
    prepare_shards(job, work.out, 1, 1)
    work.folder.rename(work.joined)
    prepare([two], tokenizer, tmp_path / "other", SEQ)
    shutil.copytree(tmp_path / "other", work.out)
    for other in (Job.of([two], tokenizer, Options(thinking=False), 1), Job.of([two], tokenizer, Options(), 2)):
        with pytest.raises(UserError, match=r"has no parts to join"):
            join_shards(work.out, other, seq_length=SEQ)
    assert contents(join_shards(work.out, job, seq_length=SEQ)[0].folder) == contents(tmp_path / "other")
    for given in (job, None):
        with pytest.raises(UserError, match=r"has no parts to join"):
            join_shards(work.out, given, seq_length=SEQ)
    assert sorted(os.listdir(tmp_path)) == ["other", "store", "two.jsonl"]


def test_a_job_that_cannot_be_read_is_written_again(tmp_path: Path, tokenizer: Path) -> None:
    two = write_jsonl(tmp_path / "two.jsonl", [row("q", "a"), row("q", "bb")])
    work, job = Work(tmp_path / "store"), Job.of([two], tokenizer, Options(), 1)
    prepare_shards(job, work.out, 1, 2)
    (work.folder / "job.json").write_text("")
    prepare_shards(job, work.out, 2, 2)
    join_shards(work.out, None, seq_length=SEQ)
    assert os.listdir(tmp_path / "store") != []
    assert sorted(os.listdir(tmp_path)) == ["store", "two.jsonl"]


def test_parts_that_are_being_written_and_what_others_left_stay(tmp_path: Path, tokenizer: Path) -> None:
    two = write_jsonl(tmp_path / "two.jsonl", [row("q", "a"), row("q", "bb")])
    work = Work(tmp_path / "store")
    prepare_shards(Job.of([two], tokenizer, Options(), 1), work.out, 1, 1)
    with locked(work.folder / ".shard-2-of-2.lock"):
        for options in (Options(), Options(thinking=False)):
            with pytest.raises(UserError, match=r"another process is writing parts \(\.shard-2-of-2\.lock\)"):
                prepare([two], tokenizer, work.out, SEQ, options, shard_rows=1)
    assert work.parts() == [0, 1]
    with (
        pytest.raises(UserError, match="holds another tool's work"),
        unfinished_output(work.out, "hf-model", {}, 0),
    ):
        pass
    assert work.parts() == [0, 1]
    work.remove()

    def converted() -> None:
        with unfinished_output(work.out, "hf-model", {}, 0) as model:
            model.hide("model").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        converted()
    with pytest.raises(UserError, match="holds what no preparation left there"):
        prepare([two], tokenizer, work.out, SEQ)
    assert (work.folder / "model.part").read_text() == "half"


def test_packs_that_cannot_be_made_leave_the_tokens(tmp_path: Path, rows: list[Path], tokenizer: Path) -> None:
    with pytest.raises(UserError, match=r"longer than --seq-length 4 .*repack\.py"):
        prepare(rows, tokenizer, tmp_path / "store", 4, shard_rows=SHARD)
    store = TokenStore(tmp_path / "store")
    check_store(store)
    assert build_packs(store, SEQ)["documents"] == len(store) == ROWS - 2
