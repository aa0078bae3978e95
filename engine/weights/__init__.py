"""Checkpoint streaming, name mapping, loading, conversion, inspection."""
