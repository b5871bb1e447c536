"""What a site file may say."""

from __future__ import annotations

import pytest

from launch.slurm.cluster import EXAMPLE, Cluster
from nano3.cli import UserError


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "Copy .*cluster.example.yaml and fill in"),
        (EXAMPLE.read_text(), "account and partition not filled in"),
        ("partition: x", "has no account"),
        ("account: a\npartition: b\nnods: 2", "unknown key nods; did you mean"),
        ("account: a\npartition: b\ngres: maybe", "gres must be bool, but it is 'maybe'"),
        ("account: a\npartition: b\ngpus_per_node: true", "gpus_per_node must be int"),
        ("account: a\npartition: b\nhardware: a100", "hardware 'a100' is not known"),
        ("account: a\npartition: b\ntime: four hours", 'time: "four hours" is not'),
        ('account: a\npartition: b\ntime: "00:05:00"', "signal_seconds: 300 must be less than time: 00:05:00"),
        ("account: a\npartition: b\nmounts: ['/x:/x']", "mounts are of a container"),
        ("account: a\npartition: b\ncontainer: c\nmounts: ['x:/y']", "mount 'x:/y' is not OUTSIDE"),
        ("account: a\npartition: b\ntime: 12:00:00", 'it is 43200; write it in quotes: time: "12:00:00"'),
        ("account: 12\npartition: b", 'account must be str, but it is 12; write it in quotes: account: "12"'),
        ("account: a\npartition: b\nenvironment: {NCCL_DEBUG: 1}", 'environment holds 1, .*write "1" there'),
        ("account: a\npartition: b\nenvironment: {A-B: x}", "'A-B', which is no name of a variable"),
        ("account: a\npartition: b\nsetup: [1]", 'setup holds 1, .*write "1" there'),
        ("account: a\npartition: b\noptions: ['--qos=high']", "without dashes, such as qos=high"),
        ("account: [", "not valid YAML"),
        ("just words", "holds text; it must be an object"),
        ("acount: a\npartition: b", "unknown key acount; did you mean account"),  # the typo, not what it leaves missing
        ('account: "a\\nb"\npartition: b', r"account has '\\n' at position 1"),
        ("account: a\npartition: b\nenvironment: {Ä: x}", "'Ä', which is no name of a variable"),
    ],
)
def test_a_site_file_is_checked(tmp_path, text, message):
    path = tmp_path / "cluster.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message):
        Cluster.load(path)


def test_the_example_names_every_key_with_its_default():
    text = EXAMPLE.read_text().replace("account: FILL IN", "account: a").replace("partition: FILL IN", "partition: b")
    path = EXAMPLE.parent / "cluster.example.yaml"
    import yaml

    raw = yaml.safe_load(text)
    assert Cluster(**raw) == Cluster("a", "b")
    assert set(raw) == set(Cluster.__dataclass_fields__), path


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("90", 5400),
        ("90:30", 5430),
        ("04:00:01", 14401),
        ("2-03", 183600),
        ("2-03:04", 183840),
        ("2-03:04:05", 183845),
        ("UNLIMITED", None),
    ],
)
def test_time_limits_are_read_as_slurm_reads_them(time, seconds):
    assert Cluster("my_account", "batch", time=time).seconds == seconds
