"""Compiles the paged Triton kernels for Hopper, which needs no GPU, and says what they use."""

import warnings

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_triton

from pallas_kernels.paged_attention.gpu import full, sparse

HALVES = ("q", "k", "v", "k_ring", "v_ring", "gate_sparse", "gate_local", "out")
INTEGERS = ("table", "length", "layer", "ring_layer", "index")
FLOATS = ("acc", "ml", "max", "sink_sparse", "sink_local")
POINTERS = {f"{name}_ptr": kind for names, kind in
            ((HALVES, "*bf16"), (INTEGERS, "*i32"), (FLOATS, "*fp32")) for name in names}


def compiled(kernel, options, **constants):
  """Prints what the kernel's PTX uses."""
  constants = {name: constants[name] for name in kernel.arg_names if name in constants}
  names = kernel.arg_names
  source = ASTSource(
    fn=kernel, constexprs=constants,
    signature={n: "constexpr" if n in constants else POINTERS[n] for n in names},
    attrs={(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in POINTERS})
  ptx = compile_triton(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
  used = "tensor cores, copies of 16 bytes" if "mma.sync" in ptx and "cp.async.cg" in ptx else ""
  print(kernel.fn.__name__, used)


def main():
  """Compiles every kernel at the sizes of two models."""
  for group, head_dim in ((16, 128), (4, 64)):
    sizes = dict(B=3, ROWS=4, K=2, G=group, M=16, H=head_dim, E=head_dim, U=100, R=400, SCALE=0.1,
                 PROGRAMS=264, P=16, PICKS=16)
    compiled(full.attend_kernel, dict(num_warps=4, num_stages=4), SELECT=True, **sizes)
    compiled(full.finish_kernel, dict(num_warps=8), COLUMNS=128, SLOTS=64, **sizes)
    splits, gate_local = (6, 1) if group == 4 else (1, head_dim)
    sizes |= dict(W=128, TILES=4, LOCAL=1, SPLITS=splits, SLOTS=8, SINKS_SPARSE=True,
                  SINKS_LOCAL=False, GATE_SPARSE=head_dim, GATE_LOCAL=gate_local)
    compiled(sparse.attend_kernel, dict(num_warps=4, num_stages=4), **sizes)
    if splits > 1:
      compiled(sparse.merge_kernel, dict(num_warps=4), **sizes)


if __name__ == "__main__":
  warnings.simplefilter("ignore")
  main()
