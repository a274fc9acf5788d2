"""The terminal table of one target, and the tables of profiles/aot/README.md."""
