"""When the CPU backend is on, what it says, and that it never switches itself on where it must not."""

import os
import subprocess
import sys

PRELUDE = "import sys; from nano3 import cpu; "


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    env = {key: value for key, value in os.environ.items() if key != "NANO3_CPU"} | environment
    return subprocess.run([sys.executable, "-c", PRELUDE + code], capture_output=True, text=True, env=env, check=False)


def test_forbidden_it_leaves_everything_alone():
    done = python("assert not cpu.enable(); assert 'transformer_engine' not in sys.modules", NANO3_CPU="0")
    assert done.returncode == 0, done.stderr
    assert "CPU backend" not in done.stderr


def test_a_cuda_device_keeps_it_off_and_asking_for_it_turns_it_on():
    code = "import torch; torch.cuda.is_available = lambda: True; print(cpu.wanted())"
    assert python(code).stdout == "False\n"
    assert python(code, NANO3_CPU="1").stdout == "True\n"


def test_it_comes_too_late_after_megatron():
    done = python("import types; sys.modules['megatron.core'] = types.ModuleType('x'); cpu.enable()")
    assert "must run before megatron" in done.stderr


def test_one_line_cuda_requests_and_one_random_generator():
    code = """
cpu.enable(); cpu.enable()
import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, model_parallel_cuda_manual_seed
from nano3.cpu.cuda import redirected_to
assert torch.zeros(2, device="cuda").device.type == "cpu"
assert torch.ones(1).to(0).device.type == torch.ones(1).to(device="cuda:0").device.type == "cpu"
assert torch.ones(2).new_zeros(3, device=torch.device("cuda")).shape == (3,)
with redirected_to("meta"):
    assert torch.empty(5, device=torch.cuda.current_device()).device.type == "meta"
torch.manual_seed(1)
tracker = get_cuda_rng_tracker()
tracker.add("model-parallel-rng", 7)
def draw():
    with tracker.fork():
        return torch.rand(3, device="cuda")
expected = torch.rand(2, generator=torch.Generator().manual_seed(1))
inside = draw()
assert torch.equal(torch.rand(2), expected), "a fork leaves the outer generator where it was"
assert torch.equal(inside, torch.rand(3, generator=torch.Generator().manual_seed(7))), "a fork draws from its own seed"
assert not torch.equal(draw(), inside), "a fork goes on where the last one stopped"
"""
    done = python(f"exec({code!r})")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.count("CPU backend: ") == 1


def test_features_that_the_stand_ins_lack_are_refused():
    code = """
from nano3.cpu.te.attention import DotProductAttention
from nano3.cpu.te.linear import LayerNormLinear
for make, word in (
    (lambda: DotProductAttention(4, 8, attention_dropout=0.1), "attention_dropout"),
    (lambda: LayerNormLinear(8, 8, normalization="LayerNorm", device="cpu"), "LayerNorm"),
):
    try:
        make()
    except NotImplementedError as error:
        assert word in str(error), error
    else:
        raise AssertionError(word)
"""
    done = python(f"exec({code!r})")
    assert done.returncode == 0, done.stderr[-2000:]
