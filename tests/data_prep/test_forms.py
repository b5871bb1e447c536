"""Forms of rows: each usual one becomes the chat row that one would write by hand, and nothing telling is left out."""

from collections import Counter

import pytest

from data_prep.chat_rows import KNOWN, form_named
from data_prep.forms.form import guess, to_chat
from data_prep.forms.mapping import mapped_form
from nano3.cli import UserError
from nano3.conversations import conversation


def user(text: str | list) -> dict:
    return {"role": "user", "content": text}


def answer(text: str, **more) -> dict:
    return {"role": "assistant", "content": text, **more}


def system(text: str) -> dict:
    return {"role": "system", "content": text}


TURN = {"from": "human", "value": "a"}
CALL = {"name": "f", "arguments": '{"x": 1}'}
OPTIONS = "q?\n\nA. x\nB. y\n\nAnswer with the letter of the right option."
CHOICE = {"messages": [user(OPTIONS), answer("B")], "answer": "B", "choices": ["x", "y"]}


@pytest.mark.parametrize(
    ("form", "row", "chat"),
    [
        ("messages", {"messages": [user("a"), answer("b")], "id": 7}, {"messages": [user("a"), answer("b")], "id": 7}),
        (
            "messages",
            {"messages": [user("a"), answer("<think>\nwhy\n</think>\n\nb")], "tools": None},
            {"messages": [user("a"), answer("b", reasoning_content="why")]},
        ),
        (
            "messages",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                          {"role": "assistant", "content": None, "function_call": CALL},
                          {"role": "function", "name": "f", "content": "1"}, answer("c")]},
            {"messages": [user("ab"), {"role": "assistant", "tool_calls": [{"type": "function", "function": CALL}]},
                          {"role": "tool", "name": "f", "content": "1"}, answer("c")]},
        ),
        (
            "sharegpt",
            {"system": "s", "conversations": [TURN, {"from": "gpt", "value": "b", "weight": 0}]},
            {"messages": [system("s"), user("a"), answer("b", weight=0)]},
        ),
        ("alpaca", {"instruction": "a", "input": "", "output": "b"}, {"messages": [user("a"), answer("b")]}),
        (
            "alpaca",
            {"instruction": "a", "input": "i", "output": "b", "history": [["q", "r"]], "system": "s"},
            {"messages": [system("s"), user("q"), answer("r"), user("a\n\ni"), answer("b")]},
        ),
        ("prompt-completion", {"prompt": "a", "completion": "b"}, {"messages": [user("a"), answer("b")]}),
        ("prompt-completion", {"question": "a", "answer": "b"}, {"messages": [user("a"), answer("b")]}),
        (
            "prompt-completion",
            {"prompt": [system("s"), user("a")], "completion": [answer("b")]},
            {"messages": [system("s"), user("a"), answer("b")]},
        ),
        ("preference", {"prompt": "a", "chosen": "b", "rejected": "c"}, {"messages": [user("a"), answer("b")]}),
        (
            "preference",
            {"chosen": [user("a"), answer("b")], "rejected": [user("a"), answer("c")]},
            {"messages": [user("a"), answer("b")]},
        ),
        ("multiple-choice", {"question": "q?", "choices": ["x", "y"], "answer": 1}, CHOICE),
        ("multiple-choice", {"question": "q?", "choices": ["x", "y"], "answer": "B"}, CHOICE),
        ("multiple-choice", {"question": "q?", "options": {"A": "x", "B": "y"}, "answer": "(b)"}, CHOICE),
        ("multiple-choice", {"query": "q?", "choices": ["x", "y"], "gold": [1]}, CHOICE),
        ("multiple-choice", {"question": "q?", "choices": {"text": ["x", "y"]}, "answerKey": "y"}, CHOICE),
    ],
)  # fmt: skip
def test_usual_forms_are_known_and_read(form: str, row: dict, chat: dict) -> None:
    found, reason = guess(row, KNOWN)
    assert found.name == form
    assert reason.startswith("it has '")
    assert to_chat(found, row, Counter()) == chat


CALLING = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]}
TALK = [user("a"), answer("b")]
SAID = {"messages": TALK}


