"""Runs as MLflow shows them. The only folder that knows MLflow."""
