"""The CPU stand-ins of mamba-ssm and causal-conv1d against the recurrence they stand for, token by token in FP64."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nano3.cpu import mamba_standin, scan_row
from nano3.cpu.conv import causal_conv1d_fn, causal_conv1d_varlen_states
from nano3.cpu.norm import RMSNorm, rmsnorm_fn
from nano3.cpu.ssd_combined import mamba_chunk_scan_combined
from nano3.cpu.ssd_split import Widths, mamba_split_conv1d_scan_combined, one_after_the_other
from nano3.cpu.te.linear import GroupedLinear

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 3e-5}


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    return request.param


def seq_idx_of(lengths: list[int], device: str) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None].int().to(device)


def recurrence(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    initial: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """H = exp(dt A) H + dt x B^T, y = H C + D x, H zero where a document starts; dt as the recurrence uses it."""
    b, length, h, p = x.shape
    repeat = h // B.shape[2]
    B, C = B.repeat_interleave(repeat, 2), C.repeat_interleave(repeat, 2)
    state = x.new_zeros(b, h, p, B.shape[-1]) if initial is None else initial
    ys = []
    for t in range(length):
        if seq_idx is not None and t > 0:
            state = state * (seq_idx[:, t] == seq_idx[:, t - 1]).to(x.dtype)[:, None, None, None]
        state = torch.exp(dt[:, t] * A)[..., None, None] * state
        state = state + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        y = (state * C[:, t, :, None]).sum(-1)
        ys.append(y if D is None else y + x[:, t] * D.reshape(h, -1))
    out = torch.stack(ys, 1)
    return (out if z is None else out * F.silu(z)), state


def convolution(x: Tensor, weight: Tensor, bias: Tensor, seq_idx: Tensor | None, initial: Tensor | None) -> Tensor:
    """x (b, d, l), one token and one tap at a time, silu."""
    b, d, length = x.shape
    width = weight.shape[1]
    head = x.new_zeros(b, d, width - 1) if initial is None else initial
    padded = torch.cat([head, x], -1)
    ids = torch.zeros(1, length) if seq_idx is None else seq_idx
    ids = torch.cat([ids[:, :1].expand(-1, width - 1), ids], 1)
    ys = []
    for t in range(length):
        own = (ids[:, t : t + width] == ids[:, t + width - 1, None]).to(x)[:, None]
        ys.append((padded[:, :, t : t + width] * own * weight).sum(-1) + bias)
    return F.silu(torch.stack(ys, -1))


def leaf(tensor: Tensor, dtype: torch.dtype, device: str) -> Tensor:
    return tensor.detach().to(device=device, dtype=dtype).requires_grad_()


def compare(outputs: tuple, references: tuple, inputs: list[Tensor], wide: list[Tensor], tolerance: float) -> None:
    """Outputs, and the gradients of all inputs for one random cotangent, relative to the largest reference value."""
    cotangents = [torch.randn_like(r) for r in references]
    torch.autograd.backward(outputs, [c.to(o.dtype) for c, o in zip(cotangents, outputs, strict=True)])
    torch.autograd.backward(references, cotangents)
    pairs = list(zip(outputs, references, strict=True))
    pairs += [(a.grad, r.grad) for a, r in zip(inputs, wide, strict=True)]
    for i, (actual, reference) in enumerate(pairs):
        error = (actual.double() - reference.double()).abs().max() / reference.abs().max().clamp(min=1e-3)
        assert error < tolerance, f"pair {i}: relative error {error:.2e}"


SCANS = {
    # name: (document lengths, heads, groups, chunk)
    "one token": ([1], 2, 1, 64),
    "one chunk, one group": ([31], 4, 1, 64),
    "a document per token": ([1] * 9, 4, 2, 4),
    "edges in, at and over chunks": ([3, 1, 4, 8, 1, 17, 2], 4, 2, 8),
    "as many groups as heads": ([16, 16, 5], 4, 4, 16),
    "longer than the largest chunk": ([100, 1, 69], 2, 2, 128),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", SCANS)
def test_scan_is_the_recurrence(name: str, dtype: torch.dtype, device: str) -> None:
    lengths, h, g, chunk = SCANS[name]
    length, p, n = sum(lengths), 5, 6
    raw = [
        *(torch.randn(1, length, h, p), torch.randn(1, length, h), -torch.rand(h) * 8, torch.randn(1, length, g, n)),
        *(torch.randn(1, length, g, n), torch.randn(h), torch.randn(1, length, h, p), torch.randn(h) - 2),
        torch.randn(1, h, p, n),
    ]
    inputs = [leaf(v, dtype, device) for v in raw]
    wide = [leaf(v, torch.float64, device) for v in inputs]
    seq = seq_idx_of(lengths, device)
    x, dt, A, B, C, D, z, dt_bias, initial = inputs
    outputs = mamba_chunk_scan_combined(
        x, dt, A, B, C, chunk, D, z, dt_bias, initial, seq, dt_softplus=True, return_final_states=True
    )
    x, dt, A, B, C, D, z, dt_bias, initial = wide
    references = recurrence(x, F.softplus(dt + dt_bias), A, B, C, D, z, initial, seq)
    assert outputs[0].dtype == dtype
    compare(outputs, references, inputs, wide, TOLERANCE[dtype])


def test_scan_without_options(device: str) -> None:
    """Batch 2, no seq_idx, D of shape (h, p), a clamp on dt instead of softplus."""
    raw = [torch.randn(2, 21, 4, 3), torch.rand(2, 21, 4), -torch.rand(4), torch.randn(2, 21, 2, 5)]
    raw += [torch.randn(2, 21, 2, 5), torch.randn(4, 3)]
    inputs = [leaf(v, torch.float64, device) for v in raw]
    wide = [leaf(v, torch.float64, device) for v in raw]
    output = mamba_chunk_scan_combined(*inputs[:5], 8, inputs[5], dt_limit=(0.2, 0.7))
    x, dt, A, B, C, D = wide
    reference, _ = recurrence(x, dt.clamp(0.2, 0.7), A, B, C, D)
    compare((output,), (reference,), inputs, wide, 1e-10)


def split_inputs(length: int, h: int = 4, p: int = 3, g: int = 2, n: int = 5) -> list[Tensor]:
    channels = h * p + 2 * g * n
    return [
        *(torch.randn(1, length, h * p + channels + h), torch.randn(channels, 4), torch.randn(channels)),
        *(torch.randn(h) - 2, -torch.rand(h) * 8, torch.randn(h)),
    ]


def split_reference(inputs: list[Tensor], seq: Tensor, h: int = 4, p: int = 3, g: int = 2) -> Tensor:
    zxbcdt, weight, bias, dt_bias, A, D = inputs
    z, xBC, dt = zxbcdt.split([h * p, weight.shape[0], h], -1)
    xBC = convolution(xBC.transpose(1, 2), weight, bias, seq, None).transpose(1, 2)
    x, B, C = xBC.split([h * p, (weight.shape[0] - h * p) // 2, (weight.shape[0] - h * p) // 2], -1)
    x, z = x.unflatten(-1, (h, p)), z.unflatten(-1, (h, p))
    B, C = B.unflatten(-1, (g, -1)), C.unflatten(-1, (g, -1))
    return recurrence(x, F.softplus(dt + dt_bias), A, B, C, D, z, None, seq)[0].flatten(2)


@pytest.mark.parametrize("span", [scan_row.SPAN, 8, 5, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_split_conv_scan_is_convolution_then_recurrence(
    dtype: torch.dtype, span: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole, and in spans that cut documents, that begin with one, and that are shorter than the convolution."""
    monkeypatch.setattr(scan_row, "SPAN", span)
    lengths = [3, 1, 1, 9, 23]
    inputs = [leaf(v, dtype, device) for v in split_inputs(sum(lengths))]
    wide = [leaf(v, torch.float64, device) for v in inputs]
    seq = seq_idx_of(lengths, device)
    output = mamba_split_conv1d_scan_combined(*inputs, 8, seq_idx=seq, headdim=3, ngroups=2)
    assert output.dtype == dtype
    compare((output,), (split_reference(wide, seq),), inputs, wide, TOLERANCE[dtype])


