"""The certificate of a merge and of a quantization: what it says, and that a copy that was altered is found out."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from conversion.adapter import accept
from conversion.certificates.certificate import Claim, write_certificate
from conversion.certificates.certificate_json import certificate_text, count_lines, read_certificate, sealed
from conversion.certificates.certificate_json import said as lines_of
from conversion.certify import main, verify
from conversion.checkpoint.model_folder import HFFolder
from conversion.checkpoint.tensor_digests import content_hash, facts_of
from conversion.fp8.selection import Selection
from conversion.merge_lora import merge
from conversion.quantize_fp8 import quantize
from nano3.arch import Arch
from nano3.cli import UserError
from nano3.sealed_folder import seal
from nano3.targets import PRESETS, select
from tests.conversion.test_merge import fill, write_adapter
from tests.helpers.tiny import TINY_CONFIG, tiny_hf_folder

CHANGED = "backbone.layers.0.mixer.out_proj.weight"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, `adapter`, and their `merged` model, of which one tensor changed."""
    folder = tmp_path_factory.mktemp("certificate")
    tiny_hf_folder(folder / "base", torch_dtype="float32")
    key = "module.decoder.layers.0.mixer.out_proj.adapter.linear_out.weight"
    config = TINY_CONFIG | {"torch_dtype": "float32"}
    write_adapter(folder / "adapter", fill(key, (32, 0.25)), config=config)
    merge(folder / "base", folder / "adapter", folder / "merged")
    return folder


def test_a_merge_says_what_changed_and_by_how_much(folders):
    said = read_certificate(folders / "merged")
    base, after = load_file(folders / "base/model.safetensors"), load_file(folders / "merged/model.safetensors")
    assert said["kind"] == "merge"
    assert said["router"] == "frozen"
    assert said["totals"] == {
        "identical": len(base) - 1,
        "changed": 1,
        "cast": 0,
        "quantized": 0,
        "added": 0,
        "dropped": 0,
    }
    line = said["tensors"][CHANGED]
    assert line["by"] == ["decoder.layers.0.mixer.out_proj"]
    # Every value of the (32, 64) matrix grew by 0.25.
    assert line["relative_change"] == pytest.approx(0.25 * (32 * 64) ** 0.5 / float(base[CHANGED].norm()), rel=1e-5)
    assert line["input"]["sha256"] != line["output"]["sha256"]
    assert said["tensors"]["lm_head.weight"]["what"] == "identical"
    assert torch.equal(after["lm_head.weight"], base["lm_head.weight"])
    assert said["adapter"]["modules"] == sorted(select(Arch.load(folders / "base"), PRESETS["all"], "shared"))
    assert said["base"] == {"sha256": said["input"]["sha256"], "name": "base", "revision": "unknown"}
    assert verify(folders / "merged", folders / "base") == []


def test_quantization_certifies_scales_and_errors(folders, tmp_path):
    selection = Selection.published(Arch.load(folders / "merged"))
    quantize(folders / "merged", tmp_path / "fp8", selection, [np.arange(16)])
    said = read_certificate(tmp_path / "fp8")
    assert said["totals"]["quantized"] == len(selection.chosen)
    assert said["totals"]["added"] == len(selection.scalars)
    assert said["input"]["sha256"] == read_certificate(folders / "merged")["output"]["sha256"]
    errors = [line["relative_error"] for line in said["tensors"].values() if line["what"] == "quantized"]
    assert 0.01 < min(errors) < max(errors) < 0.04  # half a step of 3 bits behind the point, a little more near zero
    assert verify(tmp_path / "fp8", folders / "merged") == []
    assert said["previous"] == read_certificate(folders / "merged")
    assert verify(tmp_path / "fp8", folders / "base") == []  # the chain: base -> merge -> quantization
    shutil.copytree(folders / "base", tmp_path / "other")
    tensors = load_file(tmp_path / "other/model.safetensors")
    nudge("lm_head.weight")(tensors)
    save_file(tensors, tmp_path / "other/model.safetensors")
    told = verify(tmp_path / "fp8", tmp_path / "other")
    assert "is not the model that the certificate names as input of the merge" in told[0]
    assert len(told) == 2
    assert "lm_head.weight" in told[1]
    for forge, message in _FORGED_QUANTIZATIONS:
        forged = json.loads(json.dumps(said))
        forge(forged, next(name for name, line in said["tensors"].items() if line["what"] == "quantized"))
        write(tmp_path / "fp8", forged)
        assert any(message in problem for problem in verify(tmp_path / "fp8", folders / "merged")), message


def _other_start(said: dict[str, Any], _: str) -> None:
    said["previous"]["tensors"]["lm_head.weight"]["output"]["sha256"] = "0" * 64


