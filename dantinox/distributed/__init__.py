"""Meshes of devices, what their devices exchange, and several processes."""
