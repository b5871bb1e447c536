"""The token store: a folder of flat arrays that are memory-mapped, and a manifest that says what they are.

    tokens.bin      int32, little-endian, all documents one after the other
    loss_mask.bin   uint8, 0 where the loss does not count the token, else the number of its weight, from 1
    stages.bin      uint8, the stage of each token, 0 where it has none
    documents.idx   int64, documents + 1 offsets into the three
    sources.bin     int32, the number of each document's source in the manifest's `sources`
    origins.bin     int32, two for each document: the number of its file in the manifest's `origins`, and its row there
    order.bin       float64, each document's value of the row key that the manifest's `order` names, where it names one
    manifest.json   format version, tokenizer, template, counts, sources, weights, size and SHA-256 of the files above
    packs-*/        pack indexes (data_prep/packing.py), rebuilt without touching any of these

Nothing in it is a pickle, nothing is executed on load, and reading takes no memory but the pages that are touched.
int32, because a vocabulary of 131,072 does not fit 16 bits. `weights` of the manifest is `[1.0]` unless the data has
weights: a store without them has masks of 0 and 1. Version 2, which is read too, lacks stages, origins and order.

A store that was prepared in several parts (data_prep/part_folder.py) has the first three files in `part-00000/`,
`part-00001/`, ... and the manifest's `parts` say how many documents and tokens each has, and its weights. A document
lies in one part. All else is the same, over all parts. Readers before that refuse such a store for its missing files.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NotRequired

import numpy as np
from annotated_types import Ge, Lt, MaxLen, MinLen
from typing_extensions import TypedDict

from nano3.arch import PRESETS
from nano3.cli import UserError
from nano3.documents import AboveZero, Count, InnerPath, Name, Sha256, check, read_json, shown
from nano3.file_digests import file_sha256

if TYPE_CHECKING:
    from tokenizers import Tokenizer

KIND = "token-store"
VERSION = 3
MANIFEST = "manifest.json"
FILES = {
    "tokens.bin": "<i4",
    "loss_mask.bin": "u1",
    "stages.bin": "u1",
    "documents.idx": "<i8",
    "sources.bin": "<i4",
    "origins.bin": "<i4",
}
"""File of every store -> NumPy dtype."""
ORDER = "order.bin"
"""The one file that not every store has, float64."""
DTYPES = {**FILES, ORDER: "<f8"}
PER_TOKEN = ("tokens.bin", "loss_mask.bin", "stages.bin")
"""The files with a value for each token."""
_FILES_OF = {2: set(FILES) - {"stages.bin", "origins.bin"}, 3: set(FILES)}
"""Version -> its files; these versions are read."""

_REBUILD = "prepare the data again with data_prep/prepare.py"


class Counts(TypedDict):
    """How much a store, or one source in it, holds."""

    documents: Count
    tokens: Count
    supervised_tokens: Count


class FileFacts(TypedDict):
    """What the manifest says of a file."""

    bytes: Count
    sha256: Sha256


class TokenizerFacts(TypedDict):
    """Which tokenizer made the store."""

    sha256: Sha256


class PartFacts(TypedDict):
    """What the manifest says of a part."""

    documents: Count
    tokens: Annotated[int, Ge(1)]
    weights: Annotated[list[AboveZero], MinLen(1), MaxLen(255)]


class Manifest(Counts):
    """manifest.json. Facts that only people read are not named here."""

    format: Literal["token-store"]
    version: Literal[2, 3]
    max_token_id: Annotated[int, Ge(0), Lt(1 << 31)]
    sources: Annotated[dict[Name, Counts], MinLen(1)]
    weights: NotRequired[Annotated[list[AboveZero], MinLen(1), MaxLen(255)]]
    tokenizer: TokenizerFacts
    files: dict[InnerPath, FileFacts]
    parts: NotRequired[Annotated[list[PartFacts], MinLen(1)]]


class TokenPart:
    """The values per token of a store, or of a part of one; mapped on first use.

    `first` is the number of its first token in the store, `tokens` how many it has, `weights` (weights + 1,) float32
    the weight of each number in its mask; the first is 0.
    """

    def __init__(self, folder: Path, first: int, length: int, weights: list[float], stages: bool) -> None:
        self.folder, self.first, self.length = folder, first, length
        self.weights = np.array([0.0, *weights], dtype=np.float32)
        self.weighted = weights != [1.0]
        self._has_stages = stages

    @cached_property
    def tokens(self) -> np.ndarray:
        """(length,) int32."""
        return mapped(self.folder / "tokens.bin", DTYPES["tokens.bin"])

    @cached_property
    def loss_mask(self) -> np.ndarray:
        """The numbers of weights, (length,) uint8."""
        return mapped(self.folder / "loss_mask.bin", DTYPES["loss_mask.bin"])

    @cached_property
    def stages(self) -> np.ndarray:
        """(length,) uint8; zeros, which take no memory, in a store of version 2."""
        if self._has_stages:
            return mapped(self.folder / "stages.bin", DTYPES["stages.bin"])
        return np.broadcast_to(np.zeros(1, np.uint8), self.length)

    def run(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and loss weights of the store's tokens from `start` to `stop`, views where they need no conversion."""
        start, stop = start - self.first, stop - self.first
        mask = self.loss_mask[start:stop]
        return self.tokens[start:stop], self.weights[mask] if self.weighted else mask


