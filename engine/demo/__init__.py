"""The demonstration model: its corpus, its trainer, its evaluation and the small checkpoint that ships."""
