"""The one place of `conversion/` that knows NeMo: its own import and export.

Importing this module registers the connectors, so that

    llm.import_ckpt(model, source="hf:///path/to/hf", output_path=OUT)
    llm.export_ckpt(path=OUT, target="hf", output_path=HF)

run the same code as `conversion/hf_to_nemo.py` and `conversion/nemo_to_hf.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nano3.checkpoints.nemo_context import describe  # first: it switches the CPU backend on before NeMo is imported

# isort: split

from nemo.lightning import io

from conversion import hf_to_nemo, nemo_to_hf
from conversion.checkpoint.output_folder import SIDE
from nano3.model import Nano3Model


@io.model_importer(Nano3Model, "hf")
class HFImporter(io.ModelConnector["str", Nano3Model]):
    """`hf://FOLDER` -> NeMo checkpoint."""

    def init(self) -> Nano3Model:
        return describe(Path(str(self)))

    def apply(self, output_path: Path) -> Path:
        hf_to_nemo.convert(Path(str(self)), Path(output_path))
        return output_path

    def on_import_ckpt(self, model: Nano3Model) -> None:
        """Gives the model the tokenizer of the folder."""
        tokenizer: Any = describe(Path(str(self))).tokenizer
        if tokenizer is not None:
            model.tokenizer = tokenizer
            model.__io__.tokenizer = tokenizer.__io__


@io.model_exporter(Nano3Model, "hf")
class HFExporter(io.ModelConnector[Nano3Model, "str"]):
    """NeMo checkpoint -> Hugging Face folder."""

    def init(self) -> Nano3Model:
        return describe(Path(str(self)) / SIDE)

    def apply(self, output_path: Path) -> Path:
        nemo_to_hf.convert(Path(str(self)), Path(output_path))
        return output_path

    def nemo_load(self, *_args: Any, **_kwargs: Any) -> Any:
        """Refuses: NeMo would load the whole model, only to ask whether ModelOpt had quantized it.

        NeMo takes a RuntimeError here as "not quantized" and goes on to `apply`, which streams.
        """
        raise RuntimeError("this exporter streams and never loads the model")
