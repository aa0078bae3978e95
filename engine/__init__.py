"""The model at work: weights, search, scheduling and the Translator. No HTTP, no Ray, no prices."""
