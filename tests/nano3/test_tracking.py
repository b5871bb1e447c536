"""What a run reports: every step once, in metrics.jsonl, TensorBoard and W&B; FLOPs; and the same on every layout."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from conversion.checkpoint.torch_dist import TorchDistReader
from conversion.hf_to_nemo import convert
from data_prep.packing import build_packs
from finetune.settings import CheckpointSettings, LogSettings, LoraSettings, Settings, TrainSettings
from launch.plan.layout import Layout
from nano3.arch import PRESETS, Arch
from nano3.cli import UserError
from nano3.flops import adapter_flops, forward_flops, linears, step_flops
from nano3.targets import select
from nano3.token_store import TokenStore
from nano3.training.journal import cut, read_rows
from nano3.training.trackers import WeightsAndBiases
from tests.helpers.tiny import TINY_CONFIG, tiny_hf_folder
from tests.helpers.tiny_run import write_run
from tests.helpers.tiny_store import tiny_store
from tests.helpers.wandb_file import history


def tracked_run(folder: Path, after: int, last: int, end: str) -> subprocess.CompletedProcess[str]:
    # No account and no network: W&B would fail to ask either.
    environment = {
        **os.environ,
        "WANDB_BASE_URL": "http://127.0.0.1:9",
        "HOME": str(folder),
        "PYTHONWARNINGS": "ignore",
    }
    environment.pop("WANDB_API_KEY", None)
    command = [sys.executable, "-m", "tests.helpers.tracked_run", str(folder), str(after), str(last), end]
    return subprocess.run(command, env=environment, timeout=240, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> Path:
    """A run of 8 steps: killed after step 5, killed again after 7 from a checkpoint of step 4, finished from step 4."""
    folder = tmp_path_factory.mktemp("killed")
    assert tracked_run(folder, 0, 5, "kill").returncode == -9
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # a row that the kill cut short
    assert tracked_run(folder, 4, 7, "kill").returncode == -9
    assert tracked_run(folder, 4, 8, "finish").returncode == 0
    return folder


LOSS = [(step, 1.0 / step) for step in range(1, 9)]
VALIDATION = [(step, 2.0 / step) for step in (2, 4, 6, 8)]


def test_the_record_has_every_step_once(killed):
    rows = read_rows(killed / "metrics.jsonl")
    assert [(row["step"], row["loss"]) for row in rows if "loss" in row] == LOSS
    assert [(row["step"], row["validation_loss"]) for row in rows if "validation_loss" in row] == VALIDATION


def test_wandb_shows_one_run_and_no_step_twice(killed):
    (file,) = killed.glob("wandb/offline-run-*/*.wandb")
    ids, rows = history(file)
    assert ids == {(killed / "wandb" / "run-id").read_text()}
    assert [(row["_step"], row["loss"]) for row in rows] == LOSS
    assert [(row["_step"], row["validation_loss"]) for row in rows if "validation_loss" in row] == VALIDATION
    assert rows[2]["expert_load/1/values"] == [3, 0, 3]
    assert [row["_timestamp"] for row in rows[:3:2]] == [1001.0, 1003.0]


def test_tensorboard_has_the_same_names_and_numbers(killed):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(killed / "tensorboard"), size_guidance={"histograms": 0})
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "validation_loss"}
    for name, expected in (("loss", LOSS), ("validation_loss", VALIDATION)):
        shown = events.Scalars(name)
        assert [event.step for event in shown] == [step for step, _ in expected]
        assert [event.value for event in shown] == pytest.approx([value for _, value in expected])  # stored in FP32
    third = events.Histograms("expert_load/1")[2]
    assert (third.wall_time, third.histogram_value.bucket) == (1003.0, [3.0, 0.0, 3.0])


def recorded(folder: Path) -> dict[int, dict[str, Any]]:
    """metrics.jsonl: step -> what it reports, the step's own row and its validation together."""
    steps: dict[int, dict[str, Any]] = {}
    for row in read_rows(folder / "metrics.jsonl"):
        steps.setdefault(row["step"], {}).update({k: v for k, v in row.items() if k not in ("step", "time")})
    return steps


def in_wandb(folder: Path) -> dict[int, dict[str, Any]]:
    """The same out of W&B's offline file; a histogram is its counts."""
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    hidden = re.compile(r"_.*|.*/(bins|_type)")
    _, rows = history(file)
    return {
        row["_step"]: {k.removesuffix("/values"): v for k, v in row.items() if not hidden.fullmatch(k)} for row in rows
    }


