"""Heads that torch trains by minibatches."""
