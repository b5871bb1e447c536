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

import math
from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Limit = tuple[float, float]
INFINITE: Limit = (0.0, float("inf"))
"""The `dt_limit` that clamps nothing."""
LOG2_E = math.log2(math.e)
"""exp(x) = exp2(x * LOG2_E), which is also what GPUs compute. PyTorch's exp on CPUs is Intel MKL's, which takes up to a
hundred times as long where the result is zero or denormal, as it is for half of all pairs of tokens."""
LARGEST_CHUNK = 32
"""Callers ask for the GPU kernel's tile (128 for Nemotron-H); on a CPU chunks as long as a head is wide are faster, and
the result does not depend on it beyond rounding."""


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


def cast(grad: Tensor | None, like: Tensor | None) -> Tensor | None:
    """A gradient in its input's dtype, or None where one of them is None."""
    return None if grad is None or like is None else grad.to(like.dtype)


def make_plan(seq_idx: Tensor | None, length: int, chunk: int, like: Tensor) -> Plan:
    """The masks of a scan over `length` tokens. `seq_idx` (b, l): equal within a document, whose tokens are contiguous.

    The initial state belongs to document 0, as the originals' `initial_states` do. The tail of the last chunk counts to
    the last document.
    """
    chunk = min(chunk, length, LARGEST_CHUNK)
    pad = -length % chunk
    if seq_idx is None:
        seq_idx = torch.zeros(1, length, dtype=torch.int32, device=like.device)
    if pad:
        seq_idx = torch.cat([seq_idx, seq_idx[:, -1:].expand(-1, pad)], 1)
    document = seq_idx.reshape(seq_idx.shape[0], -1, 1, chunk)
    last = document[..., -1]
    before = torch.cat([torch.zeros_like(last[:, :1]), last[:, :-1]], 1)
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
    """The decays from `cum` (b, c, h, k), sums of dt*A since the document's or chunk's start, whichever is later."""
    cum = cum * LOG2_E
    end = cum[..., -1:]
    # Tokens of other documents may have any sum, so their exponent is set to 0 before, not their decay after, exp2.
    return Decays(
        enter=cum.exp2() * plan.enters,
        leave=((end - cum) * plan.leaves).exp2_() * plan.leaves,
        carry=end.squeeze(-1).exp2() * plan.carries,
    )


def decays_within(cum: Tensor, plan: Plan) -> Tensor:
    """The decays inside the chunks from token s (column) to token l (row), (b, c, h, k, k).

    Differences of `cum` are at most 0 wherever `same` holds, so no exponential overflows; elsewhere -inf gives 0.
    """
    cum = cum * LOG2_E
    within = cum.unsqueeze(-1) - cum.unsqueeze(-2)
    return within.add_(plan.unseen).exp2_()


def shared(tensor: Tensor, groups: int) -> Tensor:
    """(b, c, h, ...) -> (b, c, g, r, ...): heads by the group whose B and C they use."""
    return tensor.reshape(*tensor.shape[:2], groups, -1, *tensor.shape[3:])


class Scan(NamedTuple):
    """The inputs of a scan in the arithmetic's dtype and layout, shared by its forward and its backward."""

    plan: Plan
    dt: Tensor  # (b, c, h, k)
    x: Tensor  # (b, c, h, k, p)
    xd: Tensor  # dt * x, (b, c, h, k, p)
    B: Tensor  # (b, c, g, k, n)
    C: Tensor  # (b, c, g, k, n)
    cum: Tensor  # (b, c, h, k)
    decay: Decays

    @property
    def groups(self) -> int:
        return self.B.shape[2]

    def states(self, initial: Tensor | None) -> tuple[Tensor, Tensor]:
        """States before every chunk (b, c, h, p, n) and after the last one (b, h, p, n).

        `initial` (b, h, p, n) or None for zeros.
        """
        weighted = shared((self.xd * self.decay.leave.unsqueeze(-1)).transpose(-1, -2), self.groups)
        added = torch.matmul(weighted, self.B.unsqueeze(3)).flatten(2, 3)
        states = added.new_empty(added.shape[0], added.shape[1] + 1, *added.shape[2:])
        steps = states.unbind(1)
        if initial is None:
            steps[0].zero_()
        else:
            steps[0].copy_(initial)
        carry = self.decay.carry[..., None, None].unbind(1)
        for state, more, factor, after in zip(steps[:-1], added.unbind(1), carry, steps[1:], strict=True):
            torch.addcmul(more, state, factor, out=after)
        return states[:, :-1], steps[-1]


