"""The command line of kernels.checks, and its small cases in the interpreter."""

from __future__ import annotations

import pytest
import torch

from kernels import checks
from kernels.compile_ahead import Job
from kernels.small_checks import small_failures, small_jobs


def test_small_cases_pass_in_the_interpreter(cpu: torch.device) -> None:
    assert list(small_failures(cpu, torch.float16)) == []


@pytest.mark.parametrize(
    ("arguments", "pools"),
    [(["--small"], 1), (["--small", "--no-compile-ahead"], 0), (["--small", "--dtype", "fp16"], 1)],
)
def test_arguments_choose_cases_and_the_pool(
    arguments: list[str], pools: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[list[Job]] = []
    ran: list[torch.dtype] = []

    def compile_ahead(jobs: list[Job], capability: int) -> list[object]:
        started.append(jobs)
        return []

    def run(_device: torch.device, dtype: torch.dtype) -> list[str]:
        ran.append(dtype)
        return [f"route {dtype}: off"] if dtype == torch.float16 else []

    monkeypatch.setattr(checks, "compile_ahead", compile_ahead)
    monkeypatch.setattr("kernels.small_checks.small_failures", run)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert checks.main(arguments) == 1
    only_fp16 = "fp16" in arguments
    assert ran == ([torch.float16] if only_fp16 else [torch.bfloat16, torch.float16])
    assert len(started) == pools
    if started:
        assert [job[1] for job in started[0]] == [job[1] for job in small_jobs(tuple(ran))]
    assert "FAILED route torch.float16: off\nchecks: 1 failed" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--tiny"], ["--dtype", "fp32"]])
def test_unknown_arguments_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        checks.main(arguments)
    assert stopped.value.code == 2
    assert arguments[-1] in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_small_cases_pass_on_the_gpu(dtype: torch.dtype, cuda: torch.device) -> None:
    assert list(small_failures(cuda, dtype)) == []
