"""Machines: Ray actors, collectives, sharded experts, checkpoints."""