@pytest.mark.parametrize(
    ("form", "row", "chat"),
    [
        # Turns.
        (
            "sharegpt",
            {"conversations": [TURN, {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                               {"from": "observation", "value": "2"}, {"from": "gpt", "value": "b"}],
             "tools": '[{"name": "f"}]'},
            {"messages": [user("a"), CALLING, {"role": "tool", "content": "2"}, answer("b")], "tools": [{"name": "f"}]},
        ),
        ("sharegpt", {"conversation": TALK}, {"messages": TALK}),
        ("sharegpt", {"conversations": '[{"from": "Human", "value": "a"}, {"from": "GPT", "value": "b"}]'}, SAID),
        ("messages", {"messages": '[{"role": "user", "content": "a"}, {"role": "model", "content": "b"}]'}, SAID),
        ("messages", {"messages": {"role": ["User", "Assistant"], "content": ["a", "b"]}}, {"messages": TALK}),
        ("messages", {"messages": [user("a"), answer("b", thinking="r")], "tools": "[]"},
         {"messages": [user("a"), answer("b", reasoning_content="r")]}),
        ("sharegpt", {"conversations": [TURN, {"from": "gpt", "value": "<|begin_of_thought|>\nr\n<|end_of_thought|>\n\n"
                                        "<|begin_of_solution|>\nb\n<|end_of_solution|>"}]},
         {"messages": [user("a"), answer("b", reasoning_content="r")]}),
        # A question and its answer.
        ("alpaca", {"instruction": "a", "context": "c", "response": "b", "category": "qa"},
         {"messages": [user("a\n\nc"), answer("b")]}),
        ("alpaca", {"instruction": "a", "input": " ", "output": "b", "history": None}, {"messages": TALK}),
        ("prompt-completion", {"question": "a", "cot": "r", "answer": 4},
         {"messages": [user("a"), answer("4", reasoning_content="r")]}),
        ("prompt-completion", {"system_prompt": "s", "question": "a", "response": "b", "reasoning": "on"},
         {"messages": [system("s"), *TALK]}),
        # Pairs.
        ("preference", {"prompt": "a", "messages": TALK, "chosen": TALK, "rejected": TALK}, {"messages": TALK}),
        ("preference", {"instruction": "a", "input": "", "chosen": "b", "rejected": "c"}, {"messages": TALK}),
        ("preference", {"conversations": [TURN], "chosen": {"from": "gpt", "value": "b"}, "rejected": TURN}, SAID),
        ("preference", {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}, SAID),
        # Options and the right one.
        ("multiple-choice", {"question": "q?", "A": "x", "B": "y", "answer": "B"}, CHOICE),
        ("multiple-choice", {"question": "q?", "option_a": "x", "option_b": "y", "answer": "y"}, CHOICE),
        ("multiple-choice", {"question": "q?", "option1": "x", "option2": "y", "answer": "2"}, CHOICE),
        ("multiple-choice", {"question": "q?", "options": {"A": "x", "C": "y", "D": None}, "answer": "C"}, CHOICE),
        ("multiple-choice", {"question": "q?", "options": '["x", "y"]', "answer": "B. Y"}, CHOICE),
        ("multiple-choice", {"question": "q?", "options": ["A. x", "B. y"], "answer": "b"}, CHOICE),
        ("multiple-choice", {"question": "q?", "answer": "A",
                             "choices": [{"key": "B", "value": "x"}, {"key": "A", "value": "y"}]}, CHOICE),
        ("multiple-choice", {"question_stem": "q?", "answerKey": "2",
                             "choices": {"text": ["x", "y"], "label": ["1", "2"]}}, CHOICE),
        ("multiple-choice", {"question": "q?", "choices": ["x", "y"], "answer": 1.0}, CHOICE),
    ],
)  # fmt: skip
def test_other_spellings_are_read_as_they_are_meant(form: str, row: dict, chat: dict) -> None:
    found, _ = guess(row, KNOWN)
    assert found.name == form
    assert to_chat(found, row, Counter()) == chat
    conversation(chat, "x:1", "x")


@pytest.mark.parametrize(
    ("one", "message"),
    [
        (answer(" \n<think>r</think> a"), answer("a", reasoning_content="r")),
        (answer("\u00a0<think>r</think>a"), answer("a", reasoning_content="r")),
        (answer("<b>a</b>"), answer("<b>a</b>")),
        (answer("a <think>r</think>"), answer("a <think>r</think>")),
        ({"role": "Human ", "content": "a"}, user("a")),
        ({"role": "gpt", "content": "a"}, answer("a")),
        ({"role": "user", "content": [{"type": "text", "text": "a"}]}, user("a")),
        ({"role": ["user"], "content": "a"}, {"role": ["user"], "content": "a"}),
        ({"role": "user", "from": "human"}, {"role": "user", "from": "human"}),
        ({"role": "user", "content": None}, {"role": "user"}),
        (
            {"role": "function_call", "content": '{"name": "f"}'},
            {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f"}}]},
        ),
    ],
)
def test_a_plain_turn_stays_and_any_other_is_looked_at(one: dict, message: dict) -> None:
    given = {"messages": [user("q"), answer("x"), one]}
    assert to_chat(form_named("messages"), given, Counter())["messages"] == [user("q"), answer("x"), message]


def test_a_number_names_an_option_by_its_place_whatever_the_options_say() -> None:
    """MMLU has options such as "1" and "0", and the right one as a number from 0."""
    row = {"question": "q?", "choices": ["1", "0"], "answer": 1}
    assert to_chat(form_named("multiple-choice"), row, Counter())["answer"] == "B"


def test_named_data_sets_are_known_by_their_keys() -> None:
    rows = {
        "medmcqa": {"question": "q", "opa": "1", "opb": "2", "opc": "3", "opd": "4", "cop": 1, "subject_name": "s"},
        "math": {"problem": "p", "solution": "s", "level": "Level 1", "type": "Algebra"},
        "svamp": {"Body": "b", "Question": "q", "Equation": "e", "Answer": 1, "Type": "t", "ID": "i"},
        "logiqa": {"context": "c", "query": "q", "options": [], "correct_option": 0},
        "reclor": {"context": "c", "question": "q", "answers": [], "label": 0, "id_string": "train_0"},
        "lsat": {"query": "q", "choices": [], "gold": [0]},
    }
    del rows["lsat"]  # its keys are those of any multiple choice: it is read by --form lsat
    assert {name: guess(row, KNOWN)[0].name for name, row in rows.items()} == {name: name for name in rows}


@pytest.mark.parametrize("key", ["system_message", "docs_context", "loss_scale", "train_on", "chat_template_kwargs"])
@pytest.mark.parametrize("value", ["French", 0, False, {"enable_thinking": False}])
def test_what_may_change_prompt_or_loss_is_refused_by_name(key: str, value: object) -> None:
    with pytest.raises(UserError, match=rf"'{key}' may change prompt or loss.*--ignore {key}"):
        to_chat(form_named("alpaca"), {"instruction": "a", "output": "b", key: value}, Counter())
    unused: Counter[str] = Counter()
    to_chat(form_named("alpaca"), {"instruction": "a", "output": "b", key: value}, unused, [key])
    assert not unused
    with pytest.raises(UserError, match=rf"^x:1: '{key}' (may|would) change the prompt or the loss"):
        conversation({"messages": [user("a"), answer("b")], key: value}, "x:1", "x")


def test_what_changes_nothing_is_listed() -> None:
    unused: Counter[str] = Counter()
    row = {"messages": [user("a"), answer("b")], "url": "x", "foo": [1], "prompt": "a", "reasoning": "on", "mask": None}
    row["system_prompt"] = ""
    chat = to_chat(form_named("messages"), row, unused)
    assert unused == {"url": 1, "foo": 1, "prompt": 1, "reasoning": 1}
    assert conversation(chat, "x:1", "x").messages == row["messages"]
    with pytest.raises(UserError, match="'prompt' may change the prompt or the loss"):
        conversation(chat | {"prompt": "not one of the messages"}, "x:1", "x")


@pytest.mark.parametrize(
    ("form", "row", "reason"),
    [
        ("messages", {"messages": "a"}, "'messages' is 'a'; text in its place must be JSON"),
        ("messages", {"messages": [user([{"type": "image_url"}])]}, "only text can be trained on"),
        ("sharegpt", {"conversations": [TURN | {"from": "x"}]}, r"conversations\[0\]: 'from' is 'x'"),
        ("sharegpt", {"conversations": [TURN | {"train": False}]}, r"conversations\[0\] has 'train'"),
        ("sharegpt", {"conversations": [{"from": "gpt", "value": 3}]}, "'value' is 3; it must be text"),
        ("sharegpt", {"conversations": [], "tools": "{"}, "'tools' is '{'; text in its place must be JSON"),
        ("alpaca", {"instruction": "a", "output": " "}, "'output' is empty"),
        ("alpaca", {"instruction": "a", "output": "b", "history": [["q"]]}, r"history\[0\] is \['q'\]"),
        ("prompt-completion", {"question": "a", "answer": "b", "response": "c"}, "'response' and 'answer' are both"),
        ("multiple-choice", {"question": "q", "choices": ["x", "y"], "answer": 2}, "'answer' is 2; give a letter"),
        ("multiple-choice", {"question": "q", "choices": ["x", "y"], "answer": "1"}, "'answer' is '1'"),
        ("multiple-choice", {"question": "q", "choices": ["x", None], "answer": 0}, r"choices\[1\] is missing"),
        ("multiple-choice", {"question": "q", "choices": ["x"], "answer": 0}, "give 2 to 10 options"),
        ("preference", {"chosen": "b", "rejected": "c"}, "there is no 'prompt'"),
        ("preference", {"prompt": "b"}, "'chosen' is missing"),
        ("sharegpt", {"messages": []}, "the row has none of 'conversations'"),
        ("prompt-completion", {"prompt": "a"}, "the row has none of 'completion'.*it has 'prompt'"),
        ("multiple-choice", {"question": "a", "answer": 1}, "the row has none of 'choices'"),
        ("sharegpt", {"conversations": [TURN, {"from": "function_call", "value": "f(1)"}]}, "must be JSON"),
        ("sharegpt", {"conversations": [TURN, {"from": "function_call", "value": "[3]"}]}, "a call must be JSON such"),
        ("messages", {"messages": {"role": ["user"], "content": []}}, "columns of different lengths"),
        ("messages", {"messages": ["a"]}, r"messages\[0\] is 'a'; it must be an object with 'role' and 'content'"),
        ("prompt-completion", {"question": "a", "answer": ["b"]}, r"'answer' is \['b'\]; it must be text"),
        ("prompt-completion", {"prompt": "a", "completion": "<think>r</think>b", "cot": "c"}, "has its own reasoning"),
        ("preference", {"prompt": "other", "chosen": [user("a"), answer("b")]}, "'chosen' answers another question"),
        ("preference", {"prompt": "a", "system": "s", "system_prompt": "t", "chosen": "b"}, "are both given"),
        # One value, two readings: nobody can tell which is meant.
        ("multiple-choice", {"question": "q", "choices": ["B", "A"], "answer": "A"}, "may name A and B"),
        ("multiple-choice", {"question": "q", "choices": [1, 2], "answer": 1}, "'answer' is 1, which may name A and B"),
        ("multiple-choice", {"question": "q", "choice1": "x", "choice2": "y", "label": 1}, "which may name A and B"),
        ("multiple-choice", {"question": "q", "choices": ["x", "x"], "answer": "x"}, "'answer' is 'x'; give a letter"),
        ("multiple-choice", {"question": "q", "choices": ["x", "y"], "answer": "B. x"}, "'answer' is 'B. x'"),
        ("multiple-choice", {"question": "q", "choices": "A) x B) y", "answer": "A"}, "text in its place must be JSON"),
    ],
)  # fmt: skip
def test_rows_that_are_not_what_their_form_says_are_refused(form: str, row: dict, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        to_chat(form_named(form), row, Counter())


def test_an_unknown_form_names_the_keys_and_proposes_a_map() -> None:
    row = {"id": "row-1", "frage": "Wie denn?", "response_text": "So.", "extra": [1]}
    with pytest.raises(UserError) as caught:
        guess(row, KNOWN)
    assert str(caught.value) == (
        "no known form has the keys 'id', 'frage', 'response_text', 'extra'; name the parts, for example "
        '--map user="{frage}" --map assistant="{response_text}"'
    )
    with pytest.raises(UserError, match="no form is called 'alpacca'; did you mean alpaca"):
        form_named("alpacca")


def test_a_map_is_filled_from_the_row() -> None:
    form = mapped_form(
        ["user={q} {{A}} {options[1]} {data.x}", "assistant={a}", "reasoning={why}", "system=S", "subject={s}"]
    )
    row = {"q": "Q", "options": ["no", "yes"], "data": {"x": 3}, "a": "yes", "why": " since ", "s": "logic", "other": 1}
    unused: Counter[str] = Counter()
    assert to_chat(form, row, unused) == {
        "subject": "logic",
        "messages": [system("S"), user("Q {A} yes 3"), answer("yes", reasoning_content="since")],
    }
    assert unused == {"other": 1}
    del row["why"]  # reasoning may be missing in a row, the question may not
    assert to_chat(form, row, unused)["messages"][-1] == answer("yes")
    del row["q"]
    with pytest.raises(UserError, match="'q' is missing or null; the row has"):
        to_chat(form, row, unused)


@pytest.mark.parametrize(
    ("pairs", "reason"),
    [
        (["user={q}"], "--map gives no assistant"),
        (["user={q}", "user={q}", "assistant=x"], "gives user twice"),
        (["question={q}"], "does not begin with one of system, user"),
        (["user={q", "assistant=x"], "expected '}'"),
        (["user={q!r}", "assistant=x"], "is not a field such as"),
        (["user={q:>10}", "assistant=x"], "is not a field such as"),
        (["user={}", "assistant=x"], "is not a field such as"),
    ],
)
def test_a_map_that_cannot_be_is_refused(pairs: list[str], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        mapped_form(pairs)


def test_a_map_takes_neither_lists_nor_attributes() -> None:
    form = mapped_form(["user={q.__class__}", "assistant={a}"])
    with pytest.raises(UserError, match=r"'q\.__class__' is missing"):
        to_chat(form, {"q": "x", "a": "y"}, Counter())
    with pytest.raises(UserError, match=r"'q' is \[1\]; a template takes text and numbers"):
        to_chat(mapped_form(["user={q}", "assistant={a}"]), {"q": [1], "a": "y"}, Counter())
