"""LoRA on the hybrid model: NeMo's adapters where they are right, our own where they are not.

Kept from NeMo 2.7.3: `PEFT` (freezing, and when adapters and optimizer are made), `LoRALinear`, and
`ParallelLinearAdapter` for dense layers. Replaced, each for a reason (the other files of this folder):
  * routed experts: one adapter per layer shared by all its experts, replicated on every rank that holds experts, or one
    for each expert, on the ranks that hold it;
  * `linear_fc1`: NeMo shards its B as two gated halves, and this model has no gate;
  * `in_proj`: its B is stored by section (z, x, B, C, dt) like the layer itself, so that it reshards;
  * DoRA, and adapters of embedding and output layer;
  * the first A: a function of the layer's global name and a seed, hence the same on every parallel layout.

Delta of a layer: W += scale * linear_out.weight @ linear_in.weight, scale = alpha / rank unless asked otherwise.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.mamba import MambaModel
from nemo.lightning.pytorch.callbacks.peft import PEFT
from torch import nn

from nano3.cli import UserError
from nano3.gate import Gate
from nano3.lora.adapters import AdaptedLinear, AdapterOptions, DenseAdapter
from nano3.lora.dropout import seed_dropout
from nano3.lora.expert_adapters import EachExpertAdapter, SharedExpertsAdapter
from nano3.lora.vocabulary_adapters import AdaptedEmbedding, AdaptedOutput, EmbeddingAdapter, OutputAdapter
from nano3.targets import EMBEDDING, OUTPUT, AdapterKind, Size, is_routed


def initial_a(name: str, rank: int, in_features: int, seed: int) -> torch.Tensor:
    """The whole first A of the layer `name`: (rank, in), uniform in ±1/sqrt(in), FP32.

    That is Kaiming-uniform with a = sqrt(5), as PEFT and the LoRA authors' code initialize it. Depends on nothing but
    its arguments, so every rank of every layout cuts its part from the same matrix.
    """
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    bound = 1 / math.sqrt(in_features)
    return torch.empty(rank, in_features).uniform_(-bound, bound, generator=generator)


@dataclass
class Nano3LoRA(AdapterKind, PEFT):
    """LoRA as a NeMo 2 model transform, of the kind that `AdapterKind` describes.

    Args:
        modules: paths of the layers to adapt with global layer numbers, from `nano3.targets.select`.
        dropout: probability on the adapters' input while training.
        seed: of the first A, and of dropout.
        mark: tokens from whose last one on the adapters act (`nano3.gate`); empty: they act everywhere. The model then
            has the `gate` that every micro batch must enter.
    """

    modules: list[str] = field(default_factory=list)
    dropout: float = 0.0
    seed: int = 1234
    mark: list[int] = field(default_factory=list)

    def freeze_model(self, model: nn.Module) -> None:
        """NeMo's, which walks a Lightning module; a bare model is simply frozen."""
        if hasattr(model, "freeze"):
            super().freeze_model(model)
        else:
            model.requires_grad_(False)

    def __call__(self, model: nn.Module) -> nn.Module:
        """Freezes the model and wraps the chosen layers of this rank's pipeline stage."""
        self.freeze_model(model)
        self._gate = Gate() if self.mark else None
        seed_dropout(self.seed)  # NeMo seeds Megatron with a constant
        chosen = self.sizes_of(self.modules)
        missed: list[str] = []
        for core in [module for module in model.modules() if isinstance(module, MambaModel)]:
            core.gate = self._gate
            found = self._wrap_vocabulary(core, chosen)
            held = [f"{name}." if name != OUTPUT else name for name in ("embedding", OUTPUT) if hasattr(core, name)]
            for layer in core.decoder.layers:
                found |= self._wrap_layer(layer, chosen)
                held.append(f"decoder.layers.{layer.layer_number - 1}.")
            missed += [path for path in chosen if path not in found and path.startswith(tuple(held))]
        if missed:
            raise UserError(f"LoRA targets found no layer in the model: {', '.join(missed[:5])}")
        return model

    def _wrap_layer(self, layer: Any, chosen: dict[str, Size]) -> set[str]:
        """Wraps what is chosen in one layer; returns the paths that were found."""
        found = set()
        for name, module in list(layer.named_modules()):
            path = f"decoder.layers.{layer.layer_number - 1}.{name}"
            if path in chosen:
                parent = layer.get_submodule(name.rpartition(".")[0])
                adapter = self._adapter(module, path, parent, chosen[path])
                setattr(parent, name.rpartition(".")[2], AdaptedLinear(module, adapter))
                found.add(path)
        return found

    def _wrap_vocabulary(self, core: Any, chosen: dict[str, Size]) -> set[str]:
        """Wraps embedding and output layer where they are chosen and on this stage; returns the paths found."""
        found = set()
        if EMBEDDING in chosen and hasattr(core, "embedding"):
            table = core.embedding.word_embeddings
            embedding = EmbeddingAdapter(table, core.config, self._options(chosen[EMBEDDING]))
            self._fill(embedding.linear_in.weight, EMBEDDING)
            core.embedding.word_embeddings = AdaptedEmbedding(table, embedding)
            found.add(EMBEDDING)
        if OUTPUT in chosen and hasattr(core, "output_layer"):
            output = OutputAdapter(core.output_layer, OUTPUT, core, self._options(chosen[OUTPUT]))
            self._fill(output.linear_in.weight, OUTPUT, 0)
            core.output_layer = AdaptedOutput(core.output_layer, output)
            found.add(OUTPUT)
        return found

    def _options(self, size: Size) -> AdapterOptions:
        return AdapterOptions(size.rank, size.scale, self.dropout, self.dora, self._gate)

    def _adapter(self, module: Any, path: str, parent: nn.Module, size: Size) -> nn.Module:
        if not is_routed(path):
            world = parallel_state.get_tensor_model_parallel_world_size()
            if size.rank % world:
                raise UserError(f"rank {size.rank} of {path} is not a multiple of layout.tp {world}")
            dense = DenseAdapter(module, path, parent, self._options(size))
            self._fill(dense.linear_in.weight, path, 1 if dense.input_is_parallel else 0)
            return dense
        if self.experts == "each":
            each = EachExpertAdapter(module, self._options(size))
            first = parallel_state.get_expert_model_parallel_rank() * module.num_gemms
            for i in range(module.num_gemms):
                weight = getattr(each.linear_in, f"weight{i}")
                self._fill(weight, f"{path}.{first + i}", 1 if each.by_input else None, each.group)
            return each
        shared = SharedExpertsAdapter(module, self._options(size))
        self._fill(shared.linear_in.weight, path)
        return shared

    def _fill(
        self, weight: torch.Tensor, name: str, split: int | None = None, group: dist.ProcessGroup | None = None
    ) -> None:
        """Sets this rank's part of the first A, split along the axis `split` over `group` (tensor parallel)."""
        if weight.device.type == "meta":
            return
        group = group or parallel_state.get_tensor_model_parallel_group()
        world = group.size()
        rows, columns = (size * (world if axis == split else 1) for axis, size in enumerate(weight.shape))
        whole = initial_a(name, rows, columns, self.seed)
        if split is not None:
            whole = whole.chunk(world, split)[group.rank()]
        with torch.no_grad():
            weight.copy_(whole)

    def transform(self, module: nn.Module, name: str | None = None, prefix: str | None = None) -> nn.Module:
        """Not used: layers are wrapped by their global path in `__call__`."""
        del name, prefix
        return module
