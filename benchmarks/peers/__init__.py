"""Competitors, each as fast as we could make it."""
