"""Subcommands of `python -m loadtest`: parse, call, print."""