def test_on_other_devices_it_is_the_same_function() -> None:
    """What CUDA tensors would go through, here on the CPU: initial states, D by channel, a clamp, a batch of 2."""
    zxbcdt, weight, bias, dt_bias, A, _ = split_inputs(23)
    raw = [zxbcdt.repeat(2, 1, 1), weight, bias, dt_bias, A, torch.randn(4, 3), torch.randn(2, 4, 3, 5)]
    seq = seq_idx_of([3, 1, 19], "cpu").repeat(2, 1)
    inputs, wide = ([leaf(v, torch.float64, "cpu") for v in raw] for _ in range(2))
    compiled = mamba_split_conv1d_scan_combined(
        *inputs[:6], 8, inputs[6], seq, (0.01, 0.3), return_final_states=True, headdim=3, ngroups=2
    )
    widths = Widths(wide[0], weight, wide[5], 3, 2)
    compare(compiled, one_after_the_other(*wide, seq, (0.01, 0.3), "silu", widths, 8), inputs, wide, 1e-10)


def test_bfloat16_inputs_are_summed_in_fp32(device: str) -> None:
    """Types as the originals'; the error is that of rounding x, B, C and the output (2^-8), not of BF16 sums."""
    lengths = [40, 1, 59]
    inputs = [leaf(v, torch.bfloat16 if i < 3 else torch.float32, device) for i, v in enumerate(split_inputs(100))]
    seq = seq_idx_of(lengths, device)
    output = mamba_split_conv1d_scan_combined(*inputs, 128, seq_idx=seq, headdim=3, ngroups=2)
    reference = split_reference([v.detach().double() for v in inputs], seq)
    assert output.dtype == torch.bfloat16
    assert (output.double() - reference).abs().max() / reference.abs().max() < 2**-7
    output.float().sum().backward()
    assert [v.grad.dtype for v in inputs] == [v.dtype for v in inputs]


