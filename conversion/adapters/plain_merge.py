"""An adapter of Hugging Face PEFT, and its merge, for a model that is tuned in plain transformers (`hf_config.PLAIN`).

Such a model's modules are called as its tensors are, so nothing is mapped: module `a.b` adapts tensor `a.b.weight`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from conversion.adapters.lora_json import refuse_other_base, training_facts
from conversion.adapters.peft_config import read_peft_config
from conversion.adapters.peft_file import open_weights
from conversion.adapters.peft_names import PREFIX, WEIGHTS
from conversion.adapters.trained_json import read_trained
from conversion.certificates.certificate import (
    Claim,
    folder_sha256,
    norm_ratio,
    previous_certificate,
    write_certificate,
)
from conversion.checkpoint.model_folder import SafetensorsFolder, side_files
from conversion.checkpoint.output_folder import HF_KIND, check_room, copy_files, unfinished_output
from conversion.checkpoint.pieces import STEP_BYTES, row_steps
from conversion.checkpoint.safetensors_writer import Passage, rewrite
from conversion.checkpoint.tensor_digests import content_hash, scan
from nano3.cli import UserError
from nano3.sealed_folder import check_seal

_KEY = re.compile(rf"{re.escape(PREFIX)}(?P<module>.+)\.lora_(?P<side>[AB])\.weight")


class PlainAdapter:
    """A PEFT adapter that fits a model whose tensors have `shapes`.

    Raises `UserError` when it is broken, incomplete, of another model, or more than added low-rank products.
    """

    def __init__(self, folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
        check_seal(folder)
        self.folder, self.config, self.trained = folder, read_peft_config(folder), read_trained(folder)
        if self.config.dora or self.config.target_parameters:
            raise UserError(f"{folder}: DoRA and target_parameters are not merged into this model; train plain LoRA")
        self._file = open_weights(folder / WEIGHTS)
        found: dict[str, set[str]] = {}
        for key in sorted(self._file.keys()):
            match = _KEY.fullmatch(key)
            if match is None:
                raise UserError(f"{folder / WEIGHTS} holds {key}, which is no tensor of a LoRA adapter of this model")
            found.setdefault(match["module"], set()).add(match["side"])
        self.modules = sorted(found)
        if not found:
            raise UserError(f"{folder / WEIGHTS} holds no adapter")
        for module, sides in found.items():
            self._check(module, sides, shapes)

    def _check(self, module: str, sides: set[str], shapes: Mapping[str, tuple[int, ...]]) -> None:
        shape = shapes.get(f"{module}.weight", ())
        if len(shape) != 2:
            raise UserError(f"{self.folder / WEIGHTS} adapts {module}, which this model does not have as a matrix")
        if sides != {"A", "B"}:
            raise UserError(f"{self.folder / WEIGHTS}: {module} has lora_{sides.pop()} alone; copy the adapter again")
        rank = self.config.rank_of(module)
        for side, wanted in (("A", (rank, shape[1])), ("B", (shape[0], rank))):
            value = self._factor(module, side)
            if tuple(value.shape) != wanted:
                raise UserError(
                    f"{self.folder}: lora_{side} of {module} has shape {tuple(value.shape)}; its rank {rank} and this "
                    f"base require {wanted}: an adapter of another rank or base"
                )
            if not torch.isfinite(value).all():
                raise UserError(f"{self.folder}: lora_{side} of {module} holds NaN or infinity; the training diverged")

    def _factor(self, module: str, side: str) -> torch.Tensor:
        value: torch.Tensor = self._file.get_tensor(f"{PREFIX}{module}.lora_{side}.weight")
        return value.float()

    def merge_into(self, passage: Passage) -> dict[str, Any]:
        """Writes one adapted tensor, W + scale B A in FP32, in its dtype; says what the certificate says of it."""
        module, entry, sums = passage.name.removesuffix(".weight"), passage.entry, [0.0, 0.0]
        low, high = (self._factor(module, side) for side in "AB")
        high *= self.config.scale_of(module)
        for begin, count in row_steps(entry.rows, 4 * entry.shape[1], STEP_BYTES):
            old = passage.read(begin, count)
            new = (old.float() + high[begin : begin + count] @ low).to(old.dtype)
            sums[0] += float((new.float() - old.float()).square().sum())
            sums[1] += float(old.float().square().sum())
            passage.write(begin, new)
        return {"by": [module], "relative_change": norm_ratio(*sums)}

    def certified(self) -> dict[str, Any]:
        """What a certificate says of the adapter."""
        said = {"rank": self.config.rank, "alpha": self.config.alpha, "rslora": self.config.rslora, "dora": False}
        facts = {"sha256": folder_sha256(self.folder), **said, "modules": self.modules}
        quantization = self.trained["base_quantization"] if self.trained else None
        return facts | ({"base_quantization": quantization} if quantization else {})

    def refuse_other_base(self, base: Path, found: str) -> None:
        """Raises `UserError` when `base`, of content hash `found`, is not what the adapter was trained on."""
        refuse_other_base(self.trained["base_sha256"] if self.trained else None, base, found, self.folder)


def merge_plain(base: Path, adapter_folder: Path, out: Path) -> dict[str, Any]:
    """Writes base + adapter to `out` and returns its certificate. All is checked before anything is written.

    Deltas are added in FP32 to the base's own weights, never to dequantized ones. Raises `UserError`.
    """
    with SafetensorsFolder(base) as model:
        shapes = {name: entry.shape for name, entry in model.layout.entries.items()}
        adapter = PlainAdapter(adapter_folder, shapes)
        side = side_files(base)
        needed = model.layout.total_bytes + sum((base / path).stat().st_size for path in side)
        check_room(out, needed)
        # One pass over the base: NaN, and whether it is the one that was tuned and still what its certificate says.
        before, _ = scan(model)
        adapter.refuse_other_base(base, content_hash(before))
        previous_certificate(base, before)
        facts: dict[str, Any] = {"adapter": adapter.certified(), "training": _training(adapter)}
        facts |= {"merged_onto": "original"} if "base_quantization" in facts["adapter"] else {}
        job = {"tool": "merge", "base": {name: fact.sha256 for name, fact in before.items()}, **facts}
        names = [f"{module}.weight" for module in adapter.modules]
        with unfinished_output(out, HF_KIND, job | {"layout": model.layout.to_json()}, needed) as work:
            copy_files(base, side, work.folder)
            written = rewrite(model, work, model.layout, dict.fromkeys(names, adapter.merge_into), {}, "merge")
            changes = {name: written.notes[name] for name in names}
            return write_certificate(work.folder, base, before, written.facts, Claim("merge", changes, facts))


def _training(adapter: PlainAdapter) -> dict[str, Any]:
    steps = {"steps": adapter.trained["steps"]} if adapter.trained and "steps" in adapter.trained else {}
    return training_facts(adapter.folder) | steps
