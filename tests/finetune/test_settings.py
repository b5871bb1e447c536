"""Settings: explained, in their ranges, from a recipe, a file or the command line, and named as people name them."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import fields, is_dataclass
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import pytest

from finetune.checks import check_run
from finetune.command import describe, filled, layered, parser, resolve, winners
from finetune.config_file import PLACES, config_text, read_config
from finetune.setting_sentences import help_text, markdown, sentences
from finetune.settings import LoraSettings, Run, Settings, TrainSettings
from launch.plan.layout import Layout
from launch.plan.plan_settings import TrainPlan
from launch.plan.run_length import RunLength, length_of, steps_of
from nano3.arch import Arch, resolve_model
from nano3.cli import UserError
from nano3.mixture import DataSize, MixtureFile, data_size
from nano3.overrides import apply_overrides, flatten, ranges
from nano3.synonyms import FLAGS, SYNONYMS
from tests.helpers.data_fixtures import row, write_jsonl

ROOT = Path(__file__).resolve().parents[2]
PICO = Arch.load(resolve_model("pico"))


def resolved(*arguments: str, defaults=Settings) -> Run:
    """The run that a command line on CPU ranks describes."""
    return resolve(parser().parse_intermixed_args(["--model", "pico", "--local", *arguments]), defaults)[0]


@pytest.fixture
def config(tmp_path: Path):
    """Writes a configuration file and returns its path."""

    def write(text: str, name: str = "mine.yaml") -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def test_every_setting_has_a_sentence_and_every_number_a_range():
    settings, explained, allowed = Settings(), sentences(Settings()), ranges(Settings())
    assert list(explained) == list(flatten(settings))
    assert [text for text in explained.values() if not re.fullmatch(r"[A-Z`].*\.", text)] == []
    numbers = {
        f"{group.name}.{field.name}"
        for group in fields(settings)
        if is_dataclass(getattr(settings, group.name))
        and group.name != "layout"  # whose rules launch/plan/layout_rules.py has
        for field in fields(getattr(settings, group.name))
        if re.search(r"\b(int|float)\b", str(field.type))
    }
    assert numbers == set(allowed)


def test_the_page_of_settings_is_what_the_sentences_say():
    page = (ROOT / "docs" / "settings.md").read_text()
    assert page == markdown(Settings()), "python -m finetune.setting_sentences > docs/settings.md"


def test_help_explains_one_group_or_all():
    text = help_text(Settings(train=TrainSettings(lr=0.5)), "train")
    assert "train.lr=0.5   (above 0 and at most 1)\n      Peak learning rate." in text
    assert "lora.rank" not in text
    assert "lora.rank=32" in help_text(Settings())
    with pytest.raises(
        UserError, match=r"--help-settings trian: .* layout, lora, train, router, stages, checkpoint, log"
    ):
        help_text(Settings(), "trian")


@pytest.mark.parametrize(
    "setting",
    [
        *("train.lr=1e300", "train.lr=-1", "train.seed=-1", "train.seed=2147483648", "lora.rank=1000000000000"),
        *(
            "lora.rank=1000",
            "lora.rank_pattern=in_proj:1000",
            "lora.rank=-2",
            "lora.alpha=1e300",
            "lora.plus_ratio=1e9",
        ),
        *("train.global_batch=0", "train.weight_decay=2", "train.divergence=0.5", "train.steps=0", "train.epochs=0"),
        *("train.warmup=-1", "train.warmup=2.5", "checkpoint.keep=-1", "checkpoint.minutes=-5", "log.every=0"),
    ],
)
def test_a_number_out_of_its_range_is_refused_with_the_range(setting):
    with pytest.raises(UserError, match=rf"^{setting.partition('=')[0].replace('_pattern', '')}.* must be "):
        resolved("train.steps=100" if "steps" not in setting and "epochs" not in setting else "log.every=1", setting)


@pytest.mark.parametrize("flag", ["--nodes", "--gpus-per-node", "--ranks"])
def test_none_of_a_machine_is_refused(flag):
    with pytest.raises(UserError, match=f"{flag} 0 must be at least 1"):
        filled(parser().parse_args([flag, "0"]))


def test_what_others_call_a_setting_names_ours():
    known = list(flatten(Settings()))
    assert set(SYNONYMS.values()) <= set(known)
    assert not set(SYNONYMS) & {key.rpartition(".")[2] for key in known}, "a name of ours is no synonym"
    flags = {option for action in parser()._actions for option in action.option_strings}
    assert {flag for flag in FLAGS.values() if flag.startswith("--")} <= flags
    for word, meant in {
        "learning_rate": "train.lr", "train.learning_rate": "train.lr", "optim.max_lr": "train.lr",
        "num_train_epochs": "train.epochs", "max_steps": "train.steps", "batch_size": "train.global_batch",
        "lora_r": "lora.rank", "lora.r": "lora.rank", "warmup_ratio": "train.warmup", "output_dir": "--out",
        "lora.rnk": "lora.rank", "tp": "layout.tp", "resume_from_checkpoint": "the same command again",
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=rf"unknown key {word}; did you mean {meant}"):
            apply_overrides(Settings(), [f"{word}=1"])


def test_the_recipe_then_the_files_then_the_command_line(config):
    first = config("train:\n  lr: 2e-4\n  clip: 2\nlora.rank: 8\nout: from-file\n", "first.yaml")
    second = config("train: {lr: 3e-4}\nlog: {name: 'on'}\n", "second.yaml")
    arguments = ["--model", "pico", "--local", "--config", first, "--config", second, "train.clip=3"]
    args, recipe = parser().parse_args(arguments), Settings(train=TrainSettings(lr=1e-3, beta2=0.9))
    run, arch = resolve(args, lambda: dataclasses.replace(recipe, train=dataclasses.replace(recipe.train)))
    train = run.settings.train
    assert (train.lr, train.clip, train.beta2, run.settings.lora.rank) == (3e-4, 3.0, 0.9, 8)
    assert run.out == str(Path("from-file").resolve())
    won = winners(args, filled(args), recipe, run)
    assert {key: won[key] for key in ("train.lr", "train.clip", "lora.rank", "log.name")} == {
        "train.lr": second, "train.clip": "command line", "lora.rank": first, "log.name": second,
    }  # fmt: skip
    lines = describe(run, arch, won).splitlines()
    assert [line.rpartition("  ")[2] for line in lines[1:4]] == ["[command line]", "[default]", f"[{first}]"]
    assert [line for line in lines if "train.beta2" in line] == [f"  {'train.beta2=0.9':<40} recipe"]
    assert [line for line in lines if "train.lr" in line] == [f"  {'train.lr=0.0003':<40} {second}"]


def test_flags_win_over_a_file(config):
    file = config("model: nano\nlocal: true\nranks: 4\nout: there\n")
    args = filled(parser().parse_args(["--config", file, "--model", "pico", "--ranks", "2"]))
    assert (args.model, args.local, args.ranks, args.out) == ("pico", True, 2, Path("there"))


def test_a_later_place_that_says_how_long_takes_the_place_of_an_earlier_one(config):
    def twice() -> Settings:
        return Settings(train=TrainSettings(epochs=2.0), lora=LoraSettings(targets=["in_proj"]))

    assert resolved("train.steps=7", defaults=twice).settings.train == TrainSettings(steps=7)
    assert resolved("lora.preset=attention", defaults=twice).settings.lora == LoraSettings(preset="attention")
    assert resolved("--config", config("train: {steps: 9}"), defaults=twice).settings.train.epochs is None
    with pytest.raises(UserError, match=r"train\.steps=7 and train\.epochs=2 both say how long to train"):
        resolved("train.steps=7", "train.epochs=2")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {learning_rate: 1}", r"mine\.yaml: unknown key train\.learning_rate; did you mean train\.lr\?"),
        ("train: {lr: [1, 2]}", r"mine\.yaml: train\.lr=1,2: .* not a finite number"),
        ("train: {lr: true}", r"mine\.yaml: train\.lr=true: "),
        ("train: {seed: 1.5}", r"train\.seed=1\.5: .* not a whole number"),
        ("log: {name: on}", r"log\.name: True is a switch here; put the word in quotes"),
        ("lora: 5", "lora is a group"),
        ("model: 5", "model: 5 is not text"),
        ("ranks: '2'", "ranks: '2' is not a whole number"),
        ("local: 1", "local: 1 is not true or false"),
        ("train.lr: 1\ntrain: {lr: 1}", r"train\.lr is given twice"),
        ("out: ${oc.env:HOME}", r"out: '\$\{oc\.env:HOME\}' is looked up elsewhere"),
        ("- 1", "mine.yaml"),
        ("a: [", "mine.yaml"),
    ],
)
def test_a_file_that_is_wrong_is_refused_by_name(config, text, message):
    with pytest.raises(UserError, match=message):
        resolved("--config", config(text))


def test_what_a_run_leaves_is_a_configuration_of_the_same_run(config):
    run = resolved(
        "--ranks", "2", "--out", "there", "layout.ep=2", "lora.targets=in_proj,*.layers.5.*", "train.recompute=moe",
        "train.lr=1e-5", "train.steps=40", "log.name=on", "layout.sp=none", "lora.dora=true",
    )  # fmt: skip
    text = config_text(run)
    again = resolve(parser().parse_args(["--config", config(text)]))[0]
    assert again == run
    places, values = read_config(Path(config(text)))
    assert set(places) | {"base", "validation", "data", "nodes", "gpus_per_node"} >= set(PLACES) - {"local"}
    assert list(values) == list(flatten(Settings()))
    for key, sentence in sentences(Settings()).items():
        assert sentence in " ".join(text.replace("#", " ").split()), key


def length(train: TrainPlan) -> RunLength:
    """Of a run over 500 rows in 80 packs."""
    return length_of(train, DataSize(rows=500, packs=80, by_epochs=False), "store")


def test_passes_become_steps_by_hand():
    assert steps_of(TrainPlan(global_batch=8), 80) == 30  # three passes of ten steps
    assert steps_of(TrainPlan(global_batch=8, epochs=0.5), 84) == 6  # 5.25 steps: every pack of the half is seen
    assert steps_of(TrainPlan(global_batch=128), 10) == 1
    assert steps_of(TrainPlan(steps=7, global_batch=8), 80) == 7
    assert length(TrainPlan(global_batch=8)).describe() == [
        "data        500 rows in 80 packs; a step takes 8",
        "length      30 steps, 3.00 passes over the data",
    ]


def test_many_passes_and_few_steps_are_said():
    many = length(TrainPlan(steps=300, global_batch=8)).describe()[-1]
    assert many.startswith("warning     30.0 passes: above 5 ")
    assert "train.steps=30 makes 3" in many
    assert len(length(TrainPlan(steps=50, global_batch=8)).describe()) == 2  # 5.0 passes
    assert "only 2 steps: lower train.global_batch" in length(TrainPlan(global_batch=128)).describe()[-1]
    assert len(length(TrainPlan(steps=2, global_batch=8)).describe()) == 2  # who asks for two gets two


def test_warm_up_in_steps_or_as_a_share():
    assert TrainSettings(steps=200, warmup=0.1).warmup_steps == 20
    assert TrainSettings(steps=200, warmup=50).warmup_steps == 50
    assert TrainSettings(steps=200, warmup=1).warmup_steps == 1
    assert TrainSettings(steps=4).warmup_steps == 0


def test_a_run_whose_steps_are_not_known_yet_passes_every_other_check():
    run = Run("pico", "", "", None, "", 1, 1, True, Settings())
    check_run(run, PICO)
    run.settings.train.warmup = 400  # once the steps are known this is refused
    check_run(run, PICO)
    run.settings.train.steps = 300
    with pytest.raises(UserError, match=r"train\.warmup=400 must be below train\.steps=300"):
        check_run(run, PICO)


def test_layers_are_applied_to_the_settings_that_they_are_given():
    settings = Settings()
    args = filled(parser().parse_args(["layout.ep=2", "lora.rank=4"]))
    assert layered(settings, args) == {"layout.ep": "command line", "lora.rank": "command line"}
    assert (settings.layout, settings.lora.rank) == (Layout(ep=2), 4)


def test_a_run_trains_on_nothing_that_is_for_evaluation_only(tmp_path, monkeypatch):
    """As training data it is refused, as validation data it is what it is for."""
    from data_prep.prepare import Options, prepare
    from finetune import run_local

    pico, stores = resolve_model("pico"), {}
    for name, more in (("training", {}), ("evaluation", {"evaluation_only": True})):
        file = write_jsonl(tmp_path / f"{name}.jsonl", [row("a", "b") | more])
        stores[name] = prepare([file], pico, tmp_path / name, 128, Options(evaluation_data=True))[0].folder
    monkeypatch.setattr(run_local, "check_base", lambda *_: None)
    settings = SimpleNamespace(train=SimpleNamespace(seq_length=128, steps=None), document_multiple=1)
    arch = SimpleNamespace(vocab_size=1 << 20)

    def check(data, validation, eval_only=False):
        run = SimpleNamespace(data=stores[data], model=pico, settings=settings, eval_only=eval_only)
        run.validation = stores[validation]
        run_local.check_data(run, arch)

    check("training", "evaluation")
    check("evaluation", "training", eval_only=True)
    with pytest.raises(UserError, match="evaluation holds rows for evaluation only"):
        check("evaluation", "training")
    stores["mixed"] = tmp_path / "mix.yaml"
    stores["mixed"].write_text("stores: [{path: training, weight: 1}, {path: evaluation, weight: 1}]")
    with pytest.raises(UserError, match="evaluation holds rows for evaluation only"):
        check("mixed", "training")
    # Epochs in the mixture bound the run: each store has one pack, so that two steps of one pack are all there is.
    stores["mixed"].write_text("stores: [{path: training, epochs: 2}]")
    settings.train.steps, settings.train.global_batch = 2, 1
    check("mixed", "evaluation")
    settings.train.steps = 3
    with pytest.raises(UserError, match=r"set train\.steps=2"):
        check("mixed", "evaluation")
    check("mixed", "evaluation", eval_only=True)  # nothing is trained, so nothing is met too often


def test_a_mixture_that_says_epochs_is_met_once_as_it_says():
    """Two stores of 10 and 30 packs, twice and half: 35 samples; of their 50 and 60 rows 130 are met."""
    mixture = MixtureFile((Path("a"), Path("b")), (Fraction(2), Fraction(1, 2)), by_epochs=True)
    size = data_size(mixture, rows=[50, 60], packs=[10, 30])
    assert size == DataSize(rows=130, packs=35, by_epochs=True)
    found = length_of(TrainPlan(global_batch=8), size, "mix.yaml")
    assert (found.steps, found.packs) == (5, 35)  # 4.4 steps: every sample is met
    with pytest.raises(UserError, match=r"mix\.yaml says epochs of its stores: leave train\.epochs=2 out"):
        length_of(TrainPlan(epochs=2), size, "mix.yaml")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: run["settings"]["train"].update(lr="fast"), r"run\.json: train\.lr=fast: 'fast' is not a finite"),
        (lambda run: run["settings"]["train"].pop("lr"), r"run\.json: settings lack train\.lr; start the run again"),
        (lambda run: run.update(nodes="2"), r"run\.json: nodes is '2'"),
        (lambda run: run.update(shell="rm"), r"run\.json: shell means nothing here"),
        (lambda run: run.update(recipe={"name": "x:y"}), r"run\.json: recipe\.file is missing"),
    ],
)
def test_what_ranks_read_is_held_to_its_types(change, message):
    run = json.loads(Run("m", "b", "d", None, "o", 2, 8, False).to_json())
    change(run)
    with pytest.raises(UserError, match=message):
        Run.from_json(json.dumps(run))
