"""Randomized SVD of stacked adapters: batched, streamed, factored, with an error certificate."""
