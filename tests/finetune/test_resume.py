"""A run killed again and again ends with the same adapter, bit for bit, as the run that nobody touched."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conversion.checkpoint.torch_dist import TorchDistReader
from conversion.hf_to_nemo import convert
from data_prep.mixture import TrainingSamples
from data_prep.packing import build_packs
from finetune.settings import CheckpointSettings, LogSettings, LoraSettings, Settings, TrainSettings
from launch.plan.layout import Layout
from nano3.checkpoints.checkpoint_folder import checkpoints, step_of
from nano3.token_store import TokenStore, tokenizer_sha256
from tests.helpers.rank_server import RankServer
from tests.helpers.tiny import tiny_hf_folder
from tests.helpers.tiny_run import digest_of, metrics, write_run
from tests.helpers.tiny_store import tiny_store

pytestmark = pytest.mark.full

STEPS = 12
MIXTURE = "mix.yaml"
KILLS = sorted(random.Random(2026).sample(range(1, STEPS), 5))
WAYS = ("kill", "save", "validation", "pruning", "kill")
MEASURED = ("step", "loss", "grad_norm", "lr", "tokens", "validation_loss", "validation_accuracy")
"""What must be equal in metrics.jsonl; the rest is time."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base model, store, and a mixture of it with another one."""
    folder = tmp_path_factory.mktemp("resume")
    source = tiny_hf_folder(folder / "hf", dtypes={"": "F32"}, hybrid_override_pattern="MEM*E")
    convert(source, folder / "nemo", context=False)
    for seed, (name, documents) in enumerate((("store", 60), ("other-store", 25))):
        tiny_store(folder / name, documents, longest=30, vocab_size=128, seed=seed, tokenizer=tokenizer_sha256(source))
        build_packs(TokenStore(folder / name), 64)
    (folder / MIXTURE).write_text("stores: [{path: store, weight: 2}, {path: other-store, weight: 1}]")
    return folder


def settings(layout: Layout, precision: str, steps: int, every: int) -> Settings:
    """Dropout on, so that random numbers count; accumulation of 2; a validation every third step."""
    return Settings(
        layout=layout,
        lora=LoraSettings(rank=4, alpha=8.0, dropout=0.2),
        train=TrainSettings(
            steps=steps, warmup=2, lr=1e-2, global_batch=4, seq_length=64, validate_every=3, precision=precision
        ),
        checkpoint=CheckpointSettings(every=every, minutes=0),
        log=LogSettings(tensorboard=False, wandb="off"),
    )


def log(out: Path) -> str:
    return (out / "logs" / "rank0.log").read_text()


def untouched(folder: Path, ranks: RankServer, name: str, run: Settings, data: str = "store") -> Path:
    path = write_run(folder, name, 2, run, validate=True, data=data)
    assert ranks.run(path) == [0, 0], log(folder / name)[-3000:]
    return folder / name


def assert_same(one: Path, other: Path) -> None:
    """Equal adapters, bit for bit, and equal metrics, each step once."""
    ours, theirs = (TorchDistReader(out / "adapter" / "weights") for out in (one, other))
    assert set(ours.shapes) == set(theirs.shapes)
    for key in ours.shapes:
        assert torch.equal(ours.whole(key).view(torch.uint8), theirs.whole(key).view(torch.uint8)), key
    rows = [[{name: row.get(name) for name in MEASURED} for row in metrics(out)] for out in (one, other)]
    assert rows[0] == rows[1]
    trained = [row["step"] for row in rows[0] if row["loss"] is not None]
    assert trained == list(range(1, len(trained) + 1))


def test_five_kills_change_nothing(folder, ranks):
    run = settings(Layout(ep=2), "fp32", STEPS, every=2)
    reference = untouched(folder, ranks, "reference", run, MIXTURE)
    path = write_run(folder, "killed", 2, run, validate=True, data=MIXTURE)
    reached = 0
    for step, way in zip(KILLS, WAYS, strict=True):
        codes = ranks.run(path, FAULT=f"{way}:{step},record:0")
        assert -signal.SIGKILL in codes, log(folder / "killed")[-3000:]
        found = [step_of(checkpoint) for checkpoint in checkpoints(folder / "killed")]
        assert (found[-1] if found else 0) >= max(reached, (step - 1) // 2 * 2), (
            f"{way} at {step} lost more than it may"
        )
        reached = found[-1] if found else 0
    assert ranks.run(path, FAULT="record:0") == [0, 0], log(folder / "killed")[-3000:]
    assert f"resumed at step {reached} from" in log(folder / "killed")
    assert_order(folder, "killed", 2, STEPS)
    assert_same(folder / "killed", reference)
    assert len(checkpoints(folder / "killed")) == 2  # pruned to checkpoint.keep


