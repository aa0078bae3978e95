"""Tests of checkpoint loading and conversion."""
