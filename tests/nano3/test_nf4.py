"""NF4 against bitsandbytes, bit for bit; cutting after quantizing; what is refused."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from nano3.arch import Arch, resolve_model
from nano3.nf4 import BLOCK, CODE, NESTED, dynamic_code, nearest, nf4_code, quantize, values_by_bitsandbytes
from nano3.tensor_names import linears
from tests.helpers import bitsandbytes_cpu as bnb

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) + shape[0]))


def with_zeros() -> torch.Tensor:
    weight = normal(256, 256)
    weight[3] = 0
    weight[100:140] = 0
    return weight


def on_the_middles() -> torch.Tensor:
    """Every block holds 1 and all 15 middles between two neighbours of the code: ties."""
    code = nf4_code()
    return torch.cat([(code[:-1] + code[1:]) / 2, torch.ones(BLOCK - 15)]).repeat(64).view(64, 64)


CASES = {
    "normal": normal(256, 192) * 0.017,
    "more than one nested block, the last one short": normal(320, 128) * 0.05,
    "rows that are no multiple of 64": normal(128, 96) * 0.05,
    "rows of zeros": with_zeros(),
    "all zero": torch.zeros(64, 64),
    "constant": torch.full((64, 64), 0.1),
    "heavy tails": normal(512, 128) / normal(513, 128)[:512].abs().clamp(min=1e-3) * 0.01,
    "tiny": normal(64, 64) * 1e-30,
    "ties": on_the_middles(),
    "one block": normal(1, 64),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_codes_scales_offsets_and_values_are_those_of_bitsandbytes(name, dtype):
    weight = CASES[name].to(dtype)
    ours, theirs = bnb.ours(weight), bnb.theirs(weight)
    assert ours.keys() == theirs.keys()
    different = {key for key, value in theirs.items() if not torch.equal(ours[key].flatten(), value.flatten())}
    assert different == set()


def test_so_are_those_of_all_matrices_of_pico():
    folder = resolve_model("pico")
    tensors, arch = load_file(folder / "model.safetensors"), Arch.load(folder)
    names = {block.name for n in range(len(arch.layers)) for linear in linears(arch, n) for block in linear.blocks}
    assert len(names) == 3 * 2 + 2 * 4 + 4 * (2 + 16)  # Mamba, attention, and MoE layers of 8 experts
    for name in sorted(names):
        ours, theirs = bnb.ours(tensors[name]), bnb.theirs(tensors[name])
        assert all(torch.equal(ours[key].flatten(), value.flatten()) for key, value in theirs.items()), name


def test_by_hand():
    """Two blocks: 1 and 0s; 0.5, -0.25 and 0s. absmax 1 and 0.5, mean 0.75, differences ±0.25 of a scale of 0.25."""
    weight = torch.zeros(2, BLOCK)
    weight[0, 0], weight[1, 0], weight[1, 1] = 1, 0.5, -0.25
    nf4 = quantize(weight)
    assert nf4.packed[0].tolist() == [0xF7] + [0x77] * 31  # 15 is 1.0 and 7 is 0.0
    assert nf4.packed[1].tolist() == [0xF2] + [0x77] * 31  # -0.5 is nearest to -0.525, the third number
    assert (nf4.offset.item(), nf4.scale.tolist()) == (0.75, [0.25])
    # The code has 1.0, and no -1.0: its lowest number stands for it.
    lowest = dynamic_code()[0].item()
    assert nf4.scale8.tolist() == [[255], [0]]
    assert nf4.absmax().flatten().tolist() == pytest.approx([1, 0.75 + 0.25 * lowest])
    values = nf4.values(torch.float32)
    assert values[0].tolist() == [1] + [0] * 63
    assert values[1, :2].tolist() == pytest.approx([0.75 + 0.25 * lowest, CODE[2] * (0.75 + 0.25 * lowest)])


def test_scales_go_to_the_nearest_number_where_the_cpu_kernel_has_a_neighbour():
    """Ours are the nearest by exact arithmetic; those of the table are so in most cases, and else off by one."""
    values = normal(4 * NESTED)
    code, absmax = dynamic_code(), values.view(-1, NESTED).abs().amax(-1)
    scaled = (values.view(-1, NESTED) * (1 / absmax)[:, None]).view(-1)
    exact = (scaled.double()[:, None] - code.double()).abs().argmin(1)
    codes, found = nearest(values, code, NESTED)
    assert torch.equal(found, absmax)
    assert torch.equal(code[codes.int()], code[exact])
    table, _ = bnb.code_scales(values, code, NESTED)
    off = (table.int() - codes.int()).abs()
    assert 0 < (off > 0).sum() < 0.05 * len(values)
    assert off.max() == 1


def test_the_torch_way_of_a_gpu_has_the_same_codes():
    values = normal(1000)
    expected = nearest(values, nf4_code(), BLOCK)

    class Elsewhere(torch.Tensor):
        device = torch.device("cuda")

    codes, absmax = nearest(values.as_subclass(Elsewhere), nf4_code(), BLOCK)
    assert torch.equal(torch.Tensor(codes.float()), expected[0].float())
    assert torch.equal(torch.Tensor(absmax), expected[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_operator_of_a_gpu_has_the_same_values(dtype):
    nf4 = quantize(CASES["normal"])
    values = values_by_bitsandbytes(nf4.packed, nf4.absmax(), dtype)
    assert values.dtype == dtype
    assert torch.equal(values, nf4.values(dtype))


@pytest.mark.parametrize("rows", [slice(0, 320), slice(0, 100), slice(100, 101), slice(299, 320)], ids=str)
@pytest.mark.parametrize("columns", [slice(0, 192), slice(0, 96), slice(96, 192), slice(64, 128)], ids=str)
def test_a_part_has_the_values_of_the_whole(rows, columns):
    """96 is amid a block: both parts have it whole."""
    whole = quantize(normal(320, 192))
    part = whole.cut(rows.start, rows.stop - rows.start, columns)
    assert torch.equal(part.values(torch.float32), whole.values(torch.float32)[rows, columns])
    blocks = -(-columns.stop // BLOCK) - columns.start // BLOCK
    assert part.scale8.shape == (rows.stop - rows.start, blocks)


def test_rows_of_a_tensor_whose_blocks_cross_rows():
    whole = quantize(normal(128, 96))
    for start, count in ((0, 128), (0, 1), (1, 1), (5, 40)):
        part = whole.cut(start, count, slice(0, 96))
        assert torch.equal(part.values(torch.float32), whole.values(torch.float32)[start : start + count])
    with pytest.raises(ValueError, match="where a row is a multiple of 64, not 96"):
        whole.cut(0, 128, slice(0, 48))


def test_quantizing_a_part_gives_other_values():
    """Why tensors are quantized whole: the mean is over the tensor, and a part has another."""
    weight = normal(128, 192)
    part = quantize(weight).cut(0, 64, slice(0, 192)).values(torch.float32)
    assert not torch.equal(part, quantize(weight[:64]).values(torch.float32))


def test_a_cast_of_the_model_leaves_scales_as_they_are():
    nf4 = quantize(CASES["normal"])
    before = nf4.values(torch.float32)
    model = torch.nn.Sequential(nf4, torch.nn.Linear(2, 2)).bfloat16()
    assert model[1].weight.dtype == torch.bfloat16
    assert (nf4.scale.dtype, nf4.offset.dtype) == (torch.float32, torch.float32)
    assert torch.equal(nf4.values(torch.float32), before)


def test_bytes():
    """64 blocks of 64 values: 2048 bytes of codes, 64 of scales, one FP32 scale and the mean."""
    assert quantize(normal(64, 64)).nbytes == 2048 + 64 + 4 + 4
    meta = quantize(torch.empty(256, 192, device="meta"))
    assert (meta.nbytes, meta.packed.device.type) == (quantize(CASES["normal"]).nbytes, "meta")


def test_what_cannot_be_quantized():
    with pytest.raises(ValueError, match="100 values are no multiple of 64"):
        quantize(normal(10, 10))
    for value in (float("nan"), float("inf")):
        weight = normal(64, 64)
        weight[5, 5] = value
        with pytest.raises(ValueError, match="infinite or no numbers"):
            quantize(weight)