def test_autocast_does_not_reach_the_arithmetic(device: str) -> None:
    inputs = [v.to(device) for v in split_inputs(20)]
    plain = mamba_split_conv1d_scan_combined(*inputs, 8, headdim=3, ngroups=2)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert torch.equal(mamba_split_conv1d_scan_combined(*inputs, 8, headdim=3, ngroups=2), plain)


def test_frozen_parameters_get_no_gradient_and_change_none(device: str) -> None:
    """LoRA freezes them all; a gradient that nobody wants is not computed."""
    zxbcdt, *rest = (v.to(device) for v in split_inputs(20))
    grads = []
    for trained in (True, False):
        leaves = [zxbcdt.clone().requires_grad_(), *(v.clone().requires_grad_(trained) for v in rest)]
        mamba_split_conv1d_scan_combined(*leaves, 8, headdim=3, ngroups=2).square().sum().backward()
        grads.append([v.grad for v in leaves])
    assert torch.equal(grads[0][0], grads[1][0])
    assert all(g is not None for g in grads[0])
    assert grads[1][1:] == [None] * 5


@pytest.mark.parametrize("span", [scan_row.SPAN, 4])
@pytest.mark.parametrize("chunk", [4, 16, 128])
def test_documents_do_not_leak(chunk: int, span: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit: B's output and gradients stay when A and C change wildly; A's and C's gradients are exactly zero."""
    monkeypatch.setattr(scan_row, "SPAN", span)
    lengths = [6, 9, 5]
    seq, b = seq_idx_of(lengths, device), slice(6, 15)
    zxbcdt, *rest = (v.to(device) for v in split_inputs(20))

    def run(values: Tensor, seq_idx: Tensor | None = seq) -> tuple[Tensor, Tensor]:
        values = values.clone().requires_grad_()
        out = mamba_split_conv1d_scan_combined(values, *rest, chunk, seq_idx=seq_idx, headdim=3, ngroups=2)
        out[:, b].square().sum().backward()
        return out.detach()[:, b], values.grad

    changed = zxbcdt * 50 + 7
    changed[:, b] = zxbcdt[:, b]
    (out, grad), (out_changed, grad_changed) = run(zxbcdt), run(changed)
    assert torch.equal(out, out_changed)
    assert torch.equal(grad, grad_changed)
    assert grad[:, b].abs().min() > 0
    assert grad[:, :6].count_nonzero() == grad[:, 15:].count_nonzero() == 0
    _, leaky = run(zxbcdt, None)  # the same check catches a scan without boundaries
    assert leaky[:, :6].count_nonzero() > 0


def test_packed_documents_equal_documents_alone(device: str) -> None:
    lengths = [70, 1, 3, 54]
    zxbcdt, *rest = (v.to(device) for v in split_inputs(sum(lengths)))
    packed = mamba_split_conv1d_scan_combined(
        zxbcdt, *rest, 128, seq_idx=seq_idx_of(lengths, device), headdim=3, ngroups=2
    )
    alone = [
        mamba_split_conv1d_scan_combined(part, *rest, 128, headdim=3, ngroups=2) for part in zxbcdt.split(lengths, 1)
    ]
    assert (packed - torch.cat(alone, 1)).abs().max() < 2e-6 * packed.abs().max()


def test_long_decays_neither_overflow_nor_give_nan(device: str) -> None:
    """dt*A of -1600 over a chunk: exp of the wrong triangle would be inf, and inf * 0 is NaN."""
    x, B, C = (leaf(torch.randn(1, 128, 2, 4), torch.float32, device) for _ in range(3))
    dt, A = (leaf(v, torch.float32, device) for v in (torch.full((1, 128, 2), 5.0), torch.full((2,), -5.0)))
    out = mamba_chunk_scan_combined(x, dt, A, B, C, 64, seq_idx=seq_idx_of([60, 68], device))
    out.sum().backward()
    for value in (out, x.grad, dt.grad, A.grad, B.grad, C.grad):
        assert value.isfinite().all()


@pytest.mark.parametrize("packed", [False, True])
def test_convolution(packed: bool, device: str) -> None:
    raw = [torch.randn(1, 6, 14), torch.randn(6, 4), torch.randn(6), torch.randn(1, 6, 3)]
    inputs, wide = ([leaf(v, torch.float64, device) for v in raw] for _ in range(2))
    seq = seq_idx_of([2, 1, 1, 10], device) if packed else None
    x, weight, bias, initial = inputs
    output = causal_conv1d_fn(x, weight, bias, seq, initial, activation="silu")
    x, weight, bias, initial = wide
    compare((output,), (convolution(x, weight, bias, seq, initial),), inputs, wide, 1e-10)


def test_convolution_by_hand() -> None:
    """Weights 1000, 100, 10, 1 (oldest to newest) over 1..6, a document starting at 4: digits read in order."""
    x, weight = torch.arange(1.0, 7.0).reshape(1, 1, 6), torch.tensor([[1000.0, 100.0, 10.0, 1.0]])
    out = causal_conv1d_fn(x, weight, seq_idx=torch.tensor([[0, 0, 0, 1, 1, 1]]))
    assert out.flatten().tolist() == [1, 12, 123, 4, 45, 456]
    assert causal_conv1d_fn(x, weight).flatten().tolist() == [1, 12, 123, 1234, 2345, 3456]


@pytest.mark.parametrize("gate_last", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_gated_norm(gated: bool, gate_last: bool, device: str) -> None:
    raw = [torch.randn(2, 3, 12), torch.randn(12), torch.randn(12), *([torch.randn(2, 3, 12)] if gated else [])]
    inputs, wide = ([leaf(v, torch.float64, device) for v in raw] for _ in range(2))

    def reference(x: Tensor, weight: Tensor, bias: Tensor, z: Tensor | None = None) -> Tensor:
        if z is not None and not gate_last:
            x = x * F.silu(z)
        groups = x.unflatten(-1, (3, 4))
        y = (groups / (groups.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(-2) * weight + bias
        return y * F.silu(z) if z is not None and gate_last else y

    output = rmsnorm_fn(*inputs, eps=1e-5, group_size=4, norm_before_gate=gate_last)
    compare((output,), (reference(*wide),), inputs, wide, 1e-10)


def test_norm_module_by_hand() -> None:
    """Two groups of two: (3, 4) and (0, 2) have RMS sqrt(12.5) and sqrt(2); weight 1 at first, no bias."""
    norm = RMSNorm(4, eps=0.0, group_size=2, norm_before_gate=False, dtype=torch.bfloat16)
    assert dict(norm.named_parameters()).keys() == {"weight"}
    assert norm.weight.tolist() == [1, 1, 1, 1]
    out = norm.float()(torch.tensor([3.0, 4.0, 0.0, 2.0]))
    assert out.tolist() == pytest.approx([3 / 12.5**0.5, 4 / 12.5**0.5, 0, 2**0.5])


@pytest.mark.parametrize("trained", [True, False])
def test_grouped_products_are_the_experts_own(trained: bool, device: str) -> None:
    """Experts with 2, 0 and 3 tokens; one without tokens keeps a gradient of zeros, a frozen one gets none."""
    x = torch.randn(5, 4, dtype=torch.float64, device=device).requires_grad_()
    layer = GroupedLinear(3, 4, 6, bias=False, params_dtype=torch.float64, device=device)
    weights = [layer.weight0, layer.weight1, layer.weight2]
    for weight in weights:
        torch.nn.init.normal_(weight).requires_grad_(trained)
    out = layer(x, [2, 0, 3])
    assert torch.allclose(out, torch.cat([x[:2] @ weights[0].t(), x[2:] @ weights[2].t()]), rtol=1e-12)
    dout = torch.randn_like(out)
    out.backward(dout)
    assert torch.allclose(x.grad, torch.cat([dout[:2] @ weights[0], dout[2:] @ weights[2]]), rtol=1e-12)
    if not trained:
        assert [weight.grad for weight in weights] == [None] * 3
        return
    assert torch.allclose(weights[0].grad, dout[:2].t() @ x[:2], rtol=1e-12)
    assert weights[1].grad.count_nonzero() == 0
    assert torch.allclose(weights[2].grad, dout[2:].t() @ x[2:], rtol=1e-12)


def test_saved_tensors_are_the_originals() -> None:
    """What stays between forward and backward, by shape: the originals' lists (see the Functions' docstrings)."""
    inputs = [v.requires_grad_() for v in split_inputs(20)]
    seq = seq_idx_of([20], "cpu")
    out = mamba_split_conv1d_scan_combined(*inputs, 8, seq_idx=seq, headdim=3, ngroups=2)
    zxbcdt, weight, bias, dt_bias, A, D = inputs
    *saved, between = out.grad_fn.saved_tensors  # type: ignore[union-attr]
    expected = [zxbcdt, weight, bias, out.unflatten(-1, (4, 3)), A, D, dt_bias, None, seq]
    assert [None if t is None else t.shape for t in saved] == [None if t is None else t.shape for t in expected]
    assert all(s is e for i, (s, e) in enumerate(zip(saved, expected, strict=True)) if i != 3)

    # And the states between spans of 256 tokens, of which these 20 have none, and 600 have two.
    width = (weight.shape[0] - 12) // 4
    assert between.shape == (1, 0, 4, 3, width)
    out = mamba_split_conv1d_scan_combined(*(v.requires_grad_() for v in split_inputs(600)), 8, headdim=3, ngroups=2)
    assert out.grad_fn.saved_tensors[-1].shape == (1, 2, 4, 3, width)  # type: ignore[union-attr]

    norm = rmsnorm_fn(torch.randn(5, 12, requires_grad=True), torch.ones(12), None, torch.randn(5, 12), group_size=4)
    shapes = [None if t is None else tuple(t.shape) for t in norm.grad_fn.saved_tensors]  # type: ignore[union-attr]
    assert shapes == [(5, 12), (12,), None, (5, 3, 1), (5, 12)]


def test_what_is_not_here_says_so() -> None:
    inputs = split_inputs(4)
    with pytest.raises(NotImplementedError, match="megatron-core applies both itself"):
        mamba_split_conv1d_scan_combined(*inputs, 8, headdim=3, ngroups=2, rmsnorm_weight=torch.ones(12))
    with pytest.raises(NotImplementedError, match="activation 'gelu'"):
        mamba_split_conv1d_scan_combined(*inputs, 8, headdim=3, ngroups=2, activation="gelu")
    with pytest.raises(ValueError, match="is 47 wide; z, xBC and dt make 48"):
        mamba_split_conv1d_scan_combined(inputs[0][..., :-1], *inputs[1:], 8, headdim=3, ngroups=2)
    with pytest.raises(NotImplementedError, match="final states"):
        causal_conv1d_fn(torch.ones(1, 2, 3), torch.ones(2, 4), return_final_states=True)
    with pytest.raises(NotImplementedError, match="trains only"):
        causal_conv1d_varlen_states(torch.ones(3, 2), torch.tensor([0, 3]), 4)


def test_install_offers_what_megatron_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in mamba_standin.MODULES:
        monkeypatch.setitem(sys.modules, name, None)  # restored afterwards
    mamba_standin.install()
    import causal_conv1d
    import mamba_ssm
    from causal_conv1d.causal_conv1d_varlen import causal_conv1d_varlen_states as states
    from mamba_ssm.ops.triton.layernorm_gated import RMSNorm as norm_class
    from mamba_ssm.ops.triton.ssd_combined import mamba_split_conv1d_scan_combined as split

    assert (mamba_ssm.__version__, causal_conv1d.__version__) == ("2.3.2.post1", "1.7.0")
    assert (states, norm_class, split) == (causal_conv1d_varlen_states, RMSNorm, mamba_split_conv1d_scan_combined)
    assert causal_conv1d.causal_conv1d_update is None
    with pytest.raises(ImportError):
        import mamba_ssm.ops.triton.selective_state_update