_FORGED_QUANTIZATIONS: list[tuple[Callable[[dict[str, Any], str], Any], str]] = [
    (_other_start, "the quantization did not begin with what the merge ended with: lm_head.weight"),
    (lambda said, name: said["tensors"][name].update(scale=0.5), "and the certificate says 0.5"),
    (lambda said, name: said["tensors"][name].update(relative_error=0.5), "and the certificate says 0.5"),
    (lambda said, name: said["tensors"].pop(f"{name}_scale"), "_scale are missing beside quantized tensors"),
    (lambda said, _: said["calibration"].update(selection=[]), "not those of the selection"),
    (lambda said, _: said["previous"]["base"].update(name="x"), "names another base than the merge before it"),
]


Tensors = dict[str, torch.Tensor]
Said = dict[str, Any]
ROUTER = "backbone.layers.1.mixer.gate.weight"
BIAS = "backbone.layers.1.mixer.gate.e_score_correction_bias"
EXPERT = "backbone.layers.1.mixer.experts.{}.up_proj.weight"


def altered(folders: Path, copy: Path, change: Callable[[Tensors], Any] = len) -> Said:
    """A copy of the merged model with other tensors; returns its certificate."""
    shutil.copytree(folders / "merged", copy)
    tensors = load_file(copy / "model.safetensors")
    change(tensors)
    save_file(tensors, copy / "model.safetensors")
    seal(copy)
    return read_certificate(copy)


def make_it_fit(copy: Path, said: Said) -> None:
    """Writes a forged certificate whose totals and hashes of the whole fit its lines, as a careful forger would."""
    said["totals"] = count_lines(said["tensors"])
    for side in ("input", "output"):
        facts = lines_of(said, side)
        said[side] = {"sha256": content_hash(facts), "tensors": len(facts)}
    said["base"]["sha256"] = said["input"]["sha256"]
    write(copy, said)


def write(copy: Path, said: Said) -> None:
    """Writes a forged certificate with the hash of itself, and the seal of its folder."""
    (copy / "certificate.json").write_text(certificate_text(sealed(said)))
    seal(copy)


def nudge(name: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name].view(-1)[0] += 1e-3

    return change


def swap(tensors: Tensors) -> None:
    tensors[EXPERT.format(2)], tensors[EXPERT.format(5)] = tensors[EXPERT.format(5)], tensors[EXPERT.format(2)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (nudge("lm_head.weight"), "lm_head.weight is not what the certificate says; it is F32"),
        (nudge(CHANGED), "0.mixer.out_proj.weight is not what the certificate says"),
        (nudge(ROUTER), "gate.weight is not what"),
        (nudge(BIAS), "e_score_correction_bias is not what"),
        (lambda t: t.pop(EXPERT.format(7)), "lacks .*experts.7.up_proj"),
        (swap, r"experts.2.up_proj.weight is not .*; it is what .*experts.5.up_proj.weight was"),
    ],
    ids=["a tensor", "a target", "a router", "a router's bias", "a missing expert", "swapped experts"],
)
def test_an_altered_copy_is_found_out(folders, tmp_path, change, message):
    altered(folders, tmp_path / "copy", change)
    assert any(re.search(message, problem) for problem in verify(tmp_path / "copy"))


def test_a_certificate_that_was_made_to_fit_is_found_out_by_the_base(folders, tmp_path):
    """Somebody moves a router and lets the certificate say that it is identical: only the base can tell."""
    said = altered(folders, tmp_path / "copy", nudge(ROUTER))
    digest = hashlib.sha256(load_file(tmp_path / "copy/model.safetensors")[ROUTER].numpy().tobytes()).hexdigest()
    said["tensors"][ROUTER]["output"]["sha256"] = said["tensors"][ROUTER]["input"]["sha256"] = digest
    write(tmp_path / "copy", said)
    assert sum("its lines make" in problem for problem in verify(tmp_path / "copy")) == 2  # input and output
    make_it_fit(tmp_path / "copy", said)
    assert verify(tmp_path / "copy") == []
    told = verify(tmp_path / "copy", folders / "base")
    assert any(ROUTER in problem for problem in told)
    assert "is not the model" in told[0]


def relabel(said: Said) -> None:
    said["tensors"][CHANGED]["what"] = "identical"


def other_totals(said: Said) -> None:
    said["totals"] |= {"identical": said["totals"]["identical"] + 1, "changed": 0}


def other_target(said: Said) -> None:
    """Another module's tensor is said to have changed, with hashes that agree with the file."""
    said["adapter"]["modules"] = ["decoder.layers.2.mixer.out_proj"]


def other_cause(said: Said) -> None:
    said["tensors"][CHANGED]["by"] = ["decoder.layers.2.mixer.out_proj"]


