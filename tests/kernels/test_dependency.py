"""What a kernel does before it waits for the kernels before it: read weights, ask for lines in L2, and write nothing."""

import os
import subprocess
import sys
from pathlib import Path

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
# loads that may come before the wait: weight and bias of the norm, the router's weights
early = {"add_layernorm_kernel", "gate_kernel", "route_few_kernel"}
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


def test_kernels_wait_before_they_read_inputs_or_write() -> None:
    """In a process of its own: here triton.jit means the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", CODE], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
