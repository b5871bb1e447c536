"""The Mamba-2 state space scan in plain PyTorch: what `mamba_ssm.ops.triton.ssd_combined` does on a GPU.

Per head, with a scalar decay and a state H of shape (p, n), the recurrence is

    H_t = exp(dt_t * A) * H_{t-1} + dt_t * x_t B_tᵀ          y_t = H_t C_t + D * x_t

and H starts at zero at the first token of every document (`seq_idx`). It is computed in chunks ("SSD", Dao and Gu 2024,
arXiv 2405.21060, section 6): inside a chunk as masked attention with scores (C Bᵀ) * exp(sum of dt*A between the two
tokens), between chunks by carrying H. Decays across a document's edge are not small numbers but exact zeros, and the
sums of dt*A start anew with each document, so nothing of one document enters another, neither values nor gradients.

Shapes: b batch, l tokens, h heads, p head width, g groups (h/g heads share B and C), n state width; inside,
c chunks of k tokens and r = h/g.

Arithmetic is FP32 for BF16, FP16 and FP32 inputs and FP64 for FP64 (the originals: FP32 sums, BF16 matmul inputs).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

INFINITE = (0.0, float("inf"))
"""The `dt_limit` that clamps nothing."""
LARGEST_CHUNK = 64
"""Callers ask for the GPU kernel's tile (128 for Nemotron-H); on a CPU chunks of 64 are faster at pico's sizes, and the
result does not depend on it beyond rounding."""


class Plan(NamedTuple):
    """Which token sees which, from `seq_idx` alone. Masks are 0/1 in the arithmetic's dtype, `unseen` is 0/-inf."""

    chunk: int
    same: Tensor  # (b or 1, c, k, k): token l (row) sees token s: s <= l, same document
    unseen: Tensor  # (b or 1, c, 1, k, k): the same as an addend for exponents, 0 where seen and -inf where not
    enters: Tensor  # (b or 1, c, 1, k): the token's document is the one that the carried state belongs to
    leaves: Tensor  # (b or 1, c, 1, k): the token's document is the chunk's last one, whose state is carried on
    carries: Tensor  # (b or 1, c, 1): the carried state's document is still the chunk's last one


class Decays(NamedTuple):
    """Products of exp(dt*A) over the tokens that a path crosses; zero where a document ends in between."""

    within: Tensor  # (b, c, h, k, k) from token s (column) to token l (row)
    enter: Tensor  # (b, c, h, k) from the carried state to token l
    leave: Tensor  # (b, c, h, k) from token s to the chunk's end
    carry: Tensor  # (b, c, h) through the whole chunk


