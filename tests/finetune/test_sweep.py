"""What a sweep tries, writes down and gives up; its command line, its script for Slurm, its report."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from finetune import command
from finetune.recipe_file import open_recipe, recipe_of
from finetune.run_cluster import hand_in_runs
from finetune.settings import Run, Settings
from finetune.sweep.report import REPORT, as_lines, best_of, ranked, write_report
from finetune.sweep.space import distributions, draw, ends, read_tries
from finetune.sweep.study import JOURNAL, Plan, Study
from finetune.sweep_command import main
from finetune.sweep_trials import array_of, check_space, common, result_of, run_here, run_on_cluster, settle, trial_run
from launch.slurm.cluster import Cluster
from launch.slurm.sbatch import render
from nano3.arch import resolve_model
from nano3.cli import UserError
from nano3.overrides import flatten
from nano3.training.divergence import DIVERGED
from recipes.nemotron_lora import nemotron_3_nano_lora

ROOT = Path(__file__).resolve().parents[2]
NOW = flatten(Settings())
TRIES = {"lora.rank": "4,8", "train.lr": "1e-5..1e-3:log"}


def plan(**changes: Any) -> Plan:
    return replace(Plan(TRIES, "tpe", 7, None, {key: str(value) for key, value in NOW.items()}), **changes)


def study(folder: Path, **changes: Any) -> Study:
    folder.mkdir(exist_ok=True)
    return Study.begin(folder, plan(**changes))


def run_in(out: Path) -> Run:
    pico = str(resolve_model("pico"))
    recipe = recipe_of(nemotron_3_nano_lora)
    return Run(pico, str(out / "base"), "", None, str(out), 1, 1, True, Settings(), recipe=recipe)


def test_choices_and_ranges_as_they_are_written():
    space = distributions(
        {"lora.rank": "8,16", "train.lr": "1e-5..0.5:log", "train.patience": "0..9", "lora.targets": "a,b|c"}, NOW
    )
    assert space == {
        "lora.rank": CategoricalDistribution(["8", "16"]),
        "train.lr": FloatDistribution(1e-5, 0.5, log=True),
        "train.patience": IntDistribution(0, 9),  # the setting is a whole number
        "lora.targets": CategoricalDistribution(["a,b", "c"]),
    }
    assert ends({key: space[key] for key in ("lora.rank", "train.lr")}) == [
        *({"lora.rank": "8"}, {"lora.rank": "16"}),
        *({"train.lr": "1e-05"}, {"train.lr": "0.5"}),
    ]


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("lora.rank", "write KEY=8,16,32"),
        ("train.lr=1e-3..1e-5", "LOW below HIGH"),
        ("train.lr=0..1e-5:log", "above 0 for :log"),
        ("train.patience=0.5..3", "must be whole numbers"),
        ("lora.rank=8,8", "says a choice twice"),
    ],
)
def test_what_is_no_choice_and_no_range_is_refused(word: str, says: str):
    with pytest.raises(UserError, match=says):
        distributions(read_tries([word]), NOW)


def test_a_proposal_depends_on_seed_number_and_results_only(tmp_path: Path):
    """Asked again it is the same; no point comes twice; a space of four points has four trials."""
    space = distributions(TRIES, NOW)
    assert draw(space, "tpe", 7, 3, []) == draw(space, "tpe", 7, 3, [])
    assert draw(space, "tpe", 7, 3, []) != draw(space, "tpe", 7, 4, [])
    assert draw(space, "tpe", 7, 3, []) != draw(space, "tpe", 8, 3, [])
    few = study(tmp_path, tries={"lora.rank": "4,8", "lora.alpha": "16,32"})
    assert [few.propose() for _ in range(4)] == [0, 1, 2, 3]
    points = [tuple(sorted(one.params.items())) for one in few.trials()]
    assert len(set(points)) == 4
    with pytest.raises(UserError, match="no point left for trial 4"):
        few.propose()


def test_a_trial_is_in_the_journal_whole_and_survives_a_half_written_line(tmp_path: Path):
    first = study(tmp_path)
    first.propose()
    params = first.trials()[0].params
    assert set(params) == set(TRIES)
    with (tmp_path / JOURNAL).open("a") as journal:
        journal.write('{"op_code":4,"worker_id":"x","study')  # killed here
    again = Study.read(tmp_path)
    assert [one.params for one in again.trials()] == [params]
    again.finish(0, 0.5)
    assert Study.read(tmp_path).trials()[0].value == 0.5


def test_a_journal_that_is_not_ours_and_another_sweep_are_refused(tmp_path: Path):
    study(tmp_path).propose()
    with pytest.raises(UserError, match=r"has seed 7, not 8; give what it was begun with"):
        Study.begin(tmp_path, plan(seed=8))
    with pytest.raises(UserError, match=r"has train\.beta2=0\.95, not 0\.9;"):
        Study.begin(tmp_path, plan(common={**plan().common, "train.beta2": "0.9"}))
    (tmp_path / JOURNAL).write_text('{"op_code": "rm -rf", "worker_id": "x"}\n')
    with pytest.raises(UserError, match=r"journal\.log:1: .*op_code"):
        Study.read(tmp_path).trials()


def test_a_trial_is_given_up_below_the_median_of_finished_ones(tmp_path: Path):
    """Four finished trials had 1, 2, 3, 4 after step 2: their median is 2.5. 2.4 goes on, 2.6 ends; not at step 1, nor
    at its last step, nor before four have finished."""
    book = study(tmp_path, prune_after=2)
    for number, loss in enumerate((1.0, 2.0, 3.0, 4.0)):
        book.propose()
        assert not book.gives_up(number, 2, loss, last=False)
        book.finish(number, loss)
    for loss, step, last, ends_here in (
        (2.4, 2, False, False),
        (9.0, 1, False, False),
        (2.6, 2, True, False),
        (2.6, 2, False, True),
    ):
        number = book.propose()
        assert book.gives_up(number, step, loss, last) == ends_here
        assert (book.trials()[number].state.name == "PRUNED") == ends_here
    assert book.gives_up(number, 2, 2.6, last=False), "asked again, after a kill, it says the same"
    assert book.trials()[number].value == 2.6


def ended(folder: Path, loss: float) -> None:
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "lora.json").write_text("{}")
    (folder / "metrics.jsonl").write_text(
        '{"step": 1, "validation_loss": 9.0}\n' + json.dumps({"step": 2, "validation_loss": loss}) + "\n"
    )


def test_results_come_from_the_runs_own_folders(tmp_path: Path):
    """An adapter: finished with its last validation loss. A run that diverged: failed. Anything else is to be run."""
    book = study(tmp_path)
    for _ in range(4):
        book.propose()
    ended(book.folder_of(0), 0.25)
    for number, words in ((1, f"error: step 30: {DIVERGED}; lower train.lr"), (2, "Killed")):
        (book.folder_of(number) / "logs").mkdir(parents=True)
        (book.folder_of(number) / "logs" / "rank0.log").write_text(words)
    assert settle(book) == [2, 3]
    assert [(one.state.name, one.value) for one in book.trials()] == [
        *(("COMPLETE", 0.25), ("FAIL", None), ("RUNNING", None), ("RUNNING", None))
    ]
    assert settle(Study.read(tmp_path)) == [2, 3]
    (book.folder_of(0) / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(UserError, match="has no validation_loss"):
        result_of(book.folder_of(0))


def test_every_choice_is_checked_before_anything_runs(tmp_path: Path):
    run = run_in(tmp_path)
    for tries, says in (
        ({"lora.rnk": "4,8"}, r"a trial with lora\.rnk=4: .*did you mean lora\.rank"),
        ({"lora.rank": "4,0"}, r"a trial with lora\.rank=0: "),
        ({"log.every": "1,2"}, "no say in the numbers"),
    ):
        with pytest.raises(UserError, match=says):
            check_space(run, Study(tmp_path, plan(tries=tries, common=common(run))))


def test_a_trial_is_the_run_with_its_settings_in_its_folder(tmp_path: Path):
    run = run_in(tmp_path)
    one = trial_run(run, Study(tmp_path, plan()), 3, {"lora.rank": "4", "train.lr": 0.1 + 0.2})
    assert (one.settings.lora.rank, one.settings.train.lr) == (4, 0.1 + 0.2)  # every bit
    assert (one.out, one.base, one.trial) == (str(tmp_path / "trials" / "3"), run.base, 3)
    assert run.settings.lora.rank == Settings().lora.rank
    assert Run.from_json(one.to_json()) == one
    old = json.loads(one.to_json())
    del old["trial"]
    assert Run.from_json(json.dumps(old)).trial is None  # a run.json of before


def test_an_array_of_trials_has_one_script_and_each_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    site = Cluster(account="a", partition="p", workdir="/code", logs=str(tmp_path / "logs"))
    out = tmp_path / "my sweep"
    out.mkdir()
    run = replace(run_in(out), cpu=False, ranks_per_node=8)
    job = array_of(run, (4, 7))
    script = render(site, job)
    assert "#SBATCH --array=4,7\n" in script
    assert f"OUT='{out}/trials/'\"$SLURM_ARRAY_TASK_ID\"\n" in script
    assert script.endswith(f"    -m finetune.worker '{out}/trials/'\"$SLURM_ARRAY_TASK_ID\"/run.json\nfinished\n")
    sent: list[str] = []
    monkeypatch.setattr("finetune.run_cluster.hand_in", lambda _, one: sent.append(one.name) or 12)
    runs = {number: trial_run(run, Study(out, plan()), number, {"lora.rank": "4"}) for number in (4, 7)}
    assert hand_in_runs(site, job, out, runs) == 12
    for number in (4, 7):
        folder = out / "trials" / str(number)
        assert Run.from_json((folder / "run.json").read_text()) == runs[number]
        assert (folder / "job").read_text() == f"12_{number}\n"
    assert (sent, (out / "job.sbatch").read_text()) == (["my sweep"], script)


def test_on_slurm_the_next_trials_go_out_when_the_array_has_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Three trials, two at a time: while the first two are queued nothing goes out; then one that has no result goes
    out again beside the third; when all have results, nothing."""
    site = Cluster(account="a", partition="p", logs=str(tmp_path / "logs"))
    out, queue, sent = tmp_path / "sweep", {"1_0": "PENDING"}, []
    run, book = replace(run_in(out), cpu=False, ranks_per_node=8), study(out)
    monkeypatch.setattr("finetune.run_cluster.hand_in", lambda _, job: sent.append(job.seeds) or len(sent))
    monkeypatch.setattr("finetune.run_cluster.status", lambda number: queue.get(number, ""))
    monkeypatch.setattr("finetune.run_cluster.preflight", lambda *_, **__: (0, "fits"))
    assert run_on_cluster(run, book, 3, 2, site, watch=False) == 0
    with pytest.raises(UserError, match=r"job 1_0 writes to .*trials/0 or waits to: PENDING"):
        run_on_cluster(run, book, 3, 2, site, watch=False)
    queue.clear()
    ended(book.folder_of(1), 0.5)
    assert run_on_cluster(run, book, 3, 2, site, watch=False) == 0
    assert sent == [(0, 1), (0, 2)]
    for number in (0, 2):
        ended(book.folder_of(number), 0.4)
    assert run_on_cluster(run, book, 3, 2, site, watch=False) == 0
    assert len(sent) == 2
    assert [one.state.name for one in book.trials()] == ["COMPLETE"] * 3
    monkeypatch.setattr("finetune.run_cluster.preflight", lambda *_, **__: (1, "DOES NOT FIT"))
    assert run_on_cluster(run, book, 4, 2, site, watch=False) == 1
    assert len(sent) == 2


