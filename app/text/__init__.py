"""Text in, text out: languages and line structure. No HTTP, no torch."""
