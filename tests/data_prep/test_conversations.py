"""Conversations at large, drawn and real: our text is the template's, what is supervised is what inference would write.

The tokenizers are pico's and two published ones, of 129,000 and 151,643 tokens (`make build/reference/data` fetches
them and BFCL).
"""

import json
import math
import zipfile
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from data_prep import chat
from data_prep.own_template import compiled
from data_prep.packing import PackedDataset
from data_prep.prepare import prepare
from data_prep.tokens import ChatTokenizer
from nano3.cli import UserError
from nano3.conversations import Conversation, conversation
from nano3.rows import write_rows
from nano3.token_store import TokenStore
from tests.helpers.public_data import package
from tests.helpers.real_tokenizers import chat_tokenizer, deepseek, qwen

TEMPLATE = compiled(chat.TEMPLATE_FILE.read_text())

# ---- what every conversation must satisfy ---------------------------------------------------------------------------


def rendered_by_template(
    messages: Sequence[dict], tools: Sequence[dict], prompt: bool = False, thinking: bool = False
) -> str:
    return TEMPLATE.render(
        messages=list(messages), tools=list(tools) or None, add_generation_prompt=prompt, enable_thinking=thinking
    )


def check_text(row: Conversation) -> list[list[chat.Segment]]:
    """Our text is the template's; every supervised turn continues the prompt that the template makes of what precedes
    it, up to and including its end; every turn that can be supervised is, once. Returns the documents."""
    documents, trained = [], []
    for messages, start in chat.split_turns(row.messages):
        segments = chat.render(messages, True, tools=row.tools, trained_from=start)
        text = chat.text_of(segments)
        assert text == rendered_by_template(messages, row.tools)
        prompts = {}
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                thinks = bool(message.get("reasoning_content"))
                prompts[rendered_by_template(messages[:number], row.tools, True, thinks)] = number
        before = ""
        for segment in segments:
            if segment.supervised:
                number = prompts[before]  # a prompt of inference, character for character
                trained.append(number)
                assert before + segment.text + "\n" == rendered_by_template(messages[: number + 1], row.tools)
                assert segment.weight == messages[number].get("weight", 1)
            before += segment.text
        documents.append(segments)
    wanted = [
        number
        for number, message in enumerate(row.messages)
        if message["role"] == "assistant" and not chat.is_empty(message) and message.get("weight", 1)
    ]
    assert trained == wanted
    return documents


def ids_of(tokenizer: ChatTokenizer, text: str) -> list[int]:
    """Tokens of a text in one piece, by the library alone."""
    return library(tokenizer.path).encode(text, add_special_tokens=False).ids


@cache
def library(path: Path) -> Tokenizer:
    return Tokenizer.from_file(str(path))


def token_ends(tokenizer: ChatTokenizer, tokens: Sequence[int]) -> list[int]:
    """Bytes of text up to the end of each token, from the tokenizer's vocabulary."""
    return np.cumsum([len(tokenizer.bytes_of(token)) for token in tokens]).tolist()


def check_tokens(tokenizer: ChatTokenizer, documents: list[list[chat.Segment]]) -> list[list[chat.Segment]]:
    """Decoding gives the text back; weight and stage of every token are those of its characters. Documents with a span
    that begins or ends inside a token are refused and left out."""
    kept = []
    for segments in documents:
        whole = b"".join(map(tokenizer.bytes_of, ids_of(tokenizer, chat.text_of(segments))))
        assert whole.decode() == chat.text_of(segments)
        exact = True
        for segment in segments:
            ends = {0, *token_ends(tokenizer, ids_of(tokenizer, segment.text))}
            places = [place for span in segment.spans for place in span[:2]]
            exact &= all(len(segment.text[:place].encode()) in ends for place in places)
        if not exact:
            with pytest.raises(UserError, match="inside the token"):
                tokenizer.encode([segments])
            continue
        kept.append(segments)
        (encoded,) = tokenizer.encode([segments])
        weights, stages = by_characters(segments)
        place = 0
        for token, weight, stage in zip(*map(np.ndarray.tolist, encoded), strict=True):
            width = len(tokenizer.bytes_of(token))
            assert set(weights[place : place + width]) == {weight}
            assert set(stages[place : place + width]) == {stage}
            place += width
        assert place == len(weights)
    return kept


