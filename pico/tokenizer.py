"""The tokenizer of `pico`: the real model's special tokens and chat format over a small vocabulary.

Every byte is a token, and so is every word of the questions that pico is pretrained on; there are no merges, so
a word that is not in the list falls apart into its bytes and any text survives a round trip. The special tokens
have the ids of Nemotron-3-Nano-30B-A3B, so that chat rendering, loss masks and stop tokens are the same code.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

CHAT_TEMPLATE = Path(__file__).parents[1] / "data_prep" / "chat_template.jinja"

# Ids 0 to 15 of the real vocabulary; 3 to 9 are reserved there as here.
SPECIAL_TOKENS = (
    "<unk>",
    "<s>",
    "</s>",
    *(f"<SPECIAL_{i}>" for i in range(3, 10)),
    "<|im_start|>",
    "<|im_end|>",
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
)
VISIBLE = ("<think>", "</think>", "<tool_call>", "</tool_call>")
"""Tokens that decoding with `skip_special_tokens=True` keeps: whoever reads an answer needs to see them."""

# Only words that pretraining shows: LoRA leaves embeddings frozen, so a token that pretraining never saw would stay
# noise for ever, while the bytes of an unlisted word are trained by the spelling tasks.
WORDS = """
system user assistant
Sort| these| this| numbers| words| word| in| ascending| descending| order| list| of| the| all| than
Spell| backward
Reverse
Keep|Remove| larger| smaller
How| many| times| does| letter| appear| text
""".replace("\n", "|").replace("system user assistant", "system|user|assistant")

# A word with its leading space, one digit at a time, ", " between list items, or one other character.
SPLIT = r" ?\p{L}+|\p{N}|, |[^\p{L}\p{N}]"


def _byte_characters() -> dict[int, str]:
    """The printable character that byte-level tokenizers write for each byte (GPT-2's published table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{byte: chr(byte) for byte in printable}, **{byte: chr(256 + i) for i, byte in enumerate(others)}}


def vocabulary() -> dict[str, int]:
    """Token (in byte-level spelling) to id: 16 specials, 256 bytes, ", ", the words; a multiple of 8 in all."""
    characters = _byte_characters()
    words = [", ", *(word for word in WORDS.split("|") if word)]
    spelled = ["".join(characters[byte] for byte in word.encode()) for word in words]
    tokens = [*SPECIAL_TOKENS, *(characters[byte] for byte in range(256)), *spelled]
    padding = [f"<SPECIAL_{i}>" for i in range(len(tokens), -(-len(tokens) // 8) * 8)]
    return {token: i for i, token in enumerate([*tokens, *padding])}


def build_tokenizer() -> Tokenizer:
    """A lossless tokenizer over `vocabulary()`."""
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary(), merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    added = [token for token in vocabulary() if token in SPECIAL_TOKENS or token.startswith("<SPECIAL_")]
    tokenizer.add_tokens([AddedToken(token, special=token not in VISIBLE, normalized=False) for token in added])
    return tokenizer


def save_tokenizer(folder: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json, chat_template.jinja and generation_config.json into `folder`."""
    build_tokenizer().save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "<|im_end|>",
        "pad_token": "<unk>",
        "unk_token": "<unk>",
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
    }
    generation = {"bos_token_id": 1, "eos_token_id": [2, 11], "pad_token_id": 0, "do_sample": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    shutil.copyfile(CHAT_TEMPLATE, folder / "chat_template.jinja")
