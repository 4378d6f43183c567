"""Logistic regression, solved to a given optimality gap."""
