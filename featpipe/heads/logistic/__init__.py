"""Softmax regression, solved to the optimum."""
