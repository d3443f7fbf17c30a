"""Races against other ways to compute the same thing; see run.py for the command."""
