"""Downstream tasks: their data, fine-tuning and scores."""