def prepare(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    plan: Plan,
    cum: Tensor | None = None,
) -> Scan:
    """Brings the inputs of a scan into chunks. `dt` from `step_sizes` fixes the dtype; `cum` if it was kept."""
    dtype = dt.dtype
    dt = chunks(dt, plan).transpose(2, 3)
    # A masked matmul, not cumsum and a difference: sums start at the document, so its values do not depend on others.
    if cum is None:
        cum = torch.matmul(dt * A.to(dtype)[:, None], plan.same.transpose(-1, -2))
    x, B, C = (by_head(t.to(dtype), plan) for t in (x, B, C))
    return Scan(plan, dt, x, x * dt.unsqueeze(-1), B, C, cum, decays_of(cum, plan))


def scan_forward(scan: Scan, states: Tensor, D: Tensor | None, length: int) -> Tensor:
    """The scan's output (b, l, h, p) in the arithmetic's dtype, from `Scan.states` before every chunk."""
    groups = scan.groups
    within = shared(decays_within(scan.cum, scan.plan), groups)
    scores = within.mul_(torch.matmul(scan.C, scan.B.transpose(-1, -2)).unsqueeze(3))
    out = torch.matmul(scores.flatten(2, 3), scan.xd)
    carried = torch.matmul(scan.C.unsqueeze(3), shared(states, groups).transpose(-1, -2)).flatten(2, 3)
    out = out.addcmul_(carried, scan.decay.enter.unsqueeze(-1))
    if D is not None:
        out = out.addcmul_(scan.x, heads_by_width(D, out))
    return tokens(out.transpose(2, 3), length)


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
    grads = entering.new_empty(entering.shape[0], entering.shape[1] + 1, *entering.shape[2:])
    steps = grads.unbind(1)
    steps[-1].copy_(dfinal)
    carry = decay.carry[..., None, None].unbind(1)
    for grad, asked, factor, before in reversed(
        list(zip(steps[1:], entering.unbind(1), carry, steps[:-1], strict=True))
    ):
        torch.addcmul(asked, grad, factor, out=before)
    return grads[:, 1:], steps[0]


def scan_backward(
    scan: Scan, states: Tensor, A: Tensor, D: Tensor | None, dout: Tensor, dfinal: Tensor, trained: bool
) -> ScanGrads:
    """Gradients of `scan_forward` and the final states, recomputing the scores.

    `states` before every chunk, from `Scan.states`; `dout` (b, l, h, p), `dfinal` (b, h, p, n); `trained`: D wants one.
    """
    decay, groups, length, dtype = scan.decay, scan.groups, dout.shape[1], scan.dt.dtype
    dy = by_head(dout.to(dtype), scan.plan)
    dy_entering = dy * decay.enter.unsqueeze(-1)
    entering = torch.matmul(shared(dy_entering.transpose(-1, -2), groups), scan.C.unsqueeze(3)).flatten(2, 3)
    dstates, dinitial = state_gradients(entering, decay, dfinal)

    products = torch.matmul(scan.C, scan.B.transpose(-1, -2)).unsqueeze(3)
    within = shared(decays_within(scan.cum, scan.plan), groups)
    dscores = shared(torch.matmul(dy, scan.xd.transpose(-1, -2)), groups).mul_(within)
    dproducts = dscores.sum(3)
    dlog_within = dscores.mul_(products).flatten(2, 3)
    scores = within.mul_(products).flatten(2, 3)

    pushed = torch.matmul(scan.B.unsqueeze(3), shared(dstates, groups).transpose(-1, -2)).flatten(2, 3)
    pushed = pushed.mul_(decay.leave.unsqueeze(-1))
    dxd = torch.matmul(scores.transpose(-1, -2), dy).add_(pushed)
    dC_entering = torch.matmul(shared(dy_entering, groups), shared(states, groups))
    dC = torch.matmul(dproducts, scan.B) + dC_entering.sum(3)
    leaving = shared(scan.xd * decay.leave.unsqueeze(-1), groups)
    dB = torch.matmul(dproducts.transpose(-1, -2), scan.C) + torch.matmul(leaving, shared(dstates, groups)).sum(3)

    # The exponents: cum_l - cum_s in `within`, cum_l in `enter`, cum_end - cum_s in `leave`, cum_end in `carry`.
    denter = dC_entering.mul_(scan.C.unsqueeze(3)).sum(-1).flatten(2, 3)
    dleave = pushed.mul_(scan.xd).sum(-1)
    dcum = dlog_within.sum(-1) - dlog_within.sum(-2) + denter - dleave
    dcum[..., -1] += dleave.sum(-1) + (dstates * states).sum((-1, -2)) * decay.carry
    da = torch.matmul(dcum, scan.plan.same)

    ddt = (dxd * scan.x).sum(-1) + da * A.to(dtype)[:, None]
    dx = dxd.mul_(scan.dt.unsqueeze(-1))
    dD = None
    if D is not None:
        dx = dx.addcmul_(dy, heads_by_width(D, dy))
        if trained:
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
