"""Recipes, training data, the two stages and the run that holds them together."""
