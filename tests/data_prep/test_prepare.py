"""From chat JSONL and reasoning-gym to a token store: the scripts, the overlap rule, and bad input."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.generate import fresh_rows, parse_params
from data_prep.overlap import HeldOut, Overlap, find_overlap, overlap_of_files
from data_prep.packing import PackedDataset, build_packs
from data_prep.prepare import Options, prepare
from data_prep.sources.reasoning_gym import reasoning_gym_rows
from data_prep.summary import print_summary
from nano3.cli import UserError
from nano3.conversations import Conversation, Conversations
from nano3.messages import CONTROL_TOKENS
from nano3.rows import write_rows
from nano3.store_contents import check_store
from nano3.token_store import TokenStore
from tests.helpers.data_fixtures import ids, row, write_jsonl, write_tokenizer

ROOT = Path(__file__).parents[2]


def script(name: str, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "data_prep" / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def refused(name: str, *arguments: object) -> str:
    """Runs a script that must refuse: exit code 2, one line, no traceback. Returns the line."""
    result = script(name, *arguments)
    assert result.returncode == 2, result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    return write_tokenizer(tmp_path / "tokenizer")


def test_prepare_script_end_to_end(tmp_path: Path, tokenizer: Path) -> None:
    first = write_jsonl(tmp_path / "first.jsonl", [row("a", "b"), "", row("c", "d", "why")])
    second = write_jsonl(tmp_path / "second.jsonl", [row("e", "ff", source="other")])
    out = tmp_path / "store"
    result = script(
        "prepare.py", "--input", first, "--input", second, "--tokenizer", tokenizer, "--out", out, "--seq-length", 128
    )
    assert result.returncode == 0, result.stderr
    assert "3 documents" in result.stdout
    assert "2 direct, 1 with reasoning, 0 without loss" in result.stdout
    store = TokenStore(out)
    check_store(store)
    # Supervised by hand: "b" + end; "why\n" + </think> + "\nd" + end; "ff" + end.
    assert store.manifest["sources"]["test"]["supervised_tokens"] == 2 + (4 + 1 + 2 + 1)
    assert store.manifest["sources"]["other"]["supervised_tokens"] == 3
    assert [entry["name"] for entry in store.manifest["inputs"]] == ["first.jsonl", "second.jsonl"]
    assert sum(pack["loss_mask"].sum() for pack in PackedDataset(out, 128)) == 13
    again = script("repack.py", out, "--seq-length", 256)
    assert "packs of 256: 1" in again.stdout
    assert len(PackedDataset(out, 256)) == 1


def test_no_thinking_leaves_reasoning_out(tmp_path: Path, tokenizer: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [row("c", "d", "why")])
    store, facts = prepare([path], tokenizer, tmp_path / "store", 128, Options(thinking=False))
    assert facts["supervised_positions"] == 2
    assert store.manifest["turns"] == {"answered": 1, "thought": 0, "context_only": 0}


def test_turns_that_lost_their_reasoning_are_counted_or_get_documents(tmp_path: Path, tokenizer: Path) -> None:
    conversation = row("a", "b", "r")["messages"] + row("c", "d", "s")["messages"]
    path = write_jsonl(tmp_path / "x.jsonl", [{"messages": conversation}])
    store, _ = prepare([path], tokenizer, tmp_path / "store", 128, Options(split=False))
    assert store.manifest["turns"] == {"answered": 0, "thought": 1, "context_only": 1}
    store, _ = prepare([path], tokenizer, tmp_path / "store", 128)
    assert store.manifest["turns"] == {"answered": 0, "thought": 2, "context_only": 1}
    assert (store.manifest["finds"]["split_rows"], store.manifest["finds"]["split_documents"], len(store)) == (1, 2, 2)
    assert store.origin(0) == store.origin(1) == "x.jsonl:1"


def test_weights_of_rows_and_messages_multiply(tmp_path: Path, tokenizer: Path) -> None:
    talk = row("a", "b")["messages"] + row("c", "dd")["messages"]
    talk[1]["weight"], talk[3]["weight"] = 0, 0.5
    rows = [{"messages": talk, "weight": 3, "source": "x"}, row("e", "f") | {"weight": 0.25}]
    store, facts = prepare([write_jsonl(tmp_path / "x.jsonl", rows)], tokenizer, tmp_path / "store", 128)
    # Supervised by hand: "dd" + end at 3 * 0.5, and "f" + end at 0.25; "b" + end has weight 0 and is context only.
    weights = [mask[mask > 0].tolist() for _, mask in (store.document(0), store.document(1))]
    assert weights == [[1.5] * 3, [0.25] * 2]
    assert facts["supervised_positions"] == store.manifest["supervised_tokens"] == 5
    assert store.manifest["turns"] == {"answered": 2, "thought": 0, "context_only": 1}
    (pack,) = (PackedDataset(tmp_path / "store", 128)[number] for number in range(facts["packs"]))
    assert pack["loss_mask"].sum() == 1.5 * 3 + 0.25 * 2
    assert {store.source_names[number] for number in set(pack["source"].tolist()) - {-1}} == {"x", "test"}


def test_same_input_gives_the_same_bytes(tmp_path: Path, tokenizer: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [row(str(n), str(n + 1)) for n in range(50)])
    contents = []
    for name in ("one", "two"):
        prepare([path], tokenizer, tmp_path / name, 256)
        files = sorted((tmp_path / name).rglob("*"))
        contents.append([(file.name, file.read_bytes()) for file in files if file.is_file()])
    assert contents[0] == contents[1]


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (['{"messages": ['], r"bad\.jsonl:2: not valid JSON"),
        (["[1]"], r"bad\.jsonl:2: a row must be a JSON object"),
        ([{"text": "x"}], r"bad\.jsonl:2: no 'messages'; the row has 'text'"),
        ([{"conversations": []}], r"bad\.jsonl:2: .*the form of ShareGPT"),
        ([{"messages": [{"role": "bot", "content": "x"}]}], r"bad\.jsonl:2: messages\[0\]: role 'bot'"),
        ([row("a", "b") | {"tools": [{}]}], r"bad\.jsonl:2: tools\[0\] is no tool definition"),
        ([row("a", "b") | {"functions": [{}]}], r"bad\.jsonl:2: tools\[0\] is no tool definition"),
        ([row("a", "b") | {"chat_template_kwargs": {"enable_thinking": False}}], "'chat_template_kwargs' would change"),
        ([row("a", "b") | {"system": 5}], r"bad\.jsonl:2: 'system' is 5"),
        ([row("a", "b") | {"loss": False}], r"bad\.jsonl:2: 'loss' would change the prompt or the loss"),
        ([{"messages": [{"role": "user", "content": "x"}]}], r"bad\.jsonl:2: no supervised token"),
        ([row("a", "b") | {"weight": -1}], r"bad\.jsonl:2: this row: 'weight' is -1"),
        ([row("a", "b") | {"weight": 0}], r"bad\.jsonl:2: 'weight' is 0, so there is nothing to learn"),
        ([row("a", "b") | {"weight": "1"}], r"bad\.jsonl:2: this row: 'weight' is '1'"),
        (
            [{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "weight": True}]}],
            r"bad\.jsonl:2: messages\[1\]: this assistant message: 'weight' is True",
        ),
        ([row("<|im_start|>", "b")], r"bad\.jsonl:2: messages\[0\].*control token"),
    ],
)
def test_bad_rows_are_named_by_file_and_line(tmp_path: Path, tokenizer: Path, lines: list, reason: str) -> None:
    path = write_jsonl(tmp_path / "bad.jsonl", [row("a", "b"), *lines])
    with pytest.raises(UserError, match=reason):
        prepare([path], tokenizer, tmp_path / "store", 128)
    assert not (tmp_path / "store").exists()
    assert not list(tmp_path.glob(".store*"))


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"messages": "\xff"}\n')
    with pytest.raises(UserError, match=r"x\.jsonl:1: not UTF-8"):
        list(Conversations(tmp_path / "x.jsonl"))


def test_script_refuses_bad_arguments_before_it_works(tmp_path: Path, tokenizer: Path) -> None:
    good = write_jsonl(tmp_path / "good.jsonl", [row("a", "b")])
    empty = write_jsonl(tmp_path / "empty.jsonl", [])
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "mine.txt").write_text("keep me")
    out = tmp_path / "store"
    common = {"--input": good, "--tokenizer": tokenizer, "--out": out, "--seq-length": 128}
    for change, reason in [
        ({"--input": tmp_path / "none.jsonl"}, "no such file"),
        ({"--input": empty}, "empty.jsonl is empty"),
        ({"--tokenizer": tmp_path}, "no tokenizer.json in"),
        ({"--out": strange}, "holds files that are not a token-store"),
        ({"--seed": -1}, "--seed -1 must be at least 0"),
        ({"--pad-multiple": 3}, "not a multiple of --pad-multiple 3; the next is 129"),
    ]:
        message = refused("prepare.py", *(part for pair in (common | change).items() for part in pair))
        assert reason in message
        assert not out.exists()
    assert (strange / "mine.txt").read_text() == "keep me"
    assert list(strange.iterdir()) == [strange / "mine.txt"]


def test_a_document_too_long_is_named_and_the_tokens_stay(tmp_path: Path, tokenizer: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [row("a", "b"), row("a", "b" * 100)])
    with pytest.raises(UserError, match=r"1 of 2 .*\(x\.jsonl:2\): the longest .*repack\.py"):
        prepare([path], tokenizer, tmp_path / "store", 128)
    assert len(TokenStore(tmp_path / "store")) == 2
    assert build_packs(TokenStore(tmp_path / "store"), 256)["documents"] == 2


def test_row_keys_system_tools_and_others(tmp_path: Path, tokenizer: Path) -> None:
    rows = [row("a", "b") | {"system": "Be brief.", "functions": [{"name": "now"}], "uuid": 5, "level": None}]
    store, _ = prepare([write_jsonl(tmp_path / "x.jsonl", rows)], tokenizer, tmp_path / "store", 2048)
    text = bytes(token - 16 for token in store.document(0)[0].tolist() if token >= 16).decode()
    assert text.startswith("system\nBe brief.\n\n# Tools\n\n")
    assert "<name>now</name>" in text
    assert store.manifest["finds"]["other_keys"] == {"uuid": 1}


def test_empty_answers_are_counted_and_dropped(tmp_path: Path, tokenizer: Path) -> None:
    twice = row("a", "")["messages"] + row("c", "d")["messages"]
    rows = [row("a", "b"), row("a", " "), row("a", "", "thought"), {"messages": twice}]
    store, _ = prepare([write_jsonl(tmp_path / "x.jsonl", rows)], tokenizer, tmp_path / "store", 256)
    finds = store.manifest["finds"]
    assert (len(store), finds["empty_turns"], finds["empty_rows"]) == (2, 3, 2)
    assert [Path(where).name for where in finds["empty_examples"]] == ["x.jsonl:2", "x.jsonl:3"]
    # "d" and its end: the empty turn before it is context only.
    assert int((store.document(1)[1] > 0).sum()) == 2


def test_arguments_that_are_null_in_every_call_are_warned_of(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = [
        {"name": "f", "arguments": {"city": "x", "path": None}},
        {"name": "g", "arguments": {"city": None, "path": "y"}},
        {"name": "g", "arguments": {"city": "z", "path": "y"}},
    ]
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": calls}]
    path = write_jsonl(tmp_path / "x.jsonl", [{"messages": talk}])
    store, facts = prepare([path], tokenizer, tmp_path / "store", 512)
    print_summary(store, facts)
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning:")]
    assert len(warnings) == 1
    assert "the argument f.path is null in all 1 of its calls" in warnings[0]
    dropped, _ = prepare([path], tokenizer, tmp_path / "store", 512, Options(drop_null_arguments=True))
    assert store.manifest["tokens"] - dropped.manifest["tokens"] == 2 * len("<parameter=path>\nNone\n</parameter>\n")


def test_spans_are_exact_on_tokens(tmp_path: Path, tokenizer: Path) -> None:
    """By hand: the answer "abcd" and its end; "bc" weighs 0.5 * 2 * 3 at stage 7, "d" 0, the rest 2 * 3."""
    answer = {"role": "assistant", "content": "abcd", "weight": 2}
    answer["spans"] = [{"text": "bc", "weight": 0.5, "stage": 7}, {"start": 3, "end": 4, "weight": 0}]
    rows = [{"messages": [{"role": "user", "content": "q"}, answer], "weight": 3}]
    store, _ = prepare([write_jsonl(tmp_path / "x.jsonl", rows)], tokenizer, tmp_path / "store", 128)
    tokens, weights = store.document(0)
    assert tokens[-6:-1].tolist() == [*ids("abcd"), CONTROL_TOKENS["<|im_end|>"]]
    assert weights[-6:].tolist() == [6, 3, 3, 0, 6, 0]
    assert store.stages(0)[-6:].tolist() == [0, 7, 7, 0, 0, 0]
    assert not weights[:-6].any()
    assert not store.stages(0)[:-6].any()


def test_a_span_inside_a_token_is_refused(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "merging", merges=[("b", "c")])
    answer = {"role": "assistant", "content": "abcd", "spans": [{"text": "ab", "stage": 1}]}
    path = write_jsonl(tmp_path / "x.jsonl", [{"messages": [{"role": "user", "content": "q"}, answer]}])
    with pytest.raises(UserError, match=r"x\.jsonl:1: the span 'ab' ends inside the token 'bc'"):
        prepare([path], tokenizer, tmp_path / "store", 128)


def test_added_tokens_of_a_tokenizer_never_become_real_ones(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "adding", CONTROL_TOKENS | {"<SPECIAL_9>": 9})
    path = write_jsonl(tmp_path / "x.jsonl", [row("a", "b"), row("say <SPECIAL_9> now", "b")])
    with pytest.raises(UserError, match=r"x\.jsonl:2: 'say <SPECIAL_9> now' contains <SPECIAL_9>"):
        prepare([path], folder, tmp_path / "store", 128)


def test_a_failed_run_leaves_the_old_store(tmp_path: Path, tokenizer: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [row("a", "b")])
    prepare([path], tokenizer, tmp_path / "store", 128)
    write_jsonl(path, [row("c", "d"), "{"])
    with pytest.raises(UserError):
        prepare([path], tokenizer, tmp_path / "store", 128)
    assert TokenStore(tmp_path / "store").manifest["documents"] == 1
    PackedDataset(tmp_path / "store", 128)


def test_reasoning_gym_is_deterministic_and_seeds_share_nothing() -> None:
    def questions(seed: int) -> list[str]:
        return [r["messages"][0]["content"] for r in reasoning_gym_rows("number_sorting", 20, seed, min_numbers=8)]

    assert questions(1) == questions(1)
    assert not set(questions(1)) & set(questions(2))
    (sample,) = reasoning_gym_rows("chain_sum", 1, 7)
    assert set(sample) == {"id", "source", "messages"}
    assert (sample["id"], sample["source"]) == ("chain_sum-7-0", "reasoning-gym/chain_sum")
    expression = sample["messages"][0]["content"].split(":")[1].strip(" =")
    assert sample["messages"][1] == {"role": "assistant", "content": str(eval(expression))}


@pytest.mark.parametrize(
    ("task", "params", "reason"),
    [
        ("number_sortin", {}, "no task 'number_sortin'; did you mean 'number_sorting'"),
        ("number_sorting", {"max_number": 4}, "no parameter 'max_number'; did you mean 'max_numbers'"),
        ("number_sorting", {"min_numbers": 9, "max_numbers": 3}, "does not take size=1 min_numbers=9 max_numbers=3"),
    ],
)
def test_unknown_tasks_and_parameters_are_refused(task: str, params: dict, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        list(reasoning_gym_rows(task, 1, 1, **params))


def test_parameters_are_json_where_they_can_be() -> None:
    assert parse_params(["a=5", "b=[1, 2]", "c=true", "d=up", "e=x=y"]) == {
        "a": 5,
        "b": [1, 2],
        "c": True,
        "d": "up",
        "e": "x=y",
    }
    with pytest.raises(UserError, match="'size' is not key=value"):
        parse_params(["size"])
    with pytest.raises(UserError, match="'seed=4': give it as --seed 4"):
        parse_params(["seed=4"])


def held_out(*questions: str) -> HeldOut:
    """Held-out questions of one source, whose ids are their texts."""
    return HeldOut(Conversation(text, "s", row(text, "?")["messages"], "x:1") for text in questions)


def test_exact_matches_ignore_case_space_and_form() -> None:
    held = held_out("Sort:  3 1 ２")
    assert held.match("sort: 3 1 2") == ("exact", "Sort:  3 1 ２")
    assert held.match("sort: 3 1 4") is None


def test_the_same_numbers_in_another_order_are_near() -> None:
    texts = [f"Sort these numbers: {n}, {n * 7}, {n * 13}" for n in range(2, 30)]
    held = held_out(*texts)
    assert held.match("Sort these numbers: 35, 5, 65") == ("near", texts[3])
    assert held.match("Sort these numbers: 35, 5, 66") is None


def test_shared_wording_is_not_overlap_but_shared_content_is() -> None:
    """Without the template taken out, every two of these questions would share most of their 3-grams."""
    wording = "Please read the following text with great care and then write it backwards, answer with the text only: "
    trees = "ash birch cedar doum elm fir gum hazel iroko jarrah kauri larch maple neem oak pine"
    names = trees.split(" ")
    held = held_out(*(wording + " ".join(names[n : n + 8]) for n in range(0, 8)))
    assert held.match(wording + "one two three four five six seven eight") is None
    changed = [*names[:7], "willow"]  # 5 of the 6 held-out 3-grams, 1 new: Jaccard 5/7
    assert held.match(wording + " ".join(changed)) == ("near", wording + " ".join(names[:8]))
    assert held.match(wording + " ".join([*names[:4], "w", "x", "y", "z"])) is None


def test_operators_distinguish_sums() -> None:
    held = held_out(*(f"What is {n} + {n + 1}?" for n in range(20)))
    assert held.match("What is 4 + 3?") == ("near", "What is 3 + 4?")
    assert held.match("What is 4 - 3?") is None


def test_overlap_counts_and_names_the_offenders() -> None:
    def conversations(*questions: str) -> list[Conversation]:
        return [Conversation(text, "s", row(text, "?")["messages"], "x:1") for text in questions]

    found = find_overlap(conversations("1 2 3", "3 2 1", "7 8 9"), conversations("1 2 3", "4 5 6"))
    assert found == Overlap(3, 2, [("1 2 3", "1 2 3")], [("3 2 1", "1 2 3")])
    assert str(found) == "1 exact, 1 near duplicates between 3 training and 2 held-out questions"


def test_generate_stays_clear_of_held_out_questions(tmp_path: Path) -> None:
    """Sorting two numbers below 20 has 400 questions, so that a careless second draw would hit the first."""
    small = ["min_numbers=2", "max_numbers=2", "min_value=0", "max_value=20", "max_decimals=0"]
    held, train = tmp_path / "held.jsonl", tmp_path / "train.jsonl"
    assert script("generate.py", "--task", "number_sorting", "--size", 60, "--out", held, *small).returncode == 0
    options = ["--task", "number_sorting", "--size", 150, "--seed", 2, "--out", train]
    careless = write_rows(tmp_path / "careless.jsonl", fresh_rows("number_sorting", 150, 2, **parse_params(small)))
    assert careless == 150
    careless_overlap = overlap_of_files(tmp_path / "careless.jsonl", held)
    assert careless_overlap.exact
    assert careless_overlap.near
    assert script("generate.py", *options, "--exclude", held, *small).returncode == 0
    result = script("check_overlap.py", train, held)
    assert result.stdout == "0 exact, 0 near duplicates between 150 training and 60 held-out questions\n"
    assert result.returncode == 0
    assert script("check_overlap.py", tmp_path / "careless.jsonl", held).returncode == 1
    questions = [json.loads(line)["messages"][0]["content"] for line in train.read_text().splitlines()]
    assert len(set(questions)) == 150
    before = train.read_bytes()
    message = refused("generate.py", *options[:3], 5000, *options[4:], "--exclude", held, *small)
    assert "gave only" in message
    assert train.read_bytes() == before  # a failed run leaves the old file
    assert sorted(path.name for path in tmp_path.iterdir()) == ["careless.jsonl", "held.jsonl", "train.jsonl"]


def test_other_forms_are_read_too_and_named(tmp_path: Path, tokenizer: Path) -> None:
    table = tmp_path / "table.csv"
    table.write_text("instruction,output,url\na,b,x\nc,d,y\n")
    out = tmp_path / "store"
    arguments = ["--input", table, "--tokenizer", tokenizer, "--out", out, "--seq-length", 128]
    result = script("prepare.py", *arguments)
    assert result.returncode == 0, result.stderr
    assert "table: rows of the form alpaca, it has 'instruction' and 'output'" in result.stdout
    assert "url (2)" in result.stdout
    assert TokenStore(out).manifest["supervised_tokens"] == 4
    table.write_text("instruction,output,system_note\na,b,Be brief.\n")
    assert "table.csv:2: 'system_note' may change prompt or loss" in refused("prepare.py", *arguments)
    assert script("prepare.py", *arguments, "--ignore", "system_note").returncode == 0
    assert "no form is called 'x'" in refused("prepare.py", *arguments, "--form", "x")


def test_rows_for_evaluation_only_never_train(tmp_path: Path, tokenizer: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [row("a", "b"), row("c", "d") | {"evaluation_only": True, "terms": "NC"}])
    with pytest.raises(UserError, match=r"x\.jsonl:2: test is for evaluation only \(NC\); --evaluation-data"):
        prepare([path], tokenizer, tmp_path / "store", 128)
    store, _ = prepare([path], tokenizer, tmp_path / "store", 128, Options(evaluation_data=True))
    assert len(store) == 2
    with pytest.raises(UserError, match=r"holds rows for evaluation only \(test\); give it as --validation"):
        store.check_trainable()
    prepare([write_jsonl(path, [row("a", "b")])], tokenizer, tmp_path / "store", 128)[0].check_trainable()
