"""The demonstration corpus: multi-way parallel interface texts and CLDR phrases in sixteen languages."""