@pytest.mark.parametrize(
    ("forge", "message"),
    [
        (relabel, f"calls {CHANGED} identical, and its hashes say changed"),
        (other_totals, "totals are .*, its lines make"),
        (other_target, f"{CHANGED} changed, and no module of the adapter holds it"),
        (other_cause, rf"{CHANGED} changed by \['decoder.layers.2.mixer.out_proj'\], and"),
        (lambda said: said["adapter"].update(modules=["a.router"]), "names no modules of an adapter that this model"),
        (lambda said: said["output"].update(sha256="0" * 64), "certificate's output is 0000000000000000, its lines"),
        (lambda said: said["base"].update(sha256="0" * 64), "the base is not the input of the first step, the merge"),
        (lambda said: said.update(kind="export"), f"{CHANGED} was changed, which no export does"),
        (lambda said: said["files"].update({"config.json": "0" * 64}), "config.json is not what the certificate says"),
    ],
)
def test_a_changed_certificate_is_found_out(folders, tmp_path, forge, message):
    said = altered(folders, tmp_path / "copy")
    forge(said)
    write(tmp_path / "copy", said)
    assert any(re.search(message, problem) for problem in verify(tmp_path / "copy"))


def test_a_router_that_moved_is_found_out_whatever_the_certificate_says(folders, tmp_path):
    """The true hashes stand in the certificate, all sums fit, and the router is called one of the adapter's."""
    said = altered(folders, tmp_path / "copy", nudge(ROUTER))
    digest = hashlib.sha256(load_file(tmp_path / "copy/model.safetensors")[ROUTER].numpy().tobytes()).hexdigest()
    said["tensors"][ROUTER]["output"]["sha256"] = digest
    said["tensors"][ROUTER] |= {"what": "changed", "by": ["decoder.layers.0.mixer.out_proj"], "relative_change": 0.1}
    make_it_fit(tmp_path / "copy", said)
    told = "\n".join(verify(tmp_path / "copy"))
    assert f"the router is not that of the input: {ROUTER}" in told
    assert f"{ROUTER} changed, and no module of the adapter holds it" in told


def test_the_size_of_a_change_is_recomputed_against_the_base(folders, tmp_path):
    said = altered(folders, tmp_path / "copy")
    said["tensors"][CHANGED]["relative_change"] /= 2
    write(tmp_path / "copy", said)
    assert verify(tmp_path / "copy") == []
    (told,) = verify(tmp_path / "copy", folders / "base")
    assert told.startswith(f"{CHANGED}: relative_change is ")


def test_other_settings_than_certified_are_found_out(folders, tmp_path):
    """The tensors are all there; one line of config.json makes another model of them."""
    altered(folders, tmp_path / "copy")
    config = json.loads((tmp_path / "copy/config.json").read_text())
    (tmp_path / "copy/config.json").write_text(json.dumps(config | {"routed_scaling_factor": 1.0}))
    (tmp_path / "copy/README.md").write_text("what came later is nobody's concern")
    assert verify(tmp_path / "copy") == [f"{tmp_path / 'copy'}: config.json is not what the certificate says"]


def test_files_that_came_later_are_found_out(folders, tmp_path):
    """A chat template makes another model of it for its users; so does an adapter, which transformers would apply."""
    altered(folders, tmp_path / "copy")
    for name in ("chat_template.jinja", "adapter_config.json", "adapter_model.bin"):
        assert not (tmp_path / "copy" / name).exists()
        (tmp_path / "copy" / name).write_text("{}")
        assert verify(tmp_path / "copy") == [f"{tmp_path / 'copy'}: {name} is not in the certificate"]
        (tmp_path / "copy" / name).unlink()
    (tmp_path / "copy/model.sig").write_text("somebody's signature of the folder")
    assert verify(tmp_path / "copy") == []


def test_a_certificate_made_to_fit_other_settings_is_found_out_by_the_base(folders, tmp_path):
    said = altered(folders, tmp_path / "copy")
    config = json.loads((tmp_path / "copy/config.json").read_text())
    (tmp_path / "copy/config.json").write_text(json.dumps(config | {"routed_scaling_factor": 1.0}))
    said["files"]["config.json"] = hashlib.sha256((tmp_path / "copy/config.json").read_bytes()).hexdigest()
    write(tmp_path / "copy", said)
    assert verify(tmp_path / "copy") == []
    base = folders / "base"
    assert verify(tmp_path / "copy", base) == [f"{tmp_path / 'copy'}: config.json is not that of {base}"]


