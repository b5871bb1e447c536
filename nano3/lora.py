"""LoRA on the hybrid model: NeMo's adapters where they are right, our own where they are not.

Kept from NeMo 2.7.3: `PEFT` (freezing, adapter-only checkpoints), `LoRALinear`, and `ParallelLinearAdapter` for dense
layers. Replaced, each for a reason:
  * routed experts: one adapter per layer shared by all its experts, replicated on every rank that holds experts;
  * `linear_fc1`: NeMo shards its B as two gated halves, and this model has no gate;
  * `in_proj`: its B is stored by section (z, x, B, C, dt) like the layer itself, so that it reshards;
  * the first A: a function of the layer's global name and a seed, hence the same on every parallel layout.

Delta of a layer: W += (alpha / rank) * linear_out.weight @ linear_in.weight.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.ssm.mamba_block import MambaStack
from megatron.core.ssm.mamba_mixer import MambaMixer, _split_tensor_factory
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from nemo.collections.llm.peft.lora import LoRALinear
from nemo.collections.llm.peft.utils import ParallelLinearAdapter, get_adapter_attributes_from_linear
from nemo.lightning.pytorch.callbacks.peft import PEFT
from torch import nn

from nano3.cli import UserError


def initial_a(name: str, rank: int, in_features: int, seed: int) -> torch.Tensor:
    """The whole first A of the layer `name`: (rank, in), uniform in ±1/sqrt(in), FP32.

    That is Kaiming-uniform with a = sqrt(5), as PEFT and the LoRA authors' code initialize it. Depends on nothing but
    its arguments, so every rank of every layout cuts its part from the same matrix.
    """
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    bound = 1 / math.sqrt(in_features)
    return torch.empty(rank, in_features).uniform_(-bound, bound, generator=generator)


class DenseAdapter(ParallelLinearAdapter):
    """NeMo's adapter of a column- or row-parallel layer; `sections` are the local rows of each part of in_proj's B."""

    sections: list[tuple[str, int]] | None = None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """`linear_in.weight` split along the rank (column) or the input (row), `linear_out.weight` along the output."""
        state = self.linear_in.sharded_state_dict(f"{prefix}linear_in.", sharded_offsets, metadata)
        state.update(self.linear_out.sharded_state_dict(f"{prefix}linear_out.", sharded_offsets, metadata))
        state = {key: value for key, value in state.items() if not key.endswith("_extra_state")}
        if self.sections:
            key = f"{prefix}linear_out.weight"
            names, rows = zip(*self.sections, strict=True)
            state[key] = _split_tensor_factory(state[key], list(rows), list(names), 0)
        return state


class SharedExpertsAdapter(nn.Module):
    """One adapter for all routed experts of a layer, whole on every rank (expert tensor parallel 1).

    Its gradient is the sum over all tokens of all experts, wherever they are: the tokens of other expert-parallel ranks
    arrive through the data-parallel reduction (`allreduce=True`: that group spans the expert ranks), those of other
    tensor-parallel ranks through Megatron-Core's reduction of sequence-parallel parameters.
    """

    def __init__(self, in_features: int, out_features: int, lora: Nano3LoRA, config: Any) -> None:
        super().__init__()
        settings = {"bias": False, "dtype": config.params_dtype, "device": torch.cuda.current_device()}
        self.linear_in = nn.Linear(in_features, lora.dim, **settings)
        self.linear_out = nn.Linear(lora.dim, out_features, **settings)
        nn.init.zeros_(self.linear_out.weight)
        self.dropout = nn.Dropout(lora.dropout)
        self.scale = lora.alpha / lora.dim
        for parameter in self.parameters():
            parameter.allreduce = True  # type: ignore[attr-defined]
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(tokens, in) -> (tokens, out)."""
        return self.linear_out(self.linear_in(self.dropout(x))) * self.scale

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Both matrices whole; replicas on every tensor- and data-parallel rank, of which one writes."""
        del metadata  # names the groups of the experts around it; the replicas are over the dense model's groups
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            {},
            sharded_offsets,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            dp_cp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        )


@dataclass
class Nano3LoRA(PEFT):
    """LoRA as a NeMo 2 model transform.

    Args:
        modules: paths of the layers to adapt with global layer numbers, from `nano3.targets.select`.
        dim: rank of the adapters.
        alpha: scale times rank; the delta is multiplied by alpha / dim.
        dropout: probability on the adapters' input while training.
        seed: of the first A, and of dropout.
    """

    modules: list[str] = field(default_factory=list)
    dim: int = 32
    alpha: float = 32.0
    dropout: float = 0.0
    seed: int = 1234

    def __call__(self, model: nn.Module) -> nn.Module:
        """Freezes the model and wraps the chosen layers of this rank's pipeline stage."""
        self.freeze_model(model)
        model_parallel_cuda_manual_seed(self.seed)  # of dropout; NeMo seeds Megatron with a constant
        stacks = [module for module in model.modules() if isinstance(module, MambaStack)]
        chosen = set(self.modules)
        for stack in stacks:
            for layer in stack.layers:
                chosen -= self._wrap_layer(layer, chosen)
        held = {f"decoder.layers.{layer.layer_number - 1}." for stack in stacks for layer in stack.layers}
        missed = sorted(path for path in chosen if any(path.startswith(prefix) for prefix in held))
        if missed:
            raise UserError(f"LoRA targets found no layer in the model: {', '.join(missed[:5])}")
        return model

    def _wrap_layer(self, layer: Any, chosen: set[str]) -> set[str]:
        """Wraps what is chosen in one layer; returns the paths that were found."""
        found = set()
        for name, module in list(layer.named_modules()):
            path = f"decoder.layers.{layer.layer_number - 1}.{name}"
            if path in chosen:
                parent = layer.get_submodule(name.rpartition(".")[0])
                setattr(parent, name.rpartition(".")[2], LoRALinear(module, self._adapter(module, path, parent)))
                found.add(path)
        return found

    def _adapter(self, module: Any, path: str, parent: nn.Module) -> nn.Module:
        if ".mlp.experts." in path:
            if parallel_state.get_expert_tensor_parallel_world_size() > 1:
                raise UserError("adapters on routed experts need layout.etp=1")
            adapter: Any = SharedExpertsAdapter(module.in_features, module.out_features, self, module.config)
            split = None
        else:
            adapter, split = self._dense_adapter(module, path, parent)
        weight = adapter.linear_in.weight
        world = parallel_state.get_tensor_model_parallel_world_size()
        whole = initial_a(path, self.dim, weight.shape[1] * (world if split == 1 else 1), self.seed)
        if split is not None:
            whole = whole.chunk(world, split)[parallel_state.get_tensor_model_parallel_rank()]
        with torch.no_grad():
            weight.copy_(whole)
        return adapter

    def _dense_adapter(self, module: nn.Module, path: str, parent: nn.Module) -> tuple[DenseAdapter, int]:
        """The adapter and the axis along which tensor parallelism splits its A."""
        input_is_parallel, in_features, out_features, no_sequence_gather, is_parallel = (
            get_adapter_attributes_from_linear(module)
        )
        world = parallel_state.get_tensor_model_parallel_world_size()
        if self.dim % world:
            raise UserError(f"lora.rank {self.dim} is not a multiple of layout.tp {world}")
        adapter = DenseAdapter(
            in_features,
            out_features,
            self.dim,
            base_linear_name=path,
            activation="identity",
            column_init_method="zero",  # A is filled by the caller
            row_init_method="zero",
            input_is_parallel=input_is_parallel,
            dropout=self.dropout,
            dropout_position="pre",
            model_parallel_config=module.config,
            alpha=self.alpha,
            disable_sequence_parallel_comm=no_sequence_gather,
            base_linear_is_parallel=is_parallel,
        )
        if isinstance(parent, MambaMixer) and path.endswith("in_proj"):
            states = parent.ngroups_local_tp * parent.d_state
            inner, heads = parent.d_inner_local_tp, parent.nheads_local_tp
            adapter.sections = [("z", inner), ("x", inner), ("B", states), ("C", states), ("dt", heads)]
        return adapter, 1 if input_is_parallel else 0

    def transform(self, module: nn.Module, name: str | None = None, prefix: str | None = None) -> nn.Module:
        """Not used: layers are wrapped by their global path in `__call__`."""
        del name, prefix
        return module
