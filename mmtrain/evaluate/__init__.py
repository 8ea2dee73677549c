"""Measuring a trained model: what it drew and what it wrote, against the truth."""
