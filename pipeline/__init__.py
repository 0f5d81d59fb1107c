"""Plans, stores, runs, tracks and composes the stages; the command line."""