def test_a_certificate_with_parts_missing_is_refused(folders, tmp_path):
    said = read_certificate(folders / "merged")
    for change, says in (
        ({"input": None}, "input is None; it must be an object"),
        ({"tensors": {"a": 1}}, "tensors.a is 1; it must be an object"),
        ({"tensors": {"a": {"what": "added"}}}, "tensors.a has neither input nor output"),
        ({"tensors": {"a": {"what": "added", "output": {"dtype": "F32", "shape": []}}}}, "a.output.sha256 is missing"),
        ({"kind": 3}, "kind is 3; it must be 'import'"),
        ({"kind": "distillation"}, "kind is 'distillation'"),
        ({"kind": ["merge"]}, r"kind is \['merge'\]"),
        ({"calibration": [1]}, r"calibration is \[1\]; it must be an object"),
        ({"previous": {}}, r"previous.* is missing"),
        ({"format": 1}, "is not of format 3"),
    ):
        (tmp_path / "certificate.json").write_text(json.dumps(said | change))
        with pytest.raises(UserError, match=says):
            verify(tmp_path)


def test_any_part_that_was_changed_is_told_by_the_certificate_s_own_hash(folders, tmp_path):
    """Even what nobody can recompute, such as how long the adapter trained."""
    said = altered(folders, tmp_path / "copy")
    for forge in (
        {"training": {"steps": 10**9}},
        {"tools": {"torch": "9.9"}},
        {"adapter": said["adapter"] | {"sha256": "0" * 64}},
        {"proof": said["proof"] | {"folder": ["training"]}},
    ):
        (tmp_path / "copy/certificate.json").write_text(certificate_text(said | forge))
        seal(tmp_path / "copy")
        told = "\n".join(verify(tmp_path / "copy"))
        assert "the certificate's own hash is not that of its content: a field was changed" in told
        with pytest.raises(UserError, match="its own hash is not that of its content"):
            read_certificate(tmp_path / "copy")
    (tmp_path / "copy/certificate.json").write_text(certificate_text(said).replace(": ", ":  ", 1))
    seal(tmp_path / "copy")
    assert verify(tmp_path / "copy") == [
        f"{tmp_path / 'copy'}: certificate.json is not in the form in which it was written"
    ]


def test_the_adapter_is_recomputed_where_it_is_given(folders, tmp_path):
    assert verify(folders / "merged", adapter=folders / "adapter") == []
    shutil.copytree(folders / "adapter", tmp_path / "adapter")
    lora = json.loads((tmp_path / "adapter/lora.json").read_text())
    (tmp_path / "adapter/lora.json").write_text(json.dumps(lora | {"alpha": 800.0}))
    assert "is truncated or changed" in verify(folders / "merged", adapter=tmp_path / "adapter")[0]
    assert accept(tmp_path / "adapter") == ["lora.json"]
    told = verify(folders / "merged", adapter=tmp_path / "adapter")
    assert [problem.split(": ")[1].split(" is ")[0] for problem in told] == ["sha256", "alpha"]


def test_what_is_recomputed_and_what_is_claimed_is_said(folders, monkeypatch, capsys):
    for more, words in (
        ([], ["give --against BASE: input, base.sha256", "give --adapter ADAPTER: adapter"]),
        (["--against", str(folders / "base"), "--adapter", str(folders / "adapter")], ["relative_change, adapter"]),
    ):
        monkeypatch.setattr("sys.argv", ["certify.py", "verify", str(folders / "merged"), *more])
        assert main() == 0
        said = capsys.readouterr().out
        for word in [*words, "recomputed: kind, output, totals, files, tensors", "not to be recomputed: base.name"]:
            assert word in said, said


def test_no_certificate_no_verdict(folders):
    with pytest.raises(UserError, match=r"has no certificate\.json"):
        verify(folders / "base")


def test_an_altered_input_is_refused_before_anything_is_written(folders, tmp_path):
    """A merge into what is no longer the certified model would certify the alteration as the starting point."""
    altered(folders, tmp_path / "copy", nudge("lm_head.weight"))
    write_adapter(tmp_path / "adapter", config=TINY_CONFIG | {"torch_dtype": "float32"})
    with pytest.raises(UserError, match=r"is not what its certificate\.json says"):
        merge(tmp_path / "copy", tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_only_what_was_declared_is_certified(folders, tmp_path):
    """A tool that changes a tensor without saying so, or loses one, gets no certificate for it."""
    with HFFolder(folders / "base") as base, HFFolder(folders / "merged") as merged:
        before, after = facts_of(base), facts_of(merged)
    with pytest.raises(UserError, match=f"{CHANGED} differs from the input, and nothing was to change it"):
        write_certificate(tmp_path, folders / "base", before, after, Claim("merge"))
    lost = {name: fact for name, fact in before.items() if name != "lm_head.weight"}
    with pytest.raises(UserError, match=r"lm_head\.weight was dropped, which no import does"):
        write_certificate(tmp_path, folders / "base", before, lost, Claim("import"))
    assert not (tmp_path / "certificate.json").exists()