def in_tensorboard(folder: Path) -> dict[int, dict[str, Any]]:
    """The same out of TensorBoard's event files, by its own reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"histograms": 0, "scalars": 0})
    events.Reload()
    steps: dict[int, dict[str, Any]] = {}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            steps.setdefault(event.step, {})[name] = event.value
    for name in events.Tags()["histograms"]:
        for event in events.Histograms(name):
            steps.setdefault(event.step, {})[name] = event.histogram_value.bucket
    return steps


def compare_views(folder: Path) -> int:
    """Compares every number of the record with both views, W&B's to the bit and TensorBoard's in FP32; how many."""
    expected = recorded(folder)
    assert in_wandb(folder) == expected
    rounded = {
        s: {k: v if isinstance(v, list) else float(np.float32(v)) for k, v in row.items()}
        for s, row in expected.items()
    }
    assert in_tensorboard(folder) == rounded
    return sum(len(row) for row in expected.values())


def test_both_views_have_every_number_of_the_record(killed, tmp_path):
    assert compare_views(killed) == 8 + 4 + 8
    shutil.copytree(killed, tmp_path / "run")
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_text(path.read_text().replace('"loss": 0.5', '"loss": 0.50000001'))
    with pytest.raises(AssertionError):
        compare_views(tmp_path / "run")


def test_a_run_goes_on_when_wandbs_process_is_killed(tmp_path):
    done = tracked_run(tmp_path, 0, 3, "lose")
    assert done.returncode == 0
    assert re.fullmatch(
        r"note: Weights & Biases ended at step 3 \(.*\)\. The run goes on without it; .*\n", done.stderr
    )
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl") if "loss" in row] == [1, 2, 3]


def test_wandb_online_is_not_sent_what_it_has(tmp_path, monkeypatch):
    import wandb

    sent = []
    run = SimpleNamespace(starting_step=4, log=lambda row, step: sent.append((step, row)), finish=lambda: None)
    asked = []
    monkeypatch.setattr(wandb, "init", lambda **arguments: asked.append(arguments) or run)
    for _ in range(2):  # a start and a restart, both after step 2
        view = WeightsAndBiases(str(tmp_path), "online", "project", "name", {})
        view.open()
        for step in (3, 4):
            view.add({"step": step, "time": 1000.0, "loss": 1.0})
        view.close()
    assert sent == [(4, {"loss": 1.0, "_timestamp": 1000.0})] * 2  # the server had steps up to 3
    assert [arguments["resume"] for arguments in asked] == ["allow", "allow"]
    assert asked[0]["id"] == asked[1]["id"] == (tmp_path / "wandb" / "run-id").read_text()


def test_wandb_without_an_account_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(UserError, match=r"did not start: No API key configured.*log\.wandb=offline"):
        WeightsAndBiases(str(tmp_path), "online", "project", "name", {}).open()


def test_a_cut_leaves_whole_rows_up_to_the_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 2, "validation_loss": 1}\n{"step": 3}\n{"st')
    assert [row["step"] for row in cut(path, 2)] == [1, 2, 2]
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 2, "validation_loss": 1}\n'
    assert cut(path, 0) == []
    assert cut(tmp_path / "new" / "metrics.jsonl", 5) == []


TINY = Arch.from_config({**TINY_CONFIG, "hybrid_override_pattern": "M*E"})


def test_flops_of_a_tiny_model_by_hand():
    # Hidden 32. Mamba: 8 heads of 8, 4 groups of 16 states: in_proj 4 * 64 + 8 = 264 rows, convolution 192 channels.
    mamba = 2 * (32 * 264 + 64 * 32) + 2 * 192 * 4 + 2 * 64
    # Attention: 4 query and 2 key heads of 16. Router of 8; two experts of 24 and a shared one of 40; vocabulary 128.
    attention = 2 * (32 * (64 + 32 + 32) + 64 * 32)
    experts = 2 * (32 * 8 + 2 * (32 * 24 + 24 * 32) + 32 * 40 + 40 * 32)
    weights = mamba + attention + experts + 2 * 32 * 128
    # Documents of 10 and 6 tokens: 5 per channel and state a token; 2 * l^2 * 64 for causal scores and values.
    between = 16 * 5 * 64 * 16 + 2 * (10**2 + 6**2) * 64
    assert forward_flops(TINY, [10, 6]) == (16 * weights, between)
    ranks = {"decoder.layers.0.mixer.in_proj": 4, "decoder.layers.2.mlp.experts.linear_fc1": 3}
    adapters = 16 * (2 * 4 * (32 + 264) + 2 * (2 * 3 * (32 + 24)))
    assert adapter_flops(TINY, ranks, 16) == adapters
    assert step_flops(TINY, ranks, [10, 6]) == 2 * 16 * weights + 3 * between + 3 * adapters


def test_flops_of_the_real_model_are_two_for_every_active_parameter():
    nano = Arch.load(PRESETS["nano"])
    weights, between = forward_flops(nano, [1])
    active = nano.active_parameters - nano.vocab_size * nano.hidden_size  # looking up the embedding costs nothing
    assert weights == pytest.approx(2 * active, rel=1e-4)  # norms and a few vectors are no products
    assert between == pytest.approx(23 * 5 * 4096 * 128 + 6 * 2 * 4096)
    assert set(select(nano, ["*"], "each")) <= set(linears(nano))


STEPS = 4
RUNS: dict[str, tuple[int, Layout, list[Any]]] = {
    "one": (1, Layout(), []),
    "tp2": (2, Layout(tp=2), ["moe", "mamba"]),
    "pp2": (2, Layout(pp=2), ["full"]),
    "ep2": (2, Layout(ep=2), ["moe_act", "shared_experts", "layernorm"]),
}
"""Ranks, layout and what is recomputed: nothing of all this may change what is reported."""


def report(folder: Path, name: str) -> dict[str, float]:
    """The last step's row of a run."""
    return [row for row in read_rows(folder / name / "metrics.jsonl") if "loss" in row][-1]


