"""The expert FFN for many tokens on Hopper: asynchronous tensor-core instructions in an explicit schedule (Gluon)."""
