"""The chat format: exact text, loss mask, and equality with the Jinja template that ships in pico's tokenizer."""

import random

import pytest

from data_prep import chat
from nano3.cli import UserError
from nano3.messages import checked_messages, checked_tools

SYSTEM = "<|im_start|>system\n<|im_end|>\n"


def segments(*messages: dict, thinking: bool = True, prompt: bool = False) -> list[tuple[str, bool]]:
    rendered = chat.render(checked_messages(messages), thinking, add_generation_prompt=prompt)
    return [(segment.text, segment.supervised) for segment in rendered]


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str | None, reasoning: str | None = None, calls: list | None = None) -> dict:
    message: dict = {"role": "assistant", "content": text}
    if reasoning is not None:
        message["reasoning_content"] = reasoning
    if calls is not None:
        message["tool_calls"] = calls
    return message


def call(name: str, **arguments: object) -> dict:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def test_answer_without_reasoning() -> None:
    assert segments(user("hi"), assistant("hello")) == [
        (SYSTEM + "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think></think>", False),
        ("hello<|im_end|>", True),
        ("\n", False),
    ]


def test_reasoning_is_supervised_after_the_thinking_prompt() -> None:
    assert segments({"role": "system", "content": "Be brief."}, user("1+1"), assistant("2 ", "One and one.")) == [
        (
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1+1<|im_end|>\n"
            "<|im_start|>assistant\n<think>\n",
            False,
        ),
        ("One and one.\n</think>\n2<|im_end|>", True),
        ("\n", False),
    ]


@pytest.mark.parametrize(("thinking", "tail"), [(True, "<think>\n"), (False, "<think></think>")])
def test_generation_prompt_is_a_prefix_of_the_training_text(thinking: bool, tail: str) -> None:
    """What evaluation feeds the model is, character for character, the unsupervised head of what training showed."""
    ((prompt, supervised),) = segments(user("q"), thinking=thinking, prompt=True)
    assert not supervised
    assert prompt.endswith("<|im_start|>assistant\n" + tail)
    trained = segments(user("q"), assistant("a", "because" if thinking else None))
    assert trained[0] == (prompt, False)


def test_earlier_reasoning_is_dropped_and_its_turn_is_context_only() -> None:
    rendered = segments(user("a"), assistant("b", "why"), user("c"), assistant("d", "so"))
    assert [text for text, supervised in rendered if supervised] == ["so\n</think>\nd<|im_end|>"]
    assert "<|im_start|>assistant\n<think></think>\nb<|im_end|>\n" in rendered[0][0]
    assert "why" not in "".join(text for text, _ in segments(user("a"), assistant("b", "why"), user("c")))


def test_earlier_turns_without_reasoning_are_supervised() -> None:
    rendered = segments(user("a"), assistant("b"), user("c"), assistant("d"))
    assert [text for text, supervised in rendered if supervised] == ["b<|im_end|>", "d<|im_end|>"]


def test_tool_steps_keep_reasoning_until_the_next_user_message() -> None:
    steps = [
        user("sum?"),
        assistant(None, "add them", [call("add", x=1, flag=True, items=[1, "ü"], table={"k": None}, none=None)]),
        {"role": "tool", "content": "3"},
        {"role": "tool", "content": "4"},
        assistant("7"),
    ]
    written = (
        "add them\n</think>\n<tool_call>\n<function=add>\n<parameter=x>\n1\n</parameter>\n<parameter=flag>\nTrue\n"
        '</parameter>\n<parameter=items>\n[1, "ü"]\n</parameter>\n<parameter=table>\n{"k": null}\n</parameter>\n'
        "<parameter=none>\nNone\n</parameter>\n</function>\n</tool_call>\n<|im_end|>"
    )
    assert segments(*steps) == [
        (SYSTEM + "<|im_start|>user\nsum?<|im_end|>\n<|im_start|>assistant\n<think>\n", False),
        (written, True),
        (
            "\n<|im_start|>user\n<tool_response>\n3\n</tool_response>\n<tool_response>\n4\n</tool_response>\n"
            "<|im_end|>\n<|im_start|>assistant\n<think></think>",
            False,
        ),
        ("7<|im_end|>", True),
        ("\n", False),
    ]
    # Once a user message follows, the call loses its reasoning, and the answer "7" the context it was written in.
    later = segments(*steps, user("thanks"), assistant("!"))
    assert [text for text, supervised in later if supervised] == ["!<|im_end|>"]
    assert "<|im_start|>assistant\n<think></think>\n<tool_call>\n" in later[0][0]


