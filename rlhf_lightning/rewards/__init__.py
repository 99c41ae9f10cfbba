"""Rewards: what a response is worth, as objects that YAML names."""
