"""The Transformer Engine stand-in offers nothing that the real one lacks: names, parameters, defaults, every call made.

The real signatures are read from the transformer-engine 2.10 wheel (`make build/reference`); the calls are recorded
while megatron-core builds and runs a tiny model on the stand-in (tests/helpers/te_calls.py).
"""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

from nano3.cpu.te import VERSION
from tests.helpers.fetched import not_here
from tests.helpers.probes import made_afresh_by
from tests.helpers.te_wheel import Found, Parameter, Wheel, as_signature

ROOT = Path(__file__).parents[2]
WHEEL = ROOT / "build" / "reference" / f"transformer_engine-{VERSION}-py3-none-any.whl"


@pytest.fixture(scope="module")
def wheel() -> Wheel:
    """Missing is a skip on a laptop and a failure in CI."""
    if not WHEEL.is_file():
        not_here(f"no {WHEEL.name} in {WHEEL.parent}: run `make build/reference`")
    return Wheel(WHEEL)


@pytest.fixture(scope="module")
def standin(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("te") / "calls.json"
    return json.loads(made_afresh_by("te_calls", out, NANO3_CPU="1").read_text())


def offered(standin: dict[str, Any]) -> list[tuple[str, str, str, list[Parameter]]]:
    """(module, name, method or '', parameters) of every signature of the stand-in."""
    rows = []
    for module, names in standin["offered"].items():
        for name, value in names.items():
            if isinstance(value, list):
                rows.append((module, name, "", [tuple(p) for p in value]))
            elif isinstance(value, dict):
                rows += [(module, name, method, [tuple(p) for p in ps]) for method, ps in value.items()]
    return rows


def differences(mine: list[Parameter], real: list[Parameter]) -> list[str]:
    """What the stand-in accepts that the real one does not accept in the same way."""
    found = []
    by_name = {p[0]: p for p in real}
    for name, kind, default in mine:
        if name not in by_name:
            found.append(f"{name}: not in the real signature")
            continue
        _, real_kind, real_default = by_name[name]
        if kind != real_kind and not (real_kind == "KEYWORD_ONLY" and kind == "POSITIONAL_OR_KEYWORD"):
            found.append(f"{name}: {kind}, really {real_kind}")
        if default != real_default and not (name == "device" and real_default == "None"):
            found.append(f"{name}: default {default or 'none'}, really {real_default or 'none'}")
    order = [p[0] for p in real if p[0] in {m[0] for m in mine}]
    if not found and order != [p[0] for p in mine]:
        found.append(f"order {[p[0] for p in mine]}, really {order}")
    mandatory = [n for n, kind, d in real if not d and not kind.startswith("VAR") and n not in {m[0] for m in mine}]
    return found + [f"{name}: mandatory in the real signature, missing here" for name in mandatory]


def resolve(wheel: Wheel, module: str, name: str) -> Found:
    found = wheel.find(module, name)
    assert found, f"transformer-engine {VERSION} has no {module}.{name}"
    return found


def test_every_name_of_the_standin_exists(wheel: Wheel, standin: dict[str, Any]) -> None:
    missing = [
        f"{module}.{name}"
        for module, names in standin["offered"].items()
        if module.startswith("transformer_engine.") or module == "transformer_engine"
        for name in names
        if not wheel.find(module, name)
    ]
    assert not missing, missing


def test_the_standin_accepts_only_what_the_real_one_accepts(wheel: Wheel, standin: dict[str, Any]) -> None:
    problems = []
    rows = offered(standin)
    assert len(rows) > 15
    for module, name, method, mine in rows:
        if module == "transformer_engine_torch":  # compiled C++, its signatures are not in the wheel
            continue
        found = wheel.find(module, name)
        real = found and wheel.signature(found, method)
        if real is None:
            problems.append(f"{module}.{name}: no such class or method {method}")
        elif not refuses_all(mine):
            problems += [f"{module}.{name}.{method}: {text}" for text in differences(mine, real)]
    assert not problems, "\n".join(problems)


def refuses_all(mine: list[Parameter]) -> bool:
    """A function of (*args, **kwargs) only: the stand-in raises NotImplementedError whatever it is given."""
    return [kind for _, kind, _ in mine] == ["VAR_POSITIONAL", "VAR_KEYWORD"]


def test_every_recorded_call_means_the_same_to_the_real_one(wheel: Wheel, standin: dict[str, Any]) -> None:
    """Bound to both signatures, the arguments of each call must land on the same parameters."""
    signatures = {(f"{module}.{name}", method): mine for module, name, method, mine in offered(standin)}
    classes = {call[0].rsplit(".", 1)[-1] for call in standin["calls"]}
    assert {"Linear", "LayerNormLinear", "GroupedLinear", "RMSNorm", "DotProductAttention"} <= classes
    for owner, method, positional, keywords in standin["calls"]:
        module, _, name = owner.rpartition(".")
        real = wheel.signature(resolve(wheel, module, name), method)
        assert real is not None, f"{owner} has no {method}"
        values = [f"argument {i}" for i in range(positional)]
        named = {k: k for k in keywords}
        bound = as_signature(real).bind(*values, **named).arguments  # a TypeError here is the failure
        assert bound == as_signature(signatures[owner, method]).bind(*values, **named).arguments, (owner, method)


def test_the_comparison_notices(wheel: Wheel) -> None:
    """A parameter of our own, another default, another order, a swallowing **kwargs: each is reported."""
    real = wheel.signature(resolve(wheel, "transformer_engine.pytorch", "Linear"), "__init__")
    assert real is not None
    assert ("in_features", "POSITIONAL_OR_KEYWORD", "") in real
    assert ("bias", "POSITIONAL_OR_KEYWORD", "True") in real
    base = real[:2]
    assert differences(base, real) == []
    assert "not in the real" in differences([*base, ("mine", "KEYWORD_ONLY", "None")], real)[0]
    assert "default False" in differences([*base, ("bias", "POSITIONAL_OR_KEYWORD", "False")], real)[0]
    assert "order" in differences(base[::-1], real)[0]
    assert "not in the real" in differences([*base, ("kwargs", "VAR_KEYWORD", "")], real)[0]
    assert "mandatory" in differences(real[:1], real)[0]
    assert wheel.find("transformer_engine.pytorch", "Liner") is None


def test_wheel_reader_follows_reexports_and_base_classes(wheel: Wheel) -> None:
    linear = resolve(wheel, "transformer_engine.pytorch", "Linear")
    assert linear.module == "transformer_engine.pytorch.module.linear"
    assert isinstance(linear.node, ast.ClassDef)
    norm = wheel.signature(resolve(wheel, "transformer_engine.pytorch", "RMSNorm"), "__init__")
    assert norm is not None
    assert "device" in [p[0] for p in norm]  # through RMSNorm's **kwargs, from the operation beneath it