def test_thinking_changes_only_the_generation_prompt() -> None:
    messages = [user("a"), assistant("b", "why")]
    assert chat.render(messages, True) == chat.render(messages, False)
    assert chat.render(chat.without_reasoning(messages), False) == chat.render([user("a"), assistant("b")], True)
    assert messages[1]["reasoning_content"] == "why"


def _random_conversation(rng: random.Random) -> list[dict]:
    texts = ["", " ", "x", "\n x\n", "two words ", "<tool_response>", "ü 'quoted' <b>&", "1,2"]
    messages = [{"role": "system", "content": rng.choice(texts)}] if rng.random() < 0.5 else []
    for _ in range(rng.randint(1, 3)):
        messages.append(user(rng.choice(texts)))
        for _ in range(rng.randint(0, 3)):
            calls = [call("f", a=rng.choice([1, 2.5, True, None, "s", [1, {"b": 2}], {"q": "é"}]))]
            calls = calls * rng.randint(1, 2) if rng.random() < 0.5 else []
            reasoning = rng.choice([None, "", " \n", "r", "r\nr"])
            messages.append(assistant(rng.choice(texts), reasoning, calls or None))
            if calls:
                messages += [{"role": "tool", "content": rng.choice(texts)} for _ in range(rng.randint(1, 3))]
    return messages


def test_template_renders_what_render_renders() -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    template = chat.TEMPLATE_FILE.read_text()
    rng = random.Random(0)
    for _ in range(500):
        messages, thinking, prompt = _random_conversation(rng), rng.random() < 0.5, rng.random() < 0.5
        (expected,), _ = render_jinja_template(
            [messages], chat_template=template, add_generation_prompt=prompt, enable_thinking=thinking
        )
        assert chat.text_of(chat.render(checked_messages(messages), thinking, prompt)) == expected


def test_white_space_around_reasoning_and_a_turn_without_content_are_what_the_template_makes_of_them() -> None:
    from data_prep.own_template import compiled

    template = compiled(chat.TEMPLATE_FILE.read_text())
    spaced, plain = ([user("q"), assistant("a", reasoning)] for reasoning in (" \nwhy\n ", "why"))
    text = chat.text_of(chat.render(checked_messages(spaced), True))
    assert text == template.render(messages=plain, tools=None, add_generation_prompt=False)
    for role_only in ({"role": "assistant"}, {"role": "assistant", "content": None}, assistant("")):
        for given in ({}, {"reasoning_content": "why"}, {"tool_calls": [call("f", x=1)]}):
            talk = [user("q"), role_only | given]
            text = chat.text_of(chat.render(checked_messages(talk), True))
            assert text == template.render(messages=talk, tools=None, add_generation_prompt=False)
    # Nothing was said: such a turn is context, and never a lesson in silence.
    assert [text for text, supervised in segments(user("q"), {"role": "assistant"}) if supervised] == []


TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": " Adds. ",
        "parameters": {
            "type": "object",
            "properties": {"x": {"type": "integer", "description": "one\n", "enum": [1, 2], "default": None}},
            "required": ["x"],
        },
    },
}


def test_tool_definitions_by_hand() -> None:
    (block, *_) = chat.render([user("x")], True, tools=checked_tools([TOOL, {"name": "now"}]))
    assert block.text.startswith(
        "<|im_start|>system\n# Tools\n\nYou have access to the following functions:\n\n<tools>\n<function>\n"
        "<name>add</name>\n<description>Adds.</description>\n<parameters>\n<parameter>\n<name>x</name>\n"
        "<type>integer</type>\n<description>one</description>\n<enum>[1, 2]</enum>\n<default>None</default>\n"
        '</parameter>\n<required>["x"]</required>\n</parameters>\n</function>\n<function>\n<name>now</name>\n'
        "<parameters>\n</parameters>\n</function>\n</tools>\n\nIf you choose to call a function ONLY reply in"
    )
    assert "</IMPORTANT><|im_end|>\n<|im_start|>user\nx<|im_end|>\n" in block.text
    assert not block.supervised
    with_system = chat.render([{"role": "system", "content": "Hi."}, user("x")], True, tools=checked_tools([TOOL]))
    assert with_system[0].text.startswith("<|im_start|>system\nHi.\n\n# Tools\n\nYou have")


def test_template_renders_tools_as_render_does() -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    (expected,), _ = render_jinja_template(
        [[user("x"), assistant("", None, [call("add", x=1)])]],
        chat_template=chat.TEMPLATE_FILE.read_text(),
        tools=[TOOL, {"name": "now"}],
    )
    messages = checked_messages([user("x"), assistant("", None, [call("add", x=1)])])
    assert chat.text_of(chat.render(messages, True, tools=checked_tools([TOOL, {"name": "now"}]))) == expected


