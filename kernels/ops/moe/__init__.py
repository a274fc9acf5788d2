"""A dropless mixture of SwiGLU experts."""