def by_characters(segments: list[chat.Segment]) -> tuple[list[float], list[int]]:
    """Weight and stage of every byte of the text."""
    weights, stages = [], []
    for segment in segments:
        if not segment.spans:
            size = len(segment.text.encode())
            weights += [float(np.float32(segment.weight))] * size
            stages += [0] * size
            continue
        for place, character in enumerate(segment.text):
            inside = [span for span in segment.spans if span.start <= place < span.end]
            weight = segment.weight * math.prod(span.weight for span in inside)
            width = len(character.encode())
            weights += [float(np.float32(weight))] * width
            stages += [max([span.stage for span in inside], default=0)] * width
    return weights, stages


def check_store(rows: list[dict], folder: Path, tokenizer: Path, expected: list[str], decode: Callable) -> None:
    """The packs of a prepared store hold every document once, whole."""
    store, _ = prepare([write(folder / "rows.jsonl", rows)], tokenizer, folder / "store", 1 << 16)
    found = []
    packs = PackedDataset(folder / "store", 1 << 16)
    for number in range(len(packs)):
        pack = packs[number]
        starts = pack["cu_seqlens"][:-1].tolist()
        for start, document in zip(starts, packs.documents(number).tolist(), strict=False):
            tokens, weights = store.document(document)
            stop = start + len(tokens) - 1
            assert np.array_equal(pack["labels"][start:stop], tokens[1:])
            assert np.array_equal(pack["loss_mask"][start:stop], weights[1:])
            found.append((document, decode([int(pack["tokens"][start]), *pack["labels"][start:stop].tolist()])))
    assert [text for _, text in sorted(found)] == expected


def write(path: Path, rows: list[dict]) -> Path:
    write_rows(path, rows)
    return path


# ---- conversations that are drawn -----------------------------------------------------------------------------------

_WORDS = [
    "a",
    " b",
    "\n",
    "\n\n",
    " ",
    "x1",
    "é",
    "😀",
    "<b>",
    "&",
    "{}",
    '"',
    "None",
    "</function>",
    "</parameter>",
    "7,",
]
TEXT = st.lists(st.sampled_from(_WORDS), max_size=5).map("".join)
VALUE = st.recursive(
    st.one_of(
        TEXT, st.integers(-9, 10**20), st.floats(allow_nan=False, allow_infinity=False), st.booleans(), st.none()
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(TEXT, inner, max_size=2)),
    max_leaves=4,
)
NAME = st.sampled_from(["f", "get.weather", "a-b", "ü"])
SCHEMA = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(["string", "object", ["string", "null"]]),
        "description": TEXT,
        "enum": st.lists(VALUE, min_size=1, max_size=2),
        "default": VALUE,
        "items": st.just({"type": "integer", "maximum": 3}),
    },
)
TOOL = st.fixed_dictionaries(
    {"name": NAME},
    optional={
        "description": TEXT,
        "strict": st.booleans(),
        "parameters": st.fixed_dictionaries(
            {"type": st.just("object"), "properties": st.dictionaries(NAME, SCHEMA, max_size=2)},
            optional={"required": st.lists(NAME, max_size=2), "$defs": VALUE.filter(lambda value: value is not None)},
        ),
    },
)


@st.composite
def calls(draw: st.DrawFn) -> list[dict]:
    """Tool calls as objects, wrapped or not, or with arguments as a JSON string."""
    made = []
    for _ in range(draw(st.integers(1, 2))):
        arguments = draw(st.dictionaries(NAME, VALUE, max_size=2))
        form = draw(st.integers(0, 2))
        call = {"name": draw(NAME), "arguments": json.dumps(arguments) if form == 2 else arguments}
        made.append(call if form == 0 else {"type": "function", "id": "1", "function": call})
    return made


@st.composite
def turn(draw: st.DrawFn) -> dict:
    """An assistant turn; its spans are cuts of what it will write."""
    message: dict = {"role": "assistant", "content": draw(TEXT)}
    if draw(st.booleans()):
        message["reasoning_content"] = draw(TEXT)
    if draw(st.integers(0, 2)) == 0:
        message["tool_calls"] = draw(calls())
    message |= draw(st.sampled_from([{}, {}, {"loss": False}, {"weight": 0.5}, {"weight": 0}, {"loss": True}]))
    reasoning = message.get("reasoning_content", "")
    if not reasoning[:1].isspace() and draw(st.booleans()):
        reasoning, content = reasoning.strip(), message["content"]
        written = f"{reasoning}\n</think>\n{content}" if reasoning else content
        ends = sorted(draw(st.sets(st.integers(0, len(written.rstrip())), max_size=4)))
        message["spans"] = [
            {"start": a, "end": b, "weight": draw(st.sampled_from([0, 0.25, 1, 3])), "stage": draw(st.integers(1, 255))}
            for a, b in zip(ends[::2], ends[1::2], strict=False)
        ]
    return message


