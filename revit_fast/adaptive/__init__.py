"""How many tokens an image gets: the assigner, the policies, and the preprocessing that applies them."""
