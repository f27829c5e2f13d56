"""How many nodes are worth their place in a pass, and how deep to draft: numbers in, numbers out. numpy only."""
