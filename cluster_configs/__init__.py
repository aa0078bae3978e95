"""Deployment files; see README.md."""
