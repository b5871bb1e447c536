"""What may stand in cluster.yaml, a path or a name: it arrives in the job as it is, or it is refused; it never runs."""

from __future__ import annotations

import os
import shlex
import stat
import subprocess
from dataclasses import fields, replace
from pathlib import Path

import pytest

from launch.slurm.cluster import Cluster
from launch.slurm.sbatch import Job, private_environment, render
from launch.slurm.shell import option, quote, words, write_private
from nano3.cli import UserError

HOSTILE = (
    "$(touch PWNED)",
    "`touch PWNED`",
    "a'; touch PWNED; '",
    'a"; touch PWNED; "',
    "a; touch PWNED",
    "a && touch PWNED #",
    "${PATH} $SLURM_JOB_ID ~ * ? [a] {x,y} ! <(touch PWNED)",
    "-n ä #",
)
CONTROL = ("a\ntouch PWNED", "a\r", "a\0b", "a\x1b[2J", "\ud800")
TOOLS = ("srun", "scontrol", "squeue", "scancel", "getent", "sinfo")


def job(folder: Path, text: str) -> tuple[Cluster, Job]:
    """A site and a job of an array that have the text wherever a text may be."""
    for name in ("project", "bundle"):
        (folder / (name + text.replace("/", ""))).mkdir()
    inner = text.replace("/", "")
    project = folder / f"project{inner}"
    (project / "launch" / "slurm").mkdir(parents=True)
    (project / "launch" / "slurm" / "survive.sh").write_text('survive() { "$@"; }\nfinished() { echo "OUT=<$OUT>"; }\n')
    site = Cluster(
        text, text, logs=f"{folder}/logs{inner}", workdir=str(project), container=f"image{text}", hardware="cpu",
        gpus_per_node=1, mounts=[f"/a{inner}:/b{inner}"] if not set(":,") & set(inner) else [], python=f"python{text}",
        environment={"VALUE": text}, options=[f"comment=x{text}"], bundle=f"{folder}/bundle{inner}",
    )  # fmt: skip
    private = folder / f"{inner}.env"
    write_private(private, private_environment(site))
    path = f"/out{text}/{{seed}}/run.json"
    name = inner.replace("%", "")
    return site, Job(
        name, ["-m", "worker", path, text], 2, ["-m", "first", path], (1, 2), None, path, private=str(private)
    )


@pytest.mark.parametrize("text", HOSTILE)
def test_text_arrives_as_it_is_and_nothing_runs(tmp_path, text):
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in TOOLS:
        body = (
            'printf "%s\\0" "$@" "$PYTHONPATH" "$VALUE" >> "$RAN"; printf "\\n\\0" >> "$RAN"' if tool == "srun" else ":"
        )
        (tools / tool).write_text(f"#!/bin/bash\n{body}\n")
        (tools / tool).chmod(0o755)
    site, made = job(tmp_path, text)
    ran = tmp_path / "ran"
    environment = {"PATH": f"{tools}:{os.environ['PATH']}", "RAN": str(ran), "PYTHONPATH": "/before"}
    environment |= {
        "SLURM_JOB_ID": "7",
        "SLURM_ARRAY_JOB_ID": "5",
        "SLURM_ARRAY_TASK_ID": "2",
        "SLURM_JOB_NODELIST": "n",
    }
    done = subprocess.run(
        ["bash"], input=render(site, made), text=True, capture_output=True, env=environment, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    path = f"/out{text}/2/run.json"
    assert done.stdout.splitlines()[-1] == f"OUT=<{path}>"
    first, ranks = [part.strip("\0").split("\0") for part in ran.read_text().split("\n\0")[:2]]
    assert first[-6:] == [
        "launch/slurm/inside.py", "-m", "first", path, f"{site.workdir}:{site.bundle}/packages:/before", text
    ]  # fmt: skip
    assert f"--container-image=image{text}" in first
    assert f"python{text}" in ranks
    assert ranks[-5:-2] == ["worker", path, text]
    assert not list(tmp_path.rglob("PWNED"))


@pytest.mark.parametrize("text", CONTROL)
def test_what_no_quoting_carries_is_refused_by_its_name(tmp_path, text):
    lists = {"mounts", "setup", "cpu_options", "options", "settings"}
    given = {"account": "a", "partition": "b"}
    for item in fields(Cluster):
        kind = str(item.type)
        if "str" not in kind or item.name == "time":
            continue
        value = [text] if item.name in lists else {"NAME": text} if item.name == "environment" else text
        with pytest.raises(UserError, match=f"cluster.yaml: {item.name} has .* which cannot stand in a job's script"):
            Cluster(**(given | {item.name: value}))
    with pytest.raises(UserError, match=r"cluster\.yaml: environment has"):
        Cluster("a", "b", environment={text: "x"})
    plain = Job("x", ["y"], private=str(tmp_path))
    for change in ({"name": text}, {"command": [text]}, {"prepare": [text]}, {"out": text}, {"private": text}):
        with pytest.raises(UserError, match="cannot stand in a job's script"):
            replace(plain, **change)


def test_options_are_read_by_sbatch_which_takes_a_backslash_for_an_escape():
    assert option("comment", "two words") == "#SBATCH --comment='two words'"
    assert option("exclusive", "") == "#SBATCH --exclusive"
    with pytest.raises(UserError, match="a backslash for an escape"):
        option("comment", "a\\b")
    site = replace(Cluster("a", "b"), logs="/logs/100%j")
    assert "#SBATCH --output=/logs/100%%j/x-%j.log\n" in render(site, Job("x", ["y"]))


def test_only_the_seed_is_expanded():
    assert words(["/a b/{seed}/c", "$x", "", "{seed}"]) == (
        "'/a b/'\"$SLURM_ARRAY_TASK_ID\"/c '$x' '' \"$SLURM_ARRAY_TASK_ID\""
    )
    assert shlex.split(quote("it's `x`")) == ["it's `x`"]


def test_a_private_file_is_the_owners_alone_from_the_start(tmp_path):
    path = tmp_path / "deep" / "job.env"
    path.parent.mkdir()
    path.write_text("older")
    path.chmod(0o644)
    before = os.umask(0)
    try:
        write_private(path, "export KEY=1\n")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert (path.read_text(), list(path.parent.iterdir())) == ("export KEY=1\n", [path])