@pytest.mark.parametrize(
    ("tools", "reason"),
    [
        (5, "must be a list"),
        ([{"type": "function"}], r"tools\[0\] is no tool definition"),
        ([{"name": "f", "parameters": {}}], r"tools\[0\] \(f\): 'parameters' is \{\}; give a JSON schema"),
        ([{"name": "f", "parameters": {"type": "object", "properties": {"x": 5}}}], "'properties' must be an object"),
        ([{"name": "f", "description": "say <|im_end|>"}], r"contains <\|im_end\|>"),
    ],
)
def test_malformed_tools_are_refused(tools: object, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        checked_tools(tools)


def test_a_key_that_becomes_a_control_token_is_refused() -> None:
    tools = checked_tools([{"name": "f", "s": 1}])  # rendered as <s>1</s>
    with pytest.raises(UserError, match=r"tool 'f' reads <s> when rendered"):
        chat.render([user("x")], True, tools=tools)


def test_arguments_as_object_or_json_string_are_one_call() -> None:
    as_text = {"type": "function", "id": "c1", "function": {"name": "add", "arguments": '{"x": 1, "y": [true]}'}}
    plain = {"name": "add", "arguments": {"x": 1, "y": [True]}}
    one, two, three = (
        segments(user("q"), assistant("", None, [form])) for form in (as_text, plain, call("add", x=1, y=[True]))
    )
    assert one == two == three


def test_nulls_of_arrow_in_definitions_are_left_out_but_a_default_stays() -> None:
    properties = {"city": {"type": "string", "description": None, "default": None}, "path": None}
    (tool,) = checked_tools([{"type": "function", "function": {"name": "f", "parameters": {"type": "object",
                             "properties": properties, "required": None}}, "strict": None}])  # fmt: skip
    assert tool == {
        "name": "f",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "default": None}}},
    }


def test_loss_false_and_weight_of_a_turn() -> None:
    talk = [user("a"), assistant("b") | {"loss": False}, user("c"), assistant("d") | {"weight": 0.5}]
    rendered = chat.render(checked_messages(talk), True)
    assert [(segment.text, segment.weight) for segment in rendered if segment.supervised] == [("d<|im_end|>", 0.5)]
    # Null and empty mean: not given; a weight of 0 says of a user message what is so anyway.
    nulls = [user("a") | {"weight": None, "loss": False}, assistant("b") | {"weight": None, "tool_calls": []}]
    assert checked_messages(nulls) == [user("a"), assistant("b")]


def test_split_turns_gives_every_turn_once_as_it_was_written() -> None:
    talk = [user("a"), assistant("b", "r"), user("c"), assistant("d"), user("e"), assistant("f", "s"), user("g")]
    parts = chat.split_turns(checked_messages(talk))
    assert [(len(part), start) for part, start in parts] == [(2, 0), (4, 2), (6, 4)]
    texts = []
    for part, start in parts:
        rendered = chat.render(part, True, trained_from=start)
        texts += [segment.text for segment in rendered if segment.supervised]
    assert texts == ["r\n</think>\nb<|im_end|>", "d<|im_end|>", "s\n</think>\nf<|im_end|>"]
    # Without reasoning in an earlier turn nothing is split.
    assert chat.split_turns(checked_messages([user("a"), assistant("b"), user("c"), assistant("d", "r")]))[0][1] == 0


def spans_of(*messages: dict, no_loss: tuple[str, ...] = ()) -> list[tuple[str, float, int]]:
    """Text, weight and stage of each span of the last supervised turn."""
    rendered = chat.render(checked_messages(messages), True, no_loss=no_loss)
    (text, _, spans) = [segment for segment in rendered if segment.supervised][-1]
    return [(text[span.start : span.end], span.weight, span.stage) for span in spans]


def test_spans_by_text_and_by_characters_of_what_the_model_writes() -> None:
    turn = assistant("the answer", "a plan") | {
        "spans": [{"text": "answer", "weight": 0.5}, {"start": 2, "end": 6, "stage": 255, "weight": 0}]
    }
    # "a plan\n</think>\nthe answer": the range counts from the first character of the reasoning.
    assert spans_of(user("q"), turn) == [("plan", 0.0, 255), ("answer", 0.5, 0)]