def part_name(number: int) -> str:
    """The folder of a part."""
    return f"part-{number:05}"


class TokenStore:
    """A token store opened for reading; arrays are mapped on first use and dropped when it is sent to a worker.

    Opening checks the manifest and the size of every file and raises `UserError` naming what is wrong;
    `nano3.store_contents.check_store` reads every byte.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.manifest = self._read_manifest()
        for name, facts in self.manifest["files"].items():
            path = self.folder / name
            size = path.stat().st_size if path.is_file() else None
            if size is None:
                raise UserError(f"{path} is missing from the token store; {_REBUILD}")
            if size != facts["bytes"]:
                raise UserError(f"{path} has {size} bytes and should have {facts['bytes']}; {_REBUILD}")

    def _read_manifest(self) -> dict[str, Any]:
        path = self.folder / MANIFEST
        if not path.is_file():
            if unfinished_folder(self.folder).is_dir():
                raise UserError(
                    f"{self.folder} is being prepared in parts that are not joined yet; when all are there run: "
                    f"python data_prep/prepare.py --join --out {self.folder} --seq-length N"
                )
            raise UserError(f"{self.folder} is not a token store (it has no {MANIFEST}); make one with prepare.py")
        manifest = read_json(path, dict[str, Any], _REBUILD)
        if manifest.get("format") != KIND:
            raise UserError(f"{path} does not describe a {KIND}; give a folder that data_prep/prepare.py made")
        version = manifest.get("version")
        if not isinstance(version, int) or version not in _FILES_OF:
            readable = " and ".join(map(str, _FILES_OF))
            raise UserError(f"{path} has version {shown(version)}, this code reads {readable}; {_REBUILD}")
        check(manifest, Manifest, str(path), _REBUILD)
        expected = _FILES_OF[version] | ({ORDER} if manifest.get("order") else set())
        if "parts" in manifest:
            expected -= set(PER_TOKEN)
            expected |= {f"{part_name(part)}/{name}" for part in range(len(manifest["parts"])) for name in PER_TOKEN}
        if set(manifest["files"]) != expected:
            raise UserError(f"{path} does not list the files {', '.join(sorted(expected))}; {_REBUILD}")
        _check_counts(manifest, path)
        return manifest

    def __len__(self) -> int:
        """Number of documents."""
        return self.manifest["documents"]

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "manifest": self.manifest}

    @cached_property
    def parts(self) -> list[TokenPart]:
        """The parts, in order; a store of version 2 or 3 is one."""
        files, facts = self.manifest["files"], self.manifest.get("parts")
        if facts is None:
            weights = self.manifest.get("weights", [1.0])
            return [TokenPart(self.folder, 0, self.manifest["tokens"], weights, "stages.bin" in files)]
        ends = np.cumsum([part["tokens"] for part in facts]).tolist()
        return [
            TokenPart(self.folder / part_name(number), end - part["tokens"], part["tokens"], part["weights"], True)
            for number, (part, end) in enumerate(zip(facts, ends, strict=True))
        ]

    @cached_property
    def _firsts(self) -> list[int]:
        return [part.first for part in self.parts]

    def _part(self, token: int) -> TokenPart:
        """The part that holds a token of the store."""
        return self.parts[bisect_right(self._firsts, token) - 1]

    @property
    def tokens(self) -> np.ndarray:
        """All tokens of a store in one part, (tokens,) int32, mapped."""
        (part,) = self.parts
        return part.tokens

    @property
    def weighted(self) -> bool:
        """Whether a supervised token has another weight than 1."""
        return self.manifest.get("weights", [1.0]) != [1.0]

    @property
    def source_names(self) -> list[str]:
        """The sources by number."""
        return list(self.manifest["sources"])

    @cached_property
    def sources(self) -> np.ndarray:
        """The number of every document's source, (documents,) int32, mapped."""
        return self._map("sources.bin")

    def source(self, number: int) -> int:
        """The number of a document's source."""
        return int(self.sources[number])

    @cached_property
    def _origins(self) -> np.ndarray:
        return self._map("origins.bin").reshape(-1, 2)

    def origin(self, number: int) -> str:
        """The row that a document was made of, `file:row`; `document N` in a store of version 2, which does not say."""
        if "origins.bin" not in self.manifest["files"]:
            return f"document {number}"
        file, row = self._origins[number].tolist()
        return f"{self.manifest['origins'][file]}:{row}"

    def order(self, column: str) -> np.ndarray:
        """Every document's value of a row key, (documents,) float64, mapped; `length` is there in every store.

        Raises:
            UserError: the store was prepared without it.
        """
        if column == "length":
            return self.lengths().astype(np.float64)
        if self.manifest.get("order") != column:
            raise UserError(
                f"the token store {self.folder} does not keep {column!r} of its rows (it has "
                f"{self.manifest.get('order') or 'none'}, and length); prepare it again with --order-by {column}"
            )
        return self._map(ORDER)

    @cached_property
    def offsets(self) -> np.ndarray:
        """Document d is `[offsets[d]:offsets[d + 1]]`; (documents + 1,) int64, mapped."""
        return self._map("documents.idx")

    def lengths(self) -> np.ndarray:
        """Stored length of every document, (documents,) int64."""
        return np.diff(self.offsets)

    def document(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (n,) int32 of a document, a view of the mapped array, and their weights in the loss, (n,) float32."""
        start, stop = int(self.offsets[number]), int(self.offsets[number + 1])
        tokens, weights = self._part(start).run(start, stop)
        return tokens, weights.astype(np.float32, copy=False)

    def runs(self, starts: Sequence[int], stops: Sequence[int]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Tokens and loss weights of documents, from each start to its stop, as `TokenPart.run` gives them."""
        found = [self._part(start).run(start, stop) for start, stop in zip(starts, stops, strict=True)]
        return [tokens for tokens, _ in found], [weights for _, weights in found]

    def stages(self, number: int) -> np.ndarray:
        """The stage of each token of a document, (n,) uint8; all 0 in a store of version 2."""
        start, stop = int(self.offsets[number]), int(self.offsets[number + 1])
        part = self._part(start)
        return part.stages[start - part.first : stop - part.first]

    def stage_counts(self) -> np.ndarray:
        """Tokens of each stage, (256,) int64; reads the whole file, a few megabytes at a time."""
        counts = np.zeros(256, dtype=np.int64)
        for part in self.parts:
            for start in range(0, part.length, 1 << 22):
                counts += np.bincount(part.stages[start : start + (1 << 22)], minlength=256)
        return counts

    def check_tokenizer(self, folder: Path | str, opened: Tokenizer | None = None) -> None:
        """Refuses a tokenizer (of the model that is to be trained, say) other than the one that made the store.

        A tokenizer.json that another program wrote again is the same one as long as it means the same. `opened` is the
        one in `folder` where it is in memory already.
        """
        if self.manifest["version"] == 2:  # such a store says the hash of the file's bytes
            found = file_sha256(tokenizer_file(folder))
        else:
            found = meaning_sha256(opened or open_tokenizer(folder))
        if found != self.manifest["tokenizer"]["sha256"]:
            raise UserError(
                f"the token store {self.folder} was made with another tokenizer than the one in {folder}; "
                f"run data_prep/prepare.py with --tokenizer {folder}"
            )

    def check_vocabulary(self, size: int) -> None:
        """Refuses a store with a token that a model with a vocabulary of `size` does not have."""
        largest = self.manifest["max_token_id"]
        if largest >= size:
            raise UserError(f"{self.folder} has token {largest}, but the model's vocabulary ends at {size - 1}")

    def check_trainable(self) -> None:
        """Refuses a store with rows whose publishers allow evaluation only."""
        sources = self.manifest.get("finds", {}).get("evaluation_only")
        if sources:
            raise UserError(
                f"{self.folder} holds rows for evaluation only ({', '.join(sources)}); give it as --validation, and "
                "train on other data"
            )

    def _map(self, name: str) -> np.ndarray:
        return mapped(self.folder / name, DTYPES[name])


def _check_counts(manifest: dict[str, Any], path: Path) -> None:
    """What the manifest says twice: how many values there are, and the bytes of the files that hold them."""
    documents, tokens = manifest["documents"], manifest["tokens"]
    counts = dict.fromkeys(PER_TOKEN, tokens) | dict.fromkeys(("sources.bin", ORDER), documents)
    counts |= {"documents.idx": documents + 1, "origins.bin": 2 * documents}
    parts = manifest.get("parts", ())
    for number, part in enumerate(parts):
        counts |= {f"{part_name(number)}/{name}": part["tokens"] for name in PER_TOKEN}
    if parts and any(sum(part[key] for part in parts) != manifest[key] for key in ("documents", "tokens")):
        raise UserError(f"{path}: its parts do not make {documents:,} documents of {tokens:,} tokens; {_REBUILD}")
    for name, facts in manifest["files"].items():
        if facts["bytes"] != counts[name] * np.dtype(DTYPES[name.rpartition("/")[2]]).itemsize:
            raise UserError(
                f"{path}: {documents:,} documents of {tokens:,} tokens do not make {facts['bytes']} bytes of {name}; "
                f"{_REBUILD}"
            )


def unfinished_folder(store: Path) -> Path:
    """Where the parts of a store lie until they are joined, beside it."""
    store = store.resolve()
    return store.parent / f".{store.name}.unfinished"


def mapped(path: Path, dtype: str) -> np.ndarray:
    """A file as a read-only array that takes no memory; a plain `ndarray`, since slicing a `memmap` is slow."""
    return np.memmap(path, dtype=dtype, mode="r").view(np.ndarray)


def tokenizer_file(folder: Path | str) -> Path:
    """`tokenizer.json` of a preset (`pico`) or of a model or tokenizer folder; `UserError` when there is none."""
    path = PRESETS.get(str(folder), Path(folder)) / "tokenizer.json"
    if not path.is_file():
        raise UserError(
            f"no tokenizer.json in {folder}; give the folder of a downloaded model or tokenizer, or pico "
            "(the preset nano is a config.json only, and names on a hub are not downloaded)"
        )
    return path


def open_tokenizer(folder: Path | str) -> Tokenizer:
    """The tokenizer of a preset or of a model or tokenizer folder. Raises `UserError` for none, and for a damaged one.

    Nemotron-3-Nano's takes a second or two: open it once.
    """
    from tokenizers import Tokenizer  # here: most of what imports this module reads no tokenizer

    path = tokenizer_file(folder)
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{path} is not a readable tokenizer ({error}); download or export it again") from error


def tokenizer_sha256(folder: Path | str) -> str:
    """`meaning_sha256` of the tokenizer in a folder; errors as in `open_tokenizer`."""
    return meaning_sha256(open_tokenizer(folder))


def meaning_sha256(tokenizer: Tokenizer) -> str:
    """Identity of a tokenizer: the hash of what its `tokenizer.json` says about text becoming tokens.

    The library that reads the file writes it in one form, whoever wrote it before: order of keys, merges as pairs or
    with a blank, defaults spelled out or not. Padding, truncation, the way back to text and the tokens that it adds
    round a text have no part in a store.
    """
    meaning = json.loads(tokenizer.to_str())
    for key in ("version", "truncation", "padding", "post_processor", "decoder"):
        meaning.pop(key, None)
    return hashlib.sha256(json.dumps(meaning, sort_keys=True).encode()).hexdigest()
