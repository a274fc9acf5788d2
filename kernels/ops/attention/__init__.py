"""Sliding-window gated grouped-query attention."""
