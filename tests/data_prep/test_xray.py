"""The X-ray: what it says of a store, by hand, in a terminal and on a page."""

import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from data_prep.packing import PackedDataset
from data_prep.prepare import prepare
from data_prep.store_view import Viewer, _bins, _slices, overview, runs
from data_prep.xray import main, print_documents, terminal_text
from data_prep.xray_page import page
from nano3.cli import UserError
from tests.helpers.data_fixtures import row, write_jsonl, write_tokenizer

SPAN = {"text": "bc", "weight": 0.5, "stage": 7}


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> PackedDataset:
    folder = tmp_path_factory.mktemp("xray")
    tokenizer = write_tokenizer(folder / "tokenizer")
    answer = {"role": "assistant", "content": "abcd ü", "spans": [SPAN]}
    rows = [row("q", "a"), {"messages": [{"role": "user", "content": "<b>&\x1b[31m"}, answer], "source": "s<i>"}]
    prepare([write_jsonl(folder / "x.jsonl", rows)], tokenizer, folder / "store", 128, pad_multiple=4)
    return PackedDataset(folder / "store", 128, 4)


def test_runs_by_hand(packs: PackedDataset) -> None:
    view = Viewer(packs.store, None).document(1)
    assert (view.origin, view.source, view.trained) == ("x.jsonl:2", "s<i>", 7 + 1)  # "ü" is two tokens; and the end
    found = [(weight, stage, "".join(piece.text for piece in pieces)) for weight, stage, pieces in runs(view)]
    assert found[1:] == [(1, 0, "a"), (0.5, 7, "bc"), (1, 0, "d ü<|im_end|>"), (0, 0, "\n")]
    assert [piece.text for piece in view.pieces if piece.control][-1] == "<|im_end|>"


def test_a_terminal_is_told_what_trains_and_gets_no_escapes_of_the_text(packs: PackedDataset) -> None:
    text = terminal_text(Viewer(packs.store, None).document(1), colours=False)
    assert text.endswith("<think></think>[[a]][[(weight 0.5, stage 7) bc]][[d ü<|im_end|>]]\n")
    assert "<b>&\\x1b[31m" in text
    coloured = terminal_text(Viewer(packs.store, None).document(1), colours=True)
    assert "\x1b[33m(weight 0.5, stage 7) bc\x1b[0m" in coloured
    assert "\x1b[31m" not in coloured


def test_a_long_document_loses_its_middle(packs: PackedDataset, tmp_path: Path) -> None:
    long = write_jsonl(tmp_path / "x.jsonl", [row("q" * 3000, "the end")])
    store, _ = prepare([long], packs.store.folder.parent / "tokenizer", tmp_path / "store", 4096)
    text = terminal_text(Viewer(store, None).document(0), colours=False)
    assert len(text) < 1300
    assert text.startswith("<|im_start|>system")
    assert "characters ..." in text
    assert text.endswith("[[the end<|im_end|>]]\n")


def test_numbers_of_a_store(packs: PackedDataset) -> None:
    found = overview(packs)
    lengths = packs.store.lengths().tolist()
    assert sum(count for _, _, count in found.bins) == 2
    assert found.stages == {7: 2}
    assert found.fullest == found.emptiest == [(0, sum(lengths) - 2)]
    assert _bins(np.array([2, 3, 4, 16])) == [(2, 3, 2), (4, 7, 1), (8, 15, 0), (16, 31, 1)]


def test_slices_are_cut_in_twice_as_many_pieces_as_ranks() -> None:
    assert _slices(8, 2) == (0, 0, 1, 1, 1, 1, 0, 0)
    assert _slices(12, 3) == (0, 0, 1, 1, 2, 2, 2, 2, 1, 1, 0, 0)


class Tags(HTMLParser):
    """Fails for a tag that is not closed where it must be; collects what a page must not have."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.seen.add(tag)
        assert not {name for name, _ in attrs} & {"src", "href", "onclick"}
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_whole_escaped_and_fetches_nothing(packs: PackedDataset) -> None:
    viewer = Viewer(packs.store, None)
    written = page(overview(packs), 0, viewer.pack(packs, 0, context_parallel=2))
    tags = Tags()
    tags.feed(written)
    assert not tags.open
    assert not tags.seen & {"script", "img", "link", "b>&"}
    assert "<b>&\\x1b[31m" in tags.text
    assert "<i>&lt;</i><i>b</i><i>&gt;</i><i>&amp;</i>" in written
    assert '<span class="run less stage"><b class="note">weight 0.5, stage 7</b><i>b</i><i>c</i></span>' in written
    assert 'class="slice">rank 1</b>' in written
    assert "prefers-color-scheme: dark" in written


def test_a_store_without_its_tokenizer_shows_numbers(packs: PackedDataset, tmp_path: Path) -> None:
    packs.store.manifest["tokenizer_folder"], kept = str(tmp_path), packs.store.manifest["tokenizer_folder"]
    try:
        viewer = Viewer(packs.store, None)
        assert not viewer.has_text
        assert [piece.text for piece in viewer.document(0).pieces][-2:] == [" 11", " 26"]
        with pytest.raises(UserError, match="another tokenizer"):
            Viewer(packs.store, "pico")
    finally:
        packs.store.manifest["tokenizer_folder"] = kept


def test_scripts(packs: PackedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    folder = str(packs.store.folder)
    for arguments, words in (
        ([folder], ["2 documents", "stage 7: 2 tokens", "packs of 128: 1", "fullest: 0 ("]),
        ([folder, "--pack", "0", "--cp", "2"], ["pack 0 of 1: 2 documents", "context parallel: rank 0"]),
        ([folder, "--html", str(tmp_path / "x.html")], ["x.html: pack 0"]),
    ):
        monkeypatch.setattr(sys, "argv", ["xray.py", *arguments])
        assert main() == 0
        printed = capsys.readouterr().out
        assert all(word in printed for word in words), printed
    assert (tmp_path / "x.html").read_text().startswith("<!doctype html>")
    for arguments, reason in (
        ([folder, "--pack", "1"], "the packs count from 0 to 0"),
        ([folder, "--cp", "4"], "multiple of 8"),
        ([folder, "--packs", "packs-9"], r"has no packs packs-9 \(it has packs-128-pad4\)"),
        ([str(tmp_path)], "is not a token store"),
    ):
        monkeypatch.setattr(sys, "argv", ["xray.py", *arguments])
        with pytest.raises(UserError, match=reason):
            main()


def test_some_rows_are_printed_once_each(packs: PackedDataset, capsys: pytest.CaptureFixture[str]) -> None:
    print_documents(Viewer(packs.store, None), [0, 0, 1])
    assert capsys.readouterr().out.count("x.jsonl:") == 2


def test_the_x_ray_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, data_prep.xray_page; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
