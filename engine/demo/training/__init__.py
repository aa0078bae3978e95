"""Trains the demonstration model from the built corpus: batches made on the device, one captured step, a resumable loop."""
