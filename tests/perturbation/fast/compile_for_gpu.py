"""Compiles all launches of the GPU path for an H100, and prints each kernel and the most local memory that it uses."""

from collections import defaultdict

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from mp_lightning.perturbation import initial_phi
from mp_lightning.perturbation.fast import Call, Numbers, gpu
from mp_lightning.perturbation.mathematics import Moments

TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float64: "*fp64",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}
local = defaultdict(int)


def scalar(value):
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def launch(kernel, grid):
    """Stands in for ``kernel[grid]``: types and specialization as a launch would choose them, then the compiler."""

    def compile_(*arguments, **options):
        given = dict(zip(kernel.arg_names, arguments, strict=False)) | options
        signature, constants, attributes = {}, {}, {}
        for index, parameter in enumerate(kernel.params):
            value = given[parameter.name]
            special = not parameter.do_not_specialize
            if parameter.is_constexpr or (special and not isinstance(value, torch.Tensor) and value == 1):
                signature[parameter.name], constants[(index,)] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[parameter.name], attributes[(index,)] = TYPES[value.dtype], [["tt.divisibility", 16]]
            else:
                signature[parameter.name] = scalar(value)
                if special and isinstance(value, int) and value % 16 == 0:
                    attributes[(index,)] = [["tt.divisibility", 16]]
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
        assembly = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
        local[kernel.__name__] = max(local[kernel.__name__], assembly.count(".local"))

    return compile_


JITFunction.__getitem__ = launch
SETTINGS = [
    ((128, 64, 56, 56), torch.bfloat16, torch.channels_last, True, True, False, True),
    ((128, 16, 32, 32), torch.float32, torch.contiguous_format, True, True, True, False),
    ((128, 16, 32, 32), torch.float32, torch.contiguous_format, True, True, True, True),
    ((1, 1, 7, 1), torch.float16, torch.contiguous_format, True, True, True, False),
    ((4, 512, 7, 7), torch.float32, torch.channels_last, False, False, True, False),
]
for shape, dtype, memory_format, training, sampled, needs_phi, per_channel in SETTINGS:
    x = torch.empty(shape, dtype=dtype).to(memory_format=memory_format)
    phi, moments = initial_phi(0), Moments(torch.zeros(shape[1], 4), torch.ones(shape[1], 4))
    numbers = Numbers(torch.ones(()), torch.tensor(32.0), torch.tensor(3))
    call = Call(64.0, float("inf"), (5, (1 << 31) + 7, 0, 1), training, sampled, False, per_channel)
    out = gpu.forward(x, phi, moments, numbers, None, call)
    gpu.backward(x, x, phi, out, None, call, True, needs_phi)
    gpu.record(*moments, *moments, 0.1)
for name, count in sorted(local.items()):
    print(f"{name} local={count}")
