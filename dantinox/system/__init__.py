"""The operating system: files and memory."""
