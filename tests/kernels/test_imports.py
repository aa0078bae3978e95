import ast
import subprocess
import sys
from pathlib import Path

import pytest

import kernels

ROOT = Path(kernels.__path__[0])
OPS = sorted(p.parent.name for p in ROOT.glob("*/launcher.py"))


def imported(path: Path) -> set[str]:
    """Every module a file names in an import, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module or ""}
    return names


@pytest.mark.parametrize("op", OPS)
def test_an_op_has_its_three_rooms_and_imports_no_other_op(op: str) -> None:
    rooms = {"launcher.py", "kernel.py"} | ({"reference.py"} if op != "step_clock" else set())  # a clock has no slow twin
    assert rooms <= {p.name for p in (ROOT / op).glob("*.py")}
    others = tuple(f"kernels.{other}" for other in OPS if other != op)
    assert not [name for path in (ROOT / op).glob("*.py") for name in imported(path) if name.startswith(others)]


def test_references_and_launchers_load_and_run_where_triton_is_missing() -> None:
    code = """
import sys
sys.modules["triton"] = None  # any import of it now fails
import torch
from kernels.add_layernorm import add_layernorm_reference
from kernels.expert_gemm import expert_ffn_reference, pack
from kernels.route import route_reference
x, router = torch.randn(5, 64), torch.randn(3, 64)
routing = route_reference(x, router, top_k=2, block_tokens=16)
w = pack(torch.randint(-8, 8, (3, 64, 64), dtype=torch.int8), torch.ones(3, 64), 4)
out = expert_ffn_reference(x, w, torch.zeros(3, 64), w, torch.zeros(3, 64), routing)
add_layernorm_reference(x, out, torch.ones(64), torch.zeros(64), expert_ids=routing.expert_ids)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
