"""What a character costs and how many replicas that takes: prices, profiles, demand, queueing, plans and their proof by
replay.

Torch-free, Ray-free, HTTP-free: numpy and the standard library, highspy only where a plan is solved exactly.
"""
