"""Measure block sizes and implementations on the device at hand."""