def settings(layout: Layout, views: bool = False, **train: Any) -> Settings:
    train = {"steps": STEPS, "warmup": 0, "global_batch": 4, "seq_length": 64, "lr": 1e-3, **train}
    return Settings(
        layout=layout,
        lora=LoraSettings(rank=4, alpha=8.0, experts="each"),
        train=TrainSettings(**train),
        router="balance",
        checkpoint=CheckpointSettings(every=2, minutes=0),
        log=LogSettings(tensorboard=views, wandb="offline" if views else "off"),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Base model and store."""
    folder = tmp_path_factory.mktemp("layouts")
    source = tiny_hf_folder(folder / "hf", dtypes={"": "F32"}, hybrid_override_pattern="ME*E")
    convert(source, folder / "nemo", context=False)
    tiny_store(folder / "store", documents=60, longest=30, vocab_size=128)
    build_packs(TokenStore(folder / "store"), 64)
    return folder


@pytest.fixture(scope="module")
def layouts(ranks, folder) -> Path:
    """Four steps of an adapter for each expert on every layout of `RUNS`; the last is killed in step 4 and resumed."""
    for name, (world, layout, recompute) in RUNS.items():
        killed = name == "ep2"
        run = settings(layout, views=killed, recompute=recompute)
        path, log = write_run(folder, name, world, run, validate=True), folder / name / "logs" / "rank0.log"
        if killed:
            assert -signal.SIGKILL in ranks.run(path, FAULT="kill:4"), log.read_text()[-3000:]
        assert ranks.run(path) == [0] * world, log.read_text()[-3000:]
    return folder


@pytest.mark.full
@pytest.mark.parametrize("name", list(RUNS)[1:])
def test_what_is_reported_is_that_of_one_rank_without_recomputation(layouts, name):
    one, other = report(layouts, "one"), report(layouts, name)
    names = {key for key in one if key.startswith(("adapter_norm", "expert", "loss", "grad_norm", "router_bias_norm"))}
    # Twelve adapted layers, two of them with routed experts; one source of data.
    assert len(names) == (1 + 12) + (2 * 3 + 1) + 2 + 2
    for key in names:
        assert other[key] == (one[key] if isinstance(one[key], list) else pytest.approx(one[key], rel=1e-4)), key
    for number in (1, 3):
        assert sum(one[f"expert_load/{number}"]) == 4 * 64 * TINY_CONFIG["num_experts_per_tok"]


@pytest.mark.full
def test_a_norm_is_that_of_the_saved_adapter(layouts):
    adapter, row = TorchDistReader(layouts / "one" / "adapter" / "weights"), report(layouts, "one")
    for module in ("decoder.layers.3.mlp.experts.linear_fc2", "decoder.layers.2.self_attention.linear_qkv"):
        key = f"module.{module}".replace("mlp.experts.", "mlp.experts.experts.") + ".adapter.linear_"
        low, high = (adapter.whole(f"{key}{side}.weight").double() for side in ("in", "out"))
        assert row[f"adapter_norm/{module}"] == pytest.approx(float((2.0 * high @ low).norm()), rel=1e-6)


@pytest.mark.full
def test_a_killed_training_run_is_one_run_with_every_step_once(layouts):
    rows = read_rows(layouts / "ep2" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 4]  # the last one is the validation's
    (file,) = (layouts / "ep2").glob("wandb/offline-run-*/*.wandb")
    ids, shown = history(file)
    assert len(ids) == 1
    assert [row["_step"] for row in shown] == [1, 2, 3, 4]
    assert [row["loss"] for row in shown] == [row["loss"] for row in rows[:4]]
    assert shown[-1]["validation_loss"] == rows[-1]["validation_loss"]


@pytest.mark.full
def test_both_views_have_every_number_of_a_training_run(layouts):
    """All but step and time of each row: 32 in the first and last step, 11 in the two between, 3 of a validation."""
    rows = read_rows(layouts / "ep2" / "metrics.jsonl")
    assert compare_views(layouts / "ep2") == sum(len(row) - 2 for row in rows) == 32 + 11 + 11 + 32 + 3


@pytest.mark.full
def test_every_metric_is_documented(layouts):
    table = Path("docs/tracking.md").read_text().partition("## One run")[0]
    patterns = [re.sub("<[a-z]+>", ".+", name) for name in re.findall(r"`([a-z_/<>]+)`", table)]
    for row in read_rows(layouts / "ep2" / "metrics.jsonl"):
        for name in set(row) - {"step", "time"}:
            assert any(re.fullmatch(pattern, name) for pattern in patterns), name


@pytest.mark.full
def test_a_run_in_bf16_keeps_adam_in_fp32_and_follows_its_schedule(folder, ranks):
    schedule = {"schedule": "wsd", "warmup": 1, "decay": 2, "min_lr": 1e-4}
    path = write_run(folder, "bf16", 2, settings(Layout(ep=2), precision="bf16", **schedule))
    assert ranks.run(path) == [0, 0], (folder / "bf16" / "logs" / "rank0.log").read_text()[-3000:]
    # Warm-up 1/2, then the peak; p = 0 and 1/2 of the decay from it to a tenth.
    rates = [row["lr"] for row in read_rows(folder / "bf16" / "metrics.jsonl")]
    assert rates == pytest.approx([5e-4, 1e-3, 1e-3, 1e-3 * (0.1 + 0.9 * (1 - 0.5**0.5))])
    adam = TorchDistReader(folder / "bf16" / "checkpoints" / "step-000002" / "training" / "optimizer")
    dtypes = {adam.whole(key).dtype for key in adam.shapes}
    assert (len(adam.shapes) > 0, dtypes) == (True, {torch.float32})


@pytest.mark.full
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("nan:2", r"UserError: step 3: loss nan, gradient norm nan at lr .*: the run diverged; lower train\.lr"),
        (
            "memory:3",
            r"UserError: out of memory on rank 0 in step 4: lower train\.seq_length \(64\); "
            r"set train\.recompute=full \(now none.*layout\.ep=2, layout\.tp=1, layout\.pp=1.*Tried to allocate 2\.00",
        ),
    ],
)
def test_a_run_that_cannot_go_on_says_what_to_change(folder, ranks, fault, message):
    name = fault.partition(":")[0]
    path = write_run(folder, name, 2, settings(Layout(ep=2)))
    assert 0 not in ranks.run(path, FAULT=fault)
    log = (folder / name / "logs" / "rank0.log").read_text()
    assert re.search(message, log), log[-3000:]
    assert not (folder / name / "adapter").exists()
    saved = [checkpoint.name for checkpoint in (folder / name / "checkpoints").iterdir()]
    assert saved == ["step-000002"]
