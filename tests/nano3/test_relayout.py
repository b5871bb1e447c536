"""A checkpoint of one parallel layout goes on in any other: the same state bit for bit, then the same data.

All start from a checkpoint that four ranks (TP2·EP2) wrote after two thirds of their steps; and one of four ranks is
killed, after which everybody ends soon, says who it was, and the same or other ranks go on.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conversion.checkpoint.torch_dist import TorchDistReader
from conversion.hf_to_nemo import convert
from conversion.merge_lora import merge
from data_prep.packing import build_packs
from finetune.settings import CheckpointSettings, LogSettings, LoraSettings, Settings, TrainSettings
from launch.plan.layout import Layout
from nano3.checkpoints.checkpoint_folder import checkpoints, step_of
from nano3.overrides import flatten
from nano3.parity.case import NF4_WIDTHS
from nano3.token_store import TokenStore, tokenizer_sha256
from tests.helpers.rank_server import RankServer
from tests.helpers.tiny import tiny_hf_folder
from tests.helpers.tiny_run import metrics, write_run
from tests.helpers.tiny_store import tiny_store

pytestmark = pytest.mark.full

STEPS, SAVED = 12, 8
CLOSE = 1e-6
"""Of every tensor's largest value: how far adapters in FP32 may be from those of ranks that add up in another order."""
SECONDS = 60
"""After which nothing of a run with a killed rank may be left."""
VOCABULARY = 128
"""Padded to as many rows for each tensor-parallel rank: TP2 has twice as many as TP1."""
FOUR = Layout(tp=2, ep=2)
EVERYTHING = LoraSettings(
    rank=4, alpha=8.0, dora=True, experts="each", plus_ratio=4.0,
    targets=["in_proj", "linear_fc1", "linear_proj", "word_embeddings", "output_layer"],
)  # fmt: skip
KINDS = {
    "shared": ("fp32", LoraSettings(rank=4, alpha=8.0), "frozen"),
    "everything": ("fp32", EVERYTHING, "balance"),
    "bf16": ("bf16", replace(EVERYTHING, dora=False), "frozen"),
    "nf4": ("fp32", replace(EVERYTHING, base="nf4"), "balance"),
}
"""Precision, adapters and routers. BF16 brings the distributed optimizer. NF4's base is wider: what NF4 can cut."""