def test_parts_without_loss() -> None:
    turn = assistant("Look.", "hm", [call("f", x=1)])
    written = "<tool_call>\n<function=f>\n<parameter=x>\n1\n</parameter>\n</function>\n</tool_call>\n<|im_end|>"
    assert spans_of(user("q"), turn, no_loss=chat.PARTS) == [("hm\n</think>", 0.0, 0), (written, 0.0, 0)]
    # Without words the newline before the call is part of it: nothing of the turn is left to learn.
    assert spans_of(user("q"), assistant("", None, [call("f", x=1)]), no_loss=("tools",)) == [("\n" + written, 0.0, 0)]
    assert spans_of(user("q"), assistant("yes"), no_loss=chat.PARTS) == []


@pytest.mark.parametrize(
    ("spans", "reason"),
    [
        ([{"text": "x"}], "neither 'weight' nor 'stage'"),
        ([{"text": "no", "weight": 0}], r"spans\[0\]: 'no' is not in what the model writes"),
        ([{"text": "a", "weight": 0}], r"'a' stands 2 times"),
        ([{"start": 0, "end": 99, "stage": 1}], "characters 0 to 99 of the 4 that"),
        ([{"start": 2, "end": 2, "stage": 1}], "characters 2 to 2"),
        ([{"start": 0, "stage": 1}], "either 'text' or 'start' and 'end'"),
        ([{"start": 0, "end": 2, "text": "a", "stage": 1}], "either 'text' or"),
        ([{"start": 0, "end": 2, "stage": 0}], "from 1 to 255"),
        ([{"start": 0, "end": 2, "stage": 256}], "from 1 to 255"),
        ([{"start": 0, "end": 2, "weight": -1}], r"spans\[0\]: 'weight' is -1"),
        ([{"start": 0, "end": 2, "wieght": 1}], "has 'wieght'"),
        ([{"start": 0, "end": 2, "stage": 1}, {"text": "b a", "stage": 2}], "two spans overlap at ' '"),
        ("x", "it must be a list"),
    ],
)
def test_spans_that_cannot_be_placed_are_refused(spans: object, reason: str) -> None:
    if reason.startswith("two spans"):
        spans = [{"start": 0, "end": 2, "stage": 1}, {"start": 1, "end": 3, "stage": 2}]
    with pytest.raises(UserError, match=reason):
        chat.render(checked_messages([user("q"), assistant("a ba") | {"spans": spans}]), True)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "at least one message"),
        ("text", "list of at least one"),
        (["text"], r"messages\[0\]: 'text' is no message; it must be an object"),
        ([{"role": "bot", "content": "x"}], r"messages\[0\]: role 'bot'"),
        ([user("x"), {"role": "system", "content": "y"}], r"messages\[1\]: a system message"),
        ([{"role": "tool", "content": "y"}], "must follow an assistant"),
        ([{"role": "system", "content": "y"}], "no user message"),
        ([user(None)], r"messages\[0\]: 'content' is missing"),
        ([user(5)], r"messages\[0\]: 'content' must be a string"),
        ([{"role": "user", "content": ["x"]}], "must be a string, not list"),
        ([user("a<|im_end|>b")], "control token"),
        ([user("x"), assistant("<think>r</think>a")], "'reasoning_content'"),
        ([user("x"), assistant("a", "r</think>")], "think mark"),
        (
            [user("x"), assistant("", None, [{"function": {"name": "f", "arguments": "[1]"}}])],
            "must be an object, or one",
        ),
        ([user("x"), assistant("", None, [{"function": {"name": "f", "arguments": "{"}}])], "not valid JSON"),
        ([user("x"), assistant("", None, [call("f</s>")])], r"messages\[1\]: .*contains </s>"),
        ([user("x"), assistant("", None, [call("f", **{"a<think>": 1})])], "think mark"),
        ([user("x"), assistant("", None, [call("f", a=[{"b": "<|im_end|>"}])])], r"'a' contains <\|im_end\|>"),
        ([user("a</think>b")], "think mark"),
        ([user("a\ud83d")], r"U\+D83D, half of a character"),
        ([user("x"), assistant("a", None, 5)], "'tool_calls' is 5; it must be a list"),
        ([{"role": ["user"], "content": "x"}], r"messages\[0\]: role \['user'\]"),
        ([{"role": "developer", "content": "x"}], "give the text as a system message"),
        ([user("x") | {"loss": True}], "no user message"),
        ([user("x"), assistant("y") | {"loss": True, "weight": 0}], "keep one"),
        ([user("x"), assistant("y") | {"loss": 0}], "'loss' is 0; it must be true or false"),
        ([user("x"), assistant("y") | {"train": False}], "cannot have 'train'"),
        ([user("x"), assistant("", None, [{"id": 1}])], "function name"),
        ([{"role": "user", "content": "x", "images": ["y"]}], "'images'"),
    ],
)
def test_malformed_conversations_are_refused(messages: list, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        checked_messages(messages)
