"""The settings of a training, typed, and the recipes of the package."""
