"""Load tests: a stranger to our code, it speaks HTTP only. `python -m loadtest --help` teaches the command."""
