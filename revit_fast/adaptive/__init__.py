"""How many tokens an image gets: the assigner, policies, and preprocessing by them."""