def settings(kind: str, layout: Layout) -> Settings:
    """Documents padded to 4 positions, so that CP2 sees the same packs."""
    precision, lora, router = KINDS[kind]
    return Settings(
        layout=layout,
        lora=lora,
        train=TrainSettings(
            steps=STEPS, warmup=2, lr=1e-3, global_batch=4, seq_length=64, pad_multiple=4, validate_every=STEPS,
            precision=precision,
        ),
        router=router,
        checkpoint=CheckpointSettings(every=SAVED, minutes=0),
        log=LogSettings(every=1, tensorboard=False, wandb="off"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base model and store."""
    return prepared(tmp_path_factory.mktemp("relayout"))


def prepared(folder: Path, **widths: int) -> Path:
    """Base model with these widths and store, in `folder`."""
    config = {"hybrid_override_pattern": "MEM*E", "vocab_size": VOCABULARY} | widths
    source = tiny_hf_folder(folder / "hf", dtypes={"": "F32"}, **config)
    convert(source, folder / "nemo", context=False)
    tiny_store(folder / "store", documents=60, longest=30, vocab_size=VOCABULARY, tokenizer=tokenizer_sha256(source))
    build_packs(TokenStore(folder / "store"), 64, pad_multiple=4)
    return folder


def place(folder: Path, kind: str) -> Path:
    """Where base and store of this kind are."""
    wide = folder / "wide"
    if kind != "nf4":
        return folder
    return wide if wide.exists() else prepared(wide, **NF4_WIDTHS)


def untouched(folder: Path, ranks: RankServer, kind: str) -> Path:
    """The run of this kind that nobody interrupted, made once; its checkpoint is still there."""
    if not (folder / kind).exists():
        run(folder, ranks, kind, 4, settings(kind, FOUR))
    return folder / kind


def run(folder: Path, ranks: RankServer, name: str, world: int, chosen: Settings, **environment: str) -> Path:
    path = write_run(folder, name, world, chosen, validate=True)
    assert ranks.run(path, **environment) == [0] * world, log(folder / name)[-3000:]
    return folder / name


def go_on(
    folder: Path, ranks: RankServer, source: Path, name: str, world: int, chosen: Settings, **environment: str
) -> Path:
    """The run NAME from the checkpoints of another."""
    shutil.copytree(source / "checkpoints", folder / name / "checkpoints")
    return run(folder, ranks, name, world, chosen, **environment)


def moved(folder: Path, ranks: RankServer, kind: str, world: int, layout: Layout) -> Path:
    """The run of this kind that went on in another layout, made once; in `again` is what it read, written again."""
    source, name = untouched(folder, ranks, kind), f"{kind}-{world}-{layout.settings(Layout())}"
    if not (folder / name).exists():
        go_on(folder, ranks, source, name, world, settings(kind, layout), FAULT="again:0")
    return folder / name


def log(out: Path) -> str:
    return (out / "logs" / "rank0.log").read_text()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor under `folder` by key, whole, without the rows that pad the vocabulary."""
    reader = TorchDistReader(folder)
    return {
        key: reader.whole(key)[: VOCABULARY if shape[0] in (VOCABULARY, 2 * VOCABULARY) else None]
        for key, shape in reader.shapes.items()
    }


def assert_equal(one: Path, other: Path) -> None:
    """The same tensors under both folders, bit for bit."""
    ours, theirs = tensors(one), tensors(other)
    assert set(ours) == set(theirs)
    for key in ours:
        assert torch.equal(ours[key].view(torch.uint8), theirs[key].view(torch.uint8)), key


def largest_error(out: Path, reference: Path) -> float:
    """Of both runs' adapters: the largest difference relative to a tensor's largest value."""
    ours, theirs = (tensors(path / "adapter" / "weights") for path in (out, reference))
    assert set(ours) == set(theirs)
    return max(float((ours[key] - theirs[key]).abs().max() / theirs[key].abs().max()) for key in ours)


@pytest.mark.parametrize(
    ("kind", "world", "layout"),
    [
        ("shared", 1, Layout()),
        ("shared", 2, Layout(tp=2)),
        ("shared", 2, Layout(ep=2)),
        ("shared", 2, Layout(cp=2)),
        ("everything", 2, Layout(etp=2)),
        ("everything", 4, Layout(ep=4)),
        ("everything", 2, Layout(pp=2)),
        ("bf16", 2, Layout(ep=2)),
        ("bf16", 4, Layout(tp=2, pp=2)),
        ("nf4", 2, Layout(etp=2)),
        ("nf4", 4, Layout(tp=2, pp=2)),
    ],
    ids=lambda value: value.settings(Layout()).replace("layout.", "") if isinstance(value, Layout) else str(value),
)
def test_any_layout_goes_on(folder, ranks, kind, world, layout):
    folder = place(folder, kind)
    source, out = untouched(folder, ranks, kind), moved(folder, ranks, kind, world, layout)
    assert f"resumed at step {SAVED} from" in log(out)
    assert f"written by 4 ranks (tp=2 ep=2), on {world} rank" in log(out)
    (saved,), (again,) = checkpoints(source), checkpoints(out / "again")
    assert_equal(saved / "weights", again / "weights")
    assert_equal(saved / "training" / "optimizer", again / "training" / "optimizer")
    ours, theirs = (torch.load(path / "training" / "run.pt", weights_only=True) for path in (again, saved))
    assert ours == theirs
    assert merged(folder, kind, saved).read_bytes() == merged(folder, out.name, again).read_bytes()
    rows = [[row for row in metrics(path) if row["step"] > SAVED] for path in (out, source)]
    assert [row.get("tokens") for row in rows[0]] == [row.get("tokens") for row in rows[1]]
    if kind == "bf16":  # whose sums differ in the third digit
        losses = [[row["loss"] for row in part if "loss" in row] for part in rows]
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    else:
        assert largest_error(out, source) < CLOSE


@pytest.mark.parametrize(
    ("kind", "layout"), [("everything", Layout(pp=2)), ("bf16", Layout(ep=2)), ("nf4", Layout(etp=2))]
)
def test_there_and_back_again_changes_no_bit(folder, ranks, kind, layout):
    """Also where the vocabulary has less padding on the way: its rows start as they would have been."""
    folder = place(folder, kind)
    source, between = untouched(folder, ranks, kind), moved(folder, ranks, kind, 2, layout) / "again"
    out = go_on(folder, ranks, between, f"{kind}-back", 4, settings(kind, FOUR))
    assert "written by 2 ranks" in log(out)
    assert_equal(out / "adapter" / "weights", source / "adapter" / "weights")


def test_an_adapter_trains_on_in_another_layout(folder, ranks):
    """`lora.init_from`: it starts with the same bits, which merge into the same bytes."""
    source = untouched(folder, ranks, "everything")
    chosen = settings("everything", Layout(ep=2))
    chosen.lora = replace(chosen.lora, init_from=str(source / "adapter"))
    chosen.train = replace(chosen.train, steps=3, validate_every=3)
    out = run(folder, ranks, "trained-on", 2, chosen, FAULT="initial:0")
    assert_equal(out / "initial" / "weights", source / "adapter" / "weights")
    ours, theirs = (merged(folder, *pair) for pair in (("ours", out / "initial"), ("theirs", source / "adapter")))
    assert ours.read_bytes() == theirs.read_bytes()


def test_other_data_would_be_noticed(folder, ranks):
    """What the bound above is worth: after one step's samples left out the adapters are far apart."""
    source = untouched(folder, ranks, "shared")
    out = go_on(folder, ranks, source, "skipped", 2, settings("shared", Layout(ep=2)), FAULT="skip:1")
    assert largest_error(out, source) > 1000 * CLOSE


def test_a_rank_is_killed_and_four_or_two_go_on(folder, ranks):
    """The recipe's own command: all processes end within a minute, and name the rank."""
    source, out = untouched(folder, ranks, "shared"), folder / "killed"
    kill(command(folder, out), rank=2, after=SAVED + 1)
    assert step_of(checkpoints(out)[-1]) == SAVED
    two = go_on(folder, ranks, out, "two", 2, settings("shared", Layout(tp=2)))
    four = json.loads((out / "run.json").read_text())
    assert four["settings"] == json.loads((folder / "shared.json").read_text())["settings"]
    assert ranks.run(out / "run.json") == [0] * 4, log(out)[-3000:]
    assert "resumed at step" in log(out)
    assert "written by" not in log(out)
    assert_equal(out / "adapter" / "weights", source / "adapter" / "weights")
    assert largest_error(two, source) < CLOSE


def merged(folder: Path, name: str, adapter: Path) -> Path:
    """The weights of the base with this adapter merged."""
    out = folder / "merged" / name
    if not out.exists():
        merge(folder / "hf", adapter, out)
    return out / "model.safetensors"


def command(folder: Path, out: Path) -> list[str]:
    """The recipe's command for the run of kind `shared`."""
    store, plain = str(folder / "store"), flatten(Settings())
    asked = flatten(settings("shared", FOUR)).items()
    return [
        *(sys.executable, "recipes/nemotron_lora.py", "--model", str(folder / "nemo"), "--local", "--ranks", "4"),
        *("--data", store, "--validation", store, "--out", str(out)),
        *(f"{key}={str(value).lower()}" for key, value in asked if value != plain[key]),
    ]


def kill(command: list[str], rank: int, after: int) -> None:
    """Runs a command of four ranks, kills one of them after a step, and checks how the others end."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert run.stdout is not None
    lines = [next(run.stdout)]
    while not lines[-1].startswith(f"step {after:>2}/{STEPS}"):
        lines.append(next(run.stdout, ""))
        assert lines[-1], "".join(lines)
    pids = ranks_of(run.pid)
    assert sorted(pids) == [0, 1, 2, 3]
    os.kill(pids[rank], signal.SIGKILL)
    deadline = time.monotonic() + SECONDS
    said = run.communicate(timeout=SECONDS)[0]
    while living(list(pids.values())) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert living(list(pids.values())) == []
    assert run.returncode == 128 + signal.SIGKILL, said
    assert f"rank {rank} failed with exit code 137 (killed by SIGKILL" in said, said
    assert f"the same command resumes after step {SAVED}" in said, said


def ranks_of(launcher: int) -> dict[int, int]:
    """Process ids by rank, of the launcher's children."""
    found = {}
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        found |= {int(word[5:]): int(child) for word in environment if word.startswith(b"RANK=")}
    return found


def living(leaders: list[int]) -> list[int]:
    """Processes in the sessions of these: the ranks and whatever they have started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, session = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if state != "Z" and int(session) in leaders:
            found.append(int(stat.parent.name))
    return found
