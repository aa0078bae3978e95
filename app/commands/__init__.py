"""Subcommands of `babelephant`, one file each; app.cli says what such a file holds."""
