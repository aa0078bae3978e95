"""The service: HTTP, Ray Serve, money. No tensors, no torch at import time."""
