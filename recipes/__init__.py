"""Say what to do: the recipe, what planning finds, and the plan made of both."""