def test_more_trials_than_gpus_are_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"2 trials at a time require 2,?000 NVIDIA GPUs"):
        run_here(replace(run_in(tmp_path), cpu=False, ranks_per_node=1000), study(tmp_path), 2, 2)
    assert study(tmp_path).trials() == []


def test_the_report_ranks_finished_trials_before_those_given_up(tmp_path: Path):
    book = study(tmp_path)
    for number, loss in enumerate((0.7, 0.2, 0.1, 0.5)):
        book.propose()
        book.gives_up(number, 2, loss, last=True)
        if number != 2:
            book.finish(number, loss)
    book.fail(2)
    assert [one.number for one in ranked(book)] == [1, 3, 0, 2]
    lines = write_report(book, "python recipes/x.py --out 'a<b'")
    assert best_of(lines) == lines[0]
    assert as_lines(lines).splitlines()[1].startswith("   1     1    0.2000  finished     lora.rank=")
    page = (tmp_path / REPORT).read_text()
    assert "a&lt;b" in page
    assert page.count("<circle class='dot s0'") == 3 + 3 + 1  # three by rank and by rate, one point of the best's curve


def test_a_recipe_is_opened_by_its_file(tmp_path: Path):
    settings, recipe = open_recipe(ROOT / "recipes" / "reasoning_lora.py")
    assert (settings().lora.max_rank, recipe_of(recipe).name) == (64, "recipes.reasoning_lora:reasoning_lora")
    again = open_recipe(ROOT / "recipes" / "nemotron_lora.py")[1]
    assert again is nemotron_3_nano_lora  # whoever imported it before still holds the recipe's function
    other = tmp_path / "none.py"
    other.write_text("print('no recipe')\n")
    with pytest.raises(UserError, match=r"none\.py does not end in run\(lambda: main"):
        open_recipe(other)
    with pytest.raises(UserError, match="there is no recipe"):
        open_recipe(tmp_path / "nowhere.py")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "nothing to try"),
        (["--try", "lora.rank=4,8"], "give --validation STORE"),
        (["--try", "lora.rank=4,8", "--array", "1,2"], "--array is of one run"),
        (["--try", "lora.rank=4,8", "--jobs", "0"], "--jobs 0 must be at least 1"),
        (["--try", "lora.rank=4,8", "--validation", "x", "--prune-after", "2"], "give train.validate_every=STEPS"),
    ],
)
def test_a_command_that_means_nothing_is_refused(words, says, tmp_path, monkeypatch):
    argv = [
        "sweep.py",
        "--model",
        "pico",
        "--local",
        "--data",
        "x",
        "--out",
        str(tmp_path / "out"),
        *words,
        "layout.ep=1",
    ]
    monkeypatch.setattr("sys.argv", argv)
    with pytest.raises(UserError, match=says):
        main(None)
    assert not (tmp_path / "out").exists()


def test_flags_that_a_sweep_does_not_take_are_flags_of_a_recipe():
    from finetune.sweep_command import NOT_OF_A_SWEEP

    assert set(NOT_OF_A_SWEEP) <= set(vars(command.parser().parse_args([])))