@st.composite
def rows(draw: st.DrawFn) -> dict:
    """A row of chat data."""
    messages = [{"role": "system", "content": draw(TEXT)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(TEXT)})
        for _ in range(draw(st.integers(0, 2))):
            messages.append(draw(turn()))
            if messages[-1].get("tool_calls"):
                messages += [{"role": "tool", "content": draw(TEXT)} for _ in range(draw(st.integers(0, 2)))]
    return {"messages": messages, "tools": draw(st.lists(TOOL, max_size=2))}


def drawn(examples: int) -> Callable:
    """Hypothesis, the same conversations every time."""
    return settings(
        max_examples=examples, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )


@drawn(150)
@given(rows())
def test_drawn_conversations_are_what_inference_would_write(row: dict) -> None:
    check_tokens(pico(), check_text(conversation(row, "rows.jsonl:1", "drawn")))


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> tuple[ChatTokenizer, ...]:
    """pico's, one of 129,000 tokens, one of 151,643."""
    folder = tmp_path_factory.mktemp("tokenizers")
    return pico(), chat_tokenizer(deepseek, folder / "deepseek"), chat_tokenizer(qwen, folder / "qwen")


@pytest.mark.full
def test_two_thousand_drawn_conversations_on_three_tokenizers(tokenizers: tuple[ChatTokenizer, ...]) -> None:
    seen, kept = [], [0, 0, 0]

    @drawn(2000)
    @given(rows())
    def check(row: dict) -> None:
        documents = check_text(conversation(row, "rows.jsonl:1", "drawn"))
        seen.append(row)
        for place, tokenizer in enumerate(tokenizers):
            kept[place] += len(check_tokens(tokenizer, documents))

    check()
    assert len(seen) >= 2000
    assert min(kept) > 500


# ---- real ones ------------------------------------------------------------------------------------------------------


@cache
def pico() -> ChatTokenizer:
    return ChatTokenizer("pico")


def bfcl_rows(wheel: zipfile.ZipFile) -> Iterator[dict]:
    """BFCL's single-turn questions with its functions and, where it has one, the right call, its first values."""
    for name, share in (("simple_python", 60), ("multiple", 40), ("parallel_multiple", 40), ("live_multiple", 60)):
        answers = {}
        for line in wheel.read(f"bfcl_eval/data/possible_answer/BFCL_v4_{name}.json").decode().splitlines():
            answer = json.loads(line)
            answers[answer["id"]] = answer["ground_truth"]
        lines = wheel.read(f"bfcl_eval/data/BFCL_v4_{name}.json").decode().splitlines()
        for line in lines[:: len(lines) // share][:share]:
            asked = json.loads(line)
            made = [
                {
                    "function": {
                        "name": function,
                        "arguments": json.dumps({key: values[0] for key, values in call.items()}),
                    }
                }
                for truth in answers[asked["id"]]
                for function, call in truth.items()
            ]
            talk = [*asked["question"][0], {"role": "assistant", "content": None, "tool_calls": made}]
            yield {"id": asked["id"], "functions": asked["function"], "messages": talk}


@pytest.mark.full
def test_two_hundred_conversations_of_bfcl(tokenizers: tuple[ChatTokenizer, ...], tmp_path: Path) -> None:
    with package("bfcl_eval") as wheel:
        taken = list(bfcl_rows(wheel))
    assert len(taken) == 200
    documents = [check_text(conversation(row, "bfcl:1", "bfcl")) for row in taken]
    texts = [chat.text_of(segments) for parts in documents for segments in parts]
    for tokenizer in tokenizers:
        for parts in documents:
            assert len(check_tokens(tokenizer, parts)) == len(parts)
        folder = tmp_path / f"of-{tokenizer.vocab_size}"
        folder.mkdir()
        check_store(taken, folder, tokenizer.path.parent, texts, decoder(tokenizer))
        assert len(TokenStore(folder / "store")) == len(texts)


def decoder(tokenizer: ChatTokenizer) -> Callable[[list[int]], str]:
    return lambda tokens: b"".join(map(tokenizer.bytes_of, tokens)).decode()
