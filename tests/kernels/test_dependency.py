"""What a kernel does before it waits for the kernels before it: read weights, ask for lines in L2, and write nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = r"""
import re, torch
from kernels.add_layernorm.jobs import add_layernorm_jobs
from kernels.compile_ahead import compile_kernel
from kernels.embed.jobs import embed_jobs
from kernels.encoder_attention.jobs import encoder_attention_jobs
from kernels.route.jobs import route_jobs
from kernels.route.tiles import GateTiles

bf16 = torch.bfloat16
jobs = [*add_layernorm_jobs(1000, 2, bf16), *route_jobs(1024, 32, 2, bf16, GateTiles(64, 64, 16)), *embed_jobs(64, bf16)]
jobs += encoder_attention_jobs(256, 4, bf16)
# loads that may come before the wait: weight and bias of a norm, the router's weights
early = {"add_layernorm_kernel", "add_layernorm_int8_kernel", "gate_kernel", "route_few_kernel", "finish_route_kernel"}
for job in jobs:
    ptx = re.sub(r"//.*", "", compile_kernel(job, 90).asm["ptx"])
    before, wait, after = ptx.partition("griddepcontrol.wait")
    assert wait and "griddepcontrol.launch_dependents" in after, f"{job[1]} does not wait, or never lets the next one start"
    assert not re.search(r"\b(st|red|atom)\.", before.replace("st.shared", "")), f"{job[1]} writes before it waits"
    assert job[1] in early or "ld.global" not in before, f"{job[1]} reads before it waits"
    if job[1] == "gate_kernel" or (job[1] == "add_layernorm_kernel" and job[3]["SLOTS"]):
        assert "prefetch" in before, f"{job[1]} does not ask for its inputs"
    if job[1] == "gate_kernel":
        assert ptx.count("griddepcontrol.wait") == 2, "one for each kind of program"
assert "griddepcontrol" not in compile_kernel(jobs[0], 80).asm["ptx"]
"""


ATTENTION = r"""
import re, torch
from kernels.compile_ahead import compile_kernel
from kernels.decode_attention.jobs import decode_attention_jobs, group_jobs

bf16 = torch.bfloat16


def before_waiting(ptx):  # what a thread may come to before it has waited: in a loop, its place in the text says nothing
    lines = [line.strip() for line in ptx.splitlines()]
    places = {line.rstrip(":"): number for number, line in enumerate(lines) if re.fullmatch(r"\$\w+:", line)}
    to_follow, reached = [0], set()
    while to_follow:
        at = to_follow.pop()
        while at < len(lines) and at not in reached and "griddepcontrol.wait" not in lines[at] and lines[at] != "ret;":
            reached.add(at)
            jump = re.search(r"\bbra(\.uni)?\s+(\$\w+);", lines[at])
            if jump:
                to_follow.append(places[jump[2]])
            at = len(lines) if jump and not lines[at].startswith("@") else at + 1
    return [lines[at] for at in sorted(reached)], [line for at, line in enumerate(lines) if at not in reached]


# with head_dim 64 cells are read 16 bytes at a time, and nothing but cells and queries is
for job in decode_attention_jobs(1024, 16, bf16) + group_jobs(1024, 16, bf16):
    name = f"{job[1]} AHEAD={job[3]['AHEAD']}"
    ptx = re.sub(r"//.*", "", compile_kernel(job, 90).asm["ptx"])
    before, *parts = ptx.split("griddepcontrol.wait")
    if not job[3]["AHEAD"]:
        assert len(parts) == 1 and "ld.global" not in before, f"{name} reads before it waits"
        assert "launch_dependents" not in before and "launch_dependents" in parts[0], f"{name} lets the next one start"
        continue
    assert "launch_dependents" in before, f"{name}: the next kernel may not start before the wait"
    if job[1] in ("self_list_kernel", "cross_group_kernel"):
        early, late = before_waiting(ptx)
        assert len(parts) == 1, f"{name} waits {len(parts)} times"
        assert not any("st.global" in line for line in early), f"{name} writes before it waits"
        for lines in (early, late):
            assert any("ld.global.v4" in line for line in lines), f"{name} reads nothing ahead, or not its queries after"
        continue
    assert not re.search(r"\bst\.global", "".join((before, *parts[:-1]))), f"{name} writes before it waits"
    ahead, after = (before, *parts)[-2:]
    assert "ld.global.v4" in ahead and "ld.global.v4" in after, f"{name} reads nothing ahead, or not its queries after"
    if job[1] == "decode_self_attention_kernel":
        assert len(parts) == 2 and "ld.global.v4" not in before, f"{name} reads cells before it knows of a start token"
        guard = before.split(";")[-2]
        assert re.search(r"@%p\d+ bra", guard), f"{name}: all entries wait, not only those behind a start token: {guard}"
    else:
        assert len(parts) == 1, f"{name} waits {len(parts)} times"
"""


@pytest.mark.parametrize("code", [CODE, ATTENTION], ids=["weights_alone_come_early", "attention_reads_ahead"])
def test_kernels_wait_before_they_read_inputs_or_write(code: str) -> None:
    """In a process of its own: here triton.jit means the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
