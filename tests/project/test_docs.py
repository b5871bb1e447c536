"""What the documents name exists: files, scripts in commands, test names, setting keys."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from finetune.settings import Settings
from nano3.overrides import flatten

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_scripts_exist(page):
    text = page.read_text()
    links = [page.parent / target for target in re.findall(r"\]\(([^)#:]+)\)", text)]
    scripts = [ROOT / script for script in re.findall(r"python (\w+/\w+\.py)", text)]
    paths = [
        ROOT / path
        for path in re.findall(r"`((?:recipes|nano3|data_prep|conversion|evaluation|launch|tests)/[\w/.]+\.\w+)`", text)
    ]
    missing = [str(path) for path in [*links, *scripts, *paths] if not path.exists()]
    assert not missing
    assert "TODO" not in text


def test_the_tree_in_readme_is_the_repository():
    tree = (ROOT / "README.md").read_text().split("## Where things are\n```\n")[1].split("```")[0]
    folder = ROOT
    for line in tree.splitlines():
        names = re.split(r"\s{2,}", line.strip())[0].split(", ")
        if not line.startswith(" "):
            folder = ROOT / names[0]
            assert folder.is_dir(), line
        else:
            assert all((folder / name).exists() for name in names), line


def test_settings_in_readme_exist():
    text = (ROOT / "README.md").read_text()
    known = set(flatten(Settings()))
    shown = {f"{group}.{key}" for group, keys in re.findall(r"(\w+)\.\{([^}]*)\}", text) for key in keys.split(",")}
    shown |= set(re.findall(r"\b((?:layout|lora|train|log)\.\w+)=", text))
    shown.discard("train....")
    assert shown
    assert shown <= known
