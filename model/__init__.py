"""Mathematics on one device: no ray, no mlflow, no process groups."""
