"""What may be asked for: frozen, closed schemas and recipes. Imports neither torch nor ray."""
