"""The network: transformer, attention, mixture of experts, and its slow twin `reference`."""
