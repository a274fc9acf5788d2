"""What a mesh of devices costs: memory and exchanged bytes of compiled training steps."""
