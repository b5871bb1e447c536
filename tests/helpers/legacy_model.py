"""The model tree of the older remote code, for adapters that name it: `backbone.*`, a module for every expert.

Its arithmetic is that of transformers' own modules, whose weights it holds; PEFT takes it as any `nn.Module`, as it did
before it knew the model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class LegacyExpert(nn.Module):
    """One expert as two linear layers."""

    def __init__(self, up: torch.Tensor, down: torch.Tensor) -> None:
        super().__init__()
        self.up_proj = nn.Linear(up.shape[1], up.shape[0], bias=False)
        self.down_proj = nn.Linear(down.shape[1], down.shape[0], bias=False)
        self.up_proj.weight.data, self.down_proj.weight.data = up.clone(), down.clone()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(torch.relu(self.up_proj(x)).square())


class LegacyExperts(nn.ModuleList):
    """The experts of a layer, called as transformers calls its stacked ones."""

    def forward(self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        result = torch.zeros_like(x)
        for number, expert in enumerate(self):
            token, place = torch.where(chosen == number)
            result = result.index_add(0, token, expert(x[token]) * weights[token, place, None])
        return result


class LegacyModel(nn.Module):
    """`backbone` and `lm_head` of a transformers model, its experts taken apart."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.backbone, self.lm_head = model.model, model.lm_head
        for layer in self.backbone.layers:
            experts = getattr(layer.mixer, "experts", None)
            if experts is not None:
                pairs = zip(experts.up_proj.data, experts.down_proj.data, strict=True)
                layer.mixer.experts = LegacyExperts(LegacyExpert(up, down) for up, down in pairs)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.backbone(input_ids).last_hidden_state)
