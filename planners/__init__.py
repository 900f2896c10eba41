"""Experiment planners."""
