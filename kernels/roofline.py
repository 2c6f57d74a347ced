"""
Is the row kernel bound by memory or by arithmetic? On paper: its compiled instructions, counted.

    python -m kernels.roofline           # needs Triton, no GPU

The kernel is compiled for an H100 (sm_90) and taken apart by the tools that Triton brings along. In
its two loops over the vocabulary a thread handles BLOCK / (32 WARPS) words a round, so
instructions of a loop divided by that are instructions a word. Three limits of a streaming
multiprocessor (SM), in its clock cycles a word:

    issue       4 warps of 32 threads get an instruction each cycle: 128 a cycle
    special     exponentials and the like (MUFU): 16 a cycle
    memory      18 bytes a word (8 read by each loop, 2 written) at its share of 3.35 TB/s

The largest is what bounds the kernel, if nothing stalls. None of it has been timed on a GPU.
"""

import collections
import importlib
import os
import re
import subprocess
import tempfile

SMS, CLOCK, BANDWIDTH = 132, 1.755e9, 3.35e12           # of an H100 SXM; Hz, bytes a second
ISSUED, SPECIAL = 128, 16                               # a cycle and SM
BYTES = 18                                              # a word, with bf16 gradients


def compiled():
    """The machine code (SASS) of the kernel, as lines, and the words a thread handles a round."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    op = importlib.import_module("kernels.linear_kl")   # `kernels` exports a function of this name
    kernel = op._kl_kernel
    kinds = {"dz_ptr": "*bf16", "lam": "fp32", "inv_T": "fp32", "GRAD": "constexpr",
             "BLOCK": "constexpr"}
    names = kernel.arg_names
    signature = {
        name: kinds.get(name, "*fp32" if name.endswith("_ptr") else "i32") for name in names}
    aligned = [i for i, name in enumerate(names) if name.endswith("_ptr") or name in (
        "V", "z_stride")]
    source = ASTSource(
        fn=kernel, signature=signature,
        constexprs={(names.index("GRAD"),): True, (names.index("BLOCK"),): op.BLOCK},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned})
    built = triton.compile(
        source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=op.WARPS))
    tools = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [os.path.join(tools, "cuobjdump"), "-sass", file.name], capture_output=True, text=True,
            check=True, env=os.environ | {"PATH": f"{tools}:{os.environ['PATH']}"}).stdout
    return text.splitlines(), op.BLOCK // (32 * op.WARPS)


def loops(lines):
    """
    [Counter of instructions] of the loops: from the target of a branch backwards to the branch.
    """
    instruction = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)([^;]*)")
    code = []                                           # (address, name, operands)
    for line in lines:
        found = instruction.search(line)
        if found:
            code.append((int(found[1], 16), found[2], found[3]))
    bodies = []
    for address, name, operands in code:
        target = re.search(r"0x([0-9a-f]+)\s*$", operands)
        if name == "BRA" and target and int(target[1], 16) < address:
            inside = [other for at, other, _ in code if int(target[1], 16) <= at <= address]
            bodies.append(collections.Counter(inside))
    return bodies


def limits(bodies, words):
    """{limit: cycles a word} of the loops together, at `words` a thread and round."""
    issued = sum(sum(body.values()) for body in bodies) / words
    special = sum(body["MUFU"] for body in bodies) / words
    return {
        "issue": issued / ISSUED,
        "special": special / SPECIAL,
        "memory": BYTES / (BANDWIDTH / SMS / CLOCK)}


def main():
    lines, words = compiled()
    bodies = [body for body in loops(lines) if body["LDG"]]
    print(f"sm_90, {words} words a thread and round")
    print(f"{'loop':<10}{'instructions':>14}{'a word':>9}{'MUFU':>7}  most frequent, a word")
    for number, body in enumerate(bodies, 1):
        total = sum(body.values())
        often = ", ".join(f"{name} {count / words:.1f}" for name, count in body.most_common(6))
        print(f"{number:<10}{total:>14}{total / words:>9.1f}{body['MUFU'] / words:>7.2f}  {often}")
    found = limits(bodies, words)
    print("cycles of an SM a word: " + ", ".join(f"{name} {x:.2f}" for name, x in found.items()))
    bound = max(found, key=found.get)
    rest = max(x for name, x in found.items() if name != bound)
    milliseconds = 4096 * 151936 * found[bound] / SMS / CLOCK * 1e3
    print(f"bound by {bound}, {found[bound] / rest:.1f} times the next; 4,096 tokens of 151,936 "
          f"words take {milliseconds:.1f} ms")


if __name__ == "__main__":
    main()
