"""WHAT to do: the recipe, what its model and data really are, and the plan compiled from both."""
