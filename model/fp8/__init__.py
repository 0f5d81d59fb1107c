"""FP8 training: matrix products of 8-bit numbers. Start reading here.

Why 8 bits. Tensor cores that have them multiply 8-bit numbers twice as fast as 16-bit ones, and
what is saved for the backward pass takes half the memory. The cost is precision, and the rest of
this package exists to spend it where it does no harm. It follows DeepSeek-V3's report (arXiv
2412.19437, section 3.3); V4's FP4 weights follow arXiv 2606.19348.

The number format. E4M3 has a sign, 4 bits of exponent and 3 of mantissa. Its largest value is 448.
Above 2^-6 a value is rounded by at most a sixteenth of itself; below, steps stay at 2^-9 and small
values lose bits until they become zero. `format.py` has it and the other formats as casts.

Scales. Few tensors fit into that range as they are. A quantised tensor is therefore two tensors: q
in E4M3 and a float32 scale s, with x = q * s up to rounding. The scale is amax / 448, where amax is
the largest magnitude among the values that share it, taken from these values themselves and not
guessed from earlier steps. So nothing is ever too large, and only what is small beside amax
suffers: below amax / 28,672 a value loses bits, below about amax / 460,000 it becomes zero.

Tiles. With one scale for a whole tensor, one outlier would do that to everything else. So few
values share a scale. Activations and their gradients use tiles of 1 x 128, one token and 128
channels, since outliers sit in single tokens and channels. Weights are tamer and use blocks of
128 x 128. A tile must be long in the dim that a product contracts: a scale can be taken out of a
sum only if the whole sum shares it,

    sum over k of (a_k s) (b_k t)  =  s t * (sum over k of a_k b_k)    for 128 values of k.

`quantized.py` has tensors with tiles, `reference.py` defines what quantising them means.

Three products. A Linear y = x W^T of T tokens, I inputs and O outputs makes one product forward and
two backward, and each contracts another dim:

    fprop   y  [T, O] = x  [T, I] W [O, I]^T    contracts I:  x  by 1 x 128,   W by 128 x 128
    dgrad   dx [T, I] = dy [T, O] W [O, I]      contracts O:  dy by 1 x 128,   W by 128 x 128
    wgrad   dW [O, I] = dy [T, O]^T x [T, I]    contracts T:  dy by 128 x 1,   x by 128 x 1

W's blocks are square, so one cast serves fprop and dgrad. For wgrad the tiles have to run along the
tokens. dy is quantised a second time, from the original. x is not there any more in full precision:
it was saved quantised by 1 x 128, and is dequantised and quantised again by 128 x 1. `products.py`
has the three products, `linear.py` the Linear made of them.

Sums. The tensor cores of Hopper keep about 14 bits of a sum of FP8 products. Over a few thousand
products that alone is an error of up to 2 %. So a sum leaves the tensor cores every 128 products,
is multiplied by the two scales, and is added up in float32: the length of a tile is also how often
that happens. Blocks of 128 x 128 for dy would be cheaper, and made a model of the report's diverge
(appendix B.2): dgrad is the product that coarse scales hurt.

What is saved for the backward pass.

    input of a Linear                      E4M3, 1 x 128       8 bits a value
    input of the Linear after attention    E5M6, 1 x 128      12 bits, scales powers of two
    weight                                 E4M3, 128 x 128     8 bits
    gate's and up's outputs in SwiGLU      E4M3, 1 x 128       8 bits; the activation is made again

and scales beside them, 32 bits for each tile. E5M6 has three bits of mantissa more: that input is
sensitive to rounding. Its scales are powers of two so that they round nothing themselves.

Other formats. UE8M0 is a scale that is a power of two, as its exponent alone, 8 bits: checkpoints
from V3.1 on have such scales. E2M1 is FP4: V4 serves its experts' weights in it, and `fp4.py` lets
a model train for that.

What stays in high precision: the weights that the optimiser steps, all gradients of weights, and
every part of the model that is small or sensitive, as norms, gate and output head. `scheme.py` says
which part is what, from `configs.train.Fp8Config`.

Who computes. `backends.py` chooses among four implementations of the same numbers. They quantise to
the same bits, and their products differ in the order of additions and, on GPUs, in what the tensor
cores keep. `reference.py` is slow and defines them; `cpu.py` with `cpu.c` computes them on CPUs,
which have no FP8, as float32 products of FP8 values; `cublas.py` and `triton.py` are for GPUs.

Read on in this order: `format.py`, `quantized.py`, `reference.py`, `products.py`, `linear.py`,
`scheme.py`, `backends.py`; then `experts.py` (SwiGLU of many experts) and `grouped.py`; then a
backend, `cpu.py` first. `recorder.py` and `drift.py` count what FP8 does to a training, and warn.
"""