def assert_order(folder: Path, name: str, ranks: int, steps: int) -> None:
    """Each of `ranks` data-parallel ranks has taken its packs of the mixture's order: of every step each n-th one.

    A step that was taken again after a restart took the same packs again, some of them where it was killed again.
    """
    batch, order = 4, TrainingSamples(folder / MIXTURE, 64, 1, steps * 4, seed=TrainSettings().seed)
    assert {order.pack_of(sample)[0] for sample in range(steps * batch)} == {0, 1}
    for rank in range(ranks):
        taken: dict[int, dict[str, list[str]]] = {}
        for line in (folder / name / f"packs-of-{rank}").read_text().splitlines():
            process, step, digest = line.split()
            taken.setdefault(int(step), {}).setdefault(process, []).append(digest)
        assert set(taken) == set(range(1, steps + 1))
        for step, attempts in taken.items():
            own = [digest_of(order[sample]) for sample in range((step - 1) * batch + rank, step * batch, ranks)]
            *killed, last = attempts.values()
            assert last == own, (rank, step)
            assert all(found == own[: len(found)] for found in killed), (rank, step)


@pytest.mark.parametrize(("dp", "fault"), [(1, "record:0"), (4, "record:0,workers:2")])
def test_a_mixture_has_one_order_on_any_ranks_and_workers(folder, ranks, dp, fault):
    """Beside the two ranks that are killed five times above."""
    path = write_run(folder, f"order-{dp}", dp, settings(Layout(), "fp32", 3, every=3), validate=True, data=MIXTURE)
    assert ranks.run(path, FAULT=fault) == [0] * dp, log(folder / f"order-{dp}")[-3000:]
    assert_order(folder, f"order-{dp}", dp, 3)


@pytest.mark.parametrize(
    ("name", "layout", "precision"),
    [("bf16", Layout(ep=2), "bf16"), ("tp2", Layout(tp=2), "fp32"), ("tp2bf16", Layout(tp=2), "bf16")],
    ids=["distributed optimizer, EP2", "TP2", "distributed optimizer, TP2"],
)
def test_the_same_in_other_precisions_and_layouts(folder, ranks, name, layout, precision):
    run = settings(layout, precision, steps=4, every=2)
    reference = untouched(folder, ranks, f"{name}-reference", run)
    path = write_run(folder, name, 2, run, validate=True)
    assert -signal.SIGKILL in ranks.run(path, FAULT="kill:3")
    assert ranks.run(path) == [0, 0], log(folder / name)[-3000:]
    assert "resumed at step 2" in log(folder / name)
    assert_same(folder / name, reference)


def test_a_rank_that_is_stopped_is_named_and_the_run_resumes(folder, ranks):
    """SIGSTOP of one of four ranks (TP2, EP2): the rank that watches it ends the run, and nothing is lost."""
    run = settings(Layout(tp=2, ep=2), "fp32", steps=6, every=2)
    run.supervision.silent_seconds = 20.0
    reference = write_run(folder, "stopped-reference", 4, run, validate=True)
    assert ranks.run(reference) == [0, 0, 0, 0], log(folder / "stopped-reference")[-3000:]
    path = write_run(folder, "stopped", 4, run, validate=True)
    assert ranks.run(path, FAULT="stop:3") == [1, 1, -signal.SIGKILL, 1], log(folder / "stopped")[-3000:]
    assert "error: no answer for 20 s from rank 2 (process " in log(folder / "stopped")
    assert "the same command resumes the run" in log(folder / "stopped")
    assert ranks.run(path) == [0, 0, 0, 0], log(folder / "stopped")[-3000:]
    assert "resumed at step 2 from" in log(folder / "stopped")
    assert_same(folder / "stopped", folder / "stopped-reference")


def test_a_slow_rank_is_named(folder, ranks):
    """Rank 1 works 2 s longer in every step; rank 0, which waits for it, says so."""
    run = settings(Layout(ep=2), "fp32", steps=12, every=12)
    run.supervision.silent_seconds = 12.0
    path = write_run(folder, "slow", 2, run, validate=True)
    assert ranks.run(path, FAULT="delay:2") == [0, 0], log(folder / "slow")[-3000:]
    assert "note: rank 1 (process " in log(folder / "slow")
    assert "note: rank 0" not in log(folder / "slow")


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("replica:3", ["differ between ranks", ".mlp.experts.", "ranks alike: 0 | 1"]),
        ("router:3", ["frozen router moved", "correction bias"]),
        ("disk:4", ["the disk is full", "checkpoints", "bytes are free"]),
    ],
)
def test_nothing_wrong_is_saved(folder, ranks, fault, words):
    name = fault.partition(":")[0]
    path = write_run(folder, name, 2, settings(Layout(ep=2), "fp32", 6, every=2), validate=True)
    assert 0 not in ranks.run(path, FAULT=fault)
    assert all(word in log(folder / name) for word in words), log(folder / name)[-3000:]
    assert [step_of(checkpoint) for checkpoint in checkpoints(folder / name)] == [2]
    assert [hidden.name for hidden in (folder / name / "checkpoints").glob(".*")] == []
    assert not (folder / name / "adapter").exists()


