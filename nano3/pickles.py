"""Pickles, read without running anything that stands in them.

A pickle is a program: it imports what it names and calls it. `unpickle` takes the names of the few classes that a
format has for what they are, names: nothing is imported, nothing is called. `load_state` reads what `torch.save` wrote,
with `weights_only`. No other module of this project unpickles what it is given.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, ClassVar, NamedTuple

import torch

from nano3.cli import UserError
from nano3.documents import LARGEST, shown

REMEDY = "copy the checkpoint again, from a place that you trust"
MAX_STEPS = 5_000_000
"""Most operations of one pickle (a chunk takes some 40), so that reading takes seconds and half a gigabyte at most."""
MAX_DIMENSIONS = 16

DTYPES = {
    name: getattr(torch, name)
    for name in (
        *("bfloat16", "float16", "float32", "float64", "float8_e4m3fn", "float8_e5m2"),
        *("bool", "uint8", "int8", "int16", "int32", "int64"),
    )
}

_STEPS = (
    *(pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.POP, pickle.POP_MARK),
    *(pickle.PUT, pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE, pickle.GET, pickle.BINGET, pickle.LONG_BINGET),
    *(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.INT, pickle.BININT, pickle.BININT1, pickle.BININT2),
    *(pickle.LONG, pickle.LONG1, pickle.LONG4, pickle.BINFLOAT),
    *(pickle.UNICODE, pickle.BINUNICODE, pickle.SHORT_BINUNICODE, pickle.BINUNICODE8),
    *(pickle.EMPTY_DICT, pickle.DICT, pickle.SETITEM, pickle.SETITEMS),
    *(pickle.EMPTY_LIST, pickle.LIST, pickle.APPEND, pickle.APPENDS),
    *(pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3),
    *(pickle.GLOBAL, pickle.STACK_GLOBAL),
)
"""Operations that are done as Python does them. Those that make or change objects are `PlainUnpickler`'s own, and no
other is done."""


class Record:
    """An object of a pickle: the class that it names, the arguments it was made with, the state it was given."""

    __slots__ = ("args", "state")
    name = ""

    def __init__(self, *args: Any) -> None:
        self.args: tuple[Any, ...] = args
        self.state: Any = None


class PlainUnpickler(pickle._Unpickler):  # type: ignore[misc, name-defined]
    """Python's unpickler with every class replaced by a `Record`, and of bounded length.

    It is the one in Python, because the one in C reserves memory by a number in the file before it reads on.

    Args:
        file: the pickle.
        known: (module, name) of the classes that may be named, besides the dtypes.
    """

    dispatch: ClassVar[dict[int, Any]] = {}
    stack: list[Any]

    def __init__(self, file: IO[bytes], known: set[tuple[str, str]]) -> None:
        super().__init__(file)
        self.known = known
        self.records: dict[str, type[Record]] = {}
        self.left = MAX_STEPS

    def find_class(self, module: str, name: str) -> Any:
        """The `Record` of a known name, or a dtype; raises for any other name, which it never imports."""
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if (module, name) not in self.known:
            raise pickle.UnpicklingError(f"it names {shown(f'{module}.{name}')}, which no checkpoint needs")
        if name not in self.records:
            self.records[name] = type(name, (Record,), {"__slots__": (), "name": name})
        return self.records[name]

    def make(self) -> None:
        """REDUCE and NEWOBJ: a new record of a class of the format."""
        args, record = self.stack.pop(), self.stack[-1]
        need(
            isinstance(record, type) and isinstance(args, tuple), "it calls something other than a class of the format"
        )
        self.stack[-1] = record(*args)

    def build(self) -> None:
        """BUILD: the state of a record that has none."""
        state, record = self.stack.pop(), self.stack[-1]
        need(isinstance(record, Record) and record.state is None, "it changes something other than a new object")
        record.state = state

    def keep(self) -> None:
        """BINPERSID: what is said of a storage stays what it is; nothing is opened."""


def _counted(do: Callable[[Any], None]) -> Callable[[PlainUnpickler], None]:
    def step(unpickler: PlainUnpickler) -> None:
        unpickler.left -= 1
        if unpickler.left < 0:
            raise pickle.UnpicklingError(f"it has more than {MAX_STEPS:,} operations")
        do(unpickler)

    return step


PlainUnpickler.dispatch |= {step[0]: _counted(pickle._Unpickler.dispatch[step[0]]) for step in _STEPS}  # type: ignore[attr-defined]
PlainUnpickler.dispatch |= {step[0]: _counted(PlainUnpickler.make) for step in (pickle.REDUCE, pickle.NEWOBJ)}
PlainUnpickler.dispatch |= {
    pickle.BUILD[0]: _counted(PlainUnpickler.build),
    pickle.BINPERSID[0]: _counted(PlainUnpickler.keep),
}


def unpickle(data: bytes, known: set[tuple[str, str]]) -> Any:
    """What a pickle holds, its objects as `Record`s. Raises `pickle.UnpicklingError` for whatever is wrong with it."""
    try:
        return PlainUnpickler(io.BytesIO(data), known).load()
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # a damaged pickle fails in any way: stack, memo, codec, length
        raise pickle.UnpicklingError(f"{type(error).__name__} {error}"[:200]) from None


def load_state(source: Path | IO[bytes], where: str, remedy: str = REMEDY) -> Any:
    """What `torch.save` wrote: tensors and plain values, nothing else. Raises `UserError` for any other content."""
    try:
        return torch.load(source, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{where} is missing; {remedy}") from None
    except Exception as error:  # PyTorch raises whatever its readers do at what is no archive, or names a class
        # Of what the file does it says at the end, after its advice how to run it all the same.
        reason = " ".join(str(error).rpartition("WeightsUnpickler error:")[2].split())[:200]
        raise UserError(f"{where} is damaged, or holds more than tensors and numbers ({reason}); {remedy}") from None


STORAGES = {torch.bfloat16: "BFloat16Storage", torch.float16: "HalfStorage", torch.float32: "FloatStorage"}
"""Dtype -> the class of storage that `torch.save` names for it."""

_TENSOR = {
    ("torch._utils", "_rebuild_tensor_v2"),
    ("collections", "OrderedDict"),
    *(("torch", name) for name in STORAGES.values()),
}


class SavedTensor(NamedTuple):
    """What `torch.save` says of one tensor: class and name of its storage, first value, shape, strides in values."""

    storage: str
    member: str
    begin: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def saved_tensor(data: bytes) -> SavedTensor:
    """The `data.pkl` of a `torch.save` of one plain tensor. Raises `pickle.UnpicklingError` for anything else."""
    value = unpickle(data, _TENSOR)
    need(isinstance(value, Record) and value.name == "_rebuild_tensor_v2" and len(value.args) >= 4, "no tensor")
    storage, begin, size, stride = value.args[:4]
    need(isinstance(storage, tuple) and len(storage) == 5, "no storage")
    _, kind, member, *_ = storage
    need(isinstance(kind, type) and issubclass(kind, Record) and isinstance(member, str), "no storage")
    need(type(begin) is int and begin >= 0, "no place in the storage")
    return SavedTensor(kind.name, member, begin, tensor_size(size), tensor_size(stride))


def need(condition: bool, wrong: str, *values: Any) -> None:
    """Raises `pickle.UnpicklingError` unless the condition holds: what is `wrong`, with the `values` for its braces."""
    if not condition:
        raise pickle.UnpicklingError(
            wrong.format(*(value if isinstance(value, str) else shown(value) for value in values))
        )


def tensor_size(value: Any) -> tuple[int, ...]:
    """The numbers of a `torch.Size` or a tuple: a shape, an offset or strides."""
    ours = isinstance(value, Record) and value.name == "Size" and len(value.args) == 1
    numbers = value.args[0] if ours else value
    need(isinstance(numbers, tuple) and len(numbers) <= MAX_DIMENSIONS, "{} is no size of a tensor", numbers)
    whole = all(type(number) is int and 0 <= number <= LARGEST for number in numbers)
    need(whole and math.prod(numbers) <= LARGEST, "{} is no size of a tensor", numbers)
    return numbers
