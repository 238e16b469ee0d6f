"""Regularisers: terms that the trainer adds to the loss of any algorithm."""