def full_precision(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keeps autocast from lowering the matmuls inside: the originals' kernels do not see autocast either."""

    @wraps(function)
    def inside(*args: Any) -> Any:
        devices = {value.device.type for value in args if isinstance(value, Tensor)}
        with torch.autocast(devices.pop() if devices else "cpu", enabled=False):
            return function(*args)

    return inside


def make_plan(seq_idx: Tensor | None, length: int, chunk: int, like: Tensor) -> Plan:
    """The masks of a scan over `length` tokens. `seq_idx` (b, l): equal within a document, whose tokens are contiguous.

    `initial_states` belong to document 0, as in the originals. The tail of the last chunk counts to the last document.
    """
    chunk = min(chunk, length, LARGEST_CHUNK)
    pad = -length % chunk
    if seq_idx is None:
        seq_idx = torch.zeros(1, length, dtype=torch.int32, device=like.device)
    if pad:
        seq_idx = torch.cat([seq_idx, seq_idx[:, -1:].expand(-1, pad)], 1)
    document = seq_idx.reshape(seq_idx.shape[0], -1, 1, chunk)
    last = document[..., -1]
    before = F.pad(last[:, :-1], (0, 0, 1, 0))
    causal = torch.ones(chunk, chunk, dtype=torch.bool, device=like.device).tril()
    same = (document.transpose(-1, -2) == document) & causal
    return Plan(
        chunk=chunk,
        same=same.to(like.dtype),
        unseen=torch.zeros_like(same, dtype=like.dtype).masked_fill_(~same, float("-inf")).unsqueeze(2),
        enters=(document == before.unsqueeze(-1)).to(like.dtype),
        leaves=(document == last.unsqueeze(-1)).to(like.dtype),
        carries=(last == before).to(like.dtype),
    )


def chunks(tensor: Tensor, plan: Plan) -> Tensor:
    """(b, l, ...) -> (b, c, k, ...), the tail filled with zeros (dt = 0 there: the state passes unchanged)."""
    pad = -tensor.shape[1] % plan.chunk
    if pad:
        tensor = torch.cat([tensor, tensor.new_zeros(tensor.shape[0], pad, *tensor.shape[2:])], 1)
    return tensor.reshape(tensor.shape[0], -1, plan.chunk, *tensor.shape[2:])


def tokens(tensor: Tensor, length: int) -> Tensor:
    """(b, c, k, ...) -> (b, l, ...): undoes `chunks`."""
    return tensor.reshape(tensor.shape[0], -1, *tensor.shape[3:])[:, :length]


def by_head(tensor: Tensor, plan: Plan) -> Tensor:
    """(b, l, h, w) -> (b, c, h, k, w), contiguous: what batched matmuls want."""
    return chunks(tensor, plan).transpose(2, 3).contiguous()


def step_sizes(dt: Tensor, dt_bias: Tensor | None, softplus: bool, limit: tuple[float, float], dtype: Any) -> Tensor:
    """dt as the recurrence uses it (b, l, h): bias, softplus, clamp, in this order."""
    dt = dt.to(dtype)
    if dt_bias is not None:
        dt = dt + dt_bias.to(dtype)
    if softplus:
        dt = F.softplus(dt)
    return dt if tuple(limit) == INFINITE else dt.clamp(*limit)


def step_sizes_backward(
    grad: Tensor, dt: Tensor, dt_bias: Tensor | None, softplus: bool, limit: tuple[float, float]
) -> Tensor:
    """Gradient of `step_sizes` with respect to dt (b, l, h); summed over b and l it is the bias's."""
    raw = dt.to(grad.dtype) if dt_bias is None else dt.to(grad.dtype) + dt_bias.to(grad.dtype)
    if tuple(limit) != INFINITE:
        used = F.softplus(raw) if softplus else raw
        grad = torch.where((used >= limit[0]) & (used <= limit[1]), grad, torch.zeros_like(grad))
    return grad * torch.sigmoid(raw) if softplus else grad


def decays_of(cum: Tensor, plan: Plan) -> Decays:
    """The decays from `cum` (b, c, h, k), sums of dt*A since the document's or chunk's start, whichever is later.

    Differences of `cum` are at most 0 wherever `same` holds, so no exponential overflows; elsewhere -inf gives 0.
    """
    within = cum.unsqueeze(-1) - cum.unsqueeze(-2)
    within = within.add_(plan.unseen).exp_()
    end = cum[..., -1:]
    # Tokens of other documents may have any sum, so their exponent is set to 0 before, not their decay after, exp.
    return Decays(
        within=within,
        enter=cum.exp() * plan.enters,
        leave=((end - cum) * plan.leaves).exp() * plan.leaves,
        carry=end.squeeze(-1).exp() * plan.carries,
    )


def shared(tensor: Tensor, groups: int) -> Tensor:
    """(b, c, h, ...) -> (b, c, g, r, ...): heads by the group whose B and C they use."""
    return tensor.reshape(*tensor.shape[:2], groups, -1, *tensor.shape[3:])


def chunk_states(xd: Tensor, B: Tensor, decay: Decays, initial: Tensor | None) -> tuple[Tensor, Tensor]:
    """States before every chunk (b, c, h, p, n) and after the last one (b, h, p, n).

    `xd` = dt*x (b, c, h, k, p), `B` (b, c, g, k, n), `initial` (b, h, p, n) or None for zeros.
    """
    groups = B.shape[2]
    weighted = shared((xd * decay.leave.unsqueeze(-1)).transpose(-1, -2), groups)
    added = torch.matmul(weighted, B.unsqueeze(3)).flatten(2, 3)
    state = torch.zeros_like(added[:, 0]) if initial is None else initial.to(added.dtype)
    before = []
    for c in range(added.shape[1]):
        before.append(state)
        state = torch.addcmul(added[:, c], state, decay.carry[:, c, :, None, None])
    return torch.stack(before, 1), state


class Scan(NamedTuple):
    """The inputs of a scan in the arithmetic's dtype and layout, shared by its forward and its backward."""

    plan: Plan
    dt: Tensor  # (b, c, h, k)
    x: Tensor  # (b, c, h, k, p)
    B: Tensor  # (b, c, g, k, n)
    C: Tensor  # (b, c, g, k, n)
    cum: Tensor  # (b, c, h, k)
    decay: Decays

    @property
    def groups(self) -> int:
        return self.B.shape[2]


def prepare(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    seq_idx: Tensor | None,
    chunk: int,
    cum: Tensor | None = None,
) -> Scan:
    """Brings the inputs of a scan into chunks. `dt` from `step_sizes` fixes the dtype; `cum` if it was kept."""
    dtype = dt.dtype
    plan = make_plan(seq_idx, x.shape[1], chunk, dt)
    dt = chunks(dt, plan).transpose(2, 3)
    # A masked matmul, not cumsum and a difference: sums start at the document, so its values do not depend on others.
    if cum is None:
        cum = torch.matmul(dt * A.to(dtype)[:, None], plan.same.transpose(-1, -2))
    x, B, C = (by_head(t.to(dtype), plan) for t in (x, B, C))
    return Scan(plan, dt, x, B, C, cum, decays_of(cum, plan))


def scan_forward(scan: Scan, D: Tensor | None, initial: Tensor | None, length: int) -> tuple[Tensor, Tensor]:
    """The scan's output (b, l, h, p) and final states (b, h, p, n), both in the arithmetic's dtype."""
    decay, groups = scan.decay, scan.groups
    xd = scan.x * scan.dt.unsqueeze(-1)
    states, final = chunk_states(xd, scan.B, decay, initial)
    scores = torch.matmul(scan.C, scan.B.transpose(-1, -2)).unsqueeze(3) * shared(decay.within, groups)
    out = torch.matmul(scores.flatten(2, 3), xd)
    carried = torch.matmul(scan.C.unsqueeze(3), shared(states, groups).transpose(-1, -2)).flatten(2, 3)
    out = out.addcmul_(carried, decay.enter.unsqueeze(-1))
    if D is not None:
        out = out.addcmul_(scan.x, heads_by_width(D, out))
    return tokens(out.transpose(2, 3), length), final


def heads_by_width(D: Tensor, like: Tensor) -> Tensor:
    """D (h,) or (h, p) -> (h, 1, 1 or p), to go with (b, c, h, k, p)."""
    return D.to(like.dtype).reshape(D.shape[0], 1, -1)


class ScanGrads(NamedTuple):
    """Gradients of a scan in the arithmetic's dtype; `dt` is of the step sizes that the recurrence used."""

    x: Tensor  # (b, l, h, p)
    dt: Tensor  # (b, l, h)
    A: Tensor  # (h,)
    B: Tensor  # (b, l, g, n)
    C: Tensor  # (b, l, g, n)
    D: Tensor | None  # as D
    initial: Tensor  # (b, h, p, n)


def state_gradients(entering: Tensor, decay: Decays, dfinal: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the states after every chunk (b, c, h, p, n) and of the initial state, from the last chunk back.

    `entering` (b, c, h, p, n): what the chunk's own outputs ask of the state before it.
    """
    grad = dfinal.to(entering.dtype)
    after = []
    for c in reversed(range(entering.shape[1])):
        after.append(grad)
        grad = torch.addcmul(entering[:, c], grad, decay.carry[:, c, :, None, None])
    return torch.stack(after[::-1], 1), grad


def scan_backward(
    scan: Scan, A: Tensor, D: Tensor | None, initial: Tensor | None, dout: Tensor, dfinal: Tensor
) -> ScanGrads:
    """Gradients of `scan_forward`, recomputing states and scores. `dout` (b, l, h, p), `dfinal` (b, h, p, n)."""
    decay, groups, length, dtype = scan.decay, scan.groups, dout.shape[1], scan.dt.dtype
    dy = by_head(dout.to(dtype), scan.plan)
    xd = scan.x * scan.dt.unsqueeze(-1)
    states, _ = chunk_states(xd, scan.B, decay, initial)
    dy_entering = dy * decay.enter.unsqueeze(-1)
    entering = torch.matmul(shared(dy_entering.transpose(-1, -2), groups), scan.C.unsqueeze(3)).flatten(2, 3)
    dstates, dinitial = state_gradients(entering, decay, dfinal)

    products = torch.matmul(scan.C, scan.B.transpose(-1, -2)).unsqueeze(3)
    within = shared(decay.within, groups)
    dscores = shared(torch.matmul(dy, xd.transpose(-1, -2)), groups).mul_(within)
    dproducts = dscores.sum(3)
    dlog_within = dscores.mul_(products).flatten(2, 3)
    scores = (products * within).flatten(2, 3)

    pushed = torch.matmul(scan.B.unsqueeze(3), shared(dstates, groups).transpose(-1, -2)).flatten(2, 3)
    pushed = pushed.mul_(decay.leave.unsqueeze(-1))
    dxd = torch.matmul(scores.transpose(-1, -2), dy).add_(pushed)
    dC = torch.matmul(dproducts, scan.B) + torch.matmul(shared(dy_entering, groups), shared(states, groups)).sum(3)
    leaving = shared(xd * decay.leave.unsqueeze(-1), groups)
    dB = torch.matmul(dproducts.transpose(-1, -2), scan.C) + torch.matmul(leaving, shared(dstates, groups)).sum(3)

    # The exponents: cum_l - cum_s in `within`, cum_l in `enter`, cum_end - cum_s in `leave`, cum_end in `carry`.
    carried = torch.matmul(scan.C.unsqueeze(3), shared(states, groups).transpose(-1, -2)).flatten(2, 3)
    dleave = (xd * pushed).sum(-1)
    dcum = dlog_within.sum(-1) - dlog_within.sum(-2) + (dy_entering * carried).sum(-1) - dleave
    dcum[..., -1] += dleave.sum(-1) + (dstates * states).sum((-1, -2)) * decay.carry
    da = torch.matmul(dcum, scan.plan.same)

    ddt = (dxd * scan.x).sum(-1) + da * A.to(dtype)[:, None]
    dx = dxd.mul_(scan.dt.unsqueeze(-1))
    dD = None
    if D is not None:
        dx = dx.addcmul_(dy, heads_by_width(D, dy))
        dD = (dy * scan.x).sum((0, 1, 3) if D.dim() == 2 else (0, 1, 3, 4))
    return ScanGrads(
        x=tokens(dx.transpose(2, 3), length),
        dt=tokens(ddt.transpose(2, 3), length),
        A=(da * scan.dt).sum((0, 1, 3)),
        B=tokens(dB.transpose(2, 3), length),
        C=tokens(dC.transpose(2, 3), length),
        D=dD,
        initial=dinitial,
    )
