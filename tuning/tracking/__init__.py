"""Track studies and trials as MLflow runs."""