@pytest.mark.parametrize(("fault", "saved"), [("term:3", 3), ("term-in-save:4", 5)])
def test_sigterm_ends_all_ranks_together_and_loses_nothing(folder, ranks, fault, saved):
    """One rank's SIGTERM after step 3, which is no step to save; one to a rank and its helpers while step 4 is saved.

    The second comes after what the ranks agreed on for step 4, so they take step 5.
    """
    name = fault.partition(":")[0]
    path = write_run(folder, name, 2, settings(Layout(ep=2), "fp32", 6, every=2), validate=True)
    assert ranks.run(path, FAULT=fault) == [128 + signal.SIGTERM] * 2, log(folder / name)[-3000:]
    assert f"SIGTERM: ended after step {saved}" in log(folder / name)
    assert step_of(checkpoints(folder / name)[-1]) == saved


def test_only_the_same_run_goes_on(folder, ranks):
    """Other settings, another base and a truncated file are refused by name; what may change, may."""
    run = settings(Layout(ep=2), "fp32", 6, every=2)
    path = write_run(folder, "same", 2, run, validate=True)
    assert -signal.SIGKILL in ranks.run(path, FAULT="kill:5")
    for change, words in (
        ({"settings": {"train": {"lr": 1.0}}}, ["another run", "train.lr was 0.01 and is 1.0", "--overwrite"]),
        ({"base": "other"}, ["another run", "base was"]),
    ):
        assert ranks.run(changed(folder, path, change)) == [1, 1]
        assert all(word in log(folder / "same") for word in words), log(folder / "same")[-2000:]
    newest = checkpoints(folder / "same")[-1]
    data = next((newest / "training" / "optimizer").glob("*.distcp"))
    whole = data.read_bytes()
    data.write_bytes(whole[:-100])
    assert ranks.run(path) == [1, 1]
    assert f"{data} has {len(whole) - 100} bytes and should have {len(whole)}" in log(folder / "same")
    data.write_bytes(whole)
    assert ranks.run(changed(folder, path, {"settings": {"checkpoint": {"every": 3}, "log": {"every": 1}}})) == [0, 0]


def changed(folder: Path, path: Path, change: dict) -> Path:
    """The run with other values; base `other` is a model of the same shapes with other weights."""
    content = json.loads(path.read_text())
    if change.get("base") == "other":
        if not (folder / "other").exists():
            source = tiny_hf_folder(folder / "other-hf", dtypes={"": "F32"}, hybrid_override_pattern="MEM*E", seed=1)
            convert(source, folder / "other", context=False)
        content["base"] = str(folder / "other")
    for group, values in change.get("settings", {}).items():
        content["settings"][group] |= values
    target = path.with_name(f"{path.stem}-changed.json")
    target.write_text(json.dumps(content))
    return target


def test_a_checkpoint_merges_like_an_adapter(folder, ranks, tmp_path):
    from conversion.merge_lora import merge
    from nano3.cli import UserError

    run = settings(Layout(ep=2), "fp32", 3, every=2)
    out = untouched(folder, ranks, "short", run)
    (checkpoint,) = checkpoints(out)
    assert merge(folder / "hf", checkpoint, tmp_path / "merged").same_routers
    shutil.copytree(folder / "hf", tmp_path / "near")
    weights = tmp_path / "near" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1  # one bit of one tensor that is no router
    weights.write_bytes(data)
    with pytest.raises(UserError, match="trained on another base"):
        merge(tmp_path / "near", checkpoint, tmp_path / "refused")


def test_the_command_itself_terminated_then_killed_goes_on(folder):
    """`python recipes/nemotron_lora.py`: SIGTERM saves and exits 143, kill -9 of the launcher ends every rank."""
    out, steps = folder / "command", 14
    command = [sys.executable, "recipes/nemotron_lora.py", "--model", str(folder / "nemo"), "--local", "--ranks", "2"]
    command += ["--data", str(folder / "store"), "--out", str(out), "layout.ep=2", "lora.rank=4", "train.seq_length=64"]
    command += [f"train.steps={steps}", "train.warmup=1", "train.global_batch=4", "checkpoint.every=0"]
    command += ["checkpoint.minutes=0.005", "log.every=1", "log.wandb=off", "log.tensorboard=false"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def until(step: int, number: signal.Signals) -> int:
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert process.stdout is not None
        lines = [next(process.stdout)]
        while not lines[-1].startswith(f"step {step:>2}/{steps}"):
            lines.append(next(process.stdout, ""))
            assert lines[-1], "".join(lines)
        process.send_signal(number)
        rest = process.communicate(timeout=180)[0]
        assert number != signal.SIGTERM or "the same command resumes after step" in rest, rest
        return process.returncode

    assert until(3, signal.SIGTERM) == 128 + signal.SIGTERM
    first = step_of(checkpoints(out)[-1])
    assert 3 <= first < steps
    assert until(first + 3, signal.SIGKILL) == -signal.SIGKILL
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"resumed at step {step_of(checkpoints(out)[-1])}" not in done.stdout  # newer ones have come since
    assert "resumed at step" in done.stdout
    trained = [row["step"] for row in metrics(out) if "loss" in row]
    assert trained == list(range(1, steps + 1))
    again = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert again.returncode == 2
    assert "holds a finished run" in again.stderr
