"""The paper's Table 4 again, with what it leaves out said: instances per machine, one unit on both sides, utilisation.

The printed "monthly USD per token" is USD per month of a machine over its words per second. All arithmetic is here, so
that each assumption can be changed and its effect seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources

import yaml

from app.cost.hardware import usd_per_million_chars


@dataclass(frozen=True, slots=True)
class PaperRow:
    """One row as printed, and the instances per machine that its figure implies."""

    name: str
    hardware: str
    params_billion: float
    batch: int
    usd_per_month: float
    latency_ms: float
    words_per_s: float
    instances: int
    printed: float

    def usd_per_month_per_word_per_s(self, instances: int | None = None, unit: float = 1.0) -> float:
        """The table's unit. `unit` divides the throughput: 1.25 when it counts tokens and words are wanted."""
        return self.usd_per_month / (self.words_per_s / unit * (self.instances if instances is None else instances))

    @property
    def words_per_sentence(self) -> float:
        """Throughput x latency / batch: the two sides of the table disagree on it."""
        return self.words_per_s * self.latency_ms / 1000 / self.batch


@dataclass(frozen=True, slots=True)
class PaperTable:
    """All rows and the constants of the recalculation."""

    rows: tuple[PaperRow, ...]
    hours_per_month: float
    tokens_per_word: float
    chars_per_word: float

    def row(self, name: str) -> PaperRow:
        """A row by its name."""
        return next(row for row in self.rows if row.name == name)

    def saving(self, gpu: str, cpu: str = "CPU student", gpu_unit: float = 1.0, instances: int | None = None) -> float:
        """Share of the CPU row's cost that the GPU row saves; negative when it costs more."""
        ours = self.row(gpu).usd_per_month_per_word_per_s(unit=gpu_unit)
        return 1.0 - ours / self.row(cpu).usd_per_month_per_word_per_s(instances)


def paper_table() -> PaperTable:
    """The table that ships."""
    raw = yaml.safe_load((resources.files("app.cost") / "data" / "paper_table4.yaml").read_text())
    rows = tuple(PaperRow(**row) for row in raw["rows"])
    return PaperTable(rows, raw["hours_per_month"], raw["tokens_per_word"], raw["chars_per_word"])


def paper_report() -> str:
    """Table 4 redone, for a terminal."""
    table = paper_table()
    lines = [
        f"{'row':<12} {'hardware':<13} {'USD/month':>9} {'words/s':>8} {'inst.':>5} {'printed':>8}"
        f" {'redone':>8} {'words/sent.':>11}"
    ]
    lines += [
        f"{row.name:<12} {row.hardware:<13} {row.usd_per_month:>9.2f} {row.words_per_s:>8.0f} {row.instances:>5}"
        f" {row.printed:>8.3f}"
        f" {row.usd_per_month_per_word_per_s():>8.3f} {row.words_per_sentence:>11.1f}"
        for row in table.rows
    ]
    tokens = table.tokens_per_word
    corrected = [table.saving(name, gpu_unit=tokens) for name in ("T4 MoE b64", "T4 MoE b20")]
    student_one = table.row("CPU student").usd_per_month_per_word_per_s(instances=1)
    lines += [
        "",
        "Unit: USD per month of a machine over its words per second, at 100 % utilisation.",
        f"Saving of the T4 over CPU students, as printed (batch 64, 824 ms)      {table.saving('T4 MoE b64'):>7.1%}",
        f"  at batch 20 and 421 ms                                                {table.saving('T4 MoE b20'):>7.1%}",
        f"  batch 64, if its words are tokens ({tokens:g} per word)                 {corrected[0]:>7.1%}",
        f"  batch 20, likewise                                                    {corrected[1]:>7.1%}",
        f"The student's printed 0.209 needs 8 instances per 16-vCPU machine; one instance costs {student_one:.3f}.",
        "The two sides imply different sentences (33 against 26-28 words), so they do not count the same thing.",
        "",
        f"USD per million characters at {table.chars_per_word:g} characters a word, 100 % utilisation:",
    ]
    for row in table.rows:
        chars_per_s = row.words_per_s * row.instances * table.chars_per_word
        lines.append(
            f"  {row.name:<12} {usd_per_million_chars(row.usd_per_month / table.hours_per_month, chars_per_s):>8.4f}"
        )
    return "\n".join(lines)
