"""Decode attention in Pallas, in a form that a CPU interprets fast."""
