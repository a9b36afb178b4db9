"""Recipes, training data, the stages and the run that holds them together."""
