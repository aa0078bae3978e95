"""What the expert FFN is measured against: torch's bf16 grouped_mm, given bias and ReLU."""
